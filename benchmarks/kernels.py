"""Are compressed layers faster than dense ones on a CPU, and how near to what their bytes allow?

    python benchmarks/kernels.py [--threads 1] [--ratio 0.3] [--rows 1 4 16 64 512] [--shapes smollm2 llama-3.2-1b]
                                 [--alternatives] [--json kernels.jsonl]

Each shape is timed on several copies in turn, so that weights come from memory as they do in a model. Every row prints
torch's dense float32 product, the low-rank pivot form and the sparse dictionary at equal stored values (16-bit
dictionary, mask, 14-bit values), medians with half the width of the middle half, and the byte limit: bytes over the
bandwidth of a copy measured in the same run. --alternatives adds what was tried for the sparse product: torch's CSR
(MKL), embedding_bag with per-sample weights, numba over 16-bit indices, and the dense codes; and both paths whatever
the rows: where they cross.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from llmcompress_eval.speed_modules import copy_bandwidth
from llmcompress_kernels import sparse_dictionary, use
from llmcompress_kernels.layout import arranged
from llmcompress_kernels.low_rank import low_rank_forward
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmcompress.layers.low_rank import pack_mask

SHAPES = {
    "smollm2": [(576, 576), (576, 1536), (1536, 576)],
    "smollm2-shared": [(576, 960), (576, 3072)],  # q|k|v, gate|up under one basis or dictionary
    "llama-3.2-1b": [(2048, 2048), (2048, 8192), (8192, 2048)],
}


def timed(candidates: dict[str, Callable[[int], Any]], copies: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call, candidates in turn: each round calls each candidate on every copy of the weights."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            for copy in range(copies):
                call(copy)
            if number:
                found[name].append((time.perf_counter() - start) / copies)
    return found


def pivot_rank(d_in: int, d_out: int, ratio: float) -> int:
    """The largest r with r (d_in + d_out - r) values within the budget."""
    total, budget = d_in + d_out, (1 - ratio) * d_in * d_out
    return int((total - math.sqrt(total**2 - 4 * budget)) / 2)


class Problem:
    """Dense, low-rank and sparse weights of one shape at one ratio, in several copies."""

    def __init__(self, d_in: int, d_out: int, ratio: float, memory: float = 1e8) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.d_in, self.d_out = d_in, d_out
        self.copies = copies = max(2, int(memory / (4 * d_in * d_out)))
        self.rank = pivot_rank(d_in, d_out, ratio)
        self.atoms = int((1 - ratio) * d_in * d_out / (d_in + d_out / 2))
        self.nonzeros = self.atoms // 2
        self.dense = [random(d_out, d_in) for _ in range(copies)]
        self.A = [arranged(random(d_in, self.rank)) for _ in range(copies)]
        self.B = [arranged(random(self.rank, d_out - self.rank)) for _ in range(copies)]
        self.places = torch.randperm(d_out, generator=generator)
        self.D = [arranged(random(d_in, self.atoms).bfloat16()) for _ in range(copies)]
        index = torch.rand(d_out, self.atoms, generator=generator).topk(self.nonzeros).indices
        marked = torch.zeros(d_out, self.atoms, dtype=torch.bool).scatter_(1, index, True)
        mask = pack_mask(F.pad(marked, (0, -self.atoms % 8)).flatten()).view(d_out, -1)
        self.mask = [mask.clone() for _ in range(copies)]
        self.values = [random(d_out, self.nonzeros).bfloat16() for _ in range(copies)]

    @property
    def bytes(self) -> dict[str, float]:
        sparse = 2 * self.d_in * self.atoms + self.d_out * (self.atoms / 8 + 14 / 8 * self.nonzeros)
        low_rank = 4 * self.rank * (self.d_in + self.d_out - self.rank)
        return {"dense": 4 * self.d_in * self.d_out, "low rank": low_rank, "sparse": sparse}

    def candidates(self, x: Tensor) -> dict[str, Callable[[int], Any]]:
        def low_rank(i: int) -> Tensor:
            return low_rank_forward(x, self.A[i], self.B[i], None, self.places, 0)

        def sparse(i: int) -> Tensor:
            return sparse_dictionary.sparse_dictionary_forward(
                x, self.D[i], self.mask[i], self.values[i], None, self.dense[i], None
            )

        return {"dense": lambda i: F.linear(x, self.dense[i]), "low rank": low_rank, "sparse": sparse}

    def forced(self, x: Tensor) -> dict[str, Callable[[int], Any]]:
        """The kernels and torch's products whatever the number of rows: where they cross."""

        def path(name: Any, call: Callable[[int], Any]) -> Callable[[int], Any]:
            def run(i: int) -> None:
                with use(name):
                    call(i)

            return run

        calls = self.candidates(x)
        return {
            f"{name}, {kind}": path(kind, calls[name])
            for name in ("low rank", "sparse")
            for kind in ("kernel", "library")
        }

    def alternatives(self, x: Tensor) -> dict[str, Callable[[int], Any]]:
        """x D in float32, then the codes as torch has them."""
        D = [dictionary.float() for dictionary in self.D]
        codes = [
            sparse_dictionary.dense_codes(mask, values.float(), self.atoms)
            for mask, values in zip(self.mask, self.values, strict=True)
        ]
        csr = [matrix.to_sparse_csr() for matrix in codes]
        marked = sparse_dictionary.marked(self.mask[0], self.atoms)
        index = marked.nonzero()[:, 1].view(self.d_out, self.nonzeros)
        narrow = index.to(torch.uint16).numpy()
        values = [matrix.float() for matrix in self.values]

        def bag(i: int) -> list[Tensor]:
            z = x @ D[i]
            return [F.embedding_bag(index, row[:, None], mode="sum", per_sample_weights=values[i]).T for row in z]

        def indexed(i: int) -> Tensor:
            z = x @ D[i]
            out = torch.empty(len(z), self.d_out)
            gather(z.numpy(), narrow, values[i].numpy(), out.numpy())
            return out

        return {
            "16-bit indices, numba": indexed,
            "dense codes": lambda i: F.linear(x @ D[i], codes[i]),
            "CSR": lambda i: (csr[i] @ (x @ D[i]).T).T,
            "embedding_bag": bag,
        }


