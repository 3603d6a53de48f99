"""The sub-gradient method: errors as a power of the start, any rank, outliers, noise; and Grams from readings."""

import logging
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import HuberRegressor

from llmcompress.backends.recovery.subgradient import (
    DenseOperator,
    QuadraticProbes,
    SubGM,
    SubGMOptions,
    SubGMRecovery,
    descend,
    phi_gaussian,
    phi_outlier,
    sign_rip_direction,
    spectral_init,
)
from llmcompress.errors import InputError, RunError

D, RANK, M = 20, 2, 1200
NORM = 1.2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def truth(d=D, r=RANK, seed=0):
    U = randn(d, r, seed=seed)
    X = U @ U.T
    return NORM * X / X.norm()


def outliers(m, share, seed, size=100.0):
    chosen = torch.rand(m, generator=generator(seed)) < share
    return torch.where(chosen, size * randn(m, seed=seed + 1), 0)


def problem(seed, d=D, r=RANK, m=M, share=0.2):
    A = randn(m, d, d, seed=1000 + seed)
    A = (A + A.mT) / 2
    X = truth(d, r, seed)
    return DenseOperator(A), X, DenseOperator(A).forward(X) + outliers(m, share, 2000 + seed)


def error(found, X):
    return float((found - X).norm())


def fit(A, y, rank=D, **arguments):
    return SubGMRecovery(rank, **{"max_iter": 1500, **arguments}).fit(A, y)


# --- outliers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_the_error_is_a_power_of_the_start(seed):
    A, X, y = problem(seed)
    alphas = (1e-2, 1e-3, 1e-4)
    found = [error(fit(A, y, alpha=alpha).X_, X) for alpha in alphas]
    print(found)
    assert all(e <= bound for e, bound in zip(found, (3e-3, 2e-4, 1e-5), strict=True))
    assert np.polyfit(np.log(alphas), np.log(found), 1)[0] >= 1.1


def test_least_squares_and_descent_on_squares_are_ruined():
    A, X, y = problem(0)
    full = torch.linalg.lstsq(A.flat, y, driver="gelsd").solution.view(D, D)
    assert error(full, X) > 5
    U = spectral_init(A, y, D, 1e-3)
    for _ in range(1500):
        U = U - 0.02 * A.combine((A.read(U) - y) / A.m, U)
    assert error(U @ U.T, X) > 1


def steps_to(A, X, y, rank, bound=1e-4):
    scale = float(y.abs().median()) / 0.6745
    U, t = spectral_init(A, y, rank, 1e-4), 0
    while error(scale * U @ U.T, X) > bound:
        U = descend(A, y / scale, U, "geometric", 0.4 * 0.985**t, 0.985, 1).U
        t += 1
    return t


def test_the_rank_need_not_be_known():
    A, X, y = problem(0)
    spent = [steps_to(A, X, y, rank) for rank in (2, 4, D)]
    print(spent)
    assert max(spent) <= 1.05 * min(spent)


def test_the_error_decays_with_the_steps():
    A, X, y = problem(0)
    errors = [error(fit(A, y, max_iter=t).X_, X) for t in (300, 600)]
    assert math.log(errors[1] / errors[0]) / 300 == pytest.approx(math.log(0.985), rel=0.05)
    constant = fit(A, y, step="constant", eta0=0.02)
    sublinear = fit(A, y, step="sublinear", eta0=0.4)
    scale = constant.scale_
    large = descend(A, y / scale, randn(D, D, seed=5) / math.sqrt(D), "geometric", 0.4, 0.985, 1500).U
    rivals = [error(constant.X_, X), error(sublinear.X_, X), error(scale * large @ large.T, X)]
    print(errors, rivals)
    assert rivals[0] >= 1e-3
    assert rivals[1] >= 1e-3
    assert rivals[2] >= 3e-3


def test_fewer_measurements_than_unknowns():
    A, X, y = problem(0, 30, 1, 420, 0.1)
    assert error(fit(A, y, 30, alpha=1e-5).X_, X) <= 5e-5


def test_without_noise_steps_by_the_loss_go_on_for_ever():
    A, X, _ = problem(0)
    y = A.forward(X)
    assert error(fit(A, y, step="loss").X_, X) <= 1e-6


# --- noise -----------------------------------------------------------------------------------------------------------


