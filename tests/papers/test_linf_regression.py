"""Sketched least squares: operators, the instances that separate dense from sparse sketches, and the proof's traps."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from llmcompress.backends.regression.linf_regression import (
    SketchedLeastSquares,
    fwht,
    make_sketch,
    solve_sketched,
    solve_tensor,
    tensor_srht,
    theory_rows,
)
from llmcompress.backends.regression.sketches import _signs
from llmcompress.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*no coordinate-wise guarantee")
DENSE = ["srht", "gaussian_pooled", "gaussian", "rademacher"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 64, 128, 512])
def test_fwht_is_the_hadamard_matrix(n):
    X = randn(n, 3)
    H = torch.from_numpy(scipy.linalg.hadamard(n).astype(float))
    torch.testing.assert_close(fwht(X), H @ X, rtol=0, atol=1e-12 * max(n, 10))
    torch.testing.assert_close(fwht(X.T, dim=1), (H @ X).T, rtol=0, atol=1e-12 * max(n, 10))
    assert fwht(X.half()).dtype == torch.float32


@pytest.mark.parametrize("kind", [*DENSE, "countsketch", "osnap", "uniform"])
def test_every_sketch_is_an_isometry_on_average(kind):
    g = generator()
    mean = torch.zeros(24, 24, dtype=torch.float64)
    for _ in range(3000):
        S = make_sketch(kind, 24, 32, g).to_dense()
        mean += S.T @ S / 3000
    limit = 0.03 if kind in DENSE else 0.12
    assert float((mean - torch.eye(24)).abs().max()) <= limit


def test_countsketch_has_scipys_form():
    S = make_sketch("countsketch", 50, 8, generator()).to_dense()
    theirs = scipy.linalg.clarkson_woodruff_transform(np.eye(50), 8, rng=np.random.default_rng(0))
    for matrix in (S.numpy(), theirs):
        assert (np.abs(matrix).sum(0) == 1).all()
        assert ((matrix != 0).sum(0) == 1).all()


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_all_rows_give_the_exact_solution(ridge):
    X, Y = randn(100, 7), randn(100, 3, seed=1)
    found = SketchedLeastSquares(n_rows=128, ridge=ridge).fit(X, Y)
    exact = torch.linalg.solve(X.T @ X + ridge * torch.eye(7), X.T @ Y)
    torch.testing.assert_close(found.coef_, exact, rtol=0, atol=1e-10)
    assert found.predicted_eps_ == 0
    torch.testing.assert_close(found.predict(X), X @ exact, rtol=0, atol=1e-9)
    one = SketchedLeastSquares(n_rows=128, ridge=ridge).fit(X, Y[:, 0]).coef_
    torch.testing.assert_close(one, exact[:, 0], rtol=0, atol=1e-10)


def test_the_tensor_sketch_is_its_explicit_matrix():
    A1, A2, B, m = randn(6, 2), randn(11, 3, seed=1), randn(6, 11, seed=2), 40
    SA, Sb = tensor_srht(A1, A2, B, m, generator(5))
    g = generator(5)
    d1, d2 = _signs((6, 1), g), _signs((11, 1), g)
    i, j = torch.randint(8, (m,), generator=g), torch.randint(16, (m,), generator=g)
    H1 = torch.from_numpy(scipy.linalg.hadamard(8).astype(float))[:, :6] * d1.T
    H2 = torch.from_numpy(scipy.linalg.hadamard(16).astype(float))[:, :11] * d2.T
    S = torch.kron(H1, H2)[i * 16 + j] / math.sqrt(m)
    torch.testing.assert_close(SA, S @ torch.kron(A1, A2), rtol=0, atol=1e-10)
    torch.testing.assert_close(Sb[:, 0], S @ B.flatten(), rtol=0, atol=1e-10)


# --- the instance that needs a dense sketch --------------------------------------------------------------------------


def spike_errors(kind, n=2048, d=64, m=1024, draws=80, seed=0, norm=math.inf, **options):
    """eps_hat = sqrt(d) max |x' - x*| for A = permuted [I; 0], b = A x* + one unit spike; inf without full rank."""
    g = generator(seed)
    found = []
    for _ in range(draws):
        order = torch.randperm(n, generator=g)
        A = torch.zeros(n, d + 1, dtype=torch.float64)
        A[order[:d], torch.arange(d)] = 1
        A[order[d], d] = 1  # the last column is b - A x*: x* does not change the error
        sketched = make_sketch(kind, n, m, g, **options)(A)
        try:
            x = solve_sketched(sketched[:, :d], sketched[:, d:])[0]
            found.append(math.sqrt(d) * float(torch.linalg.vector_norm(x, norm)))
        except InputError:
            found.append(math.inf)
    return np.array(found)


