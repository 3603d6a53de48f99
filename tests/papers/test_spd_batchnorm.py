"""Bures-Wasserstein geometry: identities, barycentres, batch normalisation, and mixtures of text domains."""

import itertools
import logging
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from pyriemann.geometry.distance import distance_riemann, distance_wasserstein
from pyriemann.geometry.mean import mean_riemann, mean_wasserstein
from sklearn.linear_model import LogisticRegression

import llmcompress
from llmcompress import Recipe
from llmcompress.analyze import build_analysis, gather_texts
from llmcompress.backends.geometry.spd_batchnorm import (
    BiMap,
    Bures,
    BuresOptions,
    GBWBatchNorm,
    LogEig,
    ReEig,
    bures_mix_weights,
    bw_barycentre,
    bw_distance,
    bw_exp,
    bw_geodesic,
    bw_inner,
    bw_log,
    bw_transport,
    drift_report,
    spd_log,
    spd_power,
    sym_exp,
)
from llmcompress.calibration.text import pack, python_docs, tokenize
from llmcompress.errors import InputError
from llmcompress.mixture import shares
from tests.tiny import recipe, save_tiny, tiny_model, tiny_tokenizer, write_text


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def spd(N, n, condition=100.0, seed=0):
    """N matrices of that condition."""
    basis = torch.linalg.qr(randn(N, n, n, seed=seed))[0]
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    return basis * values @ basis.mT


def symmetric(*shape, seed=0):
    A = randn(*shape, seed=seed)
    return (A + A.mT) / 2


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


P, Q, EYE = *spd(2, 6, 12), torch.eye(6, dtype=torch.float64)


# --- identities ------------------------------------------------------------------------------------------------------


def test_the_distance_is_that_of_matrix_square_roots():
    root = scipy.linalg.sqrtm(P.numpy())
    expected = np.trace(P) + np.trace(Q) - 2 * np.trace(scipy.linalg.sqrtm(root @ Q.numpy() @ root)).real
    assert float(bw_distance(P, Q, squared=True)) == pytest.approx(expected, rel=1e-10)
    assert float(bw_distance(P, Q)) == pytest.approx(distance_wasserstein(P.numpy(), Q.numpy()), rel=1e-8)
    wide = spd(1, 256, 1e6)[0]
    assert float(bw_distance(wide.float(), wide.float())) <= 1e-6, "traces that cancel"


@pytest.mark.parametrize("M", [None, spd(1, 6, seed=5)[0]])
def test_logarithm_exponential_and_geodesic_agree(M):
    V = bw_log(P, Q, M)
    assert relative(bw_exp(P, V, M), Q) <= 1e-10
    if M is None:
        square = bw_distance(P, Q, squared=True)
        assert float(bw_inner(P, V, V)) == pytest.approx(float(square), rel=1e-10)
        lyapunov = scipy.linalg.solve_sylvester(P.numpy(), P.numpy(), V.numpy())
        assert float(bw_inner(P, V, V)) == pytest.approx(0.5 * float((lyapunov * V.numpy()).sum()), rel=1e-10)
    whole = float(bw_distance(P, Q, M))
    for t in (0.25, 0.5, 0.9):
        assert float(bw_distance(P, bw_geodesic(P, Q, t, M), M)) == pytest.approx(t * whole, rel=1e-8)
        assert relative(bw_geodesic(P, Q, t, M), bw_exp(P, t * V, M)) <= 1e-8
    at_identity = bw_log(EYE, P)
    assert relative(at_identity, 2 * (spd_power(P, 0.5) - EYE)) <= 1e-10


def test_the_parameter_and_the_power_reach_the_other_metrics():
    """With M = P the metric at P is a quarter of the affine-invariant one; theta -> 0 is log-Euclidean."""
    V = symmetric(6, 6, seed=3)
    root = spd_power(P, -0.5)
    pushed = root @ V @ root
    affine = float(torch.trace(torch.linalg.solve(P, V) @ torch.linalg.solve(P, V)))
    assert float(bw_inner(EYE, pushed, pushed)) == pytest.approx(affine / 4, rel=1e-8)
    near = float(bw_distance(P, P + 1e-5 * V, P))
    assert near == pytest.approx(math.sqrt(affine) / 2 * 1e-5, rel=1e-3)
    exact = float((spd_log(P) - spd_log(Q)).norm()) / 2
    for theta, bound in ((0.1, 0.06), (0.01, 0.006), (0.001, 0.0006)):
        assert float(bw_distance(P, Q, theta=theta)) == pytest.approx(exact, rel=bound)


