"""The flag aggregator: from Grams alone, under attack, in training, and between processes of which one is broken."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from llmcompress.backends.optim.aggregators import AGGREGATORS, get_aggregator
from llmcompress.backends.optim.allreduce import aggregate_microbatches, robust_allreduce_
from llmcompress.backends.optim.attacks import ATTACKS
from llmcompress.backends.optim.flag_aggregator import (
    Flag,
    FlagAggregator,
    FlagOptions,
    flag_coefficients,
    solve_flag,
)
from llmcompress.backends.ports import Subject
from llmcompress.errors import InputError
from llmcompress.types import Site
from tests import gloo
from tests.tiny import tiny_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def cosine(a, b):
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


# --- from the Gram alone ---------------------------------------------------------------------------------------------


def by_svd(G, m, rounds, lam=0.0, scale="median"):
    """The same aggregator in R^n, by singular value decompositions of the columns."""
    G = G.numpy().T
    p, norms = G.shape[1], np.linalg.norm(G, axis=0)
    X, c = G / norms, np.ones(p)
    if lam:
        pairs = np.stack([G[:, i] - G[:, j] for i in range(p) for j in range(i + 1, p)], 1)
        X = np.concatenate([X, pairs / np.linalg.norm(pairs, axis=0)], 1)
        c = np.concatenate([c, np.full(pairs.shape[1], 2 * lam / (p - 1))])
    w = c
    for _ in range(rounds):
        Y = np.linalg.svd(X * np.sqrt(w), full_matrices=False)[0][:, :m]
        v = ((Y.T @ X) ** 2).sum(0)
        w = c * 0.5 / np.sqrt(np.maximum(1 - v, 0) + 1e-7)
    unit = Y @ (Y.T @ (G / norms))
    return {
        "none": Y @ (Y.T @ G.mean(1)),
        "unit": unit.sum(1) / m,
        "median": unit.mean(1) * np.sort(norms)[(p - 1) // 2],
    }[scale]


@pytest.mark.parametrize("scale", ["none", "unit", "median"])
@pytest.mark.parametrize("lam", [0.0, 2.0])
def test_the_gram_knows_all(scale, lam):
    G = randn(11, 400, seed=1) + randn(400, seed=2)
    found = FlagAggregator(n_iter=10, lam=lam, scale=scale, tol=-math.inf)(G)
    expected = by_svd(G, 6, 10, lam, scale)
    assert float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) <= 1e-9


@pytest.mark.parametrize("lam", [0.0, 2.0])
def test_no_round_raises_the_objective(lam):
    for seed in range(3):
        G = randn(11, 400, seed=seed) + 0.5 * randn(400, seed=seed + 10)
        objective = solve_flag(G @ G.T, n_iter=30, lam=lam, tol=-math.inf).objective
        assert len(objective) == 30
        assert max(np.diff(objective)) <= 1e-8
        assert objective[-1] < objective[0]


def test_the_exact_likelihood_collapses():
    G = randn(11, 400) + randn(400, seed=1)
    found = solve_flag(G @ G.T, n_iter=30, loss="beta", tol=-math.inf)
    assert found.objective[-1] < -20
    assert int((found.v > 1 - 1e-6).sum()) >= 6, "m gradients span the subspace"


def test_single_precision_lists_and_the_seed_of_nothing():
    G = randn(7, 100, dtype=torch.float32)
    rule = FlagAggregator()
    found = rule(G)
    assert found.dtype == torch.float32
    assert torch.equal(found, rule([row.view(10, 10) for row in G]))
    assert rule.values_.shape == rule.weights_.shape == (7,)
    s, v = flag_coefficients(G.double() @ G.double().T)
    torch.testing.assert_close(s, rule.weights_)
    torch.testing.assert_close(v, rule.values_)


# --- attacks ---------------------------------------------------------------------------------------------------------


def workers(seed, p=15, n=4000):
    """mu plus noise of its size."""
    mu = randn(n, seed=seed)
    mu = mu / mu.norm()
    return mu, mu + randn(p, n, seed=seed + 1) / math.sqrt(n)


@pytest.mark.parametrize("seed", range(3))
def test_three_bad_workers_of_fifteen(seed):
    mu, G = workers(10 * seed)
    for name in ("uniform", "gaussian", "reverse", "drop", "little", "inner product", "zero", "nan"):
        attacked = ATTACKS[name](G, 3, generator(seed))
        assert torch.equal(attacked[3:], G[3:])
        found = cosine(FlagAggregator()(attacked), mu)
        assert found >= 0.87, name
        if name in ("uniform", "gaussian", "reverse"):
            assert cosine(get_aggregator("mean")(attacked), mu) <= 0.45, name
            assert cosine(FlagAggregator(scale="none")(attacked), mu) <= 0.7, "the paper's own scale is not robust"
    values = FlagAggregator(m=1, n_iter=1)
    values(ATTACKS["gaussian"](G, 3, generator(seed)))
    assert float(values.values_[3:].min()) >= 0.4
    assert float(values.values_[:3].max()) <= 0.01


def test_broken_workers_count_for_nothing():
    _, G = workers(3)
    rule = FlagAggregator()
    expected = rule(G[4:])
    broken = G.clone()
    broken[0], broken[1, 5], broken[2], broken[3] = math.nan, math.inf, 0, 1e-9 * G[3]
    found = rule(broken)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert not rule.weights_[:4].any()
    assert not rule.values_[:4].any()


def test_the_other_rules_are_what_they_are_called():
    G = randn(11, 6)
    a = G.numpy()
    np.testing.assert_allclose(get_aggregator("mean")(G), a.mean(0))
    np.testing.assert_allclose(get_aggregator("median")(G), np.median(a, 0))
    np.testing.assert_allclose(get_aggregator("trimmed_mean", 2)(G), np.sort(a, 0)[2:9].mean(0))
    near = lambda centre, k: np.stack([a[np.argsort(np.abs(a[:, j] - centre[j]))[:k], j].mean() for j in range(6)])  # noqa: E731
    np.testing.assert_allclose(get_aggregator("meamed", 2)(G), near(np.median(a, 0), 9))
    np.testing.assert_allclose(get_aggregator("phocas", 2)(G), near(np.sort(a, 0)[2:9].mean(0), 9))
    distance = ((a[:, None] - a[None]) ** 2).sum(-1)
    scores = np.sort(distance, 1)[:, 1 : 1 + 11 - 2 - 2].sum(1)
    np.testing.assert_allclose(get_aggregator("krum", 2)(G), a[scores.argmin()])
    np.testing.assert_allclose(get_aggregator("multi_krum", 2)(G), a[np.argsort(scores)[:9]].mean(0))
    centre = get_aggregator("geometric_median")(G)
    pull = ((G - centre) / (G - centre).norm(dim=1, keepdim=True)).sum(0)
    assert float(pull.norm()) <= 1e-2, "unit pulls balance"
    unit = (G / G.norm(dim=1, keepdim=True)).mean(0) * G.norm(dim=1).median()
    torch.testing.assert_close(get_aggregator("unit_mean")(G), unit)
    assert torch.isfinite(get_aggregator("bulyan", 2)(G)).all()
    for name in ("krum", "multi_krum", "bulyan"):
        outlying = G.clone()
        outlying[:2] += 1000
        assert float(get_aggregator(name, 2)(outlying).abs().max()) < 10


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 6))
        teacher = nn.Linear(30, 6, bias=False)
    x = randn(6000, 30, dtype=torch.float32)
    with torch.no_grad():
        y = teacher(x).argmax(1)
    return model, x[:5000], y[:5000], x[5000:], y[5000:]


def accuracy(task, rule, attack, p=15, bad=3, steps=150):
    model, x, y, test, labels = task
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]
    sizes = [shape.numel() for shape in shapes]

    def unflat(flat):
        return {n: g.view(s) for n, g, s in zip(names, flat.split(sizes), shapes, strict=True)}

    def loss(flat, x, y):
        return nn.functional.cross_entropy(functional_call(model, unflat(flat), (x,)), y)

    w, draw = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), generator(5)
    each = vmap(grad(loss), (None, 0, 0))
    for _ in range(steps):
        rows = torch.randint(len(x), (p, 4), generator=draw)
        G = each(w, x[rows], y[rows])
        if attack:
            G = ATTACKS[attack](G, bad, draw)
        w = w - 0.3 * rule(G)
    return float((functional_call(model, unflat(w), (test,)).argmax(1) == labels).float().mean())


def test_training_with_three_liars_of_fifteen(task):
    rules = {"flag": FlagAggregator(), "mean": get_aggregator("mean"), "median": get_aggregator("median")}
    pairs = [("uniform", name) for name in rules] + [("reverse", "flag"), ("reverse", "median")]
    pairs += [(None, "flag"), (None, "mean")]
    found = {attack: {} for attack, _ in pairs}
    for attack, name in pairs:
        found[attack][name] = accuracy(task, rules[name], attack)
    found["uniform"]["none"] = accuracy(task, FlagAggregator(scale="none"), "uniform")
    found["uniform"]["unit mean"] = accuracy(task, get_aggregator("unit_mean"), "uniform")
    found["uniform"]["multi-krum"] = accuracy(task, get_aggregator("multi_krum", 3), "uniform")
    print(found)
    uniform = found["uniform"]
    assert uniform["flag"] >= uniform["mean"] + 0.2
    assert uniform["flag"] >= uniform["median"] + 0.02
    assert uniform["none"] < uniform["median"]
    assert found["reverse"]["flag"] >= found["reverse"]["median"]
    assert found[None]["flag"] >= found[None]["mean"] - 0.04


def test_microbatches_as_workers():
    model = nn.Linear(6, 2)
    x, y = randn(5, 8, 6, dtype=torch.float32), torch.randint(2, (5, 8), generator=generator(1))
    losses = [nn.functional.cross_entropy(model(a), b) for a, b in zip(x, y, strict=True)]
    losses[2] = losses[2] * math.nan
    standing = aggregate_microbatches(model, losses, FlagAggregator())
    assert standing[2] == 0
    assert min(standing[:2] + standing[3:]) > 0.1
    rows = []
    for a, b in zip(x, y, strict=True):
        copied = copy.deepcopy(model)
        nn.functional.cross_entropy(copied(a), b).backward()
        rows.append(torch.cat([p.grad.flatten() for p in copied.parameters()]))
    rows[2] = rows[2] * math.nan
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, FlagAggregator()(rows), rtol=1e-5, atol=1e-7)


# --- processes -------------------------------------------------------------------------------------------------------


def test_five_processes_one_of_them_broken(tmp_path):
    found = gloo.run(gloo.process, gloo.PROCESSES, tmp_path)
    rows = [gloo.local_gradient(rank)[1] for rank in range(gloo.PROCESSES)]
    broken = [row.clone() for row in rows]
    broken[1][:600] = math.nan
    expected = FlagAggregator()(broken)
    for one in found:
        torch.testing.assert_close(one["sharded"], expected, rtol=1e-6, atol=1e-8)
        assert torch.equal(one["sharded"], found[0]["sharded"])
        assert one["values"][1] == 0
        assert torch.equal(one["hook"], found[0]["hook"]), "bitwise equal on all ranks"
        for what in ("lacks", "another"):
            assert one[what].startswith("the processes have gradients of different parameters: [723, 723, ")
    trio = FlagAggregator()([rows[rank] for rank in (0, 2, 4)])
    for rank in (0, 2, 4):
        torch.testing.assert_close(found[rank]["three"], trio, rtol=1e-6, atol=1e-8)
    honest = torch.stack([row for rank, row in enumerate(rows) if rank != 3]).mean(0)
    lied = torch.stack([gloo.local_gradient(rank, liar=3)[1] for rank in range(gloo.PROCESSES)])
    print(cosine(found[0]["hook"], honest), cosine(lied.mean(0), honest))
    assert cosine(found[0]["hook"], honest) >= 0.85
    assert cosine(lied.mean(0), honest) <= 0.1


# --- the analysis ----------------------------------------------------------------------------------------------------


def test_the_analysis_compares_rules_under_attacks():
    model = tiny_model()
    tokens = torch.randint(4, 100, (12, 16), generator=generator())
    site = Site("model.layers.1.mlp.down_proj", "down", 1, 48, 32, "x")
    inputs = {site.name: torch.empty(0)}
    report = Flag(FlagOptions(m=4)).analyze(Subject([site], inputs, {}, {}, model=model, tokens=tokens))
    assert report.column("attack") == list(ATTACKS)
    assert set(report.columns[1:]) == {"flag", *AGGREGATORS} - {"bulyan"}
    flag = dict(zip(report.column("attack"), report.column("flag"), strict=True))
    mean = dict(zip(report.column("attack"), report.column("mean"), strict=True))
    assert flag["gaussian"] > mean["gaussian"] + 0.2
    assert flag["reverse"] > mean["reverse"]
    assert math.isfinite(flag["nan"])
    assert "worst cosine" in report.findings[0]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: FlagAggregator()(randn(1, 5)), r"at least 2 gradients \(p, n\) are needed; got shape \(1, 5\)"),
        (lambda: FlagAggregator()([]), "at least 2 gradients"),
        (lambda: FlagAggregator()([randn(3), randn(4)]), r"the gradients differ in length: \[3, 4\]"),
        (lambda: FlagAggregator()(torch.ones(3, 4, dtype=torch.int64)), "gradients are floating-point numbers"),
        (lambda: FlagAggregator(m=0)(randn(3, 4)), "m must be between 1 and p = 3; got 0"),
        (lambda: FlagAggregator(m=4)(randn(3, 4)), "got 4"),
        (lambda: FlagAggregator(n_iter=0)(randn(3, 4)), "n_iter must be >= 1"),
        (lambda: FlagAggregator(lam=-1.0)(randn(3, 4)), "lam >= 0"),
        (lambda: FlagAggregator(power=1.0)(randn(3, 4)), "power > 1; got 5, 0, 1"),
        (lambda: FlagAggregator(loss="l2")(randn(3, 4)), "unknown loss 'l2'; known: power, beta"),
        (lambda: FlagAggregator(scale="mean")(randn(3, 4)), "unknown scale 'mean'"),
        (lambda: FlagAggregator()(torch.full((3, 4), math.nan)), "no worker has a finite gradient"),
        (lambda: solve_flag(torch.ones(1, 1)), r"K must be \(p, p\) of at least 2 gradients"),
        (lambda: get_aggregator("krumm"), "unknown aggregator 'krumm'; known: mean, "),
        (lambda: get_aggregator("bulyan", 2)(randn(10, 4)), r"bulyan needs p >= 4f \+ 3 = 11 gradients; got 10"),
        (lambda: get_aggregator("krum", 2)(randn(4, 4)), "4 gradients have no majority over 2 bad ones"),
        (lambda: robust_allreduce_(nn.Linear(2, 2), FlagAggregator()), "there is no process group"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(InputError, match=message):
        run()
