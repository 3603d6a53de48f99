"""Sparse regression on random supports: the lemma, no condition number, rates, against Lasso, OMP and IHT."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso, LassoLars, orthogonal_mp

from llmcompress.backends.regression.elimination import eliminate_columns
from llmcompress.backends.regression.sparse_regression import (
    RandomSupport,
    RandomSupportOptions,
    RandomSupportRegressor,
    backward_eliminate,
    error_bound,
    free_columns,
    iterative_hard_thresholding,
    n_free,
    precondition,
    support_ratio,
)
from llmcompress.errors import InputError


def design(kind, N, d, M, rng):
    G = rng.normal(size=(N, d))
    if kind == "spike":
        X = rng.normal(size=(N, 6)) * np.geomspace(M, 1, 6) @ rng.normal(size=(6, d)) + G
    elif kind == "tree":
        a, b = rng.integers(4, size=d), rng.integers(4, size=d)
        top, sub = rng.normal(size=(N, 4)), rng.normal(size=(N, 4, 4))
        X = M * top[:, a] + math.sqrt(M) * sub[:, a, b] + G
    elif kind == "walk":
        X = np.cumsum(G, axis=1)
    elif kind == "hetero":
        tau = rng.permutation(np.where(np.arange(d) % 2, 1.0, 1 / M))
        X = rng.normal(size=(N, 2)) @ rng.normal(size=(2, d)) + tau * G
    else:
        X = G
    return X / np.linalg.norm(X, axis=0) * math.sqrt(N)


def planted(X, rng, k=4, sigma=0.3):
    """y, signal: w is the smallest right singular vector of the support's columns, scaled to a signal of unit RMS."""
    N, d = X.shape
    support = rng.choice(d, k, replace=False)
    w = np.linalg.svd(X[:, support])[2][-1]
    signal = X[:, support] @ w
    w = w * math.sqrt(N) / np.linalg.norm(signal)
    signal = X[:, support] @ w
    return signal + sigma * rng.normal(size=N), signal, support


def T(x):
    return torch.from_numpy(np.ascontiguousarray(x))


# --- the lemma -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "spike", "tree", "walk", "hetero"])
def test_free_columns_bound_the_weights(kind):
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    violated, largest, without = 0, 0.0, 0.0
    for draw in range(60):
        if draw % 10 == 0:
            X = T(design(kind, 150, 600, 1e6 if kind == "hetero" else 1e5, rng))
        support = T(rng.choice(600, 4, replace=False))
        pre = precondition(X, free_columns(600, 4, 0.2, generator))
        single = torch.tensor([support_ratio(X, pre, support)])
        columns = X[:, support]
        distance = 1 / torch.linalg.pinv(columns).norm(dim=1)
        if (pre.scale[support] > distance * (1 + 1e-6)).any():
            violated += 1
        else:
            largest = max(largest, float(single))
        without = max(without, support_ratio(X, None, support))
    assert n_free(4, 0.2) == 60
    assert violated / 60 <= 0.2
    assert largest <= 4.0001
    if kind in ("spike", "tree", "hetero"):
        assert without >= 1e4


# --- no condition number ---------------------------------------------------------------------------------------------


def error(fitted, signal):
    return float(np.square(np.asarray(fitted) - signal).mean())


def test_the_condition_number_does_not_matter():
    lasso, pruned, sizes = {}, {}, []
    for M in (1e2, 1e4, 1e8):
        rng, errors = np.random.default_rng(1), {"lasso": [], "pruned": []}
        for draw in range(14):
            X = design("hetero", 240, 600, M, rng)
            y, signal, _ = planted(X, rng)
            plain = RandomSupportRegressor(4, sigma=0.3, prune=False, random_state=draw).fit(T(X), T(y))
            full = RandomSupportRegressor(4, sigma=0.3, random_state=draw).fit(T(X), T(y))
            errors["lasso"].append(error(plain.fitted_, signal))
            errors["pruned"].append(error(full.fitted_, signal))
            sizes.append(len(full.support_))
        lasso[M], pruned[M] = np.mean(errors["lasso"]), np.mean(errors["pruned"])
    assert max(lasso.values()) <= 0.07
    assert max(lasso.values()) / min(lasso.values()) <= 1.15
    assert max(pruned.values()) <= 0.012
    assert 3 <= np.mean(sizes) <= 5


