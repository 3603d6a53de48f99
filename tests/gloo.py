"""What each process of a distributed test does; imports little, since every process imports it."""

import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmcompress.backends.optim.allreduce import flag_comm_hook, robust_allreduce_
from llmcompress.backends.optim.flag_aggregator import FlagAggregator
from llmcompress.errors import InputError

PROCESSES = 5


def run(work: Callable[[int, int, str], None], count: int, folder: Path) -> list[Any]:
    """What each of `count` processes of work(rank, port, folder) has saved as folder/RANK.pt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, str(folder)), count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


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


TRAINERS, BAD = 3, 1  # processes that train together, and the one that lies
FAULTS = {"reversed": -10.0, "nan": math.nan, "none": 1.0}


def fine_tune(rank, port, folder):
    """Six steps of the transformers Trainer, each of its processes a worker, with the aggregator and with the mean."""
    import llmcompress
    from llmcompress.calibration.text import generate_text
    from llmcompress.finetune.train import train
    from llmcompress.finetune.trainer import FinetuneTrainer
    from llmcompress.recipe import Finetune
    from tests.tiny import tiny_model

    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": TRAINERS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    tokens = generate_text(tiny_model, 1, 48, 16, seed=0)
    standings = []

    class Spoilt(FinetuneTrainer):
        factor = 1.0

        def compute_loss(self, model, inputs, return_outputs=False, **rest):
            found = super().compute_loss(model, inputs, return_outputs, **rest)
            return found * self.factor if model.training and not return_outputs else found

        def training_step(self, *args, **kwargs):
            found = super().training_step(*args, **kwargs)
            standings.append(self.rule.values_.tolist() if self.rule else None)
            return found

    llmcompress.finetune.train.FinetuneTrainer = Spoilt
    found = {}
    for fault, factor in FAULTS.items():
        for rule in ("flag", None):
            if (fault, rule) == ("nan", None):
                continue
            Spoilt.factor = factor if rank == BAD else 1.0
            model = tiny_model()
            llmcompress.compress(model, tokens=tokens, ratio=0.3)
            section = Finetune(
                steps=6, lr=3e-4, length=16, batch=4, validation=8, evaluate_every=2, aggregator=rule
            )  # fmt: skip
            run = train(model, tokens, section, Path(folder) / f"{fault}-{rule}", teacher=tiny_model())
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            found[fault, rule] = (run.validation_before, run.validation_after, weights, standings[:])
            standings.clear()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
