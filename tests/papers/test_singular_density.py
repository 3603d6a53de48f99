"""Deep densities of perturbed rows: a closed form, singular laws, intrinsic dimensions, and a model's activations."""

import logging
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from llmcompress.analyze import gather
from llmcompress.backends.analysis.intrinsic_dimension import SCALES, slope
from llmcompress.backends.analysis.singular_density import (
    DeepDensity,
    SingularDensity,
    SingularDensityOptions,
    fit_together,
    jacobian_dimension,
    levina_bickel,
    perturbation_rule,
    slope_dimension,
    two_nn,
    wasserstein1,
)
from llmcompress.calibration.text import pack, tokenize
from llmcompress.errors import InputError, RunError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# --- the likelihood --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear_fit():
    """Probabilistic PCA of 2,000 rows, D = 10, d = 2, and the maximum of its likelihood in closed form."""
    x = randn(2000, 2, seed=1) @ randn(10, 2, seed=0).T + 0.3 * randn(2000, 10, seed=2)
    model = DeepDensity(2, 10, linear=True).fit(x, 0.0, steps=3000, particles=1, lr=3e-2)
    covariance = torch.tensor(np.cov(x.numpy().T, bias=True))
    values = torch.linalg.eigvalsh(covariance)
    noise = float(values[:-2].mean())
    best = -0.5 * (10 * math.log(2 * math.pi) + float(values[-2:].log().sum()) + 8 * math.log(noise) + 10)
    return x, model, best, noise


