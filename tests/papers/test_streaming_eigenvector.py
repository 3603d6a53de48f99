"""One-pass top eigenvectors against eigh, closed forms and rivals."""

import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from llmcompress.backends.streaming.oja import Oja
from llmcompress.backends.streaming.streaming_eigenvector import (
    StreamingTopEigenvector,
    frequent_directions,
    oja_grid,
    price_xun,
    row_norm_sample,
)
from llmcompress.errors import InputError


def stream(rows, **arguments):
    return StreamingTopEigenvector(n_rows=len(rows), **arguments).partial_fit(rows).finalize()


def correlation(vector, axis=0):
    return float(vector[axis] ** 2 / vector.square().sum())


def sketched(rows, l):
    return torch.linalg.svd(frequent_directions(rows, l), full_matrices=False)[2][0]


# --- light rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "n", "variance", "least"), [(128, 40000, 2, 0.94), (256, 24000, 3, 0.90)])
def test_light_rows(d, n, variance, least):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, d))
    rows[:, 0] *= math.sqrt(variance)
    rows = torch.from_numpy(rows)
    found = stream(rows)
    assert correlation(found.component_) >= least
    assert found.eigenvalue_ == pytest.approx(float((rows @ found.component_).square().sum()), rel=0.1)
    assert correlation(sketched(rows, 8)) <= 0.2


# --- a stream that defeats Oja ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def defeating():
    """d = 512: three unit rows e_1, 48 rows of norm² 1/48 on every other axis, shuffled."""
    rng = np.random.default_rng(0)
    axes = np.concatenate([np.zeros(3, int), np.repeat(np.arange(1, 512), 48)])
    scales = np.concatenate([np.ones(3), np.full(511 * 48, 48**-0.5)])
    order = rng.permutation(len(axes))
    rows = np.zeros((len(axes), 512))
    rows[np.arange(len(axes)), axes[order]] = scales[order]
    return torch.from_numpy(rows)


def closed_form(etas, start):
    """Axis-aligned rows commute: (1 + eta)³ on e_1, (1 + eta / 48)^48 elsewhere."""
    etas = torch.as_tensor(etas, dtype=torch.float64)[:, None]
    growth = torch.cat((3 * (1 + etas).log(), (48 * (1 + etas / 48).log()).expand(-1, len(start) - 1)), dim=1)
    v = (growth - growth.amax(1, keepdim=True)).exp() * start
    return v / v.norm(dim=1, keepdim=True)


