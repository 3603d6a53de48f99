"""M-FAC: inverse Fisher products against dense inverses, pruning, and the optimiser on rotated features."""

import copy
import math
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector

from llmcompress.backends.curvature.mfac import (
    MFAC,
    DynamicFisherInverse,
    FisherOptions,
    MFACFactory,
    SequenceFisher,
    StaticFisherInverse,
    collect_gradients,
    obs_prune,
)
from llmcompress.backends.ports import Subject
from llmcompress.errors import InputError
from llmcompress.types import Site
from tests.tiny import tiny_model

D, M, LAM = 200, 24, 1e-4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def fisher(G, lam=LAM, m=None):
    return lam * torch.eye(G.shape[1], dtype=torch.float64) + G.double().T @ G.double() / (m or len(G))


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


# --- products --------------------------------------------------------------------------------------------------------


def test_static_products_are_those_of_the_dense_inverse():
    G, X = randn(M, D, seed=1), randn(D, 3, seed=2)
    exact, static = torch.linalg.inv(fisher(G)), StaticFisherInverse(G, LAM)
    assert relative(static.mul(X), exact @ X) <= 1e-9
    assert relative(static.mul(X[:, 0]), exact @ X[:, 0]) <= 1e-9
    assert relative(static.diag(), exact.diagonal()) <= 1e-9
    for i, j in ((0, 0), (3, 150), (199, 7)):
        assert static.element(i, j) == pytest.approx(float(exact[i, j]), abs=1e-10 * float(exact.abs().max()))


def test_blocks_are_the_inverses_of_the_diagonal_blocks():
    G, x = randn(M, D, seed=1), randn(D, seed=2)
    blocked = StaticFisherInverse(G, LAM, block_size=64)  # 64, 64, 64 and 8
    F = fisher(G)
    parts = torch.arange(D).split(64)
    expected = torch.cat([torch.linalg.solve(F[p][:, p], x[p]) for p in parts])
    assert relative(blocked.mul(x), expected) <= 1e-9
    assert relative(blocked.diag(), torch.cat([torch.linalg.inv(F[p][:, p]).diagonal() for p in parts])) <= 1e-9
    assert blocked.element(63, 64) == 0
    assert blocked.element(195, 199) == pytest.approx(float(torch.linalg.inv(F[192:, 192:])[3, 7]), rel=1e-6)


