"""lp sensitivities, Lewis weights and the samples drawn by them: against linear programmes, grids and theory."""

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.exceptions import ConvergenceWarning

from llmcompress.backends.sampling.sensitivity_sampling import (
    Distortion,
    SensitivitySampler,
    distortion,
    leverage_scores,
    lewis_weights,
    lp_sensitivities,
    root_leverage_sample,
    sample_size,
)
from llmcompress.backends.sampling.weights import _lewis, orthonormal_basis
from llmcompress.errors import InputError


def heavy_rows(n=150, d=5, tail=1.5, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) * (1 + rng.pareto(tail, size=(n, 1))))


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "gap"), [(1.25, 1e-5), (1.5, 1e-7), (3, 1e-7), (4, 1e-7), (6, 1e-7)])
def test_primal_and_dual_bounds_meet_between_the_lewis_bounds(p, gap):
    X = heavy_rows()
    lower, upper = lp_sensitivities(X, p)
    assert float((upper / lower - 1).abs().max()) <= gap
    below, above = lp_sensitivities(X, p, "lewis_bound")
    assert (lower >= below * (1 - 1e-6)).all()
    assert (upper <= above * (1 + 1e-6)).all()
    total = float(upper.sum())
    smaller, larger = sorted((5.0, 5 ** (p / 2)))
    assert smaller * (1 - 1e-6) <= total <= larger * (1 + 1e-6)
    leverage, weights = leverage_scores(X), lewis_weights(X, p)
    excess = weights - leverage ** (p / 2)
    assert (excess <= 1e-9).all() if p <= 2 else (excess >= -1e-9).all()


def test_at_two_sensitivities_and_lewis_weights_are_leverage():
    X = heavy_rows()
    hat = (X @ torch.linalg.solve(X.T @ X, X.T)).diagonal()
    for found in (*lp_sensitivities(X, 2), lewis_weights(X, 2), leverage_scores(X)):
        torch.testing.assert_close(found, hat, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [1.5, 3, 4])
def test_in_the_plane_a_grid_of_angles_finds_the_same(p):
    X = heavy_rows(d=2)
    angle = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)
    powers = (X @ torch.stack((angle.cos(), angle.sin()))).abs().pow(p)
    grid = (powers / powers.sum(0)).amax(1)
    lower, upper = lp_sensitivities(X, p)
    assert float((grid / upper - 1).max()) <= 1e-9
    assert float((1 - grid / lower).max()) <= 1e-6


def test_at_one_the_linear_programme_of_the_primal_agrees():
    X = heavy_rows(60)
    found = lp_sensitivities(X, 1)[0]
    x = X.numpy()
    identity = np.eye(60)
    for i in (0, 7, 33):  # min sum t, |X v| <= t, x_i v = 1
        best = scipy.optimize.linprog(
            np.append(np.zeros(5), np.ones(60)),
            np.block([[x, -identity], [-x, -identity]]), np.zeros(120),
            np.append(x[i], np.zeros(60))[None], [1.0], bounds=[(None, None)] * 65,
        ).fun  # fmt: skip
        assert float(found[i]) == pytest.approx(1 / best, rel=1e-8)
    below, above = lp_sensitivities(X, 1, "lewis_bound")
    assert (below <= found * (1 + 1e-6)).all()
    assert (found <= above * (1 + 1e-6)).all()


def test_a_coreset_stands_for_the_norm():
    X = heavy_rows(3000)
    whole = lewis_weights(X, 4)
    lower, upper = lp_sensitivities(X, 4, "coreset")
    assert float((upper / lower - 1).max()) <= 1e-6
    assert (upper >= 0.7 * whole).all()
    assert (lower <= 1.3 * 5 * whole).all()


def test_sketched_leverage_is_close():
    X = heavy_rows(4000, 8)
    ratio = leverage_scores(X, "sketch") / leverage_scores(X)
    assert 0.6 <= float(ratio.min()) <= float(ratio.max()) <= 1.6