def test_oja_fails_at_every_rate_where_the_store_succeeds(defeating):
    etas = np.geomspace(0.05, 200, 24)
    starts = torch.randn(5, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = [max(correlation(v) for v in closed_form(etas, start)) for start in starts]
    assert np.mean(best) <= 0.1
    assert max(best) <= 0.3
    for select in ("ritz", "best"):
        found = stream(defeating, select=select)
        assert correlation(found.component_) >= 0.99
        assert found.n_heavy_ == 3
        assert not found.heavy_overflow_
    assert correlation(stream(defeating, max_heavy=0).component_) <= 0.1
    assert correlation(sketched(defeating, 9)) <= 0.1


def test_streamed_oja_is_the_closed_form(defeating):
    etas = np.geomspace(0.05, 200, 6)
    start = torch.randn(512, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = oja_grid(defeating, etas, start)
    assert float((found - closed_form(etas, start)).abs().max()) <= 1e-8


def test_oja_is_its_rule_row_by_row_and_does_not_overflow():
    rows = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    start = torch.ones(6, dtype=torch.float64)
    oja = Oja(torch.tensor([0.3], dtype=torch.float64), start)
    oja.update(rows[:37])
    oja.update(rows[37:])
    v = start / start.norm()
    for row in rows:
        v = v + 0.3 * row * (row @ v)
    assert float(oja.growth[0]) == pytest.approx(math.log(float(v.norm())), rel=1e-12)
    torch.testing.assert_close(oja.vectors[0], v / v.norm())
    huge = oja_grid(1e50 * rows, [1e20])
    assert torch.isfinite(huge).all()


# --- heavy and light together ----------------------------------------------------------------------------------------


def mixture(R, f, rng, d=128, n=20000):
    rows = rng.normal(size=(n, d))
    rows[:, 0] *= math.sqrt(R * (1 - f))
    noise = rng.normal(size=(8, d))
    noise[:, 0] = 0
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    heavy = noise[:4] * math.sqrt(n / 8)
    heavy[:, 0] = rng.choice([-1, 1], 4) * math.sqrt(f * R * n / 4)
    rows[rng.choice(n, 8, replace=False)] = np.vstack([heavy, noise[4:] * math.sqrt(n / 4)])
    return torch.from_numpy(rows)


def test_a_mixture_of_heavy_and_light_rows():
    missed = {}
    for R in (4, 16, 64):
        errors = {"ritz": [], "best": [], "none": []}
        rng = np.random.default_rng(R)
        for _ in range(6):
            rows = mixture(R, rng.uniform(0.02, 0.98), rng)
            errors["ritz"].append(1 - correlation(stream(rows).component_))
            errors["best"].append(1 - correlation(stream(rows, select="best").component_))
            errors["none"].append(1 - correlation(stream(rows, max_heavy=0).component_))
        missed[R] = {name: np.mean(values) for name, values in errors.items()}
        assert missed[R]["ritz"] <= missed[R]["best"]
        assert missed[R]["none"] >= 2 * missed[R]["ritz"]
    assert missed[4]["ritz"] <= 0.05
    assert missed[16]["ritz"] <= 0.015
    assert missed[64]["ritz"] <= 0.005
    assert missed[4]["ritz"] > missed[16]["ritz"] > missed[64]["ritz"]


# --- order -----------------------------------------------------------------------------------------------------------


def two_kinds(scale, d=64, n=20000, seed=0):
    """90 % rows N(0, I) with coordinate 1 scaled by 0.3, then 10 % rows ±scale e_1."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, d))
    rows[:, 0] *= 0.3
    last = n // 10
    rows[-last:] = 0
    rows[-last:, 0] = scale * rng.choice([-1, 1], last)
    return torch.from_numpy(rows), torch.from_numpy(rng.permutation(n))


def test_the_random_rule_needs_its_order():
    rows, order = two_kinds(math.sqrt(60))
    assert correlation(stream(rows[order]).component_) >= 0.99
    assert correlation(stream(rows).component_) <= 0.2
    assert correlation(stream(rows.flip(0)).component_) <= 0.2


def test_price_and_xun_need_a_gap_but_no_order():
    rows, _ = two_kinds(math.sqrt(10 * math.log(64) ** 2))
    etas = [2.0**j for j in range(-24, 4)]
    vector, status = price_xun(rows, etas)
    assert status == "ok"
    assert correlation(vector) >= 0.85
    assert correlation(stream(rows).component_) <= correlation(vector) - 0.2
    assert price_xun(rows, [1e-12, 1e-11])[1] == "failed"
    found = StreamingTopEigenvector("arbitrary", etas=etas).partial_fit(rows[:77]).partial_fit(rows[77:]).finalize()
    assert found.status_ == "ok"
    assert correlation(found.component_) >= 0.85


# --- chunks ----------------------------------------------------------------------------------------------------------


def test_chunk_boundaries_do_not_matter():
    rng = np.random.default_rng(5)
    rows = mixture(8, 0.5, rng, d=24, n=1500)
    found = []
    for size in (1, 37, 500, 1500):
        estimator = StreamingTopEigenvector(n_rows=1500, max_heavy=6)
        for chunk in rows.split(size):
            estimator.partial_fit(chunk)
        estimator.finalize()
        found.append(estimator.component_ * estimator.component_[0].sign())
        assert float(estimator.component_.norm()) == pytest.approx(1)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-10)


# --- thinning and sketching ------------------------------------------------------------------------------------------


def test_row_norm_sampling_has_its_size_and_its_rate():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(40000, 64)) * rng.exponential(size=(40000, 1)))
    gram = rows.T @ rows
    norm = float(torch.linalg.matrix_norm(gram, 2))
    generator = torch.Generator().manual_seed(0)
    sizes = [250, 500, 1000, 2000, 4000]
    errors = []
    for s in sizes:
        found = [row_norm_sample(rows, s, generator, total=float(rows.square().sum())) for _ in range(5)]
        assert np.mean([len(b) for b in found]) == pytest.approx(s, rel=0.08)
        errors.append(np.mean([float(torch.linalg.matrix_norm(b.T @ b - gram, 2)) / norm for b in found]))
    assert -0.72 <= np.polyfit(np.log(sizes), np.log(errors), 1)[0] <= -0.4
    running = len(row_norm_sample(rows, 250, generator))
    assert running <= 250 * math.log(math.e * 40000 / 250)


def test_frequent_directions_keeps_its_bound():
    rows = torch.randn(300, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sketch = frequent_directions(rows, 8)
    gaps = torch.linalg.eigvalsh(rows.T @ rows - sketch.T @ sketch)
    assert float(gaps[0]) >= -1e-9
    assert float(gaps[-1]) <= float(rows.square().sum()) / 8


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (GOOD, {}, "needs n_rows"),
        (GOOD, {"n_rows": 30}, "more rows than n_rows = 30"),
        (GOOD * math.inf, {"n_rows": 40}, "X is not finite"),
        (GOOD[:0], {"n_rows": 40}, "X is empty"),
        (GOOD, {"n_rows": 40, "n_blocks": 41}, "n_blocks must be between 1 and n_rows = 40"),
        (GOOD, {"order": "arbitrary", "etas": [0.1, 0.0]}, "etas must be positive"),
        (GOOD, {"n_rows": 40, "holdout": 1.0}, r"holdout must be in \(0, 1\)"),
        (GOOD, {"order": "sorted"}, "unknown order 'sorted'"),
    ],
)
def test_bad_input_is_named(rows, arguments, message):
    with pytest.raises(InputError, match=message):
        StreamingTopEigenvector(**arguments).partial_fit(rows)


def test_a_change_of_length_is_named():
    estimator = StreamingTopEigenvector(n_rows=60).partial_fit(GOOD)
    with pytest.raises(InputError, match="rows must have 5 entries like those before; got 4"):
        estimator.partial_fit(GOOD[:, :4])


def test_early_late_and_empty_ends():
    with pytest.raises(NotFittedError):
        StreamingTopEigenvector(n_rows=3).finalize()
    with pytest.warns(UserWarning, match="40 of 1000 rows seen"):
        early = StreamingTopEigenvector(n_rows=1000).partial_fit(GOOD).finalize()
    assert early.status_ == "ok"
    assert float(early.component_.norm()) == pytest.approx(1)
    zero = stream(0 * GOOD)
    assert zero.status_ == "failed"
    assert torch.isfinite(zero.component_).all()


def test_more_heavy_rows_than_slots_are_told():
    rows = torch.randn(4000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[::800] *= 60
    assert stream(rows, max_heavy=3).heavy_overflow_
    full = stream(rows, max_heavy=8)
    assert (full.heavy_overflow_, full.n_heavy_) == (False, 5)
