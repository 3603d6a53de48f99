"""Builds, checks, times and prints the GPU kernels: Llama-3-8B shapes, 30 % removed, beside torch's dense product.

    python benchmarks/gpu.py [--dtype bfloat16] [--rows 1 4 16 64 256 4096] [--ratio 0.3]

One table: milliseconds by CUDA events with the L2 cache overwritten in between, medians; the byte limit is the
compressed layer's bytes over the bandwidth of a copy measured in the same run. "densify" makes the codes dense at each
call, "dense weight" is the product that a layer keeps for many rows. Every result is compared with float64 before it is
timed.
Under TRITON_INTERPRET=1 and --device cpu the same code checks small shapes without timing them.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from llmcompress_kernels import block, gpu, sparse_dictionary
from rich.console import Console
from rich.table import Table
from torch import Tensor

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 6144), (4096, 28672)]  # the last two: q|k|v and gate|up
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Weights:
    """One shape at one ratio: what each form stores."""

    def __init__(self, d_in: int, d_out: int, ratio: float, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype) / math.sqrt(shape[-1])

        total, budget = d_in + d_out, (1 - ratio) * d_in * d_out
        self.d_in, self.d_out, self.blocks = d_in, d_out, 4
        rank = int((total - math.sqrt(total**2 - 4 * budget)) / 2)
        self.A, self.B = random(d_in, rank), random(rank, d_out - rank)
        self.places = torch.randperm(d_out, generator=generator, device=device)
        atoms = int(budget / (d_in + d_out / 2))
        s = max(1, atoms // 2)
        self.D, self.values = random(d_in, atoms), random(d_out, s)
        index = torch.rand(d_out, atoms, generator=generator, device=device).topk(s).indices
        marked = torch.zeros(d_out, -(-atoms // 8) * 8, dtype=torch.bool, device=device).scatter_(1, index, True)
        powers = 2 ** torch.arange(8, dtype=torch.uint8, device=device)
        self.mask = (marked.view(d_out, -1, 8) * powers).sum(-1, dtype=torch.uint8)
        r = int(budget / (d_out + d_in / self.blocks)) // self.blocks * self.blocks
        self.V, self.U = random(self.blocks, r // self.blocks, d_in // self.blocks), random(d_out, r)

    def dense_low_rank(self, x: Tensor) -> Tensor:
        z = x @ self.A.double()
        columns = torch.cat((z[:, : self.A.shape[1]], z @ self.B.double()), 1)
        return torch.empty_like(columns).index_copy_(1, self.places, columns)

    def forms(self, x: Tensor) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], float]]:
        """name -> (what runs, its float64 definition, bytes of the weights)."""
        size, y = x.element_size(), x.double()
        low_rank = size * (self.A.numel() + self.B.numel())
        sparse = size * (self.D.numel() + self.values.numel()) + self.mask.numel()
        return {
            "low rank, pivot": (
                lambda: gpu.low_rank_expand(x @ self.A, self.B, self.places, 0),
                lambda: self.dense_low_rank(y),
                low_rank,
            ),
            "sparse dictionary": (
                lambda: gpu.sparse_expand(x @ self.D, self.mask, self.values),
                lambda: sparse_dictionary.reference(y, self.D.double(), self.mask, self.values.double()),
                sparse,
            ),
            "sparse, densify": (
                lambda: sparse_dictionary.reference(x, self.D, self.mask, self.values),
                lambda: sparse_dictionary.reference(y, self.D.double(), self.mask, self.values.double()),
                sparse,
            ),
            "block dense": (
                lambda: F.linear(gpu.block_product(x, self.V, False), self.U),
                lambda: F.linear(block.reference(y, self.V.double(), False), self.U.double()),
                size * (self.V.numel() + self.U.numel()),
            ),
        }


def check(name: str, found: Tensor, expected: Tensor) -> None:
    """SystemExit naming the form whose result is further from float64 than its dtype explains."""
    error = float((found.double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE[found.dtype]:
        raise SystemExit(f"{name}: relative error {error:.1e} in {found.dtype}")


def milliseconds(call: Callable[[], Any], rounds: int = 30) -> float:
    """Median by CUDA events; the L2 cache is overwritten between rounds, so that weights come from memory."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for number in range(rounds + 5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 5:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def bandwidth() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 4096])
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: check small shapes, interpreted"
    )
    options = parser.parse_args()
    dtype, on_gpu = getattr(torch, options.dtype), options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; TRITON_INTERPRET=1 and --device cpu check the kernels without one")
    rate = bandwidth() if on_gpu else math.nan
    what = torch.cuda.get_device_name() if on_gpu else "interpreter, nothing timed"
    table = Table(
        "shape", "rows", "form", "ms", "over dense", "byte limit ms", "times the limit", title=f"{what}, {dtype}"
    )
    for d_in, d_out in SHAPES if on_gpu else [(48, 80), (80, 48)]:
        weights = Weights(d_in, d_out, options.ratio, dtype, options.device)
        dense = torch.randn(d_out, d_in, dtype=dtype, device=options.device)
        for rows in options.rows if on_gpu else [1, 17]:
            x = torch.randn(rows, d_in, dtype=dtype, device=options.device)
            base = milliseconds(functools.partial(F.linear, x, dense)) if on_gpu else math.nan
            table.add_row(f"{d_in} x {d_out}", str(rows), "dense weight", f"{base:.3f}", "1.00x", "", "")
            for name, (run, definition, size) in weights.forms(x).items():
                check(f"{name}, {d_in} x {d_out}, {rows} rows", run(), definition())
                taken, limit = milliseconds(run) if on_gpu else math.nan, size / rate * 1e3
                table.add_row(
                    f"{d_in} x {d_out}", str(rows), name, f"{taken:.3f}", f"{base / taken:.2f}x", f"{limit:.3f}",
                    f"{taken / limit:.2f}",
                )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
