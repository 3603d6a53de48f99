"""Time of each group of layers, dense and compressed in turn, beside what the bytes of their weights allow."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from llmcompress_kernels.dispatch import CROSSOVER
from rich.table import Table
from torch import Tensor, nn

from llmcompress.layers.base import StructuredLinear


@dataclass(frozen=True)
class ModuleSpeed:
    """Medians over rounds of the mean time of one group, such as `q_proj|k_proj|v_proj`, over all blocks.

    seconds: by "dense" and "compressed". limit_seconds: bytes of the weights, as stored, over the bandwidth of a copy:
    what few rows cannot beat from memory. `blocks` is the number of groups that the mean is over.
    """

    group: str
    kind: str
    rows: int
    blocks: int
    seconds: dict[str, float]
    limit_seconds: dict[str, float]


def copy_bandwidth(device: torch.device | str = "cpu", size: int = 1 << 26, rounds: int = 5) -> float:
    """Bytes a second, read and written together, of the fastest copy of `size` float32 values."""
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    return 8 * size / min(_timed(lambda: target.copy_(source), source.device) for _ in range(rounds))


def measure_modules(
    dense: nn.Module, compressed: nn.Module, rows: list[int], rounds: int = 5, bandwidth: float | None = None
) -> list[ModuleSpeed]:
    """Times of every group of structured layers of `compressed` and of the modules of the same names in `dense`.

    A group is the layers that share a tensor, called one after the other on the same x, as a block calls them. Each
    round passes over all blocks, so that weights come from memory as they do in a model.
    """
    found = []
    groups = _groups(compressed)
    device = next(compressed.parameters()).device
    bandwidth = bandwidth or copy_bandwidth(device)
    for (label, kind), members in groups.items():
        first = compressed.get_submodule(members[0][0])
        assert isinstance(first, StructuredLinear)
        size = {"dense": 0.0, "compressed": 0.0}
        width = next(dense.parameters()).element_size()
        for layer in (compressed.get_submodule(name) for names in members for name in names):
            assert isinstance(layer, StructuredLinear)
            size["dense"] += layer.d_in * layer.d_out * width / len(members)
            size["compressed"] += layer.storage_bits / 8 / len(members)
        limits = {name: bytes_read / bandwidth for name, bytes_read in size.items()}
        for count in rows:
            x = torch.randn(count, first.d_in, device=device, dtype=next(dense.parameters()).dtype)
            times: dict[str, list[float]] = {"dense": [], "compressed": []}
            for number in range(rounds + 1):
                for name, model in (("dense", dense), ("compressed", compressed)):
                    seconds = _pass(model, members, x)
                    if number:
                        times[name].append(seconds / len(members))
            medians = {name: statistics.median(values) for name, values in times.items()}
            found.append(ModuleSpeed(label, kind, count, len(members), medians, limits))
    return found


def _groups(model: nn.Module) -> dict[tuple[str, str], list[list[str]]]:
    """(label, kind) -> the names of each group's layers, owner first."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, StructuredLinear)}
    by_owner: dict[str, list[str]] = {}
    for name, layer in layers.items():
        by_owner.setdefault(next(iter(layer.shared.values()), name), []).append(name)
    groups = defaultdict(list)
    for names in by_owner.values():
        label = "|".join(name.rpartition(".")[2] for name in names)
        groups[label, layers[names[0]].kind].append(names)
    return dict(groups)


def _pass(model: nn.Module, members: list[list[str]], x: Tensor) -> float:
    modules = [[model.get_submodule(name) for name in names] for names in members]
    inputs = [x.clone() for _ in modules]

    def run() -> None:
        for group, own in zip(modules, inputs, strict=True):
            for module in group:
                module(own)

    with torch.no_grad():
        return _timed(run, x.device)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def module_table(found: list[ModuleSpeed]) -> Table:
    """The byte limit holds where weights are read once for few rows; for many, products are bound by arithmetic."""
    table = Table(title="time of a group of layers, mean over blocks", title_justify="left")
    for column in ("layers", "kind", "rows", "dense µs", "compressed µs", "ratio", "byte limit µs", "limit"):
        table.add_column(column, justify="left" if column in ("layers", "kind") else "right")
    few = max(CROSSOVER.values())
    for entry in found:
        dense, compressed = entry.seconds["dense"], entry.seconds["compressed"]
        limit = entry.limit_seconds
        bound = (f"{limit['compressed'] * 1e6:,.0f}", f"{limit['dense'] / limit['compressed']:.2f}x")
        table.add_row(
            f"{entry.group} ({entry.blocks})", entry.kind, str(entry.rows), f"{dense * 1e6:,.0f}",
            f"{compressed * 1e6:,.0f}", f"{dense / compressed:.2f}x", *(bound if entry.rows <= few else ("", "")),
        )  # fmt: skip
    return table
