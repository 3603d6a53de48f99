"""Kronecker SBL against dense formulas, classic SBL, OMP, and the oracle's least squares."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from llmcompress.backends.regression.kronecker import kron_vectors, nearest_kronecker, normalised_columns
from llmcompress.backends.regression.kronecker_sbl import (
    KroneckerSBL,
    KroneckerSBLCoder,
    KroneckerSBLOptions,
    classic_sbl,
    irs_channel,
    kron_matvec,
    kron_omp,
    m_step,
    posterior,
)
from llmcompress.errors import InputError


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=gen(seed))


def kron(mats):
    product = mats[0]
    for mat in mats[1:]:
        product = torch.kron(product, mat)
    return product


# --- identities ------------------------------------------------------------------------------------------------------


def test_the_posterior_is_the_dense_one():
    mats = [randn(*shape, seed=i, dtype=torch.complex128) for i, shape in enumerate([(3, 4), (2, 3), (4, 5)])]
    gammas = [randn(n, seed=10 + n).abs() for n in (4, 3, 5)]
    y, s2 = randn(24, seed=9, dtype=torch.complex128), 0.3
    H, gamma = kron(mats), kron_vectors([g[None] for g in gammas])[0]
    C = H @ torch.diag(gamma).to(H.dtype) @ H.mH + s2 * torch.eye(24, dtype=torch.float64)
    back = torch.diag(gamma).to(H.dtype) @ H.mH @ torch.linalg.inv(C)
    mean, variance, cost = posterior(mats, gammas, y, s2)
    torch.testing.assert_close(mean, back @ y, rtol=0, atol=1e-10)
    dense = gamma - (back @ H @ torch.diag(gamma).to(H.dtype)).diagonal().real
    torch.testing.assert_close(variance, dense, rtol=0, atol=1e-10)
    exact = torch.linalg.slogdet(C)[1] + (y.conj() @ torch.linalg.solve(C, y)).real
    assert float(cost) == pytest.approx(float(exact), abs=1e-10)
    batched = posterior(
        mats, [g[None].repeat(2, 1) for g in gammas], torch.stack((y, 2 * y)), torch.full((2,), s2, dtype=torch.float64)
    )
    torch.testing.assert_close(batched[0][1], 2 * mean)


def test_products_are_in_c_order():
    mats = [randn(3, 4), randn(2, 3, seed=1), randn(4, 2, seed=2)]
    x = randn(24, seed=3)
    torch.testing.assert_close(kron_matvec(mats, x), kron(mats) @ x)


@pytest.mark.parametrize("method", ["svd", "am", "one_pass"])
def test_a_kronecker_moment_is_returned(method):
    factors = [randn(1, n, seed=n).abs() + 0.1 for n in (4, 3, 5)]
    lam = kron_vectors(factors)[0]
    found = m_step(lam, [torch.ones(n, dtype=torch.float64) for n in (4, 3, 5)], method)
    torch.testing.assert_close(kron_vectors([g[None] for g in found])[0], lam, rtol=1e-12, atol=1e-12)
    assert [float(g.norm()) for g in found[:-1]] == pytest.approx([1, 1])


def objective(lam, gammas):
    gamma = kron_vectors([g[None] for g in gammas])[0]
    return float((gamma.log() + lam / gamma).sum())


def test_alternation_is_stationary_optimal_and_unique():
    lam = randn(60, seed=1).square() + 0.01
    ones = [torch.ones(n, dtype=torch.float64) for n in (4, 3, 5)]
    found = m_step(lam, ones, "am")
    for _ in range(200):
        found = m_step(lam, found, "one_pass")
    ratio = (lam / kron_vectors([g[None] for g in found])[0]).view(4, 3, 5)
    for mode in range(3):
        means = ratio.movedim(mode, 0).flatten(1).mean(1)
        torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-10)
    best = objective(lam, found)
    assert best <= objective(lam, m_step(lam, ones, "svd"))
    for seed in range(3):
        start = [randn(n, seed=30 + seed + n).abs() + 0.05 for n in (4, 3, 5)]
        again = m_step(lam, start, "am")
        for _ in range(200):
            again = m_step(lam, again, "one_pass")
        assert objective(lam, again) == pytest.approx(best, abs=1e-6)


# --- recovery --------------------------------------------------------------------------------------------------------


def instance(rng, snr, rank_one=True):
    mats = [torch.from_numpy(rng.normal(size=(m, 10)) / math.sqrt(m)) for m in (6, 7, 8)]
    supports = [rng.choice(10, 3, replace=False) for _ in range(3)]
    x = np.zeros((10, 10, 10))
    values = rng.normal(size=(3, 3, 3))
    if rank_one:
        a, b, c = rng.normal(size=(3, 3))
        values = np.einsum("i,j,k->ijk", a, b, c)
    x[np.ix_(*supports)] = values
    x = torch.from_numpy(x.ravel())
    clean = kron_matvec(mats, x)
    noise = torch.from_numpy(rng.normal(size=336))
    noise = noise * clean.norm() / noise.norm() * 10 ** (-snr / 20)
    return mats, clean + noise, x, float(noise.square().mean())


def nmse(found, x):
    return float((found - x).abs().square().sum() / x.abs().square().sum())


def oracle(mats, y, x):
    live = (x != 0).nonzero()[:, 0]
    H = kron(mats)[:, live]
    fitted = torch.zeros_like(x)
    fitted[live] = torch.linalg.lstsq(H, y).solution
    return nmse(fitted, x)


@pytest.mark.parametrize("snr", [20, 30])
def test_recovery_of_products_of_sparse_vectors(snr):
    rng, found = (
        np.random.default_rng(snr),
        {name: [] for name in ("svd", "learned", "am", "csbl", "omp", "komp", "ls")},
    )
    for _ in range(12):
        mats, y, x, s2 = instance(rng, snr)
        found["svd"].append(nmse(KroneckerSBL("svd", s2).fit(mats, y).coef_, x))
        found["learned"].append(nmse(KroneckerSBL("svd").fit(mats, y).coef_, x))
        found["am"].append(nmse(KroneckerSBL("am", s2).fit(mats, y).coef_, x))
        H = kron(mats)
        found["csbl"].append(nmse(classic_sbl(H, y, s2), x))
        greedy = orthogonal_mp(H.numpy(), y.numpy(), n_nonzero_coefs=27)
        found["omp"].append(nmse(torch.from_numpy(greedy), x))
        found["komp"].append(nmse(kron_omp(mats, y, 3), x))
        found["ls"].append(oracle(mats, y, x))

    def gain(a, b):
        return float(np.exp(np.mean(np.log(found[a]) - np.log(found[b]))))

    assert gain("csbl", "svd") >= 6
    assert gain("csbl", "am") >= 2
    assert gain("omp", "svd") >= (40 if snr == 20 else 200)
    assert np.median(found["komp"]) >= 0.3
    assert np.median(found["svd"]) <= 2.2 * np.median(found["ls"])
    assert np.median(found["learned"]) <= 2.2 * np.median(found["ls"])


def test_it_is_much_faster_than_classic_sbl():
    import time

    mats, y, _, s2 = instance(np.random.default_rng(0), 20)
    H = kron(mats)
    spent = []
    for run in (lambda: KroneckerSBL("svd", s2, max_iter=40, tol=0.0).fit(mats, y), lambda: classic_sbl(H, y, s2, 40)):
        times = []
        for _ in range(2):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        spent.append(min(times))
    assert spent[1] >= 5 * spent[0]


def test_the_cost_never_rises_and_svd_converges_faster():
    found, ratios = {name: [] for name in ("svd", "am")}, {name: [] for name in ("svd", "am")}
    rng = np.random.default_rng(5)
    for _ in range(6):
        mats, y, x, s2 = instance(rng, 30)
        for method in ("am", "one_pass"):
            cost = np.array(KroneckerSBL(method, s2, 50, 0.0, prune=0.0).fit(mats, y).cost_history_)
            assert (np.diff(cost) <= 1e-9 * np.abs(cost[:-1])).all()
        for method, errors in found.items():
            errors.append(nmse(KroneckerSBL(method, s2, 50, 0.0, prune=0.0).fit(mats, y).coef_, x))
            ratios[method].append(KroneckerSBL(method).fit(mats, y).noise_var_ / s2)
    assert np.median(found["svd"]) <= 0.01
    assert np.median(found["svd"]) <= 0.1 * np.median(found["am"])
    assert 0.75 <= np.median(ratios["svd"]) <= 1.3
    assert 0.65 <= np.median(ratios["am"]) <= 1.9


def test_a_kronecker_support_with_free_values():
    rng, found = np.random.default_rng(7), {name: [] for name in ("svd", "am", "omp", "komp")}
    for _ in range(10):
        mats, y, x, s2 = instance(rng, 25, rank_one=False)
        for method in ("svd", "am"):
            found[method].append(nmse(KroneckerSBL(method, s2).fit(mats, y).coef_, x))
        greedy = orthogonal_mp(kron(mats).numpy(), y.numpy(), n_nonzero_coefs=27)
        found["omp"].append(nmse(torch.from_numpy(greedy), x))
        found["komp"].append(nmse(kron_omp(mats, y, 3), x))
    assert np.median(found["am"]) <= 0.006
    assert np.median(found["svd"]) <= 0.02
    assert np.median(found["komp"]) >= 0.2
    assert np.median(found["omp"]) >= 0.2


def test_the_reflecting_surfaces_channel():
    found = {name: [] for name in ("svd", "am", "csbl", "omp", "scaled_omp")}
    for seed in range(8):
        mats, y, truth = irs_channel(generator=gen(seed))
        noise = float((y - kron_matvec(mats, truth)).abs().square().mean())
        found["svd"].append(nmse(KroneckerSBL("svd", noise).fit(mats, y).coef_, truth))
        slow = KroneckerSBL("am", noise, max_iter=600, tol=1e-6)  # alternation needs several hundred iterations here
        found["am"].append(nmse(slow.fit(mats, y).coef_, truth))
        H = kron(mats)
        found["csbl"].append(nmse(classic_sbl(H, y, noise), truth))
        found["omp"].append(nmse(_omp(H, y, 9, torch.ones(H.shape[1])), truth))
        found["scaled_omp"].append(nmse(_omp(H, y, 9, H.norm(dim=0)), truth))
    median = {name: np.median(values) for name, values in found.items()}
    assert median["svd"] <= 0.06
    assert median["am"] <= 0.05
    assert max(median["svd"], median["am"]) < median["csbl"]
    assert median["omp"] >= 0.25
    assert median["scaled_omp"] >= 3 * median["svd"]  # with products over columns' lengths it is far better


def _omp(H, y, count, lengths):
    """Complex orthogonal matching pursuit, which scikit-learn has not."""
    chosen, residual = [], y
    for _ in range(count):
        chosen.append(
            int(((H.mH @ residual).abs() / lengths).index_fill(0, torch.tensor(chosen, dtype=torch.int64), 0).argmax())
        )
        values = torch.linalg.lstsq(H[:, chosen], y).solution
        residual = y - H[:, chosen] @ values
    x = torch.zeros(H.shape[1], dtype=H.dtype)
    x[chosen] = values
    return x


# --- variants and the coder ------------------------------------------------------------------------------------------


def test_rows_are_fitted_on_their_own():
    rng = np.random.default_rng(3)
    mats, y, _, s2 = instance(rng, 30)
    other = kron_matvec(mats, torch.from_numpy(rng.normal(size=1000)))
    together = KroneckerSBL("am", s2, 20, 0.0).fit(mats, torch.stack((y, other)))
    alone = KroneckerSBL("am", s2, 20, 0.0).fit(mats, y)
    torch.testing.assert_close(together.coef_[0], alone.coef_, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(alone.predict(), kron_matvec(mats, alone.coef_))


def test_coupled_variances_recover_blocks():
    errors = []
    for seed in (3, 4, 7):
        rng = np.random.default_rng(seed)
        mats = [torch.from_numpy(rng.normal(size=(6, 12))) for _ in range(2)]
        x = torch.zeros(12, 12, dtype=torch.float64)
        x[3:6, 5:8] = torch.from_numpy(rng.normal(size=(3, 3)))
        clean = kron_matvec(mats, x.flatten())
        noise = torch.from_numpy(rng.normal(size=36))
        noise *= 0.03 * clean.norm() / noise.norm()
        coupled = KroneckerSBL("am", float(noise.square().mean()), coupling=0.8, max_iter=60).fit(mats, clean + noise)
        errors.append(nmse(coupled.coef_, x.flatten()))
    assert np.median(errors) <= 0.05


def test_the_nearest_product_of_a_product_is_itself_and_the_coder_codes_over_it():
    mats = [normalised_columns(randn(4, 6)), normalised_columns(randn(6, 8, seed=1))]
    D = kron(mats)
    torch.testing.assert_close(kron(nearest_kronecker(D, [(4, 6), (6, 8)])), D, rtol=0, atol=1e-12)
    codes = torch.zeros(3, 6, 8, dtype=torch.float64)
    codes[:, 1:3, 2:4] = randn(3, 2, 2, seed=2) + 2
    signals = D @ codes.flatten(1).T
    coder = KroneckerSBLCoder(KroneckerSBLOptions(factors=["4x6", "6x8"], max_iter=60))
    found = coder.code(D, signals, 4, gen())
    dense = torch.zeros(3, 48, dtype=torch.float64).scatter_(1, found.indices, found.values)
    torch.testing.assert_close(dense, codes.flatten(1), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="two shapes such as 16x24"):
        KroneckerSBLCoder(KroneckerSBLOptions(factors=["4x"])).code(D, signals, 4, gen())
    with pytest.raises(InputError, match="together they must have 24 rows and at most 48 columns"):
        KroneckerSBLCoder(KroneckerSBLOptions(factors=["4x6", "5x8"])).code(D, signals, 4, gen())


# --- bad input -------------------------------------------------------------------------------------------------------

A, Y = randn(3, 4), randn(9)


@pytest.mark.parametrize(
    ("mats", "y", "arguments", "message"),
    [
        ([A], Y[:3], {}, "at least 2 factors"),
        ([A, A], Y[:8], {}, "the factors have 9 rows and y 8"),
        ([A, A], Y.to(torch.complex128), {}, "imaginary part would be lost"),
        ([A, A * math.nan], Y, {}, "must be finite"),
        ([A, A * torch.tensor([1, 0, 1, 1])], Y, {}, "factor 1 has a zero column"),
        ([A, A], Y, {"noise_var": 0.0}, "noise_var must be positive"),
        ([A, A], Y, {"m_step": "em"}, "unknown m_step 'em'"),
        ([A, A], Y, {"coupling": 1.0}, r"coupling must be in \[0, 1\)"),
    ],
)
def test_bad_input_is_named(mats, y, arguments, message):
    with pytest.raises(InputError, match=message):
        KroneckerSBL(**arguments).fit(mats, y)


def test_nothing_to_explain_is_zero_with_a_warning():
    with pytest.warns(UserWarning, match="lost every entry"):
        found = KroneckerSBL(max_iter=5).fit([A, A], 0 * Y)
    assert not found.coef_.any()
    assert torch.isfinite(found.coef_).all()
