"""Dual randomised smoothing: certificates are tight and sound, halves are blind, a model's embeddings are certified."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.optimize import minimize
from scipy.stats import binomtest, norm
from sklearn.datasets import load_digits

from llmcompress.analyze import analyze_model
from llmcompress.backends.analysis.dual_smoothing import (
    DualSmoothedClassifier,
    SmoothedClassifier,
    checkerboard,
    clopper_pearson,
    dual_radius,
    dual_radius_multiclass,
    embed,
    embedding_robustness,
    even_odd,
    fill_neighbours,
    radius_cap,
    read_labelled,
)
from llmcompress.calibration.text import pack, tokenize
from llmcompress.errors import InputError, RunError
from llmcompress.models.structure import analyse
from tests.tiny import save_tiny, write_text


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the certificate -------------------------------------------------------------------------------------------------


def test_the_radius_is_the_distance_to_the_first_flip():
    """Halves that are linear under noise: the nearest perturbation that makes the classes tie, by SLSQP."""
    rng, tried = np.random.default_rng(0), 0
    for _ in range(80):
        directions = [v / np.linalg.norm(v) for v in (rng.normal(size=3), rng.normal(size=4))]
        sigma, p = rng.uniform(0.3, 1.5, 2), rng.uniform(0.55, 0.97, 2)
        p[rng.integers(2)] *= 0.8
        a, radius = norm.ppf(p), float(dual_radius(*p, *sigma))
        if a.sum() < 0.1:
            continue
        tried += 1
        slopes = scipy.linalg.block_diag(*[-v / s for v, s in zip(directions, sigma, strict=True)])

        def quantiles(d, a=a, slopes=slopes):
            return a + slopes @ d

        flipped = {"type": "eq", "fun": lambda d: norm.cdf(quantiles(d)).sum() - 1,
                   "jac": lambda d, slopes=slopes: norm.pdf(quantiles(d)) @ slopes}  # fmt: skip
        starts = [np.concatenate([u * v for u, v in zip(rng.uniform(0.2, 1, 2), directions, strict=True)]) * radius
                  for _ in range(4)]  # fmt: skip
        found = [minimize(lambda d: d @ d, start, jac=lambda d: 2 * d, constraints=flipped, method="SLSQP",
                          options={"ftol": 1e-16, "maxiter": 500}) for start in starts]  # fmt: skip
        assert min(math.sqrt(f.fun) for f in found if f.success) == pytest.approx(radius, rel=1e-6)
    assert tried >= 60


def test_a_negative_quantile_is_subtracted_and_radii_are_not_summed_by_squares():
    p = norm.cdf([2, 0.2, -0.8])
    radius = float(dual_radius(p[0], p[1], 1.0))
    assert radius == pytest.approx(1.5556, abs=1e-4)
    for factor, wins in ((0.999, True), (1.001, False)):
        step = factor * radius / math.sqrt(2)
        assert (norm.cdf(2 - step) + norm.cdf(0.2 - step) > 1) == wins
    assert float(dual_radius(p[0], p[2], 1.0)) == pytest.approx(0.8485, abs=1e-4)
    assert float(dual_radius(p[1], p[2], 1.0)) == 0, "abstains"
    assert float(dual_radius(0.0, 0.9, 1.0)) == 0
    assert float(dual_radius(0.0, 0.0, 1.0)) == 0, "not NaN"


def test_unequal_noise_by_a_scan_over_directions():
    a, sigma = norm.ppf([0.9, 0.7]), (0.4, 1.3)
    angles = np.linspace(0, np.pi / 2, 20_001)
    reach = a.sum() / (np.cos(angles) / sigma[0] + np.sin(angles) / sigma[1])
    assert float(dual_radius(0.9, 0.7, *sigma)) == pytest.approx(reach.min(), rel=1e-6)


@pytest.mark.parametrize(("n", "ratio"), [(1_000, 1.3945), (10_000, 1.4020), (100_000, 1.4054)])
def test_the_cap_pays_for_two_bounds(n, ratio):
    assert radius_cap(n, 1e-3, 0.7) / radius_cap(n, 1e-3, 0.7, dual=False) == pytest.approx(ratio, abs=1e-3)


def test_bounds_are_scipys():
    for k, n in ((0, 10), (3, 10), (10, 10), (987, 1000)):
        expected = binomtest(k, n).proportion_ci(1 - 2 * 0.01, "exact")
        assert float(clopper_pearson(k, n, 0.01)) == pytest.approx(expected.low, abs=1e-12)
        assert float(clopper_pearson(k, n, 0.01, "upper")) == pytest.approx(expected.high, abs=1e-12)


def test_a_certificate_claims_too_much_no_more_often_than_it_says():
    rng, n, alpha = np.random.default_rng(0), 500, 0.05
    for p in ((0.93, 0.62), (0.8, 0.8), (0.99, 0.55)):
        counts = rng.binomial(n, p, size=(4000, 2))
        exact = dual_radius(*p, 1.0)
        bounds = clopper_pearson(counts, n, alpha / 2)
        assert (dual_radius(bounds[:, 0], bounds[:, 1], 1.0) > exact).mean() <= 0.02
        rates = np.minimum(counts / n, 1 - 1e-9)
        assert (dual_radius(rates[:, 0], rates[:, 1], 1.0) > exact).mean() >= 0.4, "frequencies are no bounds"


def test_the_bounds_of_other_classes_widen_the_radius():
    wide = dual_radius_multiclass(0.7, 0.6, [0.1], [0.15], 1.0)
    assert wide >= 1.09
    assert float(dual_radius(0.7, 0.6, 1.0)) == pytest.approx(0.55, abs=1e-3)
    angles = np.linspace(0, np.pi / 2, 10_001)
    s, t = 0.999 * wide * np.cos(angles), 0.999 * wide * np.sin(angles)
    (a, b), (c, d) = norm.ppf([0.7, 0.6]), norm.ppf([0.1, 0.15])
    assert (norm.cdf(a - s) + norm.cdf(b - t) - norm.cdf(c + s) - norm.cdf(d + t)).min() > 0
    for p, sigma in (((0.7, 0.6), (1.0, 1.0)), ((0.95, 0.4), (0.3, 1.1))):
        two = float(dual_radius(*p, *sigma))
        assert 0.995 * two <= dual_radius_multiclass(*p, [1 - p[0]], [1 - p[1]], *sigma) <= two
    assert dual_radius_multiclass(0.7, 0.6, [0.1, 0.3], [0.15, 0.4], 1.0) <= wide, "the nearest class decides"
    assert dual_radius_multiclass(0.4, 0.4, [0.5], [0.5], 1.0) == 0


# --- classifiers -----------------------------------------------------------------------------------------------------


def test_missing_pixels_are_the_mean_of_their_kept_neighbours():
    x = torch.arange(12.0).view(3, 4)
    filled = fill_neighbours(x, checkerboard(3, 4))
    assert filled[0, 1] == (0 + 2 + 5) / 3
    assert filled[1, 2] == (2 + 10 + 5 + 7) / 4
    assert torch.equal(filled[checkerboard(3, 4)], x[checkerboard(3, 4)])
    assert even_odd(5).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("mask", [even_odd(36), checkerboard(6, 6)])
def test_a_half_sees_nothing_of_the_other(mask):
    """Noise of size 5 on the other half changes what a half answers by exactly 0."""
    x = torch.randn(mask.shape, generator=generator(1))
    other = torch.where(mask, x, x + 5 * torch.randn(mask.shape, generator=generator(2)))
    seen = []

    def record(batch):
        seen.append(batch)
        return torch.stack((batch.flatten(1).sum(1), torch.zeros(len(batch))), 1)

    smoothed = DualSmoothedClassifier(record, lambda b: torch.zeros(len(b), 2), mask, 2, 0.5)
    for start in (x, other):
        smoothed.certify(start, 10, 10, generator=generator(3))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_draws_that_choose_are_not_those_that_estimate():
    """A classifier that counts its draws: n0 for the choice, n others for the bound, in each half."""
    drawn = [0, 0]

    def counting(index):
        def f(batch):
            drawn[index] += len(batch)
            return torch.eye(3)[torch.full((len(batch),), 1)]

        return f

    smoothed = DualSmoothedClassifier(counting(0), counting(1), even_odd(8), 3, 0.5, 0.25)
    found = smoothed.certify(torch.zeros(8), n0=30, n=500, alpha=0.01, batch_size=64)
    assert drawn == [530, 530]
    assert (found.label, found.n, found.alpha) == (1, 500, 0.01)
    assert found.radius == pytest.approx(float(dual_radius(found.p_l, found.p_r, 0.5, 0.25)))
    assert found.p_l == pytest.approx((0.01 / 2) ** (1 / 500))
    plain = SmoothedClassifier(counting(0), 3, 0.5)
    assert plain.certify(torch.zeros(8), 30, 500, 0.01).radius == pytest.approx(radius_cap(500, 0.01, 0.5, dual=False))
    assert plain.predict(torch.zeros(8), n0=10, n=50) == 1


def mlp(d, seed):
    layers = [torch.nn.Linear(d, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)]
    for index, layer in enumerate(layers[::2]):
        with torch.no_grad():
            layer.weight.copy_(
                torch.randn(layer.weight.shape, generator=generator(seed + index)) / math.sqrt(layer.in_features)
            )
            layer.bias.zero_()
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)


@pytest.fixture(scope="module")
def digits():
    images, targets = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    large = torch.nn.functional.interpolate(small, size=16, mode="bilinear", align_corners=False)[:, 0]
    order = torch.randperm(len(large), generator=generator(0))
    return large[order], torch.tensor(targets)[order]


def trained(images, targets, sigma, view, seed):
    model = mlp(256, seed)
    optimizer, draw = torch.optim.Adam(model.parameters(), 1e-3), generator(seed + 100)
    for _ in range(600):
        rows = torch.randint(len(images), (128,), generator=draw)
        noised = images[rows] + sigma * torch.randn(images[rows].shape, generator=draw)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(view(noised)), targets[rows]).backward()
        optimizer.step()
    return model.requires_grad_(False)


def certified_radius(digits, sigma, dual, n=500):
    """Mean certified radius of 80 test images, wrong and uncertain ones 0."""
    images, targets = digits
    train, test = slice(0, 1400), slice(1400, 1480)
    mask = checkerboard(16, 16)
    if dual:
        halves = [trained(images[train], targets[train], sigma, lambda x, m=m: fill_neighbours(x, m), seed)
                  for seed, m in ((0, mask), (10, ~mask))]  # fmt: skip
        smoothed = DualSmoothedClassifier(*halves, mask, 10, sigma)
    else:
        smoothed = SmoothedClassifier(trained(images[train], targets[train], sigma, lambda x: x, 0), 10, sigma)
    draw = generator(7)
    found = [smoothed.certify(x, 100, n, generator=draw) for x in images[test]]
    right = [c.radius if c.label == int(t) else 0.0 for c, t in zip(found, targets[test], strict=True)]
    return float(np.mean(right))


def test_halves_certify_more_at_little_noise_and_no_more_at_much(digits):
    little = {dual: certified_radius(digits, 0.1, dual) for dual in (False, True)}
    plain = certified_radius(digits, 0.5, dual=False)
    scaled, equal = certified_radius(digits, 0.5 / math.sqrt(2), True), certified_radius(digits, 0.5, True)
    print(f"sigma .1: {little[True] / little[False]:.3f}; .5: {scaled / plain:.3f}, same sigma {equal / plain:.3f}")
    assert little[True] >= 1.25 * little[False]
    assert scaled >= 0.9 * plain
    assert equal < plain, "at equal noise halves are worse"


# --- a model's embeddings --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded_texts(smollm2, smollm2_tokenizer, wikitext):
    """Six passages of WikiText as classes, twelve texts of 32 tokens of each; the model rounded to 8 bits."""
    rows = pack(tokenize(smollm2_tokenizer, [wikitext["test"][:400_000]]), 200, 384, "test")[::30][:6]
    rounded = copy.deepcopy(smollm2)
    for site in analyse(rounded).sites:
        weight = rounded.get_submodule(site.name).weight.data
        scale = weight.abs().amax(1, keepdim=True) / 127
        weight.copy_((weight / scale).round() * scale)
    return rows.reshape(-1, 32), torch.arange(6).repeat_interleave(12), rounded


def test_most_decisions_on_embeddings_survive_rounding_to_eight_bits(smollm2, embedded_texts):
    texts, labels, rounded = embedded_texts
    before, after = embed(smollm2, texts), embed(rounded, texts)
    rows = {}
    for method in ("rs", "dual"):
        report = embedding_robustness(before, after, texts, labels, 1.0, method)
        rows[method] = dict(zip(report.columns, report.rows[0], strict=True))
        print(rows[method])
    for row in rows.values():
        assert row["accuracy"] >= 0.5, "six classes"
        assert row["centred drift"] < row["median drift"]
        assert row["certified share "] >= 0.6
    assert rows["dual"]["certified share "] <= rows["rs"]["certified share "] + 0.1, "halves certify no more"
    unmoved = embedding_robustness(before, before, texts, labels, 1.0)
    assert unmoved.rows[0][4:] == [0.0, pytest.approx(1.0, abs=0.25), 0.0, pytest.approx(1.0, abs=0.25)]
    far = embedding_robustness(
        before, before + 1e3 * torch.randn(before.shape, generator=generator(0)), texts, labels, 1.0
    )
    assert far.rows[0][5] == far.rows[0][7] == 0


def test_the_analysis_runs_on_a_model_and_a_copy_of_it(tmp_path, smollm2, smollm2_tokenizer):
    smollm2.save_pretrained(tmp_path / "same")
    smollm2_tokenizer.save_pretrained(tmp_path / "same")
    report = analyze_model(
        str(tmp_path / "same"), "dual_smoothing",
        {"compare": str(tmp_path / "same"), "sigma": [1.0], "draws": 100}, samples=3, length=96,
    )  # fmt: skip
    assert report.column("method") == ["rs", "dual", "dual"]
    assert report.column("sigma") == [1.0, 1.0, pytest.approx(2**-0.5)]
    assert report.column("median drift") == [0.0, 0.0, 0.0]
    assert len(report.findings) == 2


def labelled_file(path, rows):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def test_classes_come_from_a_file_of_labelled_texts(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    rows = [(letter * length, label) for length in (5, 9, 7, 12, 40, 6) for letter, label in (("a", 1), ("Z", 2))]
    options = {"labels": labelled_file(tmp_path / "labels.jsonl", rows), "sigma": [0.2], "draws": 200, "window": 10}
    data = write_text(tmp_path / "text.txt")
    report = analyze_model(str(folder), "dual_smoothing", options, data=str(data), samples=2, length=16)
    assert "4 texts of 2 classes" in report.title
    assert max(report.column("accuracy")) == 1.0, "one letter or the other is told apart"


def test_texts_of_several_lengths_are_embedded_as_alone(smollm2):
    texts = [torch.arange(length) + 5 for length in (4, 9, 4, 7)]
    together = embed(smollm2, texts)
    for text, found in zip(texts, together, strict=True):
        torch.testing.assert_close(found, embed(smollm2, [text])[0], rtol=1e-4, atol=1e-4)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_labels(tmp_path):
    good = [("one text", "a"), ("two texts", "b")] * 3
    with pytest.raises(InputError, match=r"labels: .*missing\.jsonl cannot be read: No such file"):
        read_labelled(tmp_path / "missing.jsonl")
    for row in ('{"text": "x"}', "[]", "no json", '{"text": "", "label": 1}'):
        path = tmp_path / "bad.jsonl"
        path.write_text(json.dumps({"text": "x", "label": 1}) + "\n" + row + "\n")
        with pytest.raises(InputError, match=r"bad\.jsonl, line 2: expected"):
            read_labelled(path)
    for rows in (good[:4], [row for row in good if row[1] == "a"]):
        with pytest.raises(InputError, match="two classes of three texts each at least; got"):
            read_labelled(Path(labelled_file(tmp_path / "few.jsonl", rows)))
    texts, labels = read_labelled(Path(labelled_file(tmp_path / "good.jsonl", good)))
    assert texts[0] == "one text"
    assert labels.tolist() == [0, 1] * 3


def test_bad_certificates():
    for sigma in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="sigma_l must be positive"):
            dual_radius(0.9, 0.9, sigma)
    with pytest.raises(InputError, match="sigma_r must be positive"):
        dual_radius(0.9, 0.9, 1.0, 0.0)
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match=r"p_l must be in \[0, 1\)"):
            dual_radius(p, 0.9, 1.0)
    with pytest.raises(InputError, match=r"q_l must be in \[0, 1\]"):
        dual_radius_multiclass(0.7, 0.6, [-0.1], [0.1], 1.0)
    with pytest.raises(InputError, match="vectors of one length"):
        dual_radius_multiclass(0.7, 0.6, [0.1, 0.2], [0.1], 1.0)
    for alpha in (0.0, 1.0):
        with pytest.raises(InputError, match=r"alpha, the chance of a wrong certificate, must be in \(0, 1\)"):
            clopper_pearson(1, 2, alpha)
    for k, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match="k must be between 0 and n"):
            clopper_pearson(k, n, 0.1)
    with pytest.raises(InputError, match="n must be at least 1"):
        radius_cap(0, 0.1, 1.0)
    with pytest.raises(InputError, match="unknown side 'both'; known: lower, upper"):
        clopper_pearson(1, 2, 0.1, "both")


def test_bad_classifiers_and_inputs():
    def three(batch):
        return torch.zeros(len(batch), 3)

    for mask in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(InputError, match="coordinates to both halves"):
            DualSmoothedClassifier(three, three, mask, 3, 1.0)
    with pytest.raises(InputError, match="must be bool"):
        DualSmoothedClassifier(three, three, torch.ones(4), 3, 1.0)
    with pytest.raises(InputError, match="num_classes must be at least 2; got 1"):
        SmoothedClassifier(three, 1, 1.0)
    with pytest.raises(InputError, match="sigma must be positive"):
        SmoothedClassifier(three, 3, 0.0)
    smoothed = DualSmoothedClassifier(three, three, even_odd(4), 3, 1.0)
    with pytest.raises(InputError, match=r"the input has shape \(5,\), the mask \(4,\)"):
        smoothed.certify(torch.zeros(5))
    with pytest.raises(InputError, match="the input is not finite"):
        smoothed.certify(torch.full((4,), math.inf))
    for options in ({"n": 0}, {"n0": 0}):
        with pytest.raises(InputError, match="must be at least 1"):
            smoothed.certify(torch.zeros(4), **options)
    with pytest.raises(InputError, match=r"alpha, .*; got 2"):
        smoothed.certify(torch.zeros(4), alpha=2)
    with pytest.raises(InputError, match=r"returned \(10, 3\) for 10 inputs and 4 classes"):
        SmoothedClassifier(three, 4, 1.0).certify(torch.zeros(4), n0=10)
    with pytest.raises(RunError, match="logits are not finite"):
        SmoothedClassifier(lambda b: three(b) * math.nan, 3, 1.0).certify(torch.zeros(4))
    with pytest.raises(InputError, match="without any kept neighbour"):
        fill_neighbours(torch.zeros(4, 4), torch.eye(4, dtype=torch.bool) & (torch.arange(4) == 0))


def test_bad_embeddings():
    labels = torch.arange(12) % 3
    z = torch.randn(12, 4, generator=generator(0))
    with pytest.raises(InputError, match="at least two classes; got 12 labels, 1 classes"):
        embedding_robustness(z, None, None, torch.zeros(12), 1.0)
    with pytest.raises(InputError, match="need as many labels"):
        embedding_robustness(z, None, None, labels[:5], 1.0)
    with pytest.raises(InputError, match="the models differ in width"):
        embedding_robustness(z, z[:, :3], None, labels, 1.0)
    with pytest.raises(InputError, match="must be finite"):
        embedding_robustness(z * math.nan, None, None, labels, 1.0)
    with pytest.raises(InputError, match="unknown method 'both'; known: rs, dual"):
        embedding_robustness(z, None, None, labels, 1.0, "both")