def test_lasso_omp_iht_and_free_columns_alone_fail_there():
    rng, ours, others = np.random.default_rng(1), [], {"lasso": [], "omp": [], "iht": [], "free": []}
    for draw in range(14):
        X = design("hetero", 240, 600, 1e4, rng)
        y, signal, _ = planted(X, rng)
        fit = RandomSupportRegressor(4, sigma=0.3, prune=False, random_state=draw).fit(T(X), T(y))
        ours.append(error(fit.fitted_, signal))
        plain = LassoLars(alpha=fit.lam_, fit_intercept=False, max_iter=2000).fit(X, y)
        others["lasso"].append(error(plain.predict(X), signal))
        others["omp"].append(error(X @ orthogonal_mp(X, y, n_nonzero_coefs=4), signal))
        others["iht"].append(error(T(X) @ iterative_hard_thresholding(T(X), T(y), 4, 200), signal))
        free = X[:, fit.free_idx_]
        others["free"].append(error(free @ np.linalg.lstsq(free, y)[0], signal))
    mean = np.mean(ours)
    assert np.mean(others["lasso"]) >= 4 * mean
    assert np.mean(others["omp"]) >= 4 * mean
    assert np.mean(others["iht"]) >= 10 * mean
    assert np.mean(others["free"]) >= 10 * mean


# --- rates -----------------------------------------------------------------------------------------------------------


def mean_errors(N, d, draws=8, seed=2):
    rng, lasso, pruned = np.random.default_rng(seed), [], []
    for draw in range(draws):
        X = design("hetero", N, d, 1e4, rng)
        y, signal, _ = planted(X, rng)
        plain = RandomSupportRegressor(4, sigma=0.3, prune=False, random_state=draw).fit(T(X), T(y))
        lasso.append(error(plain.fitted_, signal))
        assert lasso[-1] <= error_bound(4, d, N, 0.3, 0.2, 1.0)
        pruned.append(error(RandomSupportRegressor(4, sigma=0.3, random_state=draw).fit(T(X), T(y)).fitted_, signal))
    return np.mean(lasso), np.mean(pruned)


def test_the_error_falls_as_one_over_the_rows_and_hardly_grows_with_the_columns():
    sizes = [120, 240, 480, 960]
    found = [mean_errors(N, 600) for N in sizes]
    assert -1.25 <= np.polyfit(np.log(sizes), np.log([lasso for lasso, _ in found]), 1)[0] <= -0.8
    assert found[-1][1] <= 0.0025
    assert mean_errors(240, 2400, 6)[0] / mean_errors(240, 300, 6)[0] <= 1.8


# --- identities ------------------------------------------------------------------------------------------------------


def test_one_non_zero_is_the_plain_lasso():
    rng = np.random.default_rng(0)
    X = design("iid", 80, 40, 1, rng)
    y, _, _ = planted(X, rng, k=1)
    fit = RandomSupportRegressor(1, sigma=0.3, prune=False, tol=1e-12).fit(T(X), T(y))
    assert len(fit.free_idx_) == 0
    theirs = Lasso(alpha=fit.lam_, fit_intercept=False, tol=1e-12, max_iter=50000).fit(X, y).coef_
    np.testing.assert_allclose(fit.coef_, theirs, atol=1e-6)


def test_the_scale_of_columns_does_not_matter():
    rng = np.random.default_rng(3)
    X = design("hetero", 120, 200, 1e4, rng)
    y, _, _ = planted(X, rng)
    scaled = X * np.exp(3 * rng.normal(size=200))
    fits = [RandomSupportRegressor(4, sigma=0.3, prune=False, random_state=0).fit(T(x), T(y)) for x in (X, scaled)]
    assert float((fits[0].fitted_ - fits[1].fitted_).abs().max()) <= 1e-9


@pytest.mark.parametrize("sigma", [1e-1, 1e-3, 1e-5])
def test_the_error_is_in_units_of_the_noise(sigma):
    rng = np.random.default_rng(4)
    X = design("hetero", 240, 600, 1e4, rng)
    y, signal, _ = planted(X, rng, sigma=sigma)
    fit = RandomSupportRegressor(4, sigma=sigma, prune=False, random_state=0, tol=1e-10).fit(T(X), T(y))
    assert math.sqrt(error(fit.fitted_, signal)) / sigma <= 1.2


def test_unknown_noise_is_found():
    rng, errors = np.random.default_rng(5), []
    for draw in range(8):
        X = design("hetero", 240, 600, 1e4, rng)
        y, signal, _ = planted(X, rng)
        fit = RandomSupportRegressor(4, random_state=draw).fit(T(X), T(y))
        assert 0.8 <= fit.sigma_ / 0.3 <= 1.25
        errors.append(error(fit.fitted_, signal))
    assert np.mean(errors) <= 0.012