def ladder(V, source, target, steps):
    """Pole ladder: parallel transport by geodesics alone, of a short vector."""
    size = 1e-3 / float(V.norm())
    V, points = V * size, [bw_geodesic(source, target, t) for t in np.linspace(0, 1, steps + 1)]
    for here, there in itertools.pairwise(points):
        middle = bw_geodesic(here, there, 0.5)
        end = bw_exp(middle, -bw_log(middle, bw_exp(here, V)))
        V = -bw_log(there, end)
    return V / size


def test_transport_to_the_identity_is_parallel():
    V = symmetric(6, 6, seed=4)
    moved = bw_transport(V, P, EYE)
    assert float(bw_inner(EYE, moved, moved)) == pytest.approx(float(bw_inner(P, V, V)), rel=1e-12)
    gaps = [relative(ladder(V, P, EYE, steps), moved) for steps in (5, 20)]
    print(gaps)
    assert gaps[1] <= 2e-4
    assert gaps[0] / gaps[1] >= 8
    root = spd_power(P, -0.5)
    assert relative(root @ V @ root, moved) >= 0.3, "the congruence is another map"
    assert relative(bw_transport(moved, EYE, P), V) <= 1e-12


# --- barycentres -----------------------------------------------------------------------------------------------------


def test_the_barycentre_is_stationary_and_pyriemanns():
    X = spd(40, 8, 1e3)
    G, info = bw_barycentre(X, tol=1e-12)
    print(info)
    assert info["n_iter"] <= 100
    assert float(bw_log(G.expand_as(X), X).mean(0).norm() / G.norm()) <= 1e-10
    assert relative(G, torch.from_numpy(mean_wasserstein(X.numpy(), tol=1e-12, maxiter=500))) <= 1e-6
    objective = lambda S: float(bw_distance(S.expand_as(X), X, squared=True).mean())  # noqa: E731
    once, arithmetic = bw_barycentre(X, max_iter=1)[0], X.mean(0)
    assert objective(G) < objective(once) < objective(arithmetic)
    weights = torch.rand(40, dtype=torch.float64, generator=generator())
    weights /= weights.sum()
    weighted, _ = bw_barycentre(X, weights, spd(1, 8, seed=2)[0], 0.5)
    assert relative(weighted, G) > 0.05


def test_of_diagonal_matrices_it_is_the_mean_of_roots():
    values = torch.rand(9, 5, dtype=torch.float64, generator=generator()) + 0.1
    G, _ = bw_barycentre(torch.diag_embed(values), tol=1e-14)
    assert relative(G, torch.diag(values.sqrt().mean(0) ** 2)) <= 1e-12


# --- the layer -------------------------------------------------------------------------------------------------------


def normaliser(theta, **options):
    layer = GBWBatchNorm(6, theta, mean_iters=60, **{"eps": 0.0, **options})
    with torch.no_grad():
        layer.log_metric.copy_(0.3 * symmetric(6, 6, seed=7))
        layer.log_bias.copy_(0.3 * symmetric(6, 6, seed=8))
        layer.scale.fill_(0.3)
    return layer


@pytest.mark.parametrize("theta", [1.0, 0.5, 0.25])
def test_outputs_have_the_mean_and_the_variance_asked_for(theta):
    X, layer = spd(64, 6, 20), normaliser(theta)
    with torch.no_grad():
        Y = layer(X)
        M = layer.metric
        assert layer.folded == 0
        mean, _ = bw_barycentre(Y, M=M, theta=theta, max_iter=300, tol=1e-14)
        assert relative(mean, layer.bias) <= 1e-8
        variance = float(bw_distance(layer.bias.expand_as(Y), Y, M, theta, squared=True).mean())
        assert variance / 0.3**2 - 1 == pytest.approx(0, abs=1e-8)
        uncentred = float(bw_distance(EYE.expand_as(Y), Y, M, theta, squared=True).mean())
        assert abs(uncentred / 0.3**2 - 1) > 0.1, "a variance to I is another one"


