"""Augmented covariances of series: embedding, Yule-Walker, classifiers, choice of delays, and a model's activations."""

import itertools
import math
import time

import numpy as np
import pytest
import scipy.linalg
import torch
from pyriemann.geometry.distance import distance_riemann
from sklearn.base import clone

from llmcompress.analyze import analyze_model, build_analysis, gather_texts
from llmcompress.backends.geometry.augmented_covariance import (
    ACMClassifier,
    ACMDomains,
    ACMOptions,
    AugmentedCovariance,
    augment,
    augmented_covariance,
    mdop,
    select_order_lag,
    yule_walker,
)
from llmcompress.backends.geometry.delay_embedding import first_minimum, mutual_information
from llmcompress.calibration.text import pack, python_docs, tokenize
from llmcompress.errors import InputError
from tests.tiny import save_tiny, write_text


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# --- the embedding ---------------------------------------------------------------------------------------------------


def test_the_embedding_is_the_brute_force_one():
    X = randn(3, 2, 40)
    for order, lag in ((1, 3), (2, 1), (4, 5)):
        found = augment(X, order, lag)
        length = 40 - order * lag if order > 1 else 40
        expected = torch.empty(3, order * 2, length, dtype=torch.float64)
        for n, k, channel, t in itertools.product(range(3), range(order), range(2), range(length)):
            expected[n, 2 * k + channel, t] = X[n, channel, k * lag + t]
        assert torch.equal(found, expected)
    assert augment(X, 1, 7) is X or torch.equal(augment(X, 1, 7), X)
    C = augmented_covariance(X, 2, 3)
    for one, found in zip(augment(X, 2, 3), C, strict=True):
        np.testing.assert_allclose(found, np.cov(one.numpy()), atol=1e-12)
    assert augmented_covariance(X.float(), 2, 3, 0.1).dtype == torch.float32


def test_mixed_channels_keep_their_distances():
    X, W = randn(4, 3, 80), randn(3, 3, seed=1)
    C, mixed = augmented_covariance(X, 3, 2), augmented_covariance(W @ X, 3, 2)
    kron = torch.kron(torch.eye(3, dtype=torch.float64), W)
    assert relative(mixed, kron @ C @ kron.T) <= 1e-12
    for a, b in ((0, 1), (2, 3)):
        plain = distance_riemann(C[a].numpy(), C[b].numpy())
        assert distance_riemann(mixed[a].numpy(), mixed[b].numpy()) == pytest.approx(plain, rel=1e-8)


def var2(T, seed=0, series=1):
    """A stationary VAR(2) of 3 channels with spectral radius 0.8: series (N, 3, T), coefficients and noise."""
    rng = np.random.default_rng(7)
    A = rng.standard_normal((2, 3, 3))
    companion = np.block([[A[0], A[1]], [np.eye(3), np.zeros((3, 3))]])
    radius = max(abs(np.linalg.eigvals(companion)))
    A = np.stack([A[0] * (0.8 / radius), A[1] * (0.8 / radius) ** 2])
    noise = np.linalg.cholesky(np.eye(3) + 0.3)
    e = np.random.default_rng(seed).standard_normal((T + 200, series, 3)) @ noise.T
    x = np.zeros_like(e)
    for t in range(2, T + 200):
        x[t] = x[t - 1] @ A[0].T + x[t - 2] @ A[1].T + e[t]
    return torch.from_numpy(x[200:].transpose(1, 2, 0).copy()), A, noise @ noise.T


def exact_toeplitz(A, noise, order, lag):
    """The covariance of the stacked series, by the discrete Lyapunov equation."""
    companion = np.block([[A[0], A[1]], [np.eye(3), np.zeros((3, 3))]])
    driven = np.zeros((6, 6))
    driven[:3, :3] = noise
    state = scipy.linalg.solve_discrete_lyapunov(companion, driven)
    gammas, power = [], np.eye(6)
    for _ in range(order * lag + 1):
        gammas.append((power @ state)[:3, :3])
        power = companion @ power
    blocks = [
        [gammas[(i - j) * lag] if i >= j else gammas[(j - i) * lag].T for j in range(order)] for i in range(order)
    ]
    return torch.from_numpy(np.block(blocks))