def test_under_gaussian_noise_the_minimiser_is_not_the_truth():
    seed = 0
    A, X, _ = problem(seed)
    nu = 0.5
    y = A.forward(X) + nu * randn(M, seed=3000 + seed)
    small = fit(A, y)
    scale = small.scale_
    start = randn(D, D, seed=6) / math.sqrt(D)
    large = descend(A, y / scale, start, "geometric", 0.4, 0.985, 1500)
    large_X = scale * large.U @ large.U.T
    print(error(small.X_, X), error(large_X, X), small.loss_curve_[-1], scale * large.losses[-1])
    assert error(small.X_, X) <= 1.7 * nu * math.sqrt(D * RANK / M)
    assert error(small.X_, X) <= 0.7 * error(large_X, X)
    assert scale * large.losses[-1] < small.loss_curve_[-1]
    assert scale * large.losses[-1] < float((A.forward(X) - y).abs().mean())


def test_the_subdifferential_keeps_its_direction():
    X = truth(seed=1)
    X = 0.7 * X / X.norm()
    A = randn(20000, D, D, seed=7)
    p, nu = 0.3, 0.5
    s = outliers(20000, p, 8, size=2.0)
    found = float((sign_rip_direction(A, X, s) * X).sum() / 0.7)
    assert found == pytest.approx(phi_outlier(0.7, 2 * randn(100_000, seed=9), p), rel=0.05)
    noisy = float((sign_rip_direction(A, X, nu * randn(20000, seed=10)) * X).sum() / 0.7)
    assert noisy == pytest.approx(phi_gaussian(0.7, nu), rel=0.05)
    assert phi_gaussian(0.7, nu) == pytest.approx(0.6493, abs=1e-4)


# --- probes ----------------------------------------------------------------------------------------------------------


def test_probes_measure_what_their_matrices_do():
    a, b = randn(30, 6, seed=1), randn(30, 6, seed=2)
    dense = (a[:, :, None] * a[:, None, :] - b[:, :, None] * b[:, None, :]) / math.sqrt(2)
    probes, reference = QuadraticProbes(a, b), DenseOperator(dense)
    U, v = randn(6, 3, seed=3), randn(30, seed=4)
    torch.testing.assert_close(probes.read(U), reference.read(U))
    torch.testing.assert_close(probes.combine(v, U), reference.combine(v, U))
    torch.testing.assert_close(probes.adjoint(v), reference.adjoint(v))


@pytest.mark.parametrize("step", ["geometric", "median"])
def test_quadratic_probes(step):
    probes = QuadraticProbes(randn(M, D, seed=1), randn(M, D, seed=2))
    X = truth()
    y = probes.read(torch.linalg.cholesky(X + 1e-14 * torch.eye(D, dtype=torch.float64))) + outliers(M, 0.1, 3)
    assert error(fit(probes, y, step=step).X_, X) <= 5e-5


def test_single_precision():
    A, X, y = problem(0)
    found = fit(DenseOperator(A.flat.view(M, D, D).float()), y.float(), alpha=1e-3)
    assert found.X_.dtype == torch.float32
    assert error(found.X_.double(), X) <= 3e-4


def test_a_small_problem_against_robust_regression_of_all_entries():
    """Huber's estimator of all 36 entries, which knows nothing of the rank."""
    A, X, y = problem(3, 8, 1, 300, 0.1)
    lower = torch.tril_indices(8, 8)
    double = torch.where(lower[0] == lower[1], 1.0, 2.0)
    design = (A.flat.view(-1, 8, 8)[:, lower[0], lower[1]] * double).numpy()
    huber = HuberRegressor(alpha=0.0, fit_intercept=False, max_iter=2000).fit(design, y.numpy())
    plain = torch.zeros(8, 8, dtype=torch.float64)
    plain[lower[0], lower[1]] = torch.from_numpy(huber.coef_)
    plain = plain + plain.tril(-1).T
    found = fit(A, y, 8)
    print(error(found.X_, X), error(plain, X))
    assert error(plain, X) <= 1e-4
    torch.testing.assert_close(found.X_, plain, atol=1e-4, rtol=0)
    assert found.effective_rank_ == 1


# --- Grams -----------------------------------------------------------------------------------------------------------


