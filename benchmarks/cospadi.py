"""How fast and how good is the dictionary solver? Time and relative error per shape, at equal stored bits.

Compared: the fast solver, the paper's K-SVD/OMP, scikit-learn's MiniBatchDictionaryLearning (codes by its batch OMP),
the whitened SVD and its pivot form. Matrices are random, with the decaying spectrum of a whitened weight, so that
nothing has to be downloaded. The last column is the fast solver's floating-point rate over that of the machine's GEMM.

    python benchmarks/cospadi.py [--ratio 0.3] [--threads 1] [--sweeps 10] [--shapes "gate|up 576x3072"]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import MiniBatchDictionaryLearning, sparse_encode
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmcompress.compressors.cospadi import dictionary_sizes, learn_dictionary
from llmcompress.compressors.ranks import rank_costs, rank_for, rank_within

SHAPES = {
    "k 576x192": (576, 192),
    "q 576x576": (576, 576),
    "q|k|v 576x960": (576, 960),
    "gate|up 576x3072": (576, 3072),
}


def whitened_like(d_in: int, d_out: int) -> Tensor:
    """(d_in, d_out) float32 with singular values falling as the inverse square root, in random bases."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d_in + 1).float().rsqrt()
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
    return basis @ (scale[:, None] * torch.randn(d_in, d_out, generator=generator))


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """The result and the median of the processor time, in seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def gemm_rate(k: int) -> float:
    """Floating-point operations a second of the product that the solver consists of, (256, k) @ (k, k)."""
    a, b = torch.randn(256, k), torch.randn(k, k)
    _, seconds = timed(lambda: [a @ b for _ in range(50)], 3)
    return 50 * 2 * 256 * k * k / seconds


def scikit(y: Tensor, k: int, s: int) -> float:
    """Relative error of scikit-learn's online dictionary learning with k atoms, and codes of s non-zeros."""
    signals = y.T.numpy().astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of dependent atoms
        model = MiniBatchDictionaryLearning(k, alpha=0.1, max_iter=10, batch_size=256, random_state=0).fit(signals)
        codes = sparse_encode(signals, model.components_, algorithm="omp", n_nonzero_coefs=s)
    return float(np.linalg.norm(signals - codes @ model.components_) / np.linalg.norm(signals))


def tail(spectrum: Tensor, rank: int) -> float:
    return float((spectrum[rank:].square().sum() / spectrum.square().sum()).sqrt())


def row(name: str, shape: tuple[int, int], ratio: float, sweeps: int) -> str:
    y = whitened_like(*shape)
    k, s = dictionary_sizes(*shape, ratio)
    with FlopCounterMode(display=False) as counter:
        learn_dictionary(y, k, s)
    fast, fast_seconds = timed(lambda: learn_dictionary(y, k, s), 3)
    ksvd, ksvd_seconds = timed(lambda: learn_dictionary(y, k, s, "ksvd", iterations=sweeps, tolerance=0.0))
    online, online_seconds = timed(lambda: scikit(y, k, s))
    spectrum, svd_seconds = timed(lambda: torch.linalg.svdvals(y.double()))
    pivoted = rank_within(rank_costs(*shape[:1], [shape[1]], True), (1 - ratio) * shape[0] * shape[1])
    share = counter.get_total_flops() / fast_seconds / gemm_rate(k)
    cells = [
        f"{fast.history[-1]:.4f} {fast_seconds:7.2f} s",
        f"{ksvd.history[-1]:.4f} {ksvd_seconds:7.2f} s",
        f"{online:.4f} {online_seconds:7.2f} s",
        f"{tail(spectrum, rank_for(shape[0], shape[1], ratio)):.4f} {svd_seconds:7.2f} s",
        f"{tail(spectrum, pivoted):.4f}",
        f"{share:.0%}",
    ]
    return f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sweeps", type=int, default=10, help="K-SVD sweeps; the paper runs 60")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES)[:3], choices=list(SHAPES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} threads, {options.ratio:.0%} removed")
    headings = ["fast", f"K-SVD x {options.sweeps}", "scikit-learn", "whitened SVD", "pivoted SVD", "of GEMM rate"]
    print(f"{'error, processor s':<18}" + "".join(f"{heading:>18}" for heading in headings))
    for name in options.shapes:
        print(row(name, SHAPES[name], options.ratio, options.sweeps), flush=True)


if __name__ == "__main__":
    main()