# --- Lewis weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 1.5, 3, 4, 6, 8, 12])
def test_the_lewis_sweep_converges_at_its_rate(p):
    X = heavy_rows()
    weights, history = _lewis(orthonormal_basis(X), p, 1e-10, 100 if p == 12 else 60)
    assert history[-1] <= 1e-10
    assert float(weights.sum()) == pytest.approx(5, abs=1e-8)
    inverse = torch.linalg.inv(X.T @ (weights[:, None] ** (1 - 2 / p) * X))
    quadratic = ((X @ inverse) * X).sum(1)
    torch.testing.assert_close(weights, quadratic ** (p / 2), rtol=1e-8, atol=0)
    theory = abs(1 - p / 2) if p <= 2 else (p - 2) / (p + 2)
    tail = [b / a for a, b in itertools.pairwise(history) if b > 1e-9]
    assert np.mean(tail[-3:]) == pytest.approx(theory, abs=0.03)


def test_a_sweep_that_stops_early_says_so():
    with pytest.warns(ConvergenceWarning, match=r"residual .* after 3 sweeps"):
        lewis_weights(heavy_rows(), 6, max_iter=3)


# --- the right score -------------------------------------------------------------------------------------------------


def median_distortion(X, m, p, score, draws=20, seed=0, directions=1000):
    generator = torch.Generator().manual_seed(seed)
    sampler = SensitivitySampler(m, p, score, random_state=generator).fit(X)
    measure = Distortion(X, p, directions, generator)
    return float(np.median([measure(*sampler.sample()) for _ in range(draws)]))


def with_spikes(n, spikes, norm, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.vstack([rng.normal(size=(n, 3)), norm * np.eye(3)[np.arange(spikes) % 3]]))


def test_at_four_lewis_and_sensitivity_beat_uniform_and_leverage():
    X = with_spikes(60000, 3, 9.8 * math.sqrt(3))
    assert median_distortion(X, 250, 4, "lewis") <= 0.25
    assert median_distortion(X, 250, 4, "sensitivity") <= 0.25
    assert median_distortion(X, 250, 4, "uniform") >= 0.40
    assert median_distortion(X, 250, 4, "leverage") >= 0.40


def test_at_one_lewis_beats_leverage():
    X = with_spikes(20000, 300, 30 * math.sqrt(3))
    lewis = median_distortion(X, 300, 1, "lewis")
    assert lewis <= 0.15
    assert median_distortion(X, 300, 1, "leverage") >= 1.6 * lewis


def test_a_direction_carried_by_one_row_is_kept_with_weight_one():
    rng = np.random.default_rng(0)
    X = torch.from_numpy(np.hstack([rng.normal(size=(4000, 4)), np.zeros((4000, 1))]))
    X[1234, 4] = 3.0
    worst = []
    for seed in range(10):
        sampler = SensitivitySampler(200, 2, "lewis", random_state=seed).fit(X)
        position = (sampler.indices_ == 1234).nonzero()
        assert len(position) == 1
        assert float(sampler.weights_[position[0, 0]]) == 1.0
        worst.append(distortion(X, sampler.indices_, sampler.weights_, 2))
    assert float(np.median(worst)) <= 0.3
    assert median_distortion(X, 200, 2, "uniform") == pytest.approx(1.0)


def test_error_falls_as_the_root_of_the_size_and_is_unbiased():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20000, 6))
    X = torch.from_numpy(X / np.linalg.norm(X, axis=1, keepdims=True) * np.exp(0.3 * rng.normal(size=(20000, 1))))
    sizes = [200, 400, 800, 1600]
    errors = [median_distortion(X, m, 2, "lewis", draws=30) for m in sizes]
    assert -0.72 <= np.polyfit(np.log(sizes), np.log(errors), 1)[0] <= -0.36
    direction = torch.ones(6, dtype=torch.float64)
    sampler = SensitivitySampler(200, 3.0, "lewis", random_state=0).fit(X)
    powers = (X @ direction).abs() ** 3
    sums = []
    for _ in range(4000):
        indices, weights = sampler.sample()
        sums.append(float((weights * powers[indices]).sum()))
    assert abs(np.mean(sums) - float(powers.sum())) <= 5 * np.std(sums) / math.sqrt(4000)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "alpha"), [(1, 14), (1.5, 40)])