def activations(bad=0.05, d=32, batches=3000, seed=0):
    """Rows of rank 3 and a tail of 2 %; a twentieth of the batches of 64 rows 50 times as long."""
    basis = torch.linalg.qr(randn(d, 3, seed=seed))[0]
    rows = randn(batches * 64, 3, seed=seed + 1) @ basis.T + 0.02 * randn(batches * 64, d, seed=seed + 2)
    corrupt = torch.rand(batches, generator=generator(seed + 3)) < bad
    return rows, rows * torch.where(corrupt, 50.0, 1.0).repeat_interleave(64)[:, None]


@pytest.mark.parametrize("step", ["geometric", "median"])
def test_bad_batches_do_not_ruin_a_gram(step):
    clean, dirty = activations()
    exact = clean.T @ clean
    port = SubGM(SubGMOptions(rank=32, probes=3000, step=step))
    port.start(len(dirty), 32, generator(4))
    for part in dirty.split(10_000):  # not a multiple of the batches' 64 rows
        port.update(part)
    gram, (note,) = port.gram()
    found = float((gram - exact).norm() / exact.norm())
    plain = float((dirty.T @ dirty - exact).norm() / exact.norm())
    print(found, plain, note)
    assert found <= 0.15
    assert plain >= 50
    assert float(torch.linalg.eigvalsh(gram)[0]) >= -1e-6 * float(gram.norm())


def test_the_port_fits_entries_with_outliers():
    """Nearer in the l1 loss, and to the truth, than the truncated decomposition it begins with."""
    L = randn(40, 3, seed=1) @ randn(3, 30, seed=2)
    bad = torch.rand(40, 30, generator=generator(3)) < 0.05
    entries = torch.where(bad, 20 * randn(40, 30, seed=4), L)
    A, B = SubGM(SubGMOptions(eta0=1.0)).recover(entries, None, 3, generator())
    u, s, vh = torch.linalg.svd(entries)
    start = (u[:, :3] * s[:3]) @ vh[:3]
    print(error(A @ B, L) / float(L.norm()), error(start, L) / float(L.norm()))
    assert error(A @ B, L) <= 1e-6 * error(start, L)
    assert (A @ B - entries).abs().mean() < (start - entries).abs().mean()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ({"rank": 0}, lambda y: y, "rank must be between 1 and d = 20; got 0"),
        ({"rank": 21}, lambda y: y, "got 21"),
        ({"alpha": 0.0}, lambda y: y, "alpha must be positive"),
        ({"rho": 1.0}, lambda y: y, r"rho must be in \(0, 1\)"),
        ({"step": "cosine"}, lambda y: y, "unknown step 'cosine'; known: geometric, loss"),
        ({"step": "loss", "outliers": True}, lambda y: y, "step loss needs measurements without outliers"),
        ({}, lambda y: y[1:], r"y must have the 1200 measurements of A; got shape \(1199,\)"),
        ({}, lambda y: y * math.nan, "y is not finite"),
        ({}, lambda y: y * 0, "y is zero"),
    ],
)
def test_bad_input_is_named(arguments, change, message):
    A, _, y = problem(0)
    with pytest.raises(InputError, match=message):
        SubGMRecovery(**{"rank": 5, **arguments}).fit(A, change(y))


def test_bad_measurements_and_targets(caplog):
    A, _, y = problem(0)
    with pytest.raises(InputError, match=r"A must be \(m, d, d\); got shape \(5, 3, 4\)"):
        SubGMRecovery(2).fit(torch.ones(5, 3, 4), torch.ones(5))
    with pytest.raises(InputError, match="A is empty"):
        DenseOperator(torch.ones(0, 3, 3))
    with pytest.raises(InputError, match="A is not finite"):
        DenseOperator(torch.full((2, 3, 3), math.nan))
    with pytest.raises(InputError, match=r"a and b must be \(m, d\)"):
        QuadraticProbes(torch.ones(3, 2), torch.ones(2, 2))
    with pytest.raises(InputError, match="there are no probes"):
        QuadraticProbes(torch.ones(0, 2), torch.ones(0, 2))
    with pytest.raises(InputError, match="no positive direction: target not PSD or sign flipped"):
        SubGMRecovery(2).fit(torch.eye(3).expand(4, 3, 3), -torch.ones(4))
    with pytest.raises(RunError, match="the descent diverges; lower eta0 = 1000"):
        fit(A, y, step="constant", eta0=1000.0)
    with caplog.at_level(logging.WARNING, "llmcompress"):
        fit(A, y, max_iter=100)
    assert "100 steps of factor 0.985 end before the start of size 0.0001 is outgrown" in caplog.text