@pytest.mark.parametrize("updates", [10, 77])
def test_a_sliding_window_and_its_two_sets_of_coefficients(updates):
    """Ten gradients of a window of 24: the other rows are zero, and m is 24 all the same."""
    dynamic, rows = DynamicFisherInverse(M, D, LAM, torch.float64), randn(updates, D, seed=3)
    for g in rows:
        slot = dynamic.update(g)
    F, x = fisher(rows[-M:], m=M), randn(D, seed=4)
    assert relative(dynamic.mul(x), torch.linalg.solve(F, x)) <= 1e-9
    assert relative(dynamic.mul_slot(slot), torch.linalg.solve(F, rows[-1])) <= 1e-9
    by_factor, by_recursion = dynamic.coefficients(), dynamic.coefficients("recursion")
    for a, b in zip(by_factor, by_recursion, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= 1e-12
    D_, B, q = by_recursion
    v = B @ dynamic.G
    torch.testing.assert_close(q, M + (dynamic.G * v).sum(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(D_, (v @ dynamic.G.T).triu(), rtol=1e-8, atol=1e-5)
    static = x / LAM - v.T @ ((v @ x) / q)
    assert relative(static, torch.linalg.solve(F, x)) <= 1e-9


@pytest.mark.parametrize("lam", [1e-3, 1e-5, 1e-7])
def test_single_precision_products_of_the_newest_gradient_lose_no_digits(lam):
    common = randn(3000, seed=5)
    rows = (0.9 * common + 0.4 * randn(64, 3000, seed=6)).float()
    dynamic = DynamicFisherInverse(64, 3000, lam)
    for g in rows:
        slot = dynamic.update(g)
    G = rows.double()
    inner = 64 * torch.eye(64, dtype=torch.float64) + G @ G.T / lam
    expected = 64 / lam * G.T @ torch.linalg.inv(inner)[:, slot]
    found = relative(dynamic.mul_slot(slot), expected)
    print(lam, found, relative(dynamic.mul(rows[-1]), expected))
    assert found <= 2e-5
    if lam <= 1e-5:
        assert relative(dynamic.mul(rows[-1]), expected) > 100 * found, "the form that subtracts"


def test_a_new_gradient_costs_less_than_a_new_inverse():
    d, m = 200_000, 64
    rows, dynamic = randn(m, d, dtype=torch.float32), DynamicFisherInverse(m, d, 1e-3)
    for g in rows:
        dynamic.update(g)

    def seconds(run):
        spent = []
        for _ in range(2):
            start = time.process_time()
            run()
            spent.append(time.process_time() - start)
        return min(spent)

    step = seconds(lambda: dynamic.mul_slot(dynamic.update(rows[0])))
    rebuild = seconds(lambda: StaticFisherInverse(rows, 1e-3).mul(rows[0]))
    print(rebuild / step)
    assert rebuild >= 5 * step


# --- pruning ---------------------------------------------------------------------------------------------------------


def test_the_surgeons_identities():
    """The rise that a score foretells is that of the quadratic model, and the pruned weight lands on zero."""
    G, w = randn(M, D, seed=1), randn(D, seed=2)
    F, inverse = fisher(G), StaticFisherInverse(G, LAM)
    for i in (0, 17, 133):
        t = torch.zeros(D, dtype=torch.float64)
        t[i] = -w[i] / inverse.diag()[i]
        change = inverse.mul(t)
        assert float(w[i] ** 2 / (2 * inverse.diag()[i])) == pytest.approx(float(0.5 * change @ F @ change), rel=1e-8)
        assert abs(float((w + change)[i])) <= 1e-12


@pytest.fixture(scope="module")
def network():
    """A 20-40-5 tanh network trained on labels of a random one: model, training and test data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5))
        teacher = nn.Sequential(nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 5))
    with torch.no_grad():
        teacher[0].weight.mul_(3)
        teacher[2].weight.mul_(3)
        x, test = randn(2000, 20, dtype=torch.float32), randn(2000, 20, seed=1, dtype=torch.float32)
        y, labels = teacher(x).argmax(1), teacher(test).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(400):
        batch = torch.randint(2000, (128,), generator=generator(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model, x, y, test, labels


def gradients_of(model, x, y, count=256, size=4):
    """grad_fn: one gradient a few samples."""
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    rows = torch.arange(count * size).view(count, size)

    def loss(flat, x, y):
        parts = flat.split([math.prod(s) for s in shapes])
        parameters = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    return lambda flat: vmap(grad(loss), (None, 0, 0))(flat, x[rows], y[rows]), loss


def test_pruning_keeps_more_than_magnitudes_and_the_diagonal_do(network):
    model, x, y, test, labels = network
    grad_fn, loss = gradients_of(model, x, y)
    w = parameters_to_vector(model.parameters()).detach()
    kept = round(0.3 * len(w))

    def measured(flat):
        with torch.no_grad():
            right = model_at(model, flat, test).argmax(1) == labels
            return float(loss(flat, x, y)), float(right.float().mean())

    def by(scores):
        return torch.zeros_like(w).index_copy(0, (top := scores.topk(kept).indices), w[top])

    found = {"dense": measured(w), "magnitude": measured(by(w.abs()))}
    found["diagonal"] = measured(by(w.square() * (1e-5 + grad_fn(w).square().mean(0))))
    for times in (16, 1):
        pruned, mask, report = obs_prune(w, grad_fn, 0.7, 1e-5, recomputations=times)
        assert int(mask.sum()) == kept == int((pruned != 0).sum())
        assert len(report.densities) == times
        found[times] = measured(pruned)
    print(found)
    assert found[16][0] <= 0.75 * found["magnitude"][0]
    assert found[16][1] >= found["magnitude"][1] + 0.04
    assert found[16][0] < found["diagonal"][0]
    assert found[16][0] < found[1][0]
    again, mask2, _ = obs_prune(pruned, grad_fn, 0.8, "relative", recomputations=2, mask=mask)
    assert not (mask2 & ~mask).any(), "what is gone stays gone"
    assert torch.equal(again != 0, mask2)


def model_at(model, flat, x):
    parts, start = {}, 0
    for name, p in model.named_parameters():
        parts[name] = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    return functional_call(model, parts, (x,))


# --- the optimiser ---------------------------------------------------------------------------------------------------


def softmax_regression(seed):
    """30 features of scales 1 to 0.01, rotated; 8 classes."""
    rotation = torch.linalg.qr(randn(30, 30, seed=seed))[0]
    x = (randn(4000, 30, seed=seed + 1) * torch.logspace(0, -2, 30, dtype=torch.float64)) @ rotation
    logits = (x @ rotation.T / torch.logspace(0, -2, 30, dtype=torch.float64)) @ randn(30, 8, seed=seed + 2)
    y = (
        logits - torch.rand(logits.shape, generator=generator(seed + 3), dtype=torch.float64).log().neg().log()
    ).argmax(1)
    return x.float(), y


def regression_loss(build, seed, steps=300):
    x, y = softmax_regression(seed)
    weight = nn.Parameter(torch.zeros(30, 8))
    optimizer, draw = build([weight]), generator(seed)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(x[batch] @ weight, y[batch]).backward()
        optimizer.step()
        if not torch.isfinite(weight).all():
            return math.inf
    return nn.functional.cross_entropy(x @ weight, y).item()


@pytest.mark.parametrize("seed", range(2))
def test_it_sees_rotated_scales_that_first_order_methods_do_not(seed):
    best = {
        "M-FAC": min(
            regression_loss(lambda p, lr=lr: MFAC(p, lr, window=128, damp=1e-4), seed) for lr in (1e-3, 3e-3, 1e-2)
        ),
        "SGD": min(regression_loss(lambda p, lr=lr: torch.optim.SGD(p, lr, 0.9), seed) for lr in (0.3, 1.0, 3.0)),
        "Adam": min(regression_loss(lambda p, lr=lr: torch.optim.Adam(p, lr), seed) for lr in (0.03, 0.1, 0.3)),
    }
    print(best)
    assert best["M-FAC"] <= min(best["SGD"], best["Adam"]) - 0.02


def test_a_step_is_the_inverse_fisher_times_the_gradient():
    p, q = nn.Parameter(randn(4, 3)), nn.Parameter(randn(5, seed=1))
    w = parameters_to_vector([p, q]).detach().clone()
    optimizer = MFAC(
        [{"params": [p]}, {"params": [q], "lr": 0.2}], 0.1, momentum=0.5, weight_decay=0.01, window=6, damp=1e-2
    )
    rates = torch.cat((torch.full((12,), 0.1), torch.full((5,), 0.2))).double()
    seen, mean = [], torch.zeros(17, dtype=torch.float64)
    for t in range(9):
        p.grad, q.grad = randn(4, 3, seed=t + 2), randn(5, seed=t + 50)
        seen.append(torch.cat((p.grad.flatten(), q.grad)) + 0.01 * w)
        optimizer.step()
        F = fisher(torch.stack(seen[-6:]), 1e-2, 6)
        mean = 0.5 * mean + 0.5 * torch.linalg.solve(F, seen[-1])
        w = w - rates * mean
        torch.testing.assert_close(parameters_to_vector([p, q]).detach(), w, rtol=1e-8, atol=1e-8)


def test_a_saved_optimiser_goes_on_bit_for_bit():
    p = nn.Parameter(randn(6, 5, dtype=torch.float32))
    optimizer = MFAC([p], 0.01, momentum=0.9, window=4)

    def step(optimizer, p, t):
        p.grad = randn(6, 5, seed=t, dtype=torch.float32)
        optimizer.step()

    for t in range(6):
        step(optimizer, p, t)
    saved, q = copy.deepcopy(optimizer.state_dict()), nn.Parameter(p.detach().clone())
    other = MFAC([q], 0.5, window=4)
    other.load_state_dict(saved)
    for t in range(6, 9):
        step(optimizer, p, t)
        step(other, q, t)
    assert torch.equal(p, q)
    with pytest.raises(InputError, match=r"the saved window is \(4, 30\), of other parameters than these: \(4, 12\)"):
        MFAC([nn.Parameter(torch.ones(3, 4))], window=4).load_state_dict(saved)


def test_zeros_stay_zero_where_that_is_asked_and_closures_are_called():
    start = randn(6, 5)
    start[:, 2] = 0
    p = nn.Parameter(start.clone())
    optimizer = MFACFactory().build([("w", p)], 0.01)
    assert optimizer.fisher.window == 32
    optimizer = MFAC([p], 0.01, window=4, sparse=True)

    def closure():
        optimizer.zero_grad()
        loss = (p - 1).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert closure() < first
    assert not p[:, 2].any()
    assert p[:, 1].ne(start[:, 1]).all()


# --- the port --------------------------------------------------------------------------------------------------------


def test_the_port_multiplies_by_the_inverse():
    G, x = randn(M, D, seed=1), randn(D, 2, seed=2)
    port = SequenceFisher(FisherOptions(damp=LAM, block_size=None))
    port.fit(G)
    assert relative(port.inverse_product(x), torch.linalg.solve(fisher(G), x)) <= 1e-9
    port = SequenceFisher(FisherOptions(block_size=None))
    port.fit(G)
    lam = float(G.square().mean())
    assert relative(port.inverse_product(x), torch.linalg.solve(fisher(G, lam), x)) <= 1e-9


def test_the_analysis_prunes_a_copy_and_leaves_the_model_alone():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(4, 100, (12, 16), generator=generator())
    site = Site("model.layers.1.mlp.down_proj", "down", 1, 48, 32, "x")
    subject = Subject([site], {}, {}, {}, model=model, tokens=tokens)
    report = SequenceFisher(FisherOptions(block_size=16)).analyze(subject)
    assert report.column("pruned by") == [
        "nothing",
        "magnitude",
        "diagonal Fisher",
        "M-FAC",
        "M-FAC, weights left as they are",
    ]
    assert len(set(report.column("perplexity"))) == 5
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    rows = collect_gradients(model, [weight], [{"input_ids": t[None], "labels": t[None]} for t in tokens[:2]])
    model(input_ids=tokens[1:2], labels=tokens[1:2]).loss.backward()
    torch.testing.assert_close(rows[1], weight.grad.flatten())


@pytest.mark.slow
def test_pruned_down_projections_of_smollm2(smollm2, smollm2_tokenizer, wikitext):
    """Blocks and the diagonal beat magnitudes; that the blocks beat the diagonal is not promised."""
    from llmcompress.calibration.text import pack, tokenize

    model = copy.deepcopy(smollm2)
    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:120_000]]), 128, 128, "valid")
    sites = [Site(f"model.layers.{i}.mlp.down_proj", "down", i, 1536, 576, "x") for i in (10, 20)]
    report = SequenceFisher(FisherOptions()).analyze(Subject(sites, {}, {}, {}, model=model, tokens=tokens))
    found = dict(report.rows)
    print(found)
    assert found["nothing"] < found["M-FAC"] < found["magnitude"]
    assert found["diagonal Fisher"] < found["magnitude"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: StaticFisherInverse(torch.ones(2, 3), 0.0), "damp must be positive; got 0"),
        (lambda: StaticFisherInverse(torch.ones(0, 3), 1.0), "the gradients is empty"),
        (lambda: StaticFisherInverse(torch.full((2, 3), math.nan), 1.0), "the gradients is not finite"),
        (lambda: StaticFisherInverse(torch.ones(2, 3), 1.0, 0), "block_size must be at least 1; got 0"),
        (lambda: StaticFisherInverse(torch.ones(2, 3), 1.0).mul(torch.ones(4)), r"the gradients' 3 values; got shape"),
        (lambda: DynamicFisherInverse(0, 3, 1.0), "window and dim must be at least 1; got 0 and 3"),
        (lambda: DynamicFisherInverse(2, 3, 1.0).update(torch.ones(2)), r"must have 3 values; got shape \(2,\)"),
        (lambda: DynamicFisherInverse(2, 3, 1.0).update(torch.full((3,), math.inf)), "the gradient is not finite"),
        (lambda: DynamicFisherInverse(2, 3, -1.0), "damp must be positive; got -1"),
        (lambda: obs_prune(torch.ones(4), lambda w: torch.ones(3, 4), 1.0, 1.0), r"sparsity must be in \[0, 1\)"),
        (lambda: obs_prune(torch.ones(4), lambda w: torch.ones(3, 4), 0.2, 1.0, mask=torch.arange(4) < 2),
         r"at least the current 0\.5; got 0\.2"),
        (lambda: obs_prune(torch.ones(4), lambda w: torch.ones(1, 4), 0.5, 1.0), "at least 2 gradients; got 1"),
        (lambda: obs_prune(torch.ones(4), lambda w: torch.ones(3, 5), 0.5, 1.0), r"must give \(m, 4\) gradients"),
        (lambda: collect_gradients(nn.Linear(2, 2), [], []), "all are frozen"),
        (lambda: collect_gradients(nn.Linear(2, 2), [nn.Parameter(torch.ones(1))], []), "no batch was given"),
        (lambda: MFAC([nn.Parameter(torch.ones(2))], damp=0.0), "damp must be positive"),
        (lambda: MFAC([nn.Parameter(torch.ones(2))], window=0), "window and dim must be at least 1"),
        (lambda: MFAC([nn.Parameter(torch.ones(2))], lr=-1.0), "lr is out of range"),
        (lambda: MFAC([nn.Parameter(torch.ones(2), requires_grad=False)]), "all are frozen"),
        (lambda: MFAC([nn.Parameter(torch.ones(1000, 1000))], window=10**8), "gradients of 1,000,000 values take"),
        (lambda: MFAC([("up", nn.Parameter(torch.ones(2)))], window=2).step(), "parameter up has no gradient"),
    ],
)  # fmt: skip
def test_bad_input_is_named(run, message):
    with pytest.raises(InputError, match=message):
        run()


def test_a_diagonal_that_rounding_made_negative_is_left_alone_and_counted():
    G = 1e6 * torch.ones(3, 8)
    G[:, 4:] *= randn(3, 4, seed=1, dtype=torch.float32)
    _, mask, report = obs_prune(torch.arange(1.0, 9), lambda w: G, 0.25, 1e-9, recomputations=1)
    assert int(mask.sum()) == 6
    assert report.clamped == int((StaticFisherInverse(G, 1e-9).diag() <= 0).sum())
    assert np.isfinite(report.predicted) or report.clamped > 6
