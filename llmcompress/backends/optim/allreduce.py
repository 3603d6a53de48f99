"""A robust aggregate of the gradients of several processes, or of micro-batches, in place of their mean."""

# annotations are evaluated here: DistributedDataParallel looks at those of its hook

import zlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmcompress.backends.optim.flag_aggregator import FlagAggregator, combine, gram
from llmcompress.backends.ports import Aggregator
from llmcompress.errors import InputError


def robust_allreduce_(model: nn.Module, aggregator: Aggregator, group: dist.ProcessGroup | None = None) -> list[float]:
    """Replaces the gradients of every process by one aggregate of all of them, the same everywhere.

    Each process has run its backward without an averaging of gradients (DistributedDataParallel: under `no_sync()`).
    Every process gets a part of all gradients, adds to the Gram, and combines its part: traffic of about 2 n a process,
    as an all-reduce. Returns each process's standing, near 0 for a bad one. InputError on every process if there is no
    process group, or parameters or gradients differ.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError("there is no process group: start the processes by torchrun or accelerate launch")
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    parameters = [p for p in model.parameters() if p.requires_grad]
    _agree(parameters, count, group)
    trained = [p for p in parameters if p.grad is not None]
    flat = flat_gradient(trained)
    size = -(-len(flat) // count)
    parts = torch.nn.functional.pad(flat, (0, count * size - len(flat))).view(count, size)
    own = _exchange(parts, count, rank, group)
    K = gram(own)
    dist.all_reduce(K, group=group)
    s = aggregator.coefficients(K.cpu()).to(flat.device)
    merged = flat.new_empty(count * size)
    dist.all_gather_into_tensor(merged, combine(s, own), group=group)
    put_gradient(merged[: len(flat)], trained)
    return aggregator.values_.tolist()


def _agree(parameters: list[nn.Parameter], count: int, group: dist.ProcessGroup | None) -> None:
    """InputError on every process unless all have gradients of the same parameters, of the same shapes."""
    layout = repr([(tuple(p.shape), p.grad is not None) for p in parameters])
    sizes = sum(p.numel() for p in parameters if p.grad is not None)
    device = parameters[0].device if parameters else "cpu"
    own = torch.tensor([sizes, zlib.crc32(layout.encode())], device=device)
    all_of_them = own.new_empty(count * 2)
    dist.all_gather_into_tensor(all_of_them, own, group=group)
    found = all_of_them.view(count, 2)
    if (found != found[0]).any():
        lengths = found[:, 0].tolist()
        raise InputError(f"the processes have gradients of different parameters: {lengths} values by rank")
    if not sizes:
        raise InputError("no parameter has a gradient")


def _exchange(parts: Tensor, count: int, rank: int, group: dist.ProcessGroup | None) -> Tensor:
    """Part `rank` of every process, (count, size)."""
    own = torch.empty_like(parts)
    if dist.get_backend(group) == "nccl":
        dist.all_to_all_single(own, parts.contiguous(), group=group)
        return own
    for k in range(count):
        receives = list(own.unbind()) if k == rank else None
        dist.gather(
            parts[k].contiguous(), receives, dst=k if group is None else dist.get_global_rank(group, k), group=group
        )
    return own


def flag_comm_hook(state: FlagAggregator, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """For `DistributedDataParallel.register_comm_hook(FlagAggregator(), flag_comm_hook)`: each bucket for itself.

    With several buckets this is another, blockwise aggregator, whose subspace differs from bucket to bucket; for the
    global one see `robust_allreduce_`. Traffic p n. values_ are those of the last bucket.
    """
    buffer, count = bucket.buffer(), dist.get_world_size()
    gathered = buffer.new_empty(count * buffer.numel())
    future = dist.all_gather_into_tensor(gathered, buffer, async_op=True).get_future()
    return future.then(lambda _: state(gathered.view(count, -1)))


def aggregate_microbatches(model: nn.Module, losses: Iterable[Tensor], aggregator: Aggregator) -> list[float]:
    """Sets the gradients to an aggregate of those of one process's losses, as if of workers; their standings."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]) for loss in losses]
    put_gradient(aggregator.aggregate(torch.stack(rows)), trained)
    return aggregator.values_.tolist()


def flat_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The gradients as one vector, zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def put_gradient(flat: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """The inverse of `flat_gradient`."""
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p).clone()