def test_it_converges_to_the_block_toeplitz_matrix():
    _, A, noise = var2(10)
    exact = exact_toeplitz(A, noise, 4, 2)
    sizes = [1000, 4000, 16_000, 64_000]
    errors = []
    for T in sizes:
        x = var2(T, series=4)[0]
        errors.append(np.mean([relative(C, exact) for C in augmented_covariance(x, 4, 2)]))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    print(errors, slope)
    assert -0.65 <= slope <= -0.35


def test_yule_walker_recovers_the_process():
    x, A, noise = var2(64_000)
    coefficients, residual = yule_walker(exact_toeplitz(A, noise, 3, 1), 3)
    assert len(coefficients) == 2
    for found, expected in zip(coefficients, A, strict=True):
        assert float((found - torch.from_numpy(expected)).abs().max()) <= 1e-10
    assert float((residual - torch.from_numpy(noise)).abs().max()) <= 1e-10
    sampled, residual = yule_walker(augmented_covariance(x, 3, 1)[0], 3)
    assert max(float((found - torch.from_numpy(e)).abs().max()) for found, e in zip(sampled, A, strict=True)) <= 0.03
    assert float((residual - torch.from_numpy(noise)).abs().max()) <= 0.03


# --- classifiers -----------------------------------------------------------------------------------------------------