def test_running_statistics_approach_the_batchs():
    X, layer = spd(64, 6, 20), normaliser(0.5)
    pushed_mean, _ = bw_barycentre(X, M=layer.metric.detach(), theta=0.5, max_iter=300, tol=1e-14)
    root = spd_power(layer.metric.detach(), -0.5)
    target = root @ spd_power(pushed_mean, 0.5) @ root
    gaps = [float(bw_distance(layer.running_mean, target))]
    with torch.no_grad():
        for _ in range(5):
            layer(X)
            gaps.append(float(bw_distance(layer.running_mean, target)))
    np.testing.assert_allclose(np.divide(gaps[1:], gaps[:-1]), 0.9, atol=1e-6)
    layer.train()
    layer.momentum = 1.0
    with torch.no_grad():
        trained = layer(X)
        layer.eval()
        assert relative(layer(X), trained) <= 1e-8
        assert relative(layer(X[:1]), trained[:1]) <= 1e-8, "one matrix is enough in evaluation"
        assert layer(X.float()).dtype == torch.float32


def test_gradients_at_equal_eigenvalues():
    """At M = B = I, with a multiple of I among the inputs."""
    X = spd(5, 4, 20)
    X[0] = 1.7 * torch.eye(4)
    layer = GBWBatchNorm(4, 0.5)
    layer.running_mean.copy_(spd(1, 4, 5, seed=3)[0])
    layer.eval()  # the batch's own statistics have no gradient, and would move with a finite difference
    weight = symmetric(5, 4, 4, seed=9)

    def loss(X, metric, bias, scale):
        state = {"log_metric": metric, "log_bias": bias, "scale": scale}
        return (torch.func.functional_call(layer, state, X) * weight).sum()

    given = [X, layer.log_metric.detach(), layer.log_bias.detach(), torch.tensor(0.8, dtype=torch.float64)]
    wanted = [t.clone().requires_grad_() for t in given]
    gradients = torch.autograd.grad(loss(*wanted), wanted)
    for index, gradient in enumerate(gradients):
        assert torch.isfinite(gradient).all()
        direction = randn(*gradient.shape, seed=index) if gradient.ndim else torch.ones_like(gradient)
        if gradient.ndim:
            direction = (direction + direction.mT) / 2
        ends = []
        for sign in (1, -1):
            moved = list(given)
            moved[index] = given[index] + sign * 1e-5 * direction
            ends.append(float(loss(*moved)))
        numeric = (ends[0] - ends[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    for f in (spd_log, sym_exp, lambda S: spd_power(S, -0.5)):
        assert torch.autograd.gradcheck(lambda S, f=f: f((S + S.mT) / 2), (spd(2, 3, 9).requires_grad_(),))


def test_a_folded_sample_is_counted_and_told_once(caplog):
    layer = GBWBatchNorm(6)
    with torch.no_grad():
        layer.scale.fill_(40.0)
        with caplog.at_level(logging.WARNING, "llmcompress"):
            layer(spd(16, 6, 20))
            layer(spd(16, 6, 20, seed=1))
    assert layer.folded > 0
    assert len([r for r in caplog.records if "folded" in r.getMessage()]) == 1


def test_the_usual_neighbours():
    X = spd(7, 6, 1e8)
    W = BiMap(6, 4)
    found = W(X)
    weight = W.map.weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(found.detach(), weight @ X @ weight.T)
    raised = ReEig(1e-3)(X)
    np.testing.assert_allclose(np.linalg.eigvalsh(raised)[:, 0], 1e-3, rtol=1e-6)
    torch.testing.assert_close(LogEig()(raised).norm(dim=1), spd_log(raised).norm(dim=(1, 2)))
    np.testing.assert_allclose(spd_log(raised[0]), scipy.linalg.logm(raised[0].numpy()), atol=1e-8)


# --- conditioning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6])
def test_the_metrics_condition_is_that_of_the_matrix_and_not_its_square(kappa):
    P = torch.diag(torch.tensor([1.0, 0.3, 1 / kappa], dtype=torch.float64))
    i, j = torch.triu_indices(3, 3)
    basis = torch.zeros(6, 3, 3, dtype=torch.float64)
    basis[torch.arange(6), i, j] = torch.where(i == j, 1.0, 2**-0.5).double()
    basis = torch.maximum(basis, basis.mT)
    own = torch.stack([bw_inner(P.expand_as(basis), basis, v.expand_as(basis)) for v in basis])
    inverse = torch.linalg.inv(P)
    affine = torch.einsum("aij,bji->ab", inverse @ basis, inverse @ basis)
    assert float(torch.linalg.cond(own)) == pytest.approx(kappa, rel=0.01)
    assert float(torch.linalg.cond(affine)) == pytest.approx(kappa**2, rel=0.01)


def test_a_tiny_eigenvalue_counts_little():
    P = torch.diag(torch.logspace(0, -6, 6, dtype=torch.float64))
    Q = P.clone()
    Q[-1, -1] *= 100
    assert float(bw_distance(P, Q)) == pytest.approx(9e-3, rel=0.01)
    assert distance_riemann(P.numpy(), Q.numpy()) == pytest.approx(math.log(100), rel=1e-3)


def ill_conditioned(seed):
    """Two classes of sample covariances of condition about 1e6: the top two axes turned by ±0.35."""
    rng = np.random.default_rng(seed)
    n, X, y = 10, [], []
    for label, angle in ((0, -0.35), (1, 0.35)):
        turn = np.eye(n)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        for _ in range(240):
            values = np.logspace(0, -6, n)
            values[4:] *= np.exp(rng.standard_normal(6))
            skew = 0.5 * rng.standard_normal((6, 6))
            lower = np.eye(n)
            lower[4:, 4:] = scipy.linalg.expm(skew - skew.T)
            rows = rng.standard_normal((25, n)) * np.sqrt(values) @ (turn @ lower).T
            X.append(rows.T @ rows / 25)
            y.append(label)
    order = rng.permutation(480)
    return torch.from_numpy(np.stack(X))[order], np.array(y)[order]


def test_normalisation_helps_ill_conditioned_classes():
    upper = torch.triu_indices(10, 10)
    scores = {"none": [], "AIM": [], "theta 1": [], "theta 0.5": []}
    for seed in range(5):
        X, y = ill_conditioned(seed)

        def probe(found, name, y=y):
            features = spd_log(found)[:, upper[0], upper[1]].numpy()
            fit = LogisticRegression(max_iter=2000).fit(features[:80], y[:80])
            scores[name].append(fit.score(features[80:], y[80:]))

        probe(X, "none")
        mean = torch.from_numpy(mean_riemann(X[:80].numpy()))
        root = spd_power(mean, -0.5)
        centred = root @ X @ root
        spread = float(spd_log(centred[:80]).square().sum((1, 2)).mean().sqrt())
        probe(spd_power(centred, 0.5 / spread), "AIM")
        for theta in (1.0, 0.5):
            layer = GBWBatchNorm(10, theta, momentum=1.0)
            with torch.no_grad():
                layer.scale.fill_(0.5)
                layer(X[:80])
                layer.eval()
                probe(layer(X), f"theta {theta:g}")
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    print(means)
    for name in ("theta 1", "theta 0.5"):
        assert means[name] >= 0.97
        assert means[name] >= max(means["none"], means["AIM"]) + 0.05


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_is_found_from_few_samples():
    errors, uniform = [], []
    for seed in range(8):
        grams = torch.stack([spd(1, 64, 1e6, seed=10 * seed + k)[0] for k in range(3)])
        exact = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)[torch.randperm(3, generator=generator(seed))]
        root = torch.linalg.cholesky(torch.einsum("k,kij->ij", exact, grams))
        rows = randn(48, 64, seed=seed) @ root.T
        w = bures_mix_weights(grams, rows.T @ rows / 48)
        assert float(w.sum()) == pytest.approx(1)
        assert (w >= 0).all()
        errors.append(float((w - exact).abs().sum()))
        uniform.append(float((exact - 1 / 3).abs().sum()))
    print(np.mean(errors), np.mean(uniform))
    assert np.mean(errors) <= 0.20
    assert np.mean(uniform) >= 0.6


def test_the_fit_is_the_minimum():
    grams, target = spd(3, 12, 50), spd(1, 12, 50, seed=4)[0]
    w = bures_mix_weights(grams, target)

    def value(w):
        return float(bw_distance(torch.einsum("k,kij->ij", w, grams), target, squared=True))

    for seed in range(20):
        other = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample()
        assert value(w) <= value(other) + 1e-9
        assert value(w) <= value(0.98 * w + 0.02 * other) + 1e-9, seed


def test_drift_is_symmetric_and_blind_to_scale():
    grams = {"a": spd(1, 6)[0], "b": 5 * spd(1, 6)[0], "c": spd(1, 6, seed=3)[0]}
    found = drift_report(grams)
    assert found["a"]["b"] <= 1e-6
    assert found["a"]["c"] == found["c"]["a"] > 0.1
    assert found["a"]["a"] == 0


# --- at the ports ----------------------------------------------------------------------------------------------------


def test_the_stream_tells_a_change_of_text():
    half = randn(2, 400, 8) * torch.stack((torch.ones(8), torch.linspace(1, 3, 8))).double()[:, None]
    told = []
    for rows in (torch.cat((half[0], half[0])), torch.cat((half[0], half[1]))):
        stream = Bures(BuresOptions())
        stream.start(800, 8, generator())
        for part in rows.split(150):
            stream.update(part)
        told.append(float(stream.finish()[0].rsplit(" ", 1)[1]))
    assert told[0] < 0.01
    assert told[1] > 0.2


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two unlike texts for the tiny model, and a third like the second."""
    place = tmp_path_factory.mktemp("text")
    write_text(place / "a.txt")
    for name, seed in (("b", 1), ("t", 2)):
        draw = torch.randint(40, 46, (6000,), generator=generator(seed))
        (place / f"{name}.txt").write_text("".join(chr(int(c)) for c in draw))
    return {name: str(place / f"{name}.txt") for name in "abt"}


def test_a_recipe_calibrates_on_the_mixture_that_its_target_is(texts, tmp_path, caplog):
    model = save_tiny(tmp_path / "model")
    data = recipe(model, texts["a"], tmp_path / "out")
    data["calibration"] |= {"mix": {"domains": [texts["b"]], "target": texts["t"], "tokens": 200}}
    data["calibration"]["stream"] = "spd_batchnorm"
    with caplog.at_level(logging.INFO, "llmcompress"):
        llmcompress.apply(Recipe.parse(data))
    told = [r.getMessage() for r in caplog.records]
    (mixture,) = [line for line in told if line.startswith("calibration mixture for")]
    found = dict(reversed(part.split(" ")) for part in mixture.partition(": ")[2].split(", "))
    assert float(found[texts["b"]]) > 0.8
    assert any("Bures drift between halves of the rows" in line for line in told)
    mixed = llmcompress.compress(tiny_model(), tiny_tokenizer(), calibration=data["calibration"])
    alone = {**data["calibration"], "mix": None}
    plain = llmcompress.compress(tiny_model(), tiny_tokenizer(), calibration=alone)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(mixed.get_submodule(name).to_dense(), plain.get_submodule(name).to_dense())


def test_shares_sum_to_the_whole():
    assert shares(torch.tensor([0.5, 0.3, 0.2]), 128) == [64, 38, 26]
    assert shares(torch.tensor([1.0, 0.0]), 7) == [7, 0]
    assert shares(torch.tensor([1 / 3] * 3), 10) == [4, 3, 3]


def test_bad_mixtures(texts, tmp_path):
    base = recipe(tmp_path, texts["a"], tmp_path / "out")
    for mix, message in (
        ({"domains": [texts["b"]]}, r"calibration\.mix\.target: is required"),
        ({"domains": [], "target": texts["t"]}, r"calibration\.mix\.domains: "),
        (
            {"domains": [texts["b"]], "target": texts["t"], "method": "kl"},
            r"calibration\.mix\.method: input should be 'bures'",
        ),
        (
            {"domain": [texts["b"]], "target": texts["t"]},
            r"calibration\.mix\.domain: unknown key; did you mean 'domains'",
        ),
    ):
        with pytest.raises(InputError, match=message):
            Recipe.parse(base | {"calibration": base["calibration"] | {"mix": mix}})
    mix = {"domains": [texts["b"]], "target": texts["t"]}
    with pytest.raises(InputError, match="dataset self has none"):
        Recipe.parse(base | {"calibration": {"dataset": "self", "mix": mix}})
    missing = {"domains": ["nowhere.txt"], "target": texts["t"]}
    data = base | {"model": str(save_tiny(tmp_path / "model"))}
    with pytest.raises(InputError, match=r"nowhere\.txt: no such file"):
        llmcompress.apply(Recipe.parse(data | {"calibration": base["calibration"] | {"mix": missing}}))
    assert not (tmp_path / "out").exists()


def apart(text, parts, size):
    """Pieces from equally distant places: of as many documents, where documents are shorter than the distance."""
    return [text[len(text) * part // parts :][:size] for part in range(parts)]


@pytest.fixture(scope="module")
def domains(smollm2, smollm2_tokenizer, wikitext):
    """Inputs of two layers on prose, help texts, arithmetic, and a text that is half prose, half arithmetic.

    Each row is of a place of its own, so that a text's first rows are of other documents than its rest.
    """
    draw = np.random.default_rng(0)
    sums = " ".join(f"{a} + {b} = {a + b}." for a, b in draw.integers(30, 90, (4000, 2)))

    def rows(text, count, length):
        return torch.cat([
            pack(tokenize(smollm2_tokenizer, [piece]), 1, length, "text") for piece in apart(text, count, 8 * length)
        ])  # fmt: skip

    tokens = {
        name: rows(text, 12, 256)
        for name, text in {"": wikitext["valid"], "docs": python_docs("train")[0], "arithmetic": sums[:30_000]}.items()
    }
    halves = rows(wikitext["test"], 12, 128), rows(sums[30_000:], 12, 128)
    tokens["target"] = torch.cat(halves, 1)
    targets = [r"layers\.6\.mlp\.gate_proj", r"layers\.15\.mlp\.gate_proj"]
    return gather_texts(smollm2, tokens, targets)


def test_domains_of_a_model_lie_apart_and_a_mixture_is_recognised(domains):
    analysis = build_analysis("spd_batchnorm", {"domains": ["docs", "arithmetic"], "target": "t", "tokens": 512})
    report = analysis.analyze(domains)
    rows = [dict(zip(report.columns, row, strict=True)) for row in report.rows]
    for site in {row["site"] for row in rows}:
        within = [row["distance"] for row in rows if row["site"] == site and row["error, times own"] is None]
        across = [row for row in rows if row["site"] == site and row["error, times own"] is not None]
        print(site, within, [(row["domain"], row["other"], row["distance"], row["error, times own"]) for row in across])
        assert max(within) < min(row["distance"] for row in across)
        assert min(row["error, times own"] for row in across) >= 1.1
    mixtures = [finding for finding in report.findings if "is a mixture of" in finding]
    for finding in mixtures:
        print(finding)
        shares = {part.rsplit(" ", 1)[0]: float(part.rsplit(" ", 1)[1]) for part in
                  finding.partition("mixture of ")[2].partition(";")[0].split(", ")}  # fmt: skip
        assert shares["docs"] <= 0.2
        assert shares["arithmetic"] == pytest.approx(0.5, abs=0.2)
        error = {part.rsplit(" ", 1)[0]: float(part.rsplit(" ", 1)[1])
                 for part in finding.partition("rest of it: ")[2].split(", ")}  # fmt: skip
        assert error["fitted"] < error["uniform"]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_matrices():
    bad = P.clone()
    bad[0, 1] += 1
    with pytest.raises(InputError, match=r"P must be square matrices .*; got shape \(6, 5\)"):
        bw_distance(P[:, :5], Q)
    with pytest.raises(InputError, match="P is not symmetric"):
        bw_distance(bad, Q)
    with pytest.raises(InputError, match="Q is not finite"):
        bw_log(P, Q * math.nan)
    with pytest.raises(InputError, match=r"P is not positive definite \(min eigenvalue -1"):
        bw_distance(-EYE, Q)
    singular = torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0])).double()
    assert float(bw_distance(P, singular)) > 0
    with pytest.raises(InputError, match="P is not positive definite"):
        bw_log(singular, Q)
    with pytest.raises(InputError, match="theta must not be 0"):
        bw_distance(P, Q, theta=0)
    with pytest.raises(InputError, match="theta must not be 0"):
        GBWBatchNorm(4, theta=0)
    with pytest.raises(InputError, match="do not commute"):
        bw_transport(Q, P, Q)
    with pytest.raises(InputError, match="leads past the boundary"):
        bw_exp(EYE, -3 * EYE)
    for weights in (torch.tensor([1.2, -0.2]), torch.tensor([0.5, 0.4]), torch.ones(3) / 3):
        with pytest.raises(InputError, match="weights must be 2 numbers that are not negative and sum to 1"):
            bw_barycentre(torch.stack((P, Q)), weights)
    with pytest.raises(InputError, match="N at least 1"):
        bw_barycentre(torch.zeros(0, 6, 6))
    layer = GBWBatchNorm(6)
    with pytest.raises(InputError, match="N at least 1"):
        layer(torch.zeros(0, 6, 6))
    with pytest.raises(InputError, match="one matrix has no variance"):
        layer(P[None])
    with pytest.raises(InputError, match="X is not positive definite"):
        layer(torch.stack((P, singular)))
    with pytest.raises(InputError, match="n_out must be between 1 and n_in = 3"):
        BiMap(3, 4)
    with pytest.raises(InputError, match=r"target must be \(6, 6\); got \(4, 4\)"):
        bures_mix_weights(P[None], EYE[:4, :4])
    with pytest.raises(InputError, match=r"grams must be \(K, d, d\)"):
        bures_mix_weights(P, Q)
    with pytest.raises(InputError, match="compares texts: give others"):
        Bures(BuresOptions()).analyze(None)
