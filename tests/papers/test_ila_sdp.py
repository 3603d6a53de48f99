"""iLA-SDP: exact projections, tight relaxations, clusters of different shapes, and a model's heads."""

import itertools

import cvxpy
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from llmcompress.backends.graphs.ila_sdp import (
    ILASDP,
    ILASDPGroups,
    ILASDPOptions,
    covariances,
    head_features,
    likelihood_affinities,
    peng_wei_sdp,
    profile_objective,
    project_affine,
    solve_la_sdp,
    spectral_round,
)
from llmcompress.backends.graphs.la_sdp import hard_memberships
from llmcompress.errors import InputError
from tests.tiny import tiny_model


def hetero(n, seed, sep, K, p=3):
    """Clusters of stretched covariances but for a round last one: X (n, p), labels, covariances (K, p, p)."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % K
    X, covs = np.empty((n, p)), []
    for k in range(K):
        Q = np.linalg.qr(generator.standard_normal((p, p)))[0]
        covs.append(Q @ np.diag([8, 0.15, 0.15]) @ Q.T if k < K - 1 else 0.5 * np.eye(p))
        mean = np.zeros(p)
        mean[k % p] = sep if k < p else -sep
        X[labels == k] = mean + generator.standard_normal(((labels == k).sum(), p)) @ np.linalg.cholesky(covs[-1]).T
    return torch.tensor(X), torch.tensor(labels), torch.tensor(np.array(covs))


def errors(found, truth):
    """Share of wrong labels under the best matching of clusters."""
    K = int(max(found.max(), truth.max())) + 1
    agreed = np.zeros((K, K))
    np.add.at(agreed, (np.asarray(found), np.asarray(truth)), 1)
    rows, columns = linear_sum_assignment(-agreed)
    return 1 - agreed[rows, columns].sum() / len(truth)


# --- the program -----------------------------------------------------------------------------------------------------


def test_the_projection_meets_the_constraints_and_is_the_nearest():
    Z = torch.randn(3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Z = (Z + Z.mT) / 2
    found = project_affine(Z)
    assert float((found.sum((0, 2)) - 1).abs().max()) <= 1e-12
    assert float((found.diagonal(dim1=1, dim2=2).sum(1) - 1).abs().max()) <= 1e-12
    assert float((project_affine(found) - found).abs().max()) <= 1e-12
    other = torch.randn(3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other = project_affine((other + other.mT) / 2)
    assert abs(float(((Z - found) * (other - found)).sum())) <= 1e-9  # orthogonal to the affine set


def test_affinities_are_the_profile_likelihood():
    X, labels, _ = hetero(12, 0, 4, 2)
    Z = hard_memberships(labels, 2)
    covs = covariances(X, Z, 1e-3)
    total = 0.0
    for k in range(2):
        rows = X[labels == k].numpy()
        S = np.cov(rows.T, bias=True)
        np.testing.assert_allclose(covs[k].numpy(), S + 1e-3 * X.var(0, correction=0).mean().item() * np.eye(3))
        total -= len(rows) * (np.trace(np.linalg.solve(covs[k].numpy(), S)) + np.linalg.slogdet(covs[k].numpy())[1])
    assert float((likelihood_affinities(X, covs) * Z).sum()) == pytest.approx(total, rel=1e-10)
    assert profile_objective(X, labels, 1e-3) == pytest.approx(total, rel=1e-10)


def test_it_finds_the_best_of_all_partitions():
    for seed in range(4):
        X, _, covs = hetero(9, seed, 4, 2)
        A = likelihood_affinities(X, covs)
        best = -np.inf
        for bits in itertools.product((0, 1), repeat=9):
            if 0 < sum(bits) < 9:
                best = max(best, float((A * hard_memberships(torch.tensor(bits), 2)).sum()))
        found = solve_la_sdp(A, tol=1e-6, max_iter=6000)
        print(f"seed {seed}: SDP {found.objective:.6f}, best {best:.6f}, {found.n_iter} iterations")
        assert found.converged
        assert found.objective >= best - 1e-4 * abs(best)
        assert found.objective <= best + 1e-3 * abs(best)


@pytest.mark.parametrize("seed", range(3))
def test_cvxpy_finds_the_same_optimum(seed):
    """Where clusters overlap and the relaxation is not tight, too."""
    X, _, covs = hetero(14, seed, 1.0, 2)
    A = likelihood_affinities(X, covs).numpy()
    Z = [cvxpy.Variable((14, 14), PSD=True) for _ in range(2)]
    rules = [part >= 0 for part in Z] + [cvxpy.trace(part) == 1 for part in Z] + [cvxpy.sum(Z[0] + Z[1], 1) == 1]
    program = cvxpy.Problem(cvxpy.Maximize(sum(cvxpy.trace(a @ part) for a, part in zip(A, Z, strict=True))), rules)
    program.solve(solver="CLARABEL")
    found = solve_la_sdp(torch.tensor(A), tol=1e-6, max_iter=6000)
    print(found.objective, program.value)
    assert found.objective == pytest.approx(program.value, rel=1e-4)
    np.testing.assert_allclose(found.Z.sum(0), Z[0].value + Z[1].value, atol=2e-2)


def test_equal_covariances_give_the_peng_wei_program():
    X, _, _ = hetero(40, 1, 9, 3)
    A = likelihood_affinities(X, torch.eye(3).expand(3, 3, 3))
    ours, theirs = solve_la_sdp(A, 1e-6), peng_wei_sdp(X, 3, 1e-6)
    print(ours.objective / theirs.objective - 1, ours.n_iter, theirs.n_iter)
    assert ours.objective == pytest.approx(theirs.objective, rel=1e-5)
    distance = float((ours.Z.sum(0) - theirs.Z[0]).norm() / theirs.Z.norm())
    assert distance <= 1e-3


def test_the_relaxation_is_tight_for_separated_clusters():
    X, truth, covs = hetero(48, 5, 9, 3)
    found = solve_la_sdp(likelihood_affinities(X, covs), 1e-5)
    exact = hard_memberships(truth, 3)
    assert errors(found.Z.sum(2).argmax(0), truth) == 0
    assert float((found.Z - exact).norm() / exact.norm()) <= 1e-3
    assert float(found.Z.min()) >= 0
    assert errors(spectral_round(found.Z, 3, 0), truth) == 0


# --- the iteration ---------------------------------------------------------------------------------------------------


def em(X, K, seed, init="random_from_data"):
    model = GaussianMixture(K, init_params=init, random_state=seed, max_iter=500, reg_covar=1e-3)
    return model.fit_predict(X.numpy())


def test_it_errs_less_than_k_means_and_em():
    names = ("ila", "k-means", "peng-wei", "em", "em, k-means start")
    mean = dict.fromkeys(names, 0.0)
    for seed in range(8):
        X, truth, _ = hetero(48, seed, 4, 3)
        own = ILASDP(3, random_state=0).fit(X)
        history = np.array(own.objective_history_)
        assert (np.diff(history) >= -1e-8).all()
        found = (
            own.labels_, KMeans(3, n_init=10, random_state=0).fit_predict(X.numpy()),
            spectral_round(peng_wei_sdp(X, 3, 1e-3).Z, 3, 0), None, em(X, 3, seed, "kmeans"),
        )  # fmt: skip
        for name, labels in zip(names, found, strict=True):
            starts = [errors(em(X, 3, s), truth) for s in range(3)] if labels is None else [errors(labels, truth)]
            mean[name] += float(np.mean(starts)) / 8
    print(mean)
    assert mean["ila"] <= 0.05
    assert mean["ila"] <= 0.6 * mean["k-means"]
    assert mean["ila"] <= 0.6 * mean["peng-wei"]
    assert mean["ila"] <= 0.5 * mean["em"]


def test_it_does_not_depend_on_affine_coordinates():
    X, _, _ = hetero(48, 2, 4, 3)
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    moved = X @ M + torch.randn(3, dtype=torch.float64, generator=generator)
    start = KMeans(3, n_init=10, random_state=0).fit_predict(X.numpy())
    fits = [ILASDP(3, init=start, reg=1e-9, random_state=0).fit(data) for data in (X, moved)]
    assert torch.equal(fits[0].labels_, fits[1].labels_)
    shift = -48 * float(torch.linalg.det(M).square().log())
    for before, after in zip(fits[0].objective_history_, fits[1].objective_history_, strict=True):
        assert after - before == pytest.approx(shift, rel=1e-8)
    again = KMeans(3, n_init=10, random_state=0).fit_predict(moved.numpy())
    print(f"k-means changes {errors(again, start):.0%} of its labels")
    assert errors(again, start) > 0


def test_no_start_traps_it():
    """Where k-means and EM begin with two true clusters merged and one split, they stay there."""
    mean = dict.fromkeys(("ila", "em", "em, bad start", "k-means, bad start"), 0.0)
    for seed in range(6):
        X, truth, _ = hetero(48, seed, 10, 4)
        means = torch.stack([X[truth == k].mean(0) for k in range(4)])
        bad = torch.stack((means[:2].mean(0), means[2] + 0.5, means[2] - 0.5, means[3])).numpy()
        mean["ila"] += errors(ILASDP(4, random_state=0).fit_predict(X), truth) / 6
        mean["em"] += float(np.mean([errors(em(X, 4, s), truth) for s in range(6)])) / 6
        trapped = GaussianMixture(4, means_init=bad, max_iter=500, reg_covar=1e-3, random_state=0)
        mean["em, bad start"] += errors(trapped.fit_predict(X.numpy()), truth) / 6
        mean["k-means, bad start"] += errors(KMeans(4, init=bad, n_init=1).fit_predict(X.numpy()), truth) / 6
    print(mean)
    assert mean["ila"] <= 0.02
    assert mean["em"] >= 0.08
    assert mean["em, bad start"] >= 0.15
    assert mean["k-means, bad start"] >= 0.15


@pytest.mark.parametrize("options", [{"covariance": "diag"}, {"covariance": "spherical"}, {"update": "soft"},
                                     {"init": "hierarchical"}])  # fmt: skip
def test_variants_find_separated_clusters(options):
    X, truth, _ = hetero(48, 5, 12, 3)
    own = ILASDP(3, random_state=0, **options).fit(X)
    assert errors(own.labels_, truth) == 0
    assert own.converged_


def test_more_points_than_the_program_takes_are_put_where_they_are_likeliest():
    X, truth, _ = hetero(240, 0, 12, 3)
    own = ILASDP(3, max_sdp_points=60, random_state=0).fit(X.float().numpy())
    assert isinstance(own.labels_, np.ndarray)
    assert own.memberships_.shape == (3, 60, 60)
    assert errors(own.labels_, truth) <= 0.01
    assert errors(own.predict(X.numpy()), truth) <= 0.01
    assert own.get_params()["max_sdp_points"] == 60


def test_a_program_that_does_not_converge_says_so():
    X, _, _ = hetero(10, 0, 2, 2)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        own = ILASDP(2, tol=1e-15, max_iter=1, init="hierarchical").fit(X)
    assert not own.converged_


# --- a model's heads -------------------------------------------------------------------------------------------------


def test_head_features_are_spectra_of_products():
    model = tiny_model("llama")
    features, weights, names = head_features(model)
    assert features.shape == (12, 4)
    assert weights.shape == (12, 8, 32)
    raw = np.empty((12, 4))
    for index, name in enumerate(names):
        layer, head = model.model.layers[index // 4].self_attn, index % 4
        assert name == f"model.layers.{index // 4}.self_attn.q_proj[{head}]"
        own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        q, k = layer.q_proj.weight[own], layer.k_proj.weight[shared]
        o, v = layer.o_proj.weight[:, own], layer.v_proj.weight[shared]
        for at, product in ((0, q.T @ k), (2, o @ v)):
            values = np.linalg.svd(product.detach().double().numpy(), compute_uv=False)
            p = values / values.sum()
            raw[index, at : at + 2] = np.log(np.linalg.norm(values)), -(p[p > 1e-14] * np.log(p[p > 1e-14])).sum()
    np.testing.assert_allclose(features.numpy(), (raw - raw.mean(0)) / raw.std(0), rtol=1e-5, atol=1e-5)


def test_the_port_groups_by_spectrum():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 12, generator=generator) * (1 + 5 * (i % 2)) for i in range(12)]
    backend = ILASDPGroups(ILASDPOptions())
    features = torch.stack([backend.describe(weight) for weight in weights])
    labels = backend.groups(features, 2, torch.Generator().manual_seed(0))
    assert errors(labels, np.arange(12) % 2) == 0


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (torch.randn(10, 2), {"n_clusters": 1}, "n_clusters must be between 2 and half of the 10 rows; got 1"),
        (torch.randn(10, 2), {"n_clusters": 6}, "got 6"),
        (torch.randn(3, 2), {"n_clusters": 2}, "at least 4 rows"),
        (torch.full((10, 2), float("nan")), {"n_clusters": 2}, "X is not finite"),
        (torch.randn(10, 2), {"n_clusters": 2, "init": [0, 1]}, "a label for every row"),
        (torch.randn(10, 2), {"n_clusters": 2, "init": [0] * 10}, "at least 2 rows in each of the 2 clusters"),
        (torch.randn(10, 2), {"n_clusters": 2, "init": [0] * 9 + [1]}, "at least 2 rows in each"),
        (torch.randn(10, 2), {"n_clusters": 2, "init": "random"}, "unknown init 'random'"),
        (torch.randn(10, 2), {"n_clusters": 2, "covariance": "tied"}, "unknown covariance"),
        (torch.randn(10, 2), {"n_clusters": 2, "update": "none"}, "unknown update"),
    ],
)
def test_bad_data(X, options, message):
    with pytest.raises(InputError, match=message):
        ILASDP(**options).fit(X)


def test_bad_programs():
    X = torch.randn(6, 2)
    with pytest.raises(InputError, match=r"covs must be \(K, 2, 2\)"):
        likelihood_affinities(X, torch.eye(3)[None])
    with pytest.raises(InputError, match="symmetric positive definite"):
        likelihood_affinities(X, -torch.eye(2)[None])
    with pytest.raises(InputError, match="A must be symmetric"):
        solve_la_sdp(torch.arange(9.0).view(1, 3, 3))
    with pytest.raises(InputError, match="12 points exceed max_points = 10: subsample"):
        solve_la_sdp(torch.zeros(2, 12, 12), max_points=10)
    with pytest.raises(InputError, match="finite"):
        solve_la_sdp(torch.full((1, 3, 3), float("nan")))
