"""Volume sampling against enumerated laws, closed forms and its rivals."""

import itertools
import math

import numpy as np
import pytest
import torch

from llmcompress.backends.sampling.volume_sampling import (
    VolumeSampler,
    empirical_gram,
    iid_optimal,
    leading_basis,
    projection_dpp,
    repeated_dpp,
    volume_rescaled,
    weighted_lstsq,
)
from llmcompress.errors import InputError, RunError


def random_basis(N, m, seed=0):
    return torch.linalg.qr(torch.randn(N, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def legendre(m=12, N=2000):
    x = (np.arange(N) + 0.5) / N * 2 - 1
    return torch.from_numpy(np.linalg.qr(np.polynomial.legendre.legvander(x, m - 1))[0]), torch.from_numpy(x)


def hermite(m=10, N=2000):
    from scipy.stats import norm

    x = norm.ppf((np.arange(N) + 0.5) / N)
    return torch.from_numpy(np.linalg.qr(np.polynomial.hermite_e.hermevander(x, m - 1))[0]), torch.from_numpy(x)


def draw(Q, n, method, generator):
    if method == "repeated":
        return repeated_dpp(Q, n, generator)
    if method == "volume":
        return volume_rescaled(Q, n, "optimal", generator)
    return iid_optimal(Q, n, generator, "uniform" if method == "uniform" else "optimal")


def excesses(Q, f, n, method, draws, seed=0):
    """||f - fit||² / ||f - Pf||² of every draw."""
    generator = torch.Generator().manual_seed(seed)
    f = f[:, None]
    best = float((f - Q @ (Q.T @ f)).square().sum())
    found = []
    for _ in range(draws):
        idx, w = draw(Q, n, method, generator)
        try:
            fit = math.sqrt(len(Q)) * Q @ weighted_lstsq(Q, idx, w, f[idx])
            found.append(float((f - fit).square().sum()) / best)
        except RunError:
            found.append(math.inf)
    return np.array(found)


# --- laws ------------------------------------------------------------------------------------------------------------


def test_sets_are_drawn_with_their_squared_determinant():
    Q, generator = random_basis(7, 3), torch.Generator().manual_seed(1)
    subsets = list(itertools.combinations(range(7), 3))
    exact = np.array([float(torch.linalg.det(Q[list(s)])) ** 2 for s in subsets])
    assert exact.sum() == pytest.approx(1)
    counts = dict.fromkeys(subsets, 0)
    for chosen in repeated_dpp(Q, 3 * 20000, generator)[0].view(-1, 3).sort(1).values.tolist():
        counts[tuple(chosen)] += 1
    drawn = np.array(list(counts.values())) / 20000
    assert np.abs(drawn - exact).sum() / 2 <= 0.025
    inclusion = np.array([sum(share for s, share in zip(subsets, drawn, strict=True) if i in s) for i in range(7)])
    np.testing.assert_allclose(inclusion, Q.square().sum(1), atol=0.02)
    by_leverage = np.array([_without_replacement(Q.square().sum(1).numpy() / 3, s) for s in subsets])
    assert np.abs(by_leverage - exact).sum() / 2 >= 0.2


def _without_replacement(p, subset):
    return sum(p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a, b, c in itertools.permutations(subset))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("nu", ["optimal", "uniform"])
def test_the_composition_is_volume_rescaled_and_unbiased(n, nu):
    """All 6^n tuples: the sampler's composition law, from its steps, against det(G) nu^n."""
    Q = random_basis(6, 2, seed=3)
    N, m = Q.shape
    leverage = Q.square().sum(1)
    p = leverage / m if nu == "optimal" else torch.full((N,), 1 / N, dtype=torch.float64)
    target = torch.randn(N, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = Q.T @ target / math.sqrt(N)
    factor = math.factorial(n) / math.factorial(n - m) / n**m
    mass, worst, mean, iid_mean, inverse = 0.0, 0.0, 0.0, 0.0, torch.zeros(m, m, dtype=torch.float64)
    iid_mass = 0.0
    for tuple_ in itertools.product(range(N), repeat=n):
        idx = torch.tensor(tuple_)
        w = 1 / (N * p[idx])
        independent = float(p[idx].prod())
        G = empirical_gram(Q, idx, w)
        density = float(torch.linalg.det(G)) * independent / factor
        composed = 0.0
        for positions in itertools.combinations(range(n), m):
            rest = [i for i in range(n) if i not in positions]
            dpp = float(torch.linalg.det(Q[idx[list(positions)]])) ** 2 / math.factorial(m)
            composed += dpp * float(p[idx[rest]].prod()) / math.comb(n, m)
        worst = max(worst, abs(composed - density))
        mass += density
        if density > 1e-14:
            c = weighted_lstsq(Q, idx, w, target[idx])
            mean = mean + density * c
            iid_mean, iid_mass = iid_mean + independent * c, iid_mass + independent
            inverse += density * torch.linalg.inv(G)
    assert mass == pytest.approx(1, abs=1e-12)
    assert worst <= 1e-12
    assert float((mean - best).abs().max()) <= 1e-10
    assert float((iid_mean / iid_mass - best).abs().max()) >= 1e-3
    assert float(torch.linalg.eigvalsh(inverse)[-1]) <= n / (n - m + 1) + 1e-12


def test_the_sampler_follows_that_law():
    Q = random_basis(6, 2, seed=3)
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros((6, 6, 6))
    for _ in range(6000):
        counts[tuple(volume_rescaled(Q, 3, "optimal", generator)[0].tolist())] += 1 / 6000
    p = Q.square().sum(1) / 2
    exact = np.zeros((6, 6, 6))
    for tuple_ in itertools.product(range(6), repeat=3):
        idx = torch.tensor(tuple_)
        G = empirical_gram(Q, idx, 1 / (6 * p[idx]))
        exact[tuple_] = float(torch.linalg.det(G) * p[idx].prod()) * 9 / 6
    assert np.abs(counts - exact).sum() / 2 <= 0.1  # 6000 draws over 216 cells scatter by 0.07


def test_the_mean_excess_of_a_dpp_is_one_plus_m():
    Q = random_basis(12, 4, seed=2)
    f = torch.randn(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    best = float((f - Q @ (Q.T @ f)).square().sum())
    mean = 0.0
    for subset in itertools.combinations(range(12), 4):
        idx = torch.tensor(subset)
        w = 4 / (12 * Q[idx].square().sum(1))
        fit = math.sqrt(12) * Q @ weighted_lstsq(Q, idx, w, f[idx])
        mean += float(torch.linalg.det(Q[idx])) ** 2 * float((f - fit).square().sum()) / best
    assert mean == pytest.approx(5, abs=1e-9)


# --- stability and error ---------------------------------------------------------------------------------------------


def least_eigenvalues(Q, n, method, draws=60):
    generator = torch.Generator().manual_seed(0)
    return np.array(
        [float(torch.linalg.eigvalsh(empirical_gram(Q, *draw(Q, n, method, generator)))[0]) for _ in range(draws)]
    )


@pytest.mark.parametrize("features", [legendre, hermite])
def test_repeated_dpps_are_the_most_stable(features):
    Q, _ = features()
    m = Q.shape[1]
    stable = {method: (least_eigenvalues(Q, 8 * m, method) >= 0.5).mean() for method in ("repeated", "iid", "uniform")}
    assert stable["repeated"] >= 0.9
    assert stable["iid"] <= 0.75
    assert stable["uniform"] <= 0.4
    median = {method: np.median(least_eigenvalues(Q, 2 * m, method)) for method in ("repeated", "volume", "iid")}
    assert median["repeated"] >= 0.28
    assert median["volume"] >= 0.14
    assert median["iid"] <= 0.1


@pytest.mark.parametrize(
    ("features", "function"),
    [(legendre, lambda x: 1 / (1 + 5 * x**2)), (hermite, lambda x: (-(x**2) / 4).exp() * x.abs())],
)
def test_errors_at_two_rows_a_feature_and_at_one(features, function):
    Q, x = features()
    f, m = function(x), Q.shape[1]
    mean = {name: excesses(Q, f, 2 * m, name, 150).mean() for name in ("repeated", "volume", "iid", "uniform")}
    assert mean["repeated"] <= 2.5
    assert mean["volume"] <= 4.5
    assert mean["iid"] >= 10
    assert mean["uniform"] >= 1000
    assert np.median(excesses(Q, f, m, "repeated", 60)) <= 12
    assert np.median(excesses(Q, f, m, "iid", 60)) >= 15
    conditioned = {"repeated_dpp": [], "iid_optimal": []}
    errors, generator = [], torch.Generator().manual_seed(0)
    best = float((f - Q @ (Q.T @ f)).square().sum())
    for method, tries in conditioned.items():
        for _ in range(40):
            sampler = VolumeSampler(2 * m, method, delta=0.8, random_state=generator).fit(Q)
            tries.append(sampler.n_tries_)
            assert sampler.lambda_min_ >= 0.2
            if method == "repeated_dpp":
                own = sampler.basis_
                c = weighted_lstsq(own, sampler.indices_, sampler.weights_, f[sampler.indices_, None])
                errors.append(float((f - math.sqrt(len(own)) * (own @ c)[:, 0]).square().sum()) / best)
    assert np.mean(errors) <= 1.9
    assert np.mean(conditioned["repeated_dpp"]) <= 2
    assert np.mean(conditioned["iid_optimal"]) >= 3


def test_heavy_tailed_rows():
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(3000, 16)) * (rng.pareto(1.2, size=(3000, 1)) + 0.05))
    f = torch.from_numpy(rng.normal(size=3000)) + X.norm(dim=1).sqrt()
    Q = leading_basis(X, None)
    mean = {name: excesses(Q, f, 32, name, 60).mean() for name in ("repeated", "iid", "uniform")}
    assert mean["repeated"] <= 2.6
    assert mean["repeated"] <= 0.6 * mean["iid"]
    assert mean["uniform"] >= 8


def test_mixture_weights_are_bounded_and_multiplicities_kept():
    Q = random_basis(40, 4)
    generator = torch.Generator().manual_seed(0)
    assert float(iid_optimal(Q, 200, generator, "mixture")[1].max()) <= 2
    idx, w = repeated_dpp(Q, 200, generator)
    assert len(idx) == len(w) == 200
    assert len(idx.unique()) < 200
    assert all(len(block.unique()) == 4 for block in idx.split(4))


def test_low_rank_rows_are_truncated_and_types_kept():
    X = random_basis(50, 3) @ torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = VolumeSampler(6, random_state=0).fit(X)
    assert sampler.rank_ == 3
    assert VolumeSampler(6, rank=3, random_state=0).fit(X.float()).weights_.dtype == torch.float32
    assert float(sampler.leverage_.sum()) == pytest.approx(3)


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = random_basis(30, 4)


@pytest.mark.parametrize(
    ("X", "arguments", "message"),
    [
        (GOOD, {"n_samples": 3}, "n_samples must be >= rank"),
        (GOOD, {"rank": 5}, r"rank must be between 1 and min\(N, d\) = 4"),
        (GOOD * math.nan, {}, "X is not finite"),
        (GOOD[:0], {}, "X is empty"),
        (GOOD * 0, {}, "X is zero"),
        (GOOD, {"delta": 1.0}, r"delta must be in \(0, 1\)"),
        (GOOD, {"method": "dpp"}, "unknown method 'dpp'"),
        (GOOD, {"nu": "best"}, "unknown nu 'best'"),
    ],
)
def test_bad_input_is_named(X, arguments, message):
    with pytest.raises(InputError, match=message):
        VolumeSampler(**{"n_samples": 8, **arguments}).fit(X)


def test_functions_refuse_what_is_not_orthonormal_or_not_positive():
    with pytest.raises(InputError, match="orthonormal columns"):
        projection_dpp(2 * GOOD, torch.Generator())
    with pytest.raises(InputError, match="weights must be positive"):
        weighted_lstsq(GOOD, torch.arange(5), torch.zeros(5), torch.ones(5, 1))
    with pytest.raises(RunError, match="do not span"):
        weighted_lstsq(GOOD, torch.tensor([0, 0, 0, 1]), torch.ones(4), torch.ones(4, 1, dtype=torch.float64))


def test_exhausted_tries_name_the_sizes():
    with pytest.raises(RunError, match=r"n = 4 rows for m = 4 features .* delta = 0.01"):
        VolumeSampler(4, delta=0.01, max_tries=3, random_state=0).fit(GOOD)
