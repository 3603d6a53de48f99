"""Completion by alternating minimisation: exact recovery, inexact regressions, noise, cost; and a weight's outliers."""

import logging
import math

import numpy as np
import pytest
import torch

from llmcompress.backends.recovery.entries import MaskedEntries, SparseEntries
from llmcompress.backends.recovery.matrix_completion import (
    AltMinCompletion,
    MatrixCompletion,
    MatrixCompletionOptions,
    incoherence,
    multi_regression,
    svd_clip_init,
)
from llmcompress.backends.recovery.outliers import errors_beside_svd, largest_entries
from llmcompress.errors import InputError

SEEDS = range(4)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def problem(seed, m=400, n=300, k=5, p=0.2, kappa=3.0):
    """M of rank k with singular values from 1 to 1 / kappa, and the places that are seen."""
    U, V = (torch.linalg.qr(randn(size, k, seed=100 * seed + i))[0] for i, size in enumerate((m, n)))
    M = (U * torch.linspace(1, 1 / kappa, k, dtype=torch.float64)) @ V.T * math.sqrt(m * n)
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < p
    return M, mask


def entries(M, mask):
    rows, cols = mask.nonzero(as_tuple=True)
    return rows, cols, M[mask], tuple(M.shape)


def error(found, M):
    return float((found - M).norm() / M.norm())


def fitted(M, mask, rank=5, **arguments):
    return AltMinCompletion(rank, **{"tol": 1e-14, **arguments}).fit(*entries(M, mask))


# --- recovery --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regressor", ["sketch", "exact"])
def test_a_matrix_is_recovered_exactly(regressor):
    for seed in SEEDS:
        M, mask = problem(seed)
        found = fitted(M, mask, regressor=regressor, n_rounds=30)
        assert error(found.reconstruct(), M) < 1e-10
        rows, cols, vals, _ = entries(M, mask)
        torch.testing.assert_close(found.predict(rows, cols), vals, rtol=1e-8, atol=1e-8)
        u, s, vh = torch.linalg.svd(torch.where(mask, M, 0) / mask.double().mean())
        assert error((u[:, :5] * s[:5]) @ vh[:5], M) > 0.4, "one truncation does not do"
        mean = M[mask].mean()
        u, s, vh = torch.linalg.svd(torch.where(mask, M, mean))
        assert error((u[:, :5] * s[:5]) @ vh[:5], M) > 0.4


def test_one_step_a_regression_is_enough_with_a_warm_start():
    for seed in SEEDS:
        M, mask = problem(seed)
        assert error(fitted(M, mask, inner_iters=1, n_rounds=40).reconstruct(), M) < 1e-10
    # the same rounds with every regression begun at zero
    rows, cols, vals, (m, n) = entries(M, mask)
    U = svd_clip_init(rows, cols, vals, (m, n), 5, 2.0)
    for _ in range(40):
        V, _ = multi_regression(U, rows, cols, vals, n, max_iter=1)
        Q = torch.linalg.qr(V)[0]
        W, _ = multi_regression(Q, cols, rows, vals, m, max_iter=1)
        U = torch.linalg.qr(W)[0]
    assert error(W @ Q.T, M) > 1e-3


def test_errors_of_the_updates_are_not_amplified():
    """Final error over the size d of a perturbation of every update, and its growth with d."""
    M, mask = problem(0)
    rows, cols, vals, (m, n) = entries(M, mask)
    found = []
    sizes = (1e-2, 1e-3, 1e-4)
    for d in sizes:
        U, V, noise = svd_clip_init(rows, cols, vals, (m, n), 5, 2.0), None, torch.Generator().manual_seed(7)

        def shaken(X, d=d, noise=noise):
            E = torch.randn(X.shape, dtype=X.dtype, generator=noise)
            return X + d * X.norm() / E.norm() * E

        for _ in range(30):
            V = shaken(multi_regression(U, rows, cols, vals, n, V)[0])
            Q, R = torch.linalg.qr(V)
            W = shaken(multi_regression(Q, cols, rows, vals, m, U @ R.T)[0])
            U, R = torch.linalg.qr(W)
            V = Q @ R.T
        found.append(error(W @ Q.T, M))
    print(found)
    assert all(e <= 3 * d for e, d in zip(found, sizes, strict=True))
    assert 0.9 <= np.polyfit(np.log(sizes), np.log(found), 1)[0] <= 1.1


def test_noise_costs_what_its_degrees_of_freedom_do():
    for seed in SEEDS:
        M, mask = problem(seed)
        sigma = 0.1 * float(M.std())
        noisy = M + sigma * randn(*M.shape, seed=seed + 50)
        found = fitted(noisy, mask, tol=1e-8).reconstruct()
        freedom = 5 * (400 + 300 - 5)
        assert float((found - M).square().mean().sqrt()) <= 1.3 * sigma * math.sqrt(freedom / int(mask.sum()))