def rotations(angle, count, rng, T=150):
    """x_t = 0.9 R x_{t-1} + e with two planes of four channels turning by ±angle: covariance I for every angle."""
    turn = np.kron(np.eye(2), [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn[2:, 2:] = turn[2:, 2:].T
    x = rng.standard_normal((count, 4))
    found = np.empty((T, count, 4))
    for t in range(T):
        x = 0.9 * x @ turn.T + math.sqrt(1 - 0.81) * rng.standard_normal((count, 4))
        found[t] = x
    return found.transpose(1, 2, 0)


@pytest.mark.parametrize("method", ["mdm", "ts_svm"])
def test_equal_covariances_are_told_apart_by_delays(method):
    rng = np.random.default_rng(0)
    X = np.concatenate([rotations(angle, 130, rng) for angle in (0.5, 0.9)])
    y = np.repeat([0, 1], 130)
    train = np.concatenate((np.arange(30), 130 + np.arange(30)))
    test = np.setdiff1d(np.arange(260), train)
    scores = {}
    for order, lag in ((1, 1), (2, 1), (3, 2)):
        found = ACMClassifier(order, lag, method, param_grid={"C": [1.0], "kernel": ["linear"]}).fit(X[train], y[train])
        scores[order, lag] = found.score(X[test], y[test])
    print(method, scores)
    assert scores[1, 1] <= 0.65
    assert min(scores[2, 1], scores[3, 2]) >= 0.97


def oscillators(frequencies, count, rng, T=200):
    """Two oscillators with noisy phases, mixed into four channels."""
    steps = 2 * np.pi * (np.array(frequencies) + 0.05 * rng.standard_normal((count, T, 2)) / (2 * np.pi))
    phase = 2 * np.pi * rng.random((count, 1, 2)) + steps.cumsum(1)
    mix = np.random.default_rng(42).standard_normal((2, 4))
    return (np.sin(phase) @ mix + 0.3 * rng.standard_normal((count, T, 4))).transpose(0, 2, 1)


def test_oscillators_by_grid_and_by_mdop():
    rng = np.random.default_rng(1)
    X = np.concatenate([oscillators(pair, 130, rng) for pair in ((0.05, 0.065), (0.06, 0.055))])
    y = np.repeat(["a", "b"], 130)
    train = np.concatenate((np.arange(30), 130 + np.arange(30)))
    test = np.setdiff1d(np.arange(260), train)
    candidates = {
        "plain": ACMClassifier(1, 1),
        "plain, MDM": ACMClassifier(1, 1, "mdm"),
        "grid": ACMClassifier(param_grid={"order": [2, 4, 6, 8], "lag": [1, 2, 3, 4, 6, 8, 10]}),
        "mdop": ACMClassifier(selection="mdop", taus=range(21), share=0.25),
        "nonuniform": ACMClassifier(selection="mdop_nonuniform", taus=range(21), share=0.25, shrinkage=0.02),
        "afnn": ACMClassifier(selection="afnn", share=0.25, shrinkage=0.02),
    }
    scores, seconds = {}, {}
    for name, candidate in candidates.items():
        start = time.process_time()
        candidate.fit(X[train], y[train])
        seconds[name] = time.process_time() - start
        scores[name] = candidate.score(X[test], y[test])
        print(name, scores[name], seconds[name], candidate.order_, candidate.lag_)
    assert max(scores["plain"], scores["plain, MDM"]) <= 0.75
    assert min(scores["grid"], scores["mdop"]) >= 0.92
    assert scores["nonuniform"] > scores["plain"]
    assert scores["afnn"] > scores["plain"]
    assert seconds["mdop"] <= seconds["grid"] / 4
    found = candidates["grid"]
    probabilities = found.predict_proba(X[test])
    assert probabilities.shape == (200, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    agreed = found.classes_[probabilities.argmax(1)] == found.predict(X[test])
    assert agreed.mean() >= 0.95
    assert clone(found).get_params()["param_grid"]["lag"] == [1, 2, 3, 4, 6, 8, 10]


# --- delays ----------------------------------------------------------------------------------------------------------


def lorenz(T=5000, dt=0.01):
    x = np.array([1.0, 1.0, 20.0])
    found = np.empty(T)

    def f(v):
        return np.array([10 * (v[1] - v[0]), v[0] * (28 - v[2]) - v[1], v[0] * v[1] - 8 / 3 * v[2]])

    for t in range(-1000, T):
        a = f(x)
        b = f(x + dt / 2 * a)
        c = f(x + dt / 2 * b)
        x = x + dt / 6 * (a + 2 * b + 2 * c + f(x + dt * c))
        if t >= 0:
            found[t] = x[0]
    return found


def test_delays_of_a_sine_an_attractor_and_noise():
    sine = np.sin(2 * np.pi * np.arange(2000) / 40.37)
    assert mdop(sine[:, None], range(21), theiler=20).delays[1] in (10, 11)
    x = lorenz()
    minimum = first_minimum(mutual_information(x, 50))
    found = mdop(x[:, None], range(21))
    print(minimum, found)
    assert 17 <= minimum <= 19
    assert 16 <= found.delays[1] <= 19
    assert found.fnn[-1] <= 0.05
    assert 3 <= len(found.delays) <= 4
    noise = mdop(np.random.default_rng(0).standard_normal((2000, 1)), range(21))
    print(noise)
    assert len(noise.delays) >= 5


def test_mdop_takes_the_channel_that_says_more():
    x = lorenz(2000)
    found = mdop(np.stack((x, np.random.default_rng(0).standard_normal(2000) * 1e-3 + x), 1), range(0, 21, 4))
    assert len(found.channels) == len(found.delays) == len(found.fnn) + 1
    assert set(found.channels) <= {0, 1}


def test_averaged_neighbours_find_a_plane_for_a_sine():
    t = torch.arange(400, dtype=torch.float64)
    X = torch.stack([(2 * math.pi * t / 40.37 + p).sin()[None] for p in (0.0, 1.0)]) + 1e-3 * randn(2, 1, 400)
    order, lag = select_order_lag(X, "afnn")
    assert order >= 2
    assert 4 <= lag <= 14


# --- a model's activations -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(smollm2, smollm2_tokenizer, wikitext):
    sums = " ".join(f"{a} + {b} = {a + b}." for a in range(40, 90) for b in range(30, 80))
    sources = {
        "": wikitext["valid"][:16_000], "docs": python_docs("train")[0][:16_000], "sums": sums[:16_000],
        "target": wikitext["test"][:4000],
    }  # fmt: skip
    tokens = {n: pack(tokenize(smollm2_tokenizer, [text]), 12, 256, n) for n, text in sources.items()}
    return gather_texts(smollm2, tokens, [r"layers\.15\.mlp\.gate_proj"])


def test_delays_show_the_order_of_tokens(texts):
    options = {"domains": ["docs", "sums"], "target": "t", "orders": [2]}
    report = build_analysis("augmented_covariance", options).analyze(texts)
    rows = {row[1]: row[2:] for row in report.rows}
    print(rows, report.findings)
    plain, delayed = rows["token order"]
    assert plain <= 0.75
    assert delayed >= 0.9
    assert rows["domains"][1] >= 0.85
    assert "analysed text" in report.findings[0]
    assert report.columns[2:] == ["plain covariance", "order 2"]


def test_the_command_reads_several_texts(tmp_path):
    folder, first = save_tiny(tmp_path / "model"), write_text(tmp_path / "a.txt")
    other = tmp_path / "b.txt"
    other.write_text("abcd efgh" * 900)
    options = {"domains": [str(other)], "window": 16, "channels": 2, "orders": [2], "target": str(first)}
    report = analyze_model(str(folder), "augmented_covariance", options, str(first), samples=20, length=16,
                           sites=[r"layers\.1\.mlp\.gate"])  # fmt: skip
    assert {row[1] for row in report.rows} == {"token order", "domains"}
    assert any("the target's windows" in finding for finding in report.findings)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_series():
    X = randn(8, 2, 30)
    with pytest.raises(InputError, match=r"series \(N, d, T\), not empty; got shape \(2, 30\)"):
        augment(X[0], 2, 1)
    for order, lag, name in ((0, 1, "order"), (2, 0, "lag"), (2.5, 1, "order"), (True, 1, "order")):
        with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1; got"):
            augment(X, order, lag)
    with pytest.raises(InputError, match="window too short: T=30, order\\*lag=30"):
        augment(X, 3, 10)
    flat = X.clone()
    flat[5, 1] = 2.0
    with pytest.raises(InputError, match="constant channel 1 in series 5"):
        augmented_covariance(flat, 2, 1)
    with pytest.raises(InputError, match="X is not finite"):
        AugmentedCovariance(2).fit(X * math.nan)
    with pytest.raises(InputError, match="singular augmented covariance: m=12, T'=6"):
        augmented_covariance(X, 6, 4)
    assert augmented_covariance(X, 6, 4, 0.02).shape == (8, 12, 12)
    with pytest.raises(InputError, match=r"shrinkage must be in \[0, 1\); got 1"):
        augmented_covariance(X, 2, 1, 1.0)
    with pytest.raises(InputError, match="two classes at least; got \\[3\\]"):
        ACMClassifier().fit(X, [3] * 8)
    with pytest.raises(InputError, match="no order and lag of the grid fits these series: window too short"):
        ACMClassifier(param_grid={"order": [4], "lag": [9]}).fit(X, [0, 1] * 4)
    with pytest.raises(InputError, match="unknown method 'knn'"):
        ACMClassifier(method="knn").fit(X, [0, 1] * 4)
    with pytest.raises(InputError, match="unknown selection 'all'"):
        ACMClassifier(selection="all").fit(X, [0, 1] * 4)
    with pytest.raises(InputError, match="of two blocks of 5 at least"):
        yule_walker(torch.eye(8), 5)
    with pytest.raises(InputError, match="T=30, largest delay 15"):
        mdop(X[0].T, range(16))
    with pytest.raises(InputError, match="constant channel 1"):
        mdop(flat[5].T)
    with pytest.raises(InputError, match="x must be a finite series"):
        mdop(X[0, 0])


def test_bad_analyses(texts):
    with pytest.raises(InputError, match="give 3 windows of 1000; at least 6 are needed"):
        ACMDomains(ACMOptions(window=1000)).analyze(texts)
