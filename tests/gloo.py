"""What each process of a distributed test does; imports little, since every process imports it."""

import math
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmcompress.backends.optim.allreduce import flag_comm_hook, robust_allreduce_
from llmcompress.backends.optim.flag_aggregator import FlagAggregator
from llmcompress.errors import InputError

PROCESSES = 5


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))


def _rank_data(rank):
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(100 + rank))
    return x, (x[:, 0] > 0).long()


def local_gradient(rank, liar=None):
    model = _network()
    x, y = _rank_data(rank)
    loss = nn.functional.cross_entropy(model(x), y)
    (loss * (-100 if rank == liar else 1)).backward()
    return model, torch.cat([p.grad.flatten() for p in model.parameters()])


def process(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    found = {}
    # one gradient of all parameters, one process not finite
    model, _ = local_gradient(rank)
    if rank == 1:
        next(model.parameters()).grad.fill_(math.nan)
    found["values"] = robust_allreduce_(model, FlagAggregator())
    found["sharded"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    # three of them alone
    group = dist.new_group([0, 2, 4])
    if rank in (0, 2, 4):
        model, _ = local_gradient(rank)
        robust_allreduce_(model, FlagAggregator(), group)
        found["three"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    # the hook, one liar
    network = _network()
    wrapped = DistributedDataParallel(network)
    wrapped.register_comm_hook(FlagAggregator(), flag_comm_hook)
    x, y = _rank_data(rank)
    loss = nn.functional.cross_entropy(wrapped(x), y)
    (loss * (-100 if rank == 3 else 1)).backward()
    found["hook"] = torch.cat([p.grad.flatten() for p in network.parameters()])
    # one process lacks a gradient, or has another model: all of them are told
    for what in ("lacks", "another"):
        model, _ = local_gradient(rank)
        if rank == 2 and what == "lacks":
            model[2].bias.grad = None
        if rank == 2 and what == "another":
            model = nn.Linear(3, 2)
            model(torch.ones(1, 3)).sum().backward()
        try:
            robust_allreduce_(model, FlagAggregator())
        except InputError as error:
            found[what] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