def test_root_leverage_ends_at_its_size(p, alpha):
    X = heavy_rows(60000, 5, 2.0)
    target = alpha ** (2 / p) * 5
    measure = Distortion(X, p, 1000)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        indices, weights = root_leverage_sample(X, p, alpha, generator)
        assert 0.6 <= len(indices) / target <= 1.5
        found = measure(indices, weights)
        assert found <= 0.2
        if p == 1.5:
            assert found <= 0.6 * median_distortion(X, len(indices), p, "uniform", draws=9)


def test_a_distortion_is_the_same_from_the_function():
    X = heavy_rows()
    sampler = SensitivitySampler(40, 3).fit(X)
    sample = sampler.indices_, sampler.weights_
    assert distortion(X, *sample, 3, 100) == Distortion(X, 3, 100)(*sample)


def test_at_four_the_size_grows_almost_linearly_in_the_total_sensitivity():
    rng = np.random.default_rng(0)
    total, rows = [], []
    for d in (3, 12, 48):
        blocks = [rng.normal(size=(4000 // (d // 3), 3)) for _ in range(d // 3)]
        X = torch.block_diag(*map(torch.from_numpy, blocks))
        size = 20 * d
        while median_distortion(X, size, 4, "lewis", draws=5, directions=600) > 0.5:
            size = int(size * 1.25)
        total.append(float(lewis_weights(X, 4).sum()))
        rows.append(size)
    assert np.polyfit(np.log(total), np.log(rows), 1)[0] <= 1.5


def test_sample_sizes_follow_the_rules():
    assert sample_size(100, 10, 4, 0.5, "generic") == 4000
    assert sample_size(100, 10, 4, 0.5) == 4000
    assert sample_size(100, 10, 4, 1, "combined") == math.ceil(10**0.5 * 100)
    assert sample_size(9, 10, 1, 1) == math.ceil(10**0.5 * 9)
    with pytest.raises(InputError, match="root_leverage holds for p < 2"):
        sample_size(9, 10, 3, 1, "root_leverage")


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("X", "arguments", "message"),
    [
        (GOOD, {"p": 0.5}, r"p must be in \[1, inf\)"),
        (GOOD, {"p": math.inf}, r"p must be in \[1, inf\)"),
        (GOOD * math.nan, {}, "X is not finite"),
        (GOOD[:0], {}, "X is empty"),
        (GOOD * 0, {}, "X is zero"),
        (GOOD, {"n_samples": 0}, "n_samples must be at least 1"),
        (GOOD, {"n_samples": 3}, "n_samples 3 is below the rank 4"),
        (GOOD, {"score": "leverages"}, "unknown score 'leverages'"),
        (GOOD, {"score": "root_leverage"}, "root_leverage holds for p < 2"),
        (GOOD, {"rank": 5}, "rank must be between 1 and"),
    ],
)
def test_bad_input_is_named(X, arguments, message):
    with pytest.raises(InputError, match=message):
        SensitivitySampler(**{"n_samples": 20, **arguments}).fit(X)


def test_zero_rows_are_never_drawn_and_probabilities_are_probabilities():
    X = heavy_rows(200).float()
    X[::3] = 0
    for score in ("uniform", "row_norm", "leverage", "lewis", "sensitivity", "sensitivity+leverage"):
        sampler = SensitivitySampler(60, 3, score, random_state=1).fit(X)
        assert not (sampler.indices_ % 3 == 0).any()
        assert float(sampler.probabilities_.max()) <= 1
        assert sampler.weights_.dtype == torch.float32
        assert torch.isfinite(sampler.weights_).all()
        assert float(sampler.probabilities_.sum()) == pytest.approx(60, rel=1e-5)


def test_fewer_samples_than_the_rank_can_be_allowed():
    assert len(SensitivitySampler(2, allow_rank_loss=True).fit(GOOD).indices_) <= 10


def test_an_open_bracket_near_one_is_told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lower, upper = lp_sensitivities(heavy_rows(), 1.02)
    assert (lower <= upper * (1 + 1e-12)).all()
    assert float((upper / lower - 1).max()) <= 1e-7 or any(w.category is ConvergenceWarning for w in caught)
