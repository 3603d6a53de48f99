"""AuON: the scale's bounds, trajectories against a reference, what the brake does and does not, and a tiny LM."""

import copy
import math
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from llmcompress.backends.optim.auon import (
    AuON,
    AuONFactory,
    AuONOptions,
    HybridAuON,
    HybridAuONFactory,
    Muon,
    MuonFactory,
    auon_update,
    cosh_rms,
    cosh_rms_bounds,
    newton_schulz,
    split_parameters,
)
from llmcompress.backends.optim.split import Together
from llmcompress.errors import InputError
from tests.tiny import tiny_model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


# --- the scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "constant", "one-hot"])
def test_the_scale_is_within_its_bounds(gamma, kind):
    one_hot = torch.zeros(24, 36, dtype=torch.float64)
    one_hot[3, 4] = 5
    M = {
        "gaussian": randn(24, 36),
        "heavy": randn(24, 36) ** 5,
        "constant": torch.ones_like(one_hot),
        "one-hot": one_hot,
    }[kind]
    X = M / M.norm()
    R = float(cosh_rms(X, gamma))
    assert pytest.approx(float(np.sqrt(np.mean(np.cosh(gamma * X.numpy()) ** 2))), rel=1e-13) == R
    lower, upper = cosh_rms_bounds(X.numel(), gamma)
    assert lower - 1e-10 <= R <= upper + 1e-10
    if kind in ("constant", "one-hot"):
        assert pytest.approx(lower if kind == "constant" else upper, abs=1e-10) == R


def test_the_update_is_bounded_and_knows_no_scale():
    M = randn(24, 36)
    U, _ = auon_update(M)
    assert float((auon_update(1000 * M)[0] - U).abs().max()) < 1e-6
    assert float(torch.cosine_similarity(U.flatten(), M.flatten(), 0)) > 1 - 1e-12
    assert float(torch.linalg.matrix_norm(U, 2)) < 1
    assert math.isfinite(float(cosh_rms(M / M.norm(), 400.0)))
    z = 400.0 * (M / M.norm()).abs().numpy()
    expected = math.exp(
        0.5 * (2 * z.max() + math.log(np.mean(np.exp(2 * (z - z.max())) * ((1 + np.exp(-2 * z)) / 2) ** 2)))
    )
    assert float(cosh_rms(M / M.norm(), 400.0)) == pytest.approx(expected, rel=1e-10)


def test_the_brake_is_inert_at_a_models_size():
    M = randn(576, 576, dtype=torch.float32)
    paper, brake = auon_update(M)
    assert float((paper - M / M.norm()).abs().max() / paper.abs().max()) <= 1e-5
    assert 1.4e-6 <= float(brake) <= 2.2e-6
    repo, brake = auon_update(M, "repo")
    assert float((repo - M).abs().max() / M.abs().max()) <= 1e-5
    assert float(brake) <= 6.8e-6
    _, rms = auon_update(M, "rms")
    assert float(rms) + 1 == pytest.approx(math.sqrt((1 + math.e**2) / 2), rel=0.01)
    _, heavy = auon_update(M**5, "rms")
    assert float(heavy) > 1000, "this one acts"


def test_one_newton_schulz_step_is_the_quintic_of_the_singular_values():
    M = randn(40, 25)
    s = torch.linalg.svdvals(M / (M.norm() + 1e-7))
    expected = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    found = torch.linalg.svdvals(newton_schulz(M, 1))
    assert float((found - expected.sort(descending=True).values).abs().max()) <= 1e-8
    U, _ = auon_update(M, "hybrid")
    assert float(torch.linalg.matrix_norm(U, 2)) <= 1.2024
    torch.testing.assert_close(newton_schulz(M.T, 3), newton_schulz(M, 3).T)


def effective_rank(M):
    p = torch.linalg.svdvals(M) ** 2
    p = p / p.sum()
    return math.exp(-float((p * p.log()).sum()))


def test_the_spectrum_is_a_little_flatter_and_muons_is_flat():
    M = randn(128, 128) * torch.logspace(0, -1.5, 128, dtype=torch.float64)
    hybrid, orthogonal = auon_update(M, "hybrid")[0], newton_schulz(M, 5)
    ranks = [effective_rank(X) for X in (M, hybrid, orthogonal)]
    print(ranks)
    assert ranks[0] < ranks[1]
    assert ranks[2] > 2 * ranks[1]


# --- trajectories ----------------------------------------------------------------------------------------------------