def test_single_precision_and_samples_of_their_own():
    M, mask = problem(0)
    found = fitted(M.float(), mask, tol=1e-8)
    assert found.U_.dtype == torch.float32
    assert error(found.reconstruct().double(), M) <= 5e-6
    M, mask = problem(1, 400, 400, 2, 0.8)
    split = fitted(M, mask, 2, n_rounds=5, split=True, inner_tol=0.03)
    assert error(split.reconstruct(), M) < 1e-4
    assert split.n_rounds_ == 5
    assert split.converged_ is False, "the rounds ran out"


def test_a_mask_that_sees_most_and_the_list_of_its_entries_agree():
    M, mask = problem(2, 60, 50, 3, 0.9)
    by_mask = AltMinCompletion(3, tol=1e-13).fit_mask(M, mask)
    assert by_mask.converged_
    assert error(by_mask.reconstruct(), M) < 1e-10
    assert error(fitted(M, mask, 3).reconstruct(), M) < 1e-10
    sparse = SparseEntries(*entries(M, mask))
    dense = MaskedEntries(torch.where(mask, M, 0), mask.double())
    A, V = randn(60, 3, seed=1), randn(50, 3, seed=2)
    torch.testing.assert_close(dense.product(A, V).T[mask.T], sparse.product(A, V))
    torch.testing.assert_close(dense.adjoint(A, dense.values), sparse.adjoint(A, sparse.values))
    torch.testing.assert_close(dense.grams(A), sparse.grams(A))
    assert dense.count == sparse.count
    rows, cols = torch.tensor([7, 41, 0, 59]), torch.tensor([49, 3, 3, 0])  # few: the product of those alone
    few = SparseEntries(rows, cols, M[rows, cols], (60, 50))
    torch.testing.assert_close(few.product(A, V), (A @ V.T)[few.rows, few.cols])


# --- its parts -------------------------------------------------------------------------------------------------------


def test_every_regressor_solves_least_squares():
    M, mask = problem(3, 60, 20, 4, 0.6)
    noisy = M + randn(60, 20, seed=9)
    rows, cols, vals, _ = entries(noisy, mask)
    A = randn(60, 4, seed=5)
    expected = np.stack([np.linalg.lstsq(A[mask[:, j]], noisy[mask[:, j], j])[0] for j in range(20)])
    for method in ("sketch", "sketch-gd", "exact"):
        found, info = multi_regression(A, rows, cols, vals, 20, method=method, tol=1e-12, max_iter=400)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
        assert info.exact == 0
    ridge = np.stack([np.linalg.solve(A[c].T @ A[c] + 0.5 * torch.eye(4), A[c].T @ noisy[c, j])
                      for j in range(20) if len(c := mask[:, j].nonzero()[:, 0])])  # fmt: skip
    found, _ = multi_regression(A, rows, cols, vals, 20, tol=1e-12, max_iter=400, ridge=0.5)
    np.testing.assert_allclose(found, ridge, rtol=1e-8, atol=1e-8)


def test_a_column_whose_sketch_is_singular_is_solved_exactly():
    A = randn(30, 3, seed=1)
    A[:10, 2] = A[:10, 1]  # the first column sees ten dependent rows
    rows = torch.cat((torch.arange(10), torch.arange(30)))
    cols = torch.cat((torch.zeros(10, dtype=torch.int64), torch.ones(30, dtype=torch.int64)))
    vals = randn(40, seed=2)
    found, info = multi_regression(A, rows, cols, vals, 2, tol=1e-12, max_iter=50)
    assert info.exact == 1
    expected = np.linalg.lstsq(A[:10], vals[:10])[0]
    np.testing.assert_allclose(found[0], expected, rtol=1e-8, atol=1e-8)


def test_the_sketch_preconditions_what_is_ill_conditioned():
    u, v = torch.linalg.qr(randn(5000, 30))[0], torch.linalg.qr(randn(30, 30, seed=1))[0]
    A = (u * torch.logspace(0, -6, 30, dtype=torch.float64)) @ v.T
    b = A @ randn(30, seed=2) + 1e-3 * randn(5000, seed=3)
    best = A @ torch.linalg.lstsq(A, b).solution
    places = (torch.arange(5000), torch.zeros(5000, dtype=torch.int64))
    found, info = multi_regression(A, *places, b, 1, tol=1e-15, max_iter=40)
    assert info.steps <= 40
    assert float((A @ found[0] - best).norm() / best.norm()) <= 1e-8
    x, r = torch.zeros(30, dtype=torch.float64), A.T @ b
    p = r
    for _ in range(100):
        q = A.T @ (A @ p)
        alpha = (r @ r) / (p @ q)
        x, s = x + alpha * p, r - alpha * q
        r, p = s, s + (s @ s) / (r @ r) * p
    assert float((A @ x - best).norm() / best.norm()) > 1e-4


def test_clipping_keeps_a_heavy_row_from_owning_a_direction():
    M, mask = problem(0)
    M[17] *= 60
    arguments = entries(M, mask)
    clipped, plain = (svd_clip_init(*arguments, 5, 2.0, clip) for clip in (True, False))
    assert incoherence(clipped) <= 20
    assert incoherence(plain) > 60
    assert float((clipped.T @ clipped - torch.eye(5, dtype=torch.float64)).abs().max()) <= 1e-12