def test_only_dense_sketches_keep_every_coordinate():
    for kind in ("srht", "gaussian_pooled"):
        errors = spike_errors(kind)
        assert np.median(errors) <= 0.95
        assert (errors > 1.5).mean() <= 0.02
    assert (spike_errors("osnap", nonzeros=4) > 1.5).mean() >= 0.35
    assert (spike_errors("countsketch") > 1.5).mean() >= 0.5
    assert (spike_errors("uniform") > 1.5).all()


def test_rates():
    sizes = [256, 512, 1024, 2048]
    errors = [np.median(spike_errors("srht", d=32, m=m, draws=40)) for m in sizes]
    assert -0.62 <= np.polyfit(np.log(sizes), np.log(errors), 1)[0] <= -0.40


def test_the_largest_error_does_not_grow_with_the_dimension():
    few, many = ({"n": 4096, "d": d, "m": 8 * d, "draws": 25} for d in (16, 256))
    assert np.median(spike_errors("srht", **many)) <= 2.0 * np.median(spike_errors("srht", **few))
    lengths = [np.median(spike_errors("srht", norm=2, **size)) for size in (few, many)]
    assert lengths[1] >= 3.5 * lengths[0]


@pytest.mark.parametrize(("kind", "limit"), [("srht", 4), ("gaussian_pooled", 4.3)])
def test_products_of_fixed_vectors_are_kept(kind, limit):
    g = generator()
    pair = torch.zeros(1024, 2, dtype=torch.float64)
    pair[0, 0] = pair[1, 1] = 1
    found = []
    for _ in range(3000):
        sketched = make_sketch(kind, 1024, 256, g)(pair)
        found.append(16 * abs(float(sketched[:, 0] @ sketched[:, 1])))
    assert np.quantile(found, 0.998) <= limit


def test_countsketch_does_not_keep_them():
    g = generator()
    place = torch.randint(256, (20000, 2), generator=g)
    assert (place[:, 0] == place[:, 1]).double().mean() > 0.002  # a collision makes the product 1, 16 after scaling
    pair = torch.eye(1024, dtype=torch.float64)[:, :2]
    found = []
    for _ in range(3000):
        sketched = make_sketch("countsketch", 1024, 256, g)(pair)
        found.append(16 * abs(float(sketched[:, 0] @ sketched[:, 1])))
    assert np.quantile(found, 0.998) == 16


# --- traps of the proof ----------------------------------------------------------------------------------------------


def test_a_gaussian_diagonal_fails_where_signs_are_exact():
    A, b = torch.zeros(2, 16, dtype=torch.float64)
    A[:2] = 2**-0.5
    b[0], b[1] = 2**-0.5, -(2**-0.5)
    g = generator()
    gaussian = []
    for _ in range(400):
        D = torch.randn(16, dtype=torch.float64, generator=g)
        rows = torch.randint(16, (512,), generator=g)
        SA, Sb = fwht(torch.stack((D * A, D * b), 1))[rows].T
        gaussian.append(abs(float(SA @ Sb / (SA @ SA))))
        sketched = make_sketch("srht", 16, 8, g)(torch.stack((A, b), 1))
        assert abs(float(sketched[:, 0] @ sketched[:, 1])) <= 1e-15
    assert np.mean(np.array(gaussian) >= 3 / 7) >= 0.55


@pytest.mark.parametrize("d", [50, 800])
def test_a_near_isometry_need_not_keep_a_coordinate(d):
    v = randn(d)
    v[0] = 0
    v /= v.norm()
    e1 = torch.eye(d, dtype=torch.float64)[0]
    rho = a = 1 / 20
    M = torch.eye(d + 1, dtype=torch.float64)
    M[:d, :d] -= rho * (torch.outer(e1, v) + torch.outer(v, e1))
    M[:d, d] = M[d, :d] = a * v
    S = torch.linalg.cholesky(M).T
    values = torch.linalg.svdvals(S)
    assert 0.9 <= float(values[-1]) <= float(values[0]) <= 1.1
    x, _ = solve_sketched(S[:, :d], S[:, d:])
    assert abs(float(x[0])) == pytest.approx(a * rho / (1 - rho**2), abs=1e-12)


# --- Kronecker products ----------------------------------------------------------------------------------------------