def reference(W, gradients, variant, nesterov, lr, decay):
    """The same steps in numpy, from the formulas."""
    w, m = W.copy(), np.zeros_like(W)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        M = 0.05 * g + 0.95 * m if nesterov else m
        X = M / (np.linalg.norm(M) + 1e-7)
        if variant == "hybrid":
            Y = X if X.shape[0] <= X.shape[1] else X.T
            A = Y @ Y.T
            Y = 3.4445 * Y + (-4.775 * A + 2.0315 * A @ A) @ Y
            X = Y if X.shape[0] <= X.shape[1] else Y.T
        gamma = {"paper": 1.0, "hybrid": 1.0, "repo": 1.5, "rms": math.sqrt(X.size)}[variant]
        R = np.sqrt(np.mean(np.cosh(gamma * X) ** 2))
        U = (M if variant == "repo" else X) / (R + 1e-8)
        w = (1 - lr * decay) * w - lr * math.sqrt(max(1, w.shape[0] / w.shape[1])) * U
    return w


@pytest.mark.parametrize("variant", ["paper", "repo", "hybrid", "rms"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(9, 21), (21, 9)])
def test_twenty_steps_are_those_of_the_formulas(variant, nesterov, shape):
    W, gradients = randn(*shape), [randn(*shape, seed=s) for s in range(1, 21)]
    p = nn.Parameter(W.clone())
    optimizer = AuON([p], 0.1, nesterov=nesterov, weight_decay=0.1, variant=variant)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g), "gradients are left alone"
    expected = reference(W.numpy(), [g.numpy() for g in gradients], variant, nesterov, 0.1, 0.1)
    np.testing.assert_allclose(p.detach(), expected, rtol=1e-6, atol=1e-6)


def test_a_spike_moves_the_paper_by_a_step_and_the_code_by_thousands():
    for variant, most in (("paper", 1.0), ("repo", math.inf)):
        p = nn.Parameter(randn(30, 30))
        optimizer = AuON([p], 0.1, variant=variant, shape_scale=False)
        moved = []
        for t in range(12):
            before = p.detach().clone()
            p.grad = randn(30, 30, seed=t + 5) * (1e4 if t == 10 else 1)
            optimizer.step()
            moved.append(float((p.detach() - before).norm()))
        if variant == "paper":
            assert max(moved) <= most * 0.1
        else:
            assert moved[10] > 1000 * moved[9]


def test_states_schedules_and_what_is_no_matrix():
    model = tiny_model()
    matrix, other = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in matrix} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert any("embed_tokens" in names[id(p)] for p in other)
    assert any("lm_head" in names[id(p)] for p in other)
    assert len(matrix) + len(other) == len(list(model.parameters()))
    optimizer = AuONFactory().build(list(model.named_parameters()), 0.1)
    assert isinstance(optimizer, Together)
    schedule = LambdaLR(optimizer, lambda t: 1 / (t + 1))
    tokens = torch.arange(20, 52).reshape(2, 16)

    def step():
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()

    for _ in range(2):
        step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 3, 1e-4 / 3])
    assert all("brake" in optimizer.state[p] for p in matrix)
    assert all("exp_avg" in optimizer.state[p] for p in other)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    step()
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    step()
    assert all(torch.equal(after[key], value) for key, value in model.state_dict().items())
    held = sum(p.numel() for p in matrix) + 2 * sum(p.numel() for p in other)
    states = [s for state in optimizer.state.values() for s in state.values() if torch.is_tensor(s) and s.numel() > 1]
    assert sum(s.numel() for s in states) == held, "one buffer a matrix"


def test_matrices_alone_need_no_adamw_and_closures_are_called():
    p = nn.Parameter(randn(4, 3))
    optimizer = HybridAuONFactory().build([("layer.A", p)], 0.1)
    assert isinstance(optimizer, HybridAuON)
    assert isinstance(MuonFactory().build([("layer.A", p)], 0.1), Muon)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert closure() < first
    conv = nn.Parameter(randn(4, 3, 2, 2))
    conv.grad = randn(4, 3, 2, 2, seed=1)
    AuON([conv], 0.1).step()