def exact_likelihood(model, x):
    layer = model.decoder[0]
    weight = layer.weight.detach().double()
    covariance = weight @ weight.T + model.sigma() ** 2 * torch.eye(len(weight), dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(layer.bias.detach().double(), covariance)
    return float(law.log_prob(x.double()).mean())


def test_a_linear_model_reaches_the_closed_form(linear_fit):
    x, model, best, noise = linear_fit
    exact = exact_likelihood(model, x)
    print(f"maximum {best:.4f}, fit {exact:.4f}, bound {float(model.bound(x, 50).mean()):.4f}")
    assert best - 0.03 <= exact <= best + 1e-6
    assert model.sigma() ** 2 == pytest.approx(noise, rel=0.02)
    assert float(model.bound(x, 50).mean()) <= exact + 0.01


def test_particles_tighten_the_bound_of_a_poor_encoder(linear_fit):
    x, model, _, _ = linear_fit
    poor = DeepDensity(2, 10, linear=True)
    poor.load_state_dict(model.state_dict())
    with torch.no_grad():
        poor.encoder[0].weight.mul_(0.9)
    bounds = [float(poor.bound(x, k).mean()) for k in (1, 5, 50, 500)]
    print(bounds)
    assert bounds == sorted(bounds)
    assert bounds[-1] - bounds[0] > 0.5
    assert bounds[-1] <= exact_likelihood(model, x) + 0.01


# --- singular laws ---------------------------------------------------------------------------------------------------


def curve(kind, n, seed, noise, width=10):
    """Rows on a circle or a figure-eight in `width` dimensions."""
    t = 2 * math.pi * torch.rand(n, generator=generator(seed))
    flat = torch.stack((t.cos() if kind == "circle" else t.sin() * t.cos(), t.sin()), 1)
    basis = torch.linalg.qr(randn(width, width, seed=99))[0][:2]
    return flat @ basis + noise * randn(n, width, seed=seed + 1000)


@pytest.mark.parametrize("kind", ["circle", "figure-eight"])
@pytest.mark.parametrize("particles", [1, 5])
def test_noise_on_the_data_helps_where_that_of_the_model_is_fixed(kind, particles):
    """Mean W1 of two seeds to the law itself, at a perturbation of 0, one of the right size, and one too large."""
    scales = (0.0, 0.1, 0.8)
    jobs = [(seed, scale) for seed in (0, 1) for scale in scales]
    models = [DeepDensity(2, 10, noise="fixed", sigma_star=0.01) for _ in jobs]
    fit_together(models, [curve(kind, 500, seed, 0.01) for seed, _ in jobs], [scale for _, scale in jobs],
                 steps=1000, particles=particles, seeds=[seed for seed, _ in jobs])  # fmt: skip
    distance = dict.fromkeys(scales, 0.0)
    for (seed, scale), model in zip(jobs, models, strict=True):
        distance[scale] += wasserstein1(model.push(512), curve(kind, 512, seed + 50, 0.0)) / 2
    print(kind, particles, distance)
    assert distance[0.0] >= 1.5 * distance[0.1]
    assert distance[0.8] >= 1.7 * distance[0.1]
    assert distance[0.1] <= 0.25


def test_a_learned_noise_needs_no_perturbation():
    models = [DeepDensity(2, 10) for _ in range(4)]
    kinds = ("circle", "figure-eight")
    fit_together(models, [curve(kind, 500, seed, 0.01) for kind in kinds for seed in (0, 1)], [0.1] * 4,
                 steps=1000, seeds=[0, 1, 0, 1])  # fmt: skip
    for index, kind in enumerate(kinds):
        pair = [wasserstein1(models[2 * index + s].push(512), curve(kind, 512, s + 50, 0.0)) for s in (0, 1)]
        print(kind, pair)
        assert np.mean(pair) <= 0.15


@pytest.mark.parametrize(("b", "t"), [(1, 1), (2, 1), (2, 4), (3, 8)])
def test_the_rule_is_the_minimiser_of_the_bound(b, t):
    sizes = np.logspace(3, 9, 7)
    found = []
    for n in sizes:

        def bound(s, n=n):
            return math.exp(s) ** (-t / (2 * b + t)) * n ** (-b / (2 * b + t)) + math.exp(s)

        found.append(math.exp(scipy.optimize.minimize_scalar(bound, bracket=(-20, 0), tol=1e-12).x))
    slope = np.polyfit(np.log(sizes), np.log(found), 1)[0]
    assert slope == pytest.approx(-b / (2 * (b + t)), abs=1e-4)
    for n, s in zip(sizes, found, strict=True):
        assert perturbation_rule(int(n), b, t) == pytest.approx(s, rel=1e-3)


# --- dimensions ------------------------------------------------------------------------------------------------------


def manifold(kind, n, seed):
    """A figure-eight, the surface of a torus, a 3-sphere: 1, 2 and 3 dimensions in 8, rotated."""
    u, v = 2 * math.pi * torch.rand(2, n, generator=generator(seed))
    if kind == "figure-eight":
        flat = torch.stack((u.sin(), u.sin() * u.cos()), 1)
    elif kind == "torus":
        flat = torch.stack(((1 + 0.5 * v.cos()) * u.cos(), (1 + 0.5 * v.cos()) * u.sin(), 0.5 * v.sin()), 1)
    else:
        flat = torch.nn.functional.normalize(randn(n, 4, seed=seed), dim=1)
    basis = torch.linalg.qr(randn(8, 8, seed=98))[0][: flat.shape[1]]
    return flat @ basis


def test_dimensions_of_manifolds():
    jacobian, slopes = [], []
    for truth, kind in enumerate(("figure-eight", "torus", "sphere"), start=1):
        train, test = manifold(kind, 1600, 0), manifold(kind, 400, 1)
        models = [DeepDensity(4, 8) for _ in SCALES]
        fit_together(models, [train] * len(SCALES), SCALES, steps=1000, particles=10)
        jacobian.append(jacobian_dimension(models[SCALES.index(0.1)], test))
        slopes.append(slope(models, test, SCALES))
        linear = int((PCA().fit(train.numpy()).explained_variance_ > 1e-6).sum())
        print(kind, jacobian[-1], slopes[-1], linear, two_nn(test), levina_bickel(test))
        assert jacobian[-1] == pytest.approx(truth, abs=0.5)
        assert slopes[-1] == pytest.approx(truth, abs=0.5)
        assert linear == truth + 1, "linear rank counts the space around"
    assert jacobian == sorted(jacobian)
    assert slopes == sorted(slopes)
    assert len({*jacobian}) == len({*slopes}) == 3


def test_neighbours_know_the_dimension_of_uniform_points():
    for d in (2, 5):
        x = torch.rand(2000, d, generator=generator(d)) @ torch.linalg.qr(randn(9, 9, seed=3))[0][:d]
        assert two_nn(x) == pytest.approx(d, rel=0.12)
        assert levina_bickel(x) == pytest.approx(d, rel=0.15)
    twice = torch.cat((x, x[:10]))
    assert math.isfinite(two_nn(twice)), "copies of a point"


def test_perturbation_keeps_a_small_sample_from_being_learnt_by_heart():
    def torus(n, seed):
        u, v = 2 * math.pi * torch.rand(2, n, generator=generator(seed))
        flat = torch.stack(((1 + 0.5 * v.cos()) * u.cos(), (1 + 0.5 * v.cos()) * u.sin(), 0.5 * v.sin()), 1)
        return flat @ torch.linalg.qr(randn(10, 10, seed=97))[0][:3]

    train, test = torus(300, 0), torus(300, 1)
    basis = torch.linalg.qr(randn(10, 10, seed=97))[0][:3]
    shifted = test + 0.4 * torch.nn.functional.normalize(randn(300, 3, seed=5), dim=1) @ basis
    models = fit_together([DeepDensity(3, 10), DeepDensity(3, 10)], [train] * 2, [0.0, 0.05], steps=3000)
    labels = [0] * 300 + [1] * 300
    for model, tilde in zip(models, (0.0, 0.05), strict=True):
        gap = float(model.score(train, tilde).mean() - model.score(test, tilde).mean())
        area = roc_auc_score(labels, -torch.cat((model.score(test, tilde), model.score(shifted, tilde))))
        print(tilde, gap, model.sigma(), area)
        assert gap >= 3 if tilde == 0 else gap <= 1.5
        assert area >= 0.75
    centred = (torch.cat((test, shifted)) - train.mean(0)) @ basis.T
    spread = torch.cov(((train - train.mean(0)) @ basis.T).T)
    mahalanobis = (centred @ torch.linalg.inv(spread) * centred).sum(1)
    assert roc_auc_score(labels, mahalanobis) < 0.7


# --- fits ------------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_fit_and_the_global_state_is_left_alone():
    x = randn(300, 4, seed=4)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first, second, other = (DeepDensity(2, 4).fit(x, 0.1, steps=20, seed=s) for s in (7, 7, 8))
    first.score(x), first.push(9)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    again = first.fit(x, 0.1, steps=20, seed=7)
    assert torch.equal(again.log_sigma, second.log_sigma), "a fit begins with new weights"


def test_fits_side_by_side_are_those_alone():
    x = [randn(300, 4, seed=s) for s in (4, 5)]
    together = fit_together([DeepDensity(2, 4) for _ in x], x, [0.1, 0.2], steps=10, seeds=[1, 2])
    for model, rows, tilde, seed in zip(together, x, (0.1, 0.2), (1, 2), strict=True):
        alone = DeepDensity(2, 4).fit(rows, tilde, steps=10, seed=seed)
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_matching_is_the_sorted_one_on_a_line():
    a, b = randn(200, 1, seed=1), randn(200, 1, seed=2) + 1
    expected = (a.sort(0).values - b.sort(0).values).abs().mean()
    assert wasserstein1(a, b) == pytest.approx(float(expected), rel=1e-6)


# --- a model's activations -------------------------------------------------------------------------------------------


def test_density_of_activations_beside_its_baselines(smollm2, smollm2_tokenizer, wikitext):
    """Better than one Gaussian; a worse detector of bad text than the model's loss."""
    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:40_000]]), 8, 256, "valid")
    subject = gather(smollm2, tokens, ["model.layers.3.self_attn.q_proj"])
    subject.model, subject.tokens = smollm2, tokens
    options = SingularDensityOptions(steps=350, window=64, perturbations=[0.0, 0.3])
    report = SingularDensity(options).analyze(subject)
    rows = {row[0]: row[1:] for row in report.rows}
    print(rows)
    deep, gaussian, _ = rows["nats a held-out token, perturbation 0"]
    assert deep > gaussian + 0.5
    for name in ("shuffled", "random tokens", "one in 8 replaced"):
        density, _, loss = rows[f"AUROC, {name}"]
        assert loss >= 0.95
        assert loss >= density
    dimensions = [cells[0] for name, cells in rows.items() if name.startswith("dimension")]
    assert len(dimensions) == 5
    assert all(0 < d <= 12.5 for d in dimensions)
    assert "by loss" in report.findings[1]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_models_and_rows(caplog):
    x = randn(300, 4)
    with pytest.raises(InputError, match="must be at least 1; got 0, 4, 64"):
        DeepDensity(0, 4)
    with pytest.raises(InputError, match="unknown noise 'both'; known: learned, fixed"):
        DeepDensity(2, 4, noise="both")
    for rows in (x[:, :3], x[0]):
        with pytest.raises(InputError, match=r"rows must be \(n, 4\)"):
            DeepDensity(2, 4).fit(rows, 0.1)
    with pytest.raises(InputError, match="rows are not finite"):
        DeepDensity(2, 4).fit(x * math.nan, 0.1)
    with pytest.raises(InputError, match="255 rows are fewer than two batches of 128"):
        DeepDensity(2, 4).fit(x[:255], 0.1)
    with pytest.raises(InputError, match=r"perturbation must not be negative; got -0\.1"):
        DeepDensity(2, 4).fit(x, -0.1)
    with pytest.raises(InputError, match="particles, steps and batch must be at least 1"):
        DeepDensity(2, 4).fit(x, 0.1, particles=0)
    with pytest.raises(InputError, match="needs a positive sigma_star or perturbation"):
        DeepDensity(2, 4, noise="fixed", sigma_star=0.0).fit(x, 0.0)
    with pytest.raises(InputError, match="particles must be at least 1; got 0"):
        DeepDensity(2, 4).bound(x, 0)
    with pytest.raises(InputError, match="repeats at least 1"):
        DeepDensity(2, 4).score(x, repeats=0)
    with pytest.raises(InputError, match="as many models as data"):
        fit_together([DeepDensity(2, 4)], [x, x], [0.1])
    with pytest.raises(RunError, match="step 1: the loss is not finite"):
        DeepDensity(2, 4).fit(1e25 * x, 0.1, steps=3)
    with caplog.at_level(logging.WARNING, "llmcompress"):
        DeepDensity(5, 4)
        DeepDensity(1, 4, sigma_floor=0.6).fit(x * torch.tensor([1.0, 1, 1, 0]), 0.0, steps=1)
    for told in ("latent_dim 5 is above the data's 4", "axis 3 has no variance"):
        assert told in caplog.text
    with caplog.at_level(logging.WARNING, "llmcompress"):
        DeepDensity(1, 4, sigma_floor=0.6).fit(1e-3 * x, 0.0, steps=1, lr=0.5)
    assert "sigma is at its floor of 0.6" in caplog.text


def test_bad_measures():
    x = randn(20, 3)
    with pytest.raises(InputError, match="must have one shape"):
        wasserstein1(x, x[:10])
    with pytest.raises(InputError, match="at most 4096 points are matched"):
        wasserstein1(torch.zeros(4097, 1), torch.zeros(4097, 1))
    with pytest.raises(InputError, match="smoothness and dimension positive"):
        perturbation_rule(100, 0.0, 1.0)
    with pytest.raises(InputError, match="two positive scales"):
        slope_dimension(x, x, 2, scales=(0.1,))
    with pytest.raises(InputError, match="3 points have no 2 neighbours"):
        two_nn(x[:3])
    with pytest.raises(InputError, match="k must be at least 2"):
        levina_bickel(x, 1)
