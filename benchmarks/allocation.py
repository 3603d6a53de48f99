"""How long the allocations take, from spectra to budgets: python benchmarks/allocation.py

Spectra decay exponentially at seeded random rates, as those of whitened weights do within an order of magnitude; the
time depends on their number and length. The limit is one pass over all (unit, rank) tables a bisection step: values
read over the memory bandwidth that a copy of the same tables reaches here.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from llmcompress import catalog
from llmcompress.compressors.allocation.loss_aware import STEPS, choices
from llmcompress.compressors.ranks import rank_costs
from llmcompress.types import Profile, Site

#: name -> (blocks, shapes (d_in, d_out) of a block's sites by role)
MODELS = {
    "SmolLM2-135M": (30, {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576),
                          "gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}),
    "Llama-3-8B": (32, {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
                        "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}),
}  # fmt: skip
RATIOS = (0.2, 0.3, 0.5)


def profiles_of(blocks: int, shapes: dict[str, tuple[int, int]]) -> tuple[list[list[Site]], list[Profile]]:
    rng = np.random.default_rng(0)
    units, profiles = [], []
    for block in range(blocks):
        for role, (d_in, d_out) in shapes.items():
            name = f"layers.{block}.{role}"
            site = Site(name, role, block, d_in, d_out, name)
            size = min(d_in, d_out)
            decay = np.exp(-rng.uniform(2, 8) * np.arange(size) / size) * 10 ** rng.uniform(-1, 1)
            units.append([site])
            profiles.append(Profile([site], torch.from_numpy(decay), rank_costs(d_in, [d_out], True), d_in * d_out))
    return units, profiles


def seconds(run: Callable[[], object], repeats: int = 5) -> list[float]:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def limit(profiles: list[Profile]) -> float:
    """Seconds to read error and cost of every choice once a bisection step."""
    rows = np.zeros((len(profiles), max(len(choices(profile)[0]) for profile in profiles)))
    target = np.empty_like(rows)
    copy = float(np.median(seconds(lambda: np.copyto(target, rows), 20)))  # reads one table and writes one
    return STEPS * copy


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, python {platform.python_version()}, numpy {np.__version__}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'model':14} {'allocation':12} {'removed':>8} {'median s':>9} {'spread s':>15} {'left of budget':>15}")
    for model, (blocks, shapes) in MODELS.items():
        units, profiles = profiles_of(blocks, shapes)
        dense = sum(profile.dense for profile in profiles)
        for name in catalog.names("allocation"):
            allocation = catalog.get("allocation", name).load()()
            for ratio in RATIOS:
                allocate = functools.partial(allocation.allocate, units, profiles, ratio)
                found, budgets = seconds(allocate), allocate()
                left = 1 - sum(budget.values for budget in budgets) / ((1 - ratio) * dense)
                spread = f"{min(found):.3f} to {max(found):.3f}"
                print(f"{model:14} {name:12} {ratio:8.0%} {np.median(found):9.3f} {spread:>15} {left:15.1e}")
        print(f"{model:14} {'byte limit of loss_aware':39} {limit(profiles):9.3f}")


if __name__ == "__main__":
    main()