def test_muon_costs_several_times_as_much():
    def seconds(kind, **arguments):
        p = nn.Parameter(randn(1024, 1024, dtype=torch.float32))
        p.grad = randn(1024, 1024, seed=1, dtype=torch.float32)
        optimizer, spent = kind([p], 0.1, **arguments), []
        for _ in range(4):
            start = time.process_time()
            optimizer.step()
            spent.append(time.process_time() - start)
        return min(spent)

    auon, hybrid, muon = seconds(AuON), seconds(HybridAuON), seconds(HybridAuON, ns_steps=5)
    print(muon / auon, muon / hybrid)
    assert muon / auon >= 5
    assert muon / hybrid >= 2


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_torch_without_its_bfloat16(shape, nesterov):
    """torch rounds every product to 8 bits, which five steps make some hundredths of; the mean error is far smaller."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": nesterov}
    own, other = (nn.Parameter(randn(*shape, dtype=torch.float32)) for _ in range(2))
    start, optimizers = own.detach().clone(), [Muon([own], **settings), torch.optim.Muon([other], **settings)]
    for step in range(4):
        for p, optimizer in zip((own, other), optimizers, strict=True):
            p.grad = randn(*shape, seed=step + 1, dtype=torch.float32)
            optimizer.step()
    assert (own - other).norm() < 0.02 * (other - start).norm()


# --- a tiny language model -------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        heads = [t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v)]
        x = x + self.out(nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class TinyLM(nn.Module):
    def __init__(self, seed, width=64, symbols=96):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(symbols, width), nn.Linear(width, symbols, bias=False)
            self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def markov(seed, symbols=96, length=300):
    """200 rows of text whose next symbol depends on the last two."""
    tables = torch.softmax(2.5 * torch.randn(2, symbols, symbols, generator=generator(seed)), 2)
    rows, draw = list(torch.randint(symbols, (2, 200), generator=generator(seed + 1))), generator(seed + 2)
    for _ in range(length):
        chance = 0.7 * tables[0, rows[-1]] + 0.3 * tables[1, rows[-2]]
        rows.append(torch.multinomial(chance, 1, generator=draw)[:, 0])
    return torch.stack(rows, 1)


class NormalisedSGD(torch.optim.Optimizer):
    """The ablation: Nesterov momentum of unit Frobenius norm, and nothing else."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(0.95).add_(p.grad, alpha=0.05)
                M = 0.05 * p.grad + 0.95 * m
                p.add_(M / M.norm(), alpha=-group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))


def trained(build, text, seed, steps=150):
    model = TinyLM(seed)
    matrix, other = split_parameters(model)
    optimizers = [build(matrix), torch.optim.Adam(other, 3e-3)]
    schedules = [LambdaLR(o, lambda t: 1 - t / steps) for o in optimizers]
    draw, late = generator(seed), []
    for t in range(steps):
        rows = text[torch.randint(len(text), (16,), generator=draw)]
        first = int(torch.randint(text.shape[1] - 33, (1,), generator=draw))
        tokens = rows[:, first : first + 33]
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o, s in zip(optimizers, schedules, strict=True):
            o.step()
            s.step()
        late += [loss.item()] * (t >= steps - 20)
    return sum(late) / len(late)


def test_on_a_tiny_language_model_it_is_normalised_sgd():
    text = markov(0)
    loss = {
        name: trained(build, text, 0)
        for name, build in {
            "AuON": lambda p: AuON(p, 0.3),
            "normalised SGD": lambda p: NormalisedSGD(p, 0.3),
            "SGD, 1": lambda p: torch.optim.SGD(p, 1.0, 0.95, dampening=0.95),
            "SGD, 10": lambda p: torch.optim.SGD(p, 10.0, 0.95, dampening=0.95),
            "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
            "Hybrid": lambda p: HybridAuON(p, 0.1),
            "Muon": lambda p: Muon(p, 0.03, weight_decay=0.0),
        }.items()
    }
    print(loss)
    assert loss["AuON"] == pytest.approx(loss["normalised SGD"], abs=0.005)
    assert loss["AuON"] <= min(loss["SGD, 1"], loss["SGD, 10"]) - 0.06
    assert loss["AuON"] == pytest.approx(loss["AdamW"], abs=0.03)
    assert loss["Hybrid"] <= loss["AuON"] + 0.005
    assert loss["Muon"] < loss["AuON"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, r"lr is out of range: -0\.1"),
        ({"momentum": 1.0}, "momentum is out of range"),
        ({"weight_decay": -1.0}, "weight_decay is out of range"),
        ({"gamma": 0.0}, "gamma is out of range"),
        ({"ns_steps": 0}, "ns_steps is out of range"),
        ({"variant": "papr"}, "unknown variant 'papr'; known: paper, repo, hybrid, rms"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        AuON([nn.Parameter(torch.ones(2, 2))], **arguments)


def test_bad_parameters_and_gradients_are_named():
    with pytest.raises(InputError, match=r"norm\.weight of shape \(3,\) is no matrix: give it to AdamW"):
        AuON([("norm.weight", nn.Parameter(torch.ones(3)))])
    with pytest.raises(InputError, match=r"parameter 0 of shape \(\) is no matrix"):
        AuON([nn.Parameter(torch.tensor(1.0))])
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = AuON([("up.weight", p)])
    p.grad = torch.full((2, 2), math.nan)
    with pytest.raises(InputError, match=r"the gradient of up\.weight is not finite"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2, 2))
    p.grad = torch.zeros(2, 2).to_sparse()
    with pytest.raises(InputError, match=r"the gradient of up\.weight is sparse"):
        optimizer.step()
    p.grad = torch.zeros(2, 2)
    AuON([p]).step()
    assert torch.equal(p, torch.ones(2, 2)), "no momentum, no step"
    with pytest.raises(ValueError, match="rms"):
        AuONOptions(variant="hybrid")