def test_tensor_srht_is_as_good_as_srht_on_the_product():
    n, m, g = 64, 768, generator(3)
    A = torch.zeros(n, 6, dtype=torch.float64)
    A[torch.arange(6), torch.arange(6)] = 1
    B = torch.zeros(n, n, dtype=torch.float64)
    B[20, 31] = 1  # off the block of A kron A: x* = 0, residual 1
    product = torch.kron(A, A)
    tensor, explicit = [], []
    for _ in range(60):
        tensor.append(6 * float(solve_tensor(A, A, B, m, g).abs().max()))
        sketched = make_sketch("srht", n * n, m, g)(torch.cat((product, B.flatten()[:, None]), 1))
        explicit.append(6 * float(solve_sketched(sketched[:, :36], sketched[:, 36:])[0].abs().max()))
    assert np.quantile(tensor, 0.9) <= 1.0
    assert np.quantile(tensor, 0.9) <= 1.4 * np.quantile(explicit, 0.9)


def _tensor_sketch_error(product, B, m, g):
    """Count sketch of a Kronecker product: row (i, j) goes to h1(i) + h2(j) mod m."""
    n = len(B)
    h = torch.randint(m, (2, n), generator=g)
    s = _signs((2, n), g)
    place = (h[0][:, None] + h[1][None]).flatten() % m
    sign = torch.outer(s[0], s[1]).flatten()[:, None]
    both = torch.cat((product, B.flatten()[:, None]), 1) * sign
    sketched = torch.zeros(m, both.shape[1], dtype=torch.float64).index_add_(0, place, both)
    try:
        return 6 * float(solve_sketched(sketched[:, :-1], sketched[:, -1:])[0].abs().max())
    except InputError:
        return math.inf


def test_tensor_sketch_fails_often():
    n, m, g = 64, 768, generator(4)
    A = torch.eye(n, 6, dtype=torch.float64)
    B = torch.zeros(n, n, dtype=torch.float64)
    B[20, 31] = 1
    errors = [_tensor_sketch_error(torch.kron(A, A), B, m, g) for _ in range(60)]
    assert np.mean(np.array(errors) > 2) >= 0.2


# --- the estimator and bad input -------------------------------------------------------------------------------------


def test_the_predicted_bound_is_met_by_most_draws():
    X = randn(4096, 24)
    y = X @ randn(24, 1, seed=1) + randn(4096, 1, seed=2)
    exact = torch.linalg.lstsq(X, y).solution
    errors, bounds = [], []
    for seed in range(20):
        found = SketchedLeastSquares(random_state=seed).fit(X, y)
        errors.append(float((found.coef_ - exact).abs().max()))
        bounds.append(float(found.linf_bound_[0]))
    assert np.mean(np.array(errors) <= np.array(bounds)) >= 0.8
    assert np.median(errors) >= 0.2 * np.median(bounds)


def test_theory_asks_for_far_more_rows():
    assert 2e5 <= theory_rows(4096, 64, 0.5, 0.1) <= 4e5


def test_theory_padding_enlarges_the_pooled_blocks():
    S = make_sketch("gaussian_pooled", 64, 16, generator(), theory_padding=True, d=2, delta=0.1)
    X = randn(64, 2)
    assert S.shape == (16, 64)
    assert float((S(X).square().sum() / X.square().sum()).log().abs()) <= 1.5


@pytest.mark.parametrize("kind", ["countsketch", "osnap", "uniform"])
def test_baselines_say_that_they_have_no_guarantee(kind):
    with pytest.warns(UserWarning, match="no coordinate-wise guarantee"):
        found = SketchedLeastSquares(kind, n_rows=64).fit(randn(200, 4), randn(200))
    assert found.linf_bound_.isnan().all()


GOOD = randn(60, 5)


@pytest.mark.parametrize(
    ("X", "Y", "arguments", "message"),
    [
        (GOOD, randn(59), {}, "X has 60 rows and Y 59"),
        (GOOD * math.nan, randn(60), {}, "X is not finite"),
        (GOOD, randn(60) * math.inf, {}, "Y is not finite"),
        (GOOD, randn(60), {"n_rows": 4}, "n_rows must be at least d = 5"),
        (GOOD, randn(60), {"sketch": "fourier"}, "unknown sketch 'fourier'"),
        (GOOD[:, [0, 1, 1]], randn(60), {}, "rank 2 of 3 columns"),
    ],
)
def test_bad_input_is_named(X, Y, arguments, message):
    with pytest.raises(InputError, match=message):
        SketchedLeastSquares(**arguments).fit(X, Y)


def test_a_ridge_makes_dependent_columns_solvable():
    assert torch.isfinite(SketchedLeastSquares(ridge=0.1).fit(GOOD[:, [0, 1, 1]], randn(60)).coef_).all()


def test_more_rows_than_there_are_without_replacement():
    with pytest.raises(InputError, match="m = 65 rows exceed N = 64 without replacement"):
        make_sketch("srht", 60, 65, generator(), replace=False)
    with pytest.raises(InputError, match="power of two"):
        fwht(GOOD)