def test_a_step_costs_what_checking_the_answer_does():
    """In operations; `benchmarks/backends.py` has the times."""
    rows = torch.arange(1000).repeat_interleave(100)
    cols = torch.arange(100).repeat(1000)
    vals, A = randn(100_000, seed=1), randn(1000, 32)
    _, exact = multi_regression(A, rows, cols, vals, 100, method="exact")
    _, sketched = multi_regression(A, rows, cols, vals, 100, tol=0.0, max_iter=5)
    assert sketched.steps == 5
    assert exact.flops / sketched.flops >= 1.5
    for axis, cases in {
        "entries": [(250, 32), (500, 32), (1000, 32)],
        "k": [(1000, 8), (1000, 16), (1000, 32)],
    }.items():
        sizes, flops = [], []
        for m, k in cases:
            few = rows < m
            _, info = multi_regression(A[:m, :k], rows[few], cols[few], vals[few], 100)
            sizes.append(m * 100 * k)
            flops.append(info.step_flops)
        assert np.polyfit(np.log(sizes), np.log(flops), 1)[0] == pytest.approx(1, abs=0.1), axis


def test_the_seed_decides():
    M, mask = problem(0)
    a, b, c = (fitted(M, mask, n_rounds=3, random_state=seed) for seed in (0, 0, 1))
    assert torch.equal(a.U_, b.U_)
    assert not torch.equal(a.U_, c.U_)


# --- a weight's outliers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("model.layers.0.self_attn.k_proj", (0.3433, 0.3467, 0.3892)),
        ("model.layers.0.self_attn.q_proj", (0.4973, 0.5020, 0.5274)),
        ("model.layers.10.self_attn.q_proj", (0.8229, 0.8315, 0.8242)),
    ],
)
def test_completion_beats_both_svds_on_weights_without_their_outliers(smollm2, site, expected):
    weight = smollm2.get_submodule(site).weight.detach().double()
    observed = ~largest_entries(weight, 0.01)
    assert int((~observed).sum()) == round(0.01 * weight.numel())
    port = MatrixCompletion(MatrixCompletionOptions())
    A, B = port.recover(weight, observed, 32, torch.Generator().manual_seed(0))
    found = errors_beside_svd(weight, observed, A, B)
    print(site, found)
    assert found[0] < min(found[1:])
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_without_gaps_it_is_the_truncated_svd():
    M = randn(30, 20)
    A, B = MatrixCompletion(MatrixCompletionOptions()).recover(M, None, 4, torch.Generator())
    u, s, vh = np.linalg.svd(M.numpy(), full_matrices=False)
    np.testing.assert_allclose(A @ B, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-12)


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = problem(0, 20, 15, 2, 0.9)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"rank": 0}, r"rank must be between 1 and min\(m, n\) = 15; got 0"),
        ({}, {"rank": 16}, "got 16"),
        ({}, {"mu": 0.0}, "mu must be positive"),
        ({}, {"ridge": -1.0}, "ridge must not be negative"),
        ({}, {"regressor": "lsqr"}, "unknown regressor 'lsqr'; known: sketch, sketch-gd, exact"),
        ({"rows": lambda r: r + 1}, {}, r"rows must be in 0\.\.19; got 1\.\.20"),
        ({"cols": lambda c: c - 1}, {}, r"cols must be in 0\.\.14; got -1\.\.13"),
        ({"rows": lambda r: r[:-1]}, {}, "differ in length"),
        ({"vals": lambda v: v * math.nan}, {}, "vals are not finite"),
        ({"vals": lambda v: v.long()}, {}, r"vals must be float32 or float64; got torch\.int64"),
        ({"rows": lambda r: r[:0], "cols": lambda c: c[:0], "vals": lambda v: v[:0]}, {}, "no entry is seen"),
        ({"rows": lambda r: torch.cat((r[:1], r[:-1])), "cols": lambda c: torch.cat((c[:1], c[:-1]))}, {},
         r"the entry \(0, 0\) is given more than once"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, arguments, message):
    rows, cols, vals, shape = entries(*GOOD)
    given = {"rows": rows, "cols": cols, "vals": vals}
    given |= {name: edit(given[name]) for name, edit in change.items()}
    with pytest.raises(InputError, match=message):
        AltMinCompletion(**{"rank": 2, **arguments}).fit(**given, shape=shape)


def test_rows_that_see_too_little_are_listed_and_a_ridge_helps(caplog):
    M, mask = problem(0, 30, 20, 3, 0.8)
    mask[[4, 9], 2:] = False
    with pytest.raises(
        InputError, match=r"2 rows have fewer than rank = 3 entries \(4, 9\): lower rank, or give ridge"
    ):
        fitted(M, mask, 3)
    with pytest.raises(InputError, match="must have one shape"):
        AltMinCompletion(3).fit_mask(M, mask[1:])
    found = fitted(M, mask, 3, ridge=1e-6)
    assert torch.isfinite(found.reconstruct()).all()
    M, mask = problem(0, 30, 20, 3, 0.3)
    with caplog.at_level(logging.WARNING, "llmcompress"):
        fitted(M, mask, 3, ridge=1e-3)
    assert "fewer than twice the degrees of freedom, 282" in caplog.text