def test_deleting_a_column_costs_what_it_says():
    rng = np.random.default_rng(6)
    X, y = rng.normal(size=(50, 9)), rng.normal(size=50)
    kept, coef = backward_eliminate(T(X), T(y), torch.arange(9), sigma=1e-9, max_nnz=8)
    rss = [np.linalg.lstsq(np.delete(X, j, 1), y)[1][0] for j in range(9)]
    assert set(range(9)) - set(kept.tolist()) == {int(np.argmin(rss))}
    np.testing.assert_allclose(coef, np.linalg.lstsq(X[:, kept], y)[0], atol=1e-10)


def test_batched_elimination_is_the_one_by_one():
    rng = np.random.default_rng(7)
    D, Y = rng.normal(size=(40, 12)), rng.normal(size=(40, 5))
    indices, values = eliminate_columns(T(D.T @ D), T(Y.T @ D), 4)
    for j in range(5):
        kept, coef = backward_eliminate(T(D), T(Y[:, j]), torch.arange(12), 1e-9, 4)
        assert indices[j].tolist() == kept.tolist()
        np.testing.assert_allclose(values[j], coef, atol=1e-9)


def test_many_targets_share_the_free_columns():
    rng = np.random.default_rng(8)
    X = design("hetero", 120, 200, 1e3, rng)
    Y = np.stack([planted(X, rng)[0] for _ in range(3)], 1)
    together = RandomSupportRegressor(4, sigma=0.3, random_state=1).fit(T(X), T(Y))
    for j in range(3):
        alone = RandomSupportRegressor(4, sigma=0.3, random_state=1).fit(T(X), T(Y[:, j]))
        assert alone.free_idx_.tolist() == together.free_idx_.tolist()
        torch.testing.assert_close(alone.coef_, together.coef_[:, j])
    assert together.predict(T(X)).shape == (120, 3)


def test_the_coder_finds_planted_codes_either_way():
    rng = np.random.default_rng(9)
    for k, options in ((30, {}), (120, {"n_free": 16, "k": 3, "max_nnz": 3})):
        D = rng.normal(size=(60, k))
        D /= np.linalg.norm(D, axis=0)
        codes = np.zeros((6, k))
        for row in codes:
            row[rng.choice(k, 3, replace=False)] = rng.choice([-1, 1], 3) * (1 + rng.random(3))
        coder = RandomSupport(RandomSupportOptions(**options))
        found = coder.code(T(D), T(D @ codes.T + 1e-3 * rng.normal(size=(60, 6))), 3, torch.Generator().manual_seed(0))
        dense = torch.zeros(6, k, dtype=torch.float64).scatter_(1, found.indices, found.values)
        np.testing.assert_allclose(dense, codes, atol=0.02)


# --- bad input -------------------------------------------------------------------------------------------------------

X0, Y0 = T(np.random.default_rng(0).normal(size=(30, 12))), torch.ones(30, dtype=torch.float64)


@pytest.mark.parametrize(
    ("X", "y", "arguments", "message"),
    [
        (X0, Y0, {"k": 0}, "k must be between 1 and the 12"),
        (X0, Y0, {"k": 13}, "k must be between 1 and the 12"),
        (X0, Y0, {"k": 2, "delta": 1.0}, r"delta must be in \(0, 1\)"),
        (X0[:8], Y0[:8], {"k": 3}, r"n_free \(r\) must be smaller than the number of rows \(N\)"),
        (X0, Y0[:29], {"k": 2}, "X has 30 rows and y 29"),
        (X0[:0], Y0[:0], {"k": 2}, "X is empty"),
        (X0 * math.nan, Y0, {"k": 2}, "X is not finite"),
        (X0, Y0, {"k": 2, "sigma": 0.0}, "sigma must be positive"),
        (X0, Y0, {"k": 2, "n_free": torch.tensor([1, 1])}, "distinct"),
        (X0, Y0, {"k": 2, "n_free": torch.tensor([12])}, r"in 0\.\.11"),
    ],
)
def test_bad_input_is_named(X, y, arguments, message):
    with pytest.raises(InputError, match=message):
        RandomSupportRegressor(**arguments).fit(X, y)


def test_zero_columns_get_nothing_and_types_are_kept():
    X = X0.clone()
    X[:, 5] = 0
    fit = RandomSupportRegressor(2, n_free=4, random_state=0).fit(X.float(), (X[:, 1] + 0.1 * X[:, 2]).float())
    assert fit.coef_.dtype == torch.float32
    assert float(fit.coef_[5]) == 0
    assert torch.isfinite(fit.coef_).all()
    with pytest.raises(InputError, match="candidates must be distinct"):
        backward_eliminate(X0, Y0, torch.tensor([0, 0]), 1.0)