@numba.njit(parallel=True, fastmath=True)
def gather(z: Any, index: Any, values: Any, out: Any) -> None:
    """out[r, o] = sum over t of values[o, t] z[r, index[o, t]]."""
    for o in numba.prange(len(index)):
        for r in range(len(z)):
            total = np.float32(0)
            for t in range(index.shape[1]):
                total += values[o, t] * z[r, index[o, t]]
            out[r, o] = total


def row_of(problem: Problem, rows: int, options: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    x = torch.randn(rows, problem.d_in)
    calls = problem.candidates(x)
    if options.alternatives:
        calls |= problem.forced(x) | (problem.alternatives(x) if rows <= 64 else {})
    with torch.no_grad():
        seconds = timed(calls, problem.copies, options.rounds)
    found: dict[str, Any] = {"shape": f"{problem.d_in} x {problem.d_out}", "rows": rows, "threads": options.threads}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        paired = [a / b for a, b in zip(seconds["dense"], times, strict=True)]
        found[name] = {"us": middle * 1e6, "spread": (high - low) / 2 * 1e6, "ratio": statistics.median(paired)}
        found[name] |= {"best_us": min(times) * 1e6, "best_ratio": min(seconds["dense"]) / min(times)}
        if name in problem.bytes:
            found[name]["limit_us"] = problem.bytes[name] / bandwidth * 1e6
            found[name]["limit"] = problem.bytes["dense"] / problem.bytes[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--alternatives", action="store_true")
    parser.add_argument("--json", help="append the rows to this file")
    options = parser.parse_args()
    numba.set_num_threads(options.threads)  # first: it starts its pool, and with that sets torch's number too
    torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth()
    title = f"float32, ratio {options.ratio}, {options.threads} threads, copy {bandwidth / 1e9:.1f} GB/s"
    table = Table(
        "shape",
        "rows",
        "form",
        "µs",
        "over dense",
        "best µs",
        "best over dense",
        "byte limit µs",
        "limit over dense",
        title=title,
    )
    for d_in, d_out in [shape for name in options.shapes for shape in SHAPES[name]]:
        problem = Problem(d_in, d_out, options.ratio)
        for rows in options.rows:
            found = row_of(problem, rows, options, bandwidth)
            for name, entry in found.items():
                if not isinstance(entry, dict):
                    continue
                limit = (f"{entry['limit_us']:,.0f}", f"{entry['limit']:.2f}x") if "limit" in entry else ("", "")
                table.add_row(
                    found["shape"], str(rows), name, f"{entry['us']:,.0f} ± {entry['spread']:,.0f}",
                    f"{entry['ratio']:.2f}x", f"{entry['best_us']:,.0f}", f"{entry['best_ratio']:.2f}x", *limit,
                )  # fmt: skip
            if options.json:
                with open(options.json, "a") as file:
                    file.write(json.dumps(found) + "\n")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
