"""How do the backends' costs grow, next to the obvious baseline?

    python benchmarks/backends.py [--only volume ...]

Times are CPU milliseconds of one thread, medians of five runs of the two in turn, so that other work on the machine
tells little; with the exponent of the last doubling and, where the cost is a matrix product's, the share of the
machine's measured GEMM rate (float64).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy import sparse

from llmcompress.backends.analysis.dual_smoothing import DualSmoothedClassifier, SmoothedClassifier, even_odd
from llmcompress.backends.analysis.gp_pde import GPHM, fit_series
from llmcompress.backends.analysis.singular_density import DeepDensity, fit_together
from llmcompress.backends.curvature.mfac import DynamicFisherInverse
from llmcompress.backends.geometry.augmented_covariance import augmented_covariance
from llmcompress.backends.geometry.lie_group import balanced_gauge
from llmcompress.backends.geometry.ponita import SeparableGroupConv
from llmcompress.backends.geometry.spd_batchnorm import bures_mix_weights, bw_barycentre
from llmcompress.backends.graphs.bootstrap_amg import bootstrap, spd_laplacian
from llmcompress.backends.graphs.ila_sdp import likelihood_affinities, solve_la_sdp
from llmcompress.backends.graphs.k_means import k_means
from llmcompress.backends.graphs.one_connection import MixedGraph, implied_covariance, path_decomposition
from llmcompress.backends.optim.aggregators import coordinate_median
from llmcompress.backends.optim.auon import auon_update, newton_schulz
from llmcompress.backends.optim.flag_aggregator import FlagAggregator
from llmcompress.backends.recovery.matrix_completion import AltMinCompletion, multi_regression
from llmcompress.backends.recovery.matrix_sensing import IdentityOperator, sense_asymmetric
from llmcompress.backends.recovery.subgradient import QuadraticProbes, SubGMRecovery
from llmcompress.backends.regression.block_coordinate import GramLeastSquares, solve_gram
from llmcompress.backends.regression.conjugate_direction import cg, dcdm, fit_gram_direction
from llmcompress.backends.regression.kronecker_sbl import KroneckerSBL, classic_sbl, kron_matvec
from llmcompress.backends.regression.linf_regression import SketchedLeastSquares
from llmcompress.backends.regression.sparse_regression import free_columns, precondition
from llmcompress.backends.sampling.sensitivity_sampling import leverage_scores, lewis_weights
from llmcompress.backends.sampling.volume_sampling import leading_basis, repeated_dpp
from llmcompress.backends.sequence.negative_eigenvalues import delta_rule
from llmcompress.backends.sequence.ptd import DiagonalSSM, hippo, perturb_then_diagonalize
from llmcompress.backends.streaming.streaming_eigenvector import StreamingTopEigenvector

Case = tuple[Callable[[], Any], Callable[[], Any], float]  # ours, the baseline, our FLOPs


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator())


def median_ms(*runs: Callable[[], Any], repeats: int = 5) -> list[float]:
    """Of each, the runs taken in turn."""
    spent: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, times in zip(runs, spent, strict=True):
            start = time.process_time()
            run()
            if repeat:  # the first one warms up
                times.append(time.process_time() - start)
    return [1e3 * statistics.median(times) for times in spent]


def gemm_rate() -> float:
    a = randn(1024, 1024)
    return 2 * 1024**3 / (median_ms(lambda: a @ a)[0] * 1e-3)


def sensitivity(n: int) -> Case:
    X = randn(n, 64)
    return lambda: lewis_weights(X, 4, tol=1e-4), lambda: torch.linalg.svd(X, full_matrices=False), 12 * 3 * n * 64**2


def leverage(n: int) -> Case:
    X = randn(n, 64)
    return lambda: leverage_scores(X, "sketch", generator()), lambda: leverage_scores(X), 2 * n * 64 * 256


def volume(n: int) -> Case:
    Q = leading_basis(randn(n, 32), None)
    return lambda: repeated_dpp(Q, 128, generator()), lambda: leverage_scores(Q), 2 * n * 32 * 128


def top_eigenvector(d: int) -> Case:
    X = randn(8192, d)
    one_pass = lambda: StreamingTopEigenvector(n_rows=8192).partial_fit(X).finalize()  # noqa: E731
    return one_pass, lambda: torch.linalg.eigh(X.T @ X), 4 * 8192 * d


def linf_sketch(n: int) -> Case:
    X, Y = randn(n, 64), randn(n, 64)
    sketched = lambda: SketchedLeastSquares(n_rows=1024, random_state=0).fit(X, Y)  # noqa: E731
    return sketched, lambda: torch.linalg.lstsq(X, Y), n * 128 * math.log2(n) + 4 * 1024 * 64**2


def conjugate_direction(d: int) -> Case:
    X = randn(4 * d, d) * torch.linspace(1, 0.02, d)
    G, b = X.T @ X, randn(d, 16)
    net = fit_gram_direction(G, 32)
    steps = int(dcdm(G, b, net, max_iter=1000).n_iter.max())
    solve = lambda: dcdm(G, b, net, max_iter=1000)  # noqa: E731
    cholesky = lambda: torch.cholesky_solve(b, torch.linalg.cholesky(G))  # noqa: E731
    return solve, cholesky, steps * 4 * 16 * d * d


def conjugate_gradients(d: int) -> Case:
    X = randn(4 * d, d) * torch.linspace(1, 0.02, d)
    G, b = X.T @ X, randn(d, 16)
    net = fit_gram_direction(G, 32)
    return lambda: dcdm(G, b, net, max_iter=1000), lambda: cg(G, b), 0.0


def block_coordinate(d: int) -> Case:
    X, C = randn(4 * d, d), randn(d, 64)
    G = X.T @ X
    blocks = lambda: solve_gram(GramLeastSquares(G, C), max_iter=20, tol=1e-12)  # noqa: E731
    return blocks, lambda: torch.linalg.solve(G, C), 20 * 64 * (2 * d * 32 + 32**3 / 3)


def random_support(d: int) -> Case:
    X = randn(512, d)
    free = free_columns(d, 4, 0.2, generator())
    return lambda: precondition(X, free), lambda: torch.linalg.svd(X, full_matrices=False), 8 * 512 * 60 * d


def kronecker_sbl(n: int) -> Case:
    mats = [randn(n * 3 // 5, n) for _ in range(2)]
    y = kron_matvec(mats, randn(n * n))
    H = torch.kron(*mats)
    fit = lambda: KroneckerSBL("svd", 0.1, max_iter=10, tol=0.0).fit(mats, y)  # noqa: E731
    return fit, lambda: classic_sbl(H, y, 0.1, 10), 10 * 30 * (n * 3 // 5) ** 3


def dual_smoothing(n: int) -> Case:
    x = torch.randn(576, generator=generator())
    heads = [torch.nn.Linear(d, 8).requires_grad_(False) for d in (288, 288, 576)]
    dual = DualSmoothedClassifier(heads[0], heads[1], even_odd(576), 8, 1.0)
    plain = SmoothedClassifier(heads[2], 8, 1.0)
    return lambda: dual.certify(x, 100, n), lambda: plain.certify(x, 100, n), 0.0


def gp_pde(n: int) -> Case:
    axis = torch.linspace(0, 1, n, dtype=torch.float64)
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[1:-1, 1:-1] = False
    source, values = torch.zeros(n, n), torch.zeros(int(mask.sum()))
    covariance = torch.eye(n * n, dtype=torch.float64) + 0.1 / n**2
    fit = lambda: GPHM([axis, axis], "gm", 12, 4.0).fit("poisson", source, mask, values, "joint", 1)  # noqa: E731
    return fit, lambda: torch.linalg.cholesky(covariance), 0.0


def gp_series(m: int) -> Case:
    values, seen = randn(4, 2 * m), torch.arange(2 * m) % 2 == 0
    design, targets = randn(m, 48), values[:, seen].T
    fit = lambda: fit_series(values, seen, "gm", steps=1, starts=(0.0,))  # noqa: E731
    return fit, lambda: torch.linalg.lstsq(design, targets), 4 * 2 * m**3 / 3


def singular_density(count: int) -> Case:
    x = torch.randn(300, 10, generator=generator())
    models = [DeepDensity(4, 10) for _ in range(count)]
    together = lambda: fit_together(models, [x] * count, [0.1] * count, steps=20)  # noqa: E731
    return together, lambda: [model.fit(x, 0.1, steps=20) for model in models], 0.0


def lie_group(d: int) -> Case:
    A, B = randn(d, 128), randn(128, d)
    product = A @ B
    gauge = lambda: balanced_gauge(A, B)  # noqa: E731
    return gauge, lambda: torch.linalg.svd(product, full_matrices=False), 2 * 2 * d * 128**2 * 3


def spd_batchnorm(d: int) -> Case:
    rows = randn(4, 4 * d, d)
    G, few = rows[:3].mT @ rows[:3] / (4 * d), rows[3, : d // 2]
    T = few.T @ few / len(few)
    fit = lambda: bures_mix_weights(G, T)  # noqa: E731
    return fit, lambda: bw_barycentre(G, max_iter=10, tol=0.0), 0.0


def augmented_covariances(order: int) -> Case:
    X = randn(64, 6, 256)
    return (
        lambda: augmented_covariance(X, order, 2),
        lambda: augmented_covariance(X, 1, 1),
        2 * 64 * 256 * (6 * order) ** 2,
    )


def ponita(n: int) -> Case:
    convolution, x = SeparableGroupConv(16, 16).double().eval(), randn(n, 20, 16)
    edges = torch.stack((torch.arange(8 * n) % n, torch.arange(8 * n) // 8))
    spatial, fibre = randn(8 * n, 20, 16), randn(20, 20, 16)

    def full() -> torch.Tensor:
        kernel = convolution.spatial(spatial)[:, :, None] * convolution.fibre(fibre) / 20
        return torch.zeros_like(x).index_add_(0, edges[1], (kernel * x[edges[0]][:, :, None]).sum(1))

    return torch.no_grad()(lambda: convolution(x, edges, spatial, fibre)), torch.no_grad()(full), 0.0


def bootstrap_amg(n: int) -> Case:
    i, j = torch.randint(n, (2, 4 * n), generator=generator())
    ring = torch.arange(n)
    rows, columns = torch.cat((i, ring)), torch.cat((j, (ring + 1) % n))
    keep = rows != columns
    half = sparse.coo_matrix((keep.double()[keep].numpy(), (rows[keep].numpy(), columns[keep].numpy())), shape=(n, n))
    L = spd_laplacian(((half + half.T) > 0).astype(float))
    lowest = lambda: torch.linalg.eigh(torch.from_numpy(L.toarray()))  # noqa: E731
    return lambda: bootstrap(L, tol=1e-12, max_components=8), lowest, 0.0


def ila_sdp(n: int) -> Case:
    X = randn(n, 3) + 6 * torch.nn.functional.one_hot(torch.arange(n) % 3, 3)
    A = likelihood_affinities(X, torch.eye(3, dtype=X.dtype).expand(3, 3, 3))
    program = lambda: solve_la_sdp(A, tol=0.0, max_iter=20)  # noqa: E731
    return program, lambda: k_means(X, 3, 10, generator()), 20 * 3 * 9 * n**3


def negative_eigenvalues(T: int) -> Case:
    q, k, v = (torch.randn(1, 4, T, 32, generator=generator()) for _ in range(3))
    k, beta = torch.nn.functional.normalize(k, dim=-1), 2 * torch.rand(1, 4, T, generator=generator())
    return lambda: delta_rule(q, k, v, beta), lambda: delta_rule(q, k, v, beta, mode="recurrent"), 0.0


def ptd(n: int) -> Case:
    A, _ = hippo("legs", n)
    optimised = lambda: perturb_then_diagonalize(A, steps=10)  # noqa: E731
    return optimised, lambda: perturb_then_diagonalize(A, "ginibre"), 0.0


def ptd_layer(L: int) -> Case:
    layer, u = DiagonalSSM(16, 32, method="ginibre").requires_grad_(False), torch.randn(1, L, 16, generator=generator())
    return lambda: layer(u), lambda: layer(u, mode="scan"), 0.0


def one_connection(n: int) -> Case:
    G = MixedGraph(n, [(i, j) for i in range(n) for j in range(n) if i != j])
    Lambda = 0.1 * randn(n, n).fill_diagonal_(0)
    noise = torch.eye(n, dtype=torch.float64)
    paths = lambda: path_decomposition(G, Lambda, noise, 0, 1)  # noqa: E731
    return paths, lambda: implied_covariance(G, Lambda, noise), 0.0


def completion(n: int) -> Case:
    M = randn(n, 8) @ randn(8, n)
    mask = torch.rand(n, n, generator=generator()) < 0.2
    fit = lambda: AltMinCompletion(8, n_rounds=10, tol=1e-14).fit_mask(M, mask)  # noqa: E731
    flops = fit().flops_
    return fit, lambda: torch.linalg.svd(M, full_matrices=False), flops


def completion_exact(k: int) -> Case:
    rows, cols = torch.arange(1000).repeat_interleave(100), torch.arange(100).repeat(1000)
    A, values = randn(1000, k), randn(100_000)
    sketched = lambda: multi_regression(A, rows, cols, values, 100, tol=0.0, max_iter=5)  # noqa: E731
    exact = lambda: multi_regression(A, rows, cols, values, 100, method="exact")  # noqa: E731
    return sketched, exact, sketched()[1].flops


def completion_batched(k: int) -> Case:
    """All columns are of equal length here, so that their Grams are one batched product."""
    sketched, _, flops = completion_exact(k)
    cols, A, values = torch.arange(100).repeat(1000), randn(1000, k), randn(100_000)

    def normal_equations() -> torch.Tensor:
        order = cols.argsort(stable=True)
        rows, right = A[order // 100].view(100, 1000, k), values[order].view(100, 1000, 1)
        return torch.cholesky_solve(rows.mT @ right, torch.linalg.cholesky(rows.mT @ rows))

    return sketched, normal_equations, flops


def sensing(n: int) -> Case:
    M, op = randn(n, n), IdentityOperator(n, n)
    descend = lambda: sense_asymmetric(op, M.flatten(), 32, 1.0, max_iter=20, generator=generator())  # noqa: E731
    return descend, lambda: torch.linalg.svd(M), 20 * 6 * 32 * n * n


def subgradient(d: int) -> Case:
    probes, rows = QuadraticProbes(randn(2000, d), randn(2000, d).flip(0)), randn(2000, d)
    y = probes.read(randn(d, 3))
    fit = lambda: SubGMRecovery(16, alpha=0.5, max_iter=50).fit(probes, y)  # noqa: E731
    return fit, lambda: rows.T @ rows, 50 * 8 * 2000 * d * 16


def mfac(d: int) -> Case:
    m, lam, G = 64, 1e-4, randn(64, d)
    window = DynamicFisherInverse(m, d, lam, torch.float64)
    for g in G:
        window.update(g)

    def woodbury() -> torch.Tensor:
        inner = torch.cholesky_solve(G @ G[:1].T, torch.linalg.cholesky(m * torch.eye(m).to(G) + G @ G.T / lam))
        return G[0] / lam - (G.T @ inner)[:, 0] / lam**2

    return lambda: window.mul_slot(window.update(G[0])), woodbury, 2 * 2 * d * m + m**3 / 3


def mfac_dense(d: int) -> Case:
    step, G = mfac(d)[0], randn(64, d)
    fisher = lambda: 1e-4 * torch.eye(d).to(G) + G.T @ G / 64  # noqa: E731
    return step, lambda: torch.cholesky_solve(G[:1].T, torch.linalg.cholesky(fisher())), 2 * 2 * d * 64


def auon(n: int) -> Case:
    M = randn(n, n).float()
    return lambda: auon_update(M), lambda: newton_schulz(M, 5), 0.0


def auon_svd(n: int) -> Case:
    M = randn(n, n).float()

    def orthogonal() -> torch.Tensor:
        u, _, vh = torch.linalg.svd(M)
        return u @ vh

    return lambda: auon_update(M), orthogonal, 0.0


def flag(n: int) -> Case:
    G, aggregate = randn(15, n).float(), FlagAggregator()
    return lambda: aggregate(G), lambda: G.mean(0), 2 * 15 * 15 * n


def flag_median(n: int) -> Case:
    G, aggregate = randn(15, n).float(), FlagAggregator()
    return lambda: aggregate(G), lambda: coordinate_median(G, 0), 2 * 15 * 15 * n


#: name -> (case, sizes, what is compared with)
CASES: dict[str, tuple[Callable[[int], Case], list[int], str]] = {
    "sensitivity": (sensitivity, [4096, 8192, 16384, 32768], "full SVD"),
    "leverage, sketched": (leverage, [4096, 8192, 16384, 32768], "exact leverage"),
    "volume": (volume, [4096, 8192, 16384, 32768], "leverage scores"),
    "top_eigenvector": (top_eigenvector, [128, 256, 512, 1024], "Gram and eigh"),
    "linf_sketch": (linf_sketch, [8192, 16384, 32768, 65536], "lstsq"),
    "conjugate_direction": (conjugate_direction, [128, 256, 512], "Cholesky"),
    "conjugate_direction, against CG": (conjugate_gradients, [128, 256, 512], "CG"),
    "block_coordinate": (block_coordinate, [128, 256, 512, 1024], "exact solve"),
    "random_support": (random_support, [512, 1024, 2048, 4096], "full SVD"),
    "dual_smoothing": (dual_smoothing, [1000, 2000, 4000, 8000], "whole inputs"),
    "gp_pde": (gp_pde, [12, 24, 48], "Cholesky without structure"),
    "gp_pde, series": (gp_series, [32, 64, 128, 256], "lstsq"),
    "singular_density": (singular_density, [1, 2, 4, 8], "one by one"),
    "lie_group": (lie_group, [256, 512, 1024], "SVD of the product"),
    "spd_batchnorm": (spd_batchnorm, [96, 192, 384], "ten barycentre steps"),
    "augmented_covariance": (augmented_covariances, [2, 4, 8, 16], "plain covariance"),
    "ponita": (ponita, [64, 128, 256, 512], "full kernel"),
    "matrix_completion": (completion, [200, 400, 800], "full SVD, all seen"),
    "matrix_completion, regressions of k columns": (completion_exact, [8, 16, 32, 64], "exact"),
    "matrix_completion, columns of one length": (completion_batched, [8, 16, 32, 64], "exact, one batched product"),
    "matrix_sensing": (sensing, [128, 256, 512], "full SVD"),
    "subgradient": (subgradient, [64, 128, 256, 512], "the Gram itself"),
    "mfac": (mfac, [16384, 32768, 65536, 131072], "Woodbury, anew"),
    "mfac, against a dense matrix": (mfac_dense, [512, 1024, 2048], "dense Cholesky"),
    "auon": (auon, [256, 512, 1024], "Newton-Schulz, 5 steps"),
    "auon, against an SVD": (auon_svd, [256, 512, 1024], "orthogonal factor by SVD"),
    "flag": (flag, [131072, 262144, 524288, 1048576], "mean"),
    "flag, against the median": (flag_median, [131072, 262144, 524288, 1048576], "coordinate median"),
    "kronecker_sbl": (kronecker_sbl, [10, 20, 30], "SBL without structure"),
    "bootstrap_amg": (bootstrap_amg, [500, 1000, 2000], "eigh"),
    "ila_sdp": (ila_sdp, [50, 100, 200], "k-means"),
    "negative_eigenvalues": (negative_eigenvalues, [128, 256, 512, 1024], "step by step"),
    "ptd": (ptd, [16, 32, 64], "random perturbation"),
    "ptd, layer": (ptd_layer, [256, 512, 1024], "step by step"),
    "one_connection": (one_connection, [4, 5, 6], "inverse, without paths"),
}


def growth(only: list[str]) -> Table:
    peak = gemm_rate()
    table = Table(title=f"one thread, GEMM {peak / 1e9:.1f} GFLOP/s, torch {torch.__version__}")
    for column in ("backend", "size", "ms", "exponent", "of GEMM", "baseline", "ms ", "ratio"):
        table.add_column(column, justify="left" if column in ("backend", "baseline") else "right")
    for name, (case, sizes, against) in CASES.items():
        if only and name.partition(",")[0] not in only:
            continue
        before = None
        for size in sizes:
            ours, theirs, flops = case(size)
            spent, other = median_ms(ours, theirs)
            exponent = "" if before is None else f"{math.log2(spent / before):.2f}"
            share = f"{flops / (spent * 1e-3) / peak:.0%}" if flops else ""
            table.add_row(name, f"{size:,}", f"{spent:.2f}", exponent, share, against, f"{other:.2f}",
                          f"{other / spent:.2f}x")  # fmt: skip
            before = spent
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of backends, up to a comma")
    torch.set_num_threads(1)
    Console(width=120).print(growth(parser.parse_args().only))


if __name__ == "__main__":
    main()
