"""Negative eigenvalues: exact constructions, kernels, state tracking, and the layers of transformers models."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from llmcompress.backends.sequence.negative_eigenvalues import (
    DeltaNetLayer,
    NegativeEigenvalues,
    NegativeEigenvaluesOptions,
    SelectiveDiagonalLayer,
    StateTrackingProbe,
    contraction_as_gh,
    delta_rule,
    eigenvalue_report,
    extend_range,
    householder_product,
    permutation_as_reflections,
    rotation_as_reflections,
    selective_scan,
    set_range_scale,
    signed_segment_products,
    supported_layers,
)
from llmcompress.checkpoint.quantizer import attach
from llmcompress.errors import InputError


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- constructions ---------------------------------------------------------------------------------------------------


def test_rotations_are_two_reflections():
    for theta in np.linspace(-7, 7, 29):
        found = householder_product(*rotation_as_reflections(float(theta)))
        exact = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
        assert np.abs(found.numpy() - exact).max() <= 1e-12


def test_every_permutation_of_five_is_at_most_four_reflections():
    for p in itertools.permutations(range(5)):
        betas, vs = permutation_as_reflections(p)
        assert len(betas) <= 4
        exact = torch.zeros(5, 5, dtype=torch.float64)
        for i, j in enumerate(p):
            exact[j, i] = 1
        assert float((householder_product(betas, vs) - exact).abs().max()) <= 1e-12


def test_a_contraction_is_at_most_24_factors():
    M = randn(8, 8)
    M = M / torch.linalg.matrix_norm(M, 2) * 0.97
    betas, vs = contraction_as_gh(M)
    assert len(betas) <= 24
    assert float(betas.min()) >= 0
    assert float(betas.max()) <= 2
    assert float((vs.norm(dim=1) - 1).abs().max()) <= 1e-12
    assert float((householder_product(betas, vs) - M).abs().max()) <= 1e-10


@pytest.mark.parametrize("top", [1.0, 2.0])
def test_eigenvalues_of_products_of_two(top):
    generator = torch.Generator().manual_seed(1)
    vs = torch.nn.functional.normalize(torch.randn(3000, 2, 4, dtype=torch.float64, generator=generator), dim=2)
    betas = top * torch.rand(3000, 2, dtype=torch.float64, generator=generator)
    factors = torch.eye(4) - betas[..., None, None] * vs[..., :, None] * vs[..., None, :]
    values = torch.linalg.eigvals(factors[:, 0] @ factors[:, 1])
    if top == 1:
        assert float(values.real.min()) >= -1e-9
        assert float(values.imag.abs().max()) <= 1e-7
    else:
        assert float(values.real.min()) < -0.9
        assert float(values.imag.abs().max()) > 0.5
        assert float(values.abs().max()) <= 1 + 1e-9


@pytest.mark.parametrize("m", [3, 5, 7])
def test_two_layers_of_reflections_count_modulo_m(m):
    def H(a):
        return np.array([[np.cos(a), np.sin(a)], [np.sin(a), -np.cos(a)]])

    def R(a):
        return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])

    d = np.stack([R(2 * np.pi * i / m) @ [1, 0] for i in range(m)])
    c = np.stack([R(-2 * np.pi * i / m) @ H(np.pi / m) @ [1, 0] for i in range(m)])
    h1, h2, total, wrong = 0.0, np.array([1.0, 0.0]), 0, 0
    for x in np.random.default_rng(m).integers(0, m, 5000):
        h1 = -h1 + 1
        h2 = H((1 - 2 * x) * np.pi / m if h1 == 1 else (1 + 2 * x) * np.pi / m) @ h2
        total = (total + x) % m
        wrong += int(np.maximum(c @ h2, d @ h2).argmax()) != total
    assert wrong == 0


# --- kernels ---------------------------------------------------------------------------------------------------------


def inputs(T=75, dtype=torch.float64):
    q, k, v = (randn(2, 3, T, 8, seed=s, dtype=dtype) for s in range(3))
    beta = 2 * torch.rand(2, 3, T, dtype=dtype, generator=torch.Generator().manual_seed(4))
    g = -torch.rand(2, 3, T, dtype=dtype, generator=torch.Generator().manual_seed(5)) / 4
    return q, torch.nn.functional.normalize(k, dim=-1), v, beta, g


def definition(q, k, v, beta, g, state):
    """The recurrence by whole matrices, one head after the other."""
    outputs = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    states = state.clone()
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        S = state[b, h]
        for t in range(q.shape[2]):
            key = k[b, h, t]
            A = torch.exp(g[b, h, t]) * (torch.eye(len(key), dtype=q.dtype) - beta[b, h, t] * torch.outer(key, key))
            S = A @ S + beta[b, h, t] * torch.outer(key, v[b, h, t])
            outputs[b, h, t] = S.T @ q[b, h, t]
        states[b, h] = S
    return outputs, states


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunks_agree_with_the_recurrence(dtype, tolerance):
    q, k, v, beta, g = inputs(dtype=dtype)
    state = randn(2, 3, 8, 8, seed=6, dtype=dtype)
    exact = definition(*(t.double() for t in (q, k, v, beta, g, state)))
    for mode in ("chunk", "recurrent"):
        found = delta_rule(q, k, v, beta, g, state, mode, chunk_size=16)
        for a, b in zip(found, exact, strict=True):
            assert float((a - b).norm() / b.norm()) <= tolerance


def test_the_state_does_not_grow_without_writes():
    q, k, _, beta, _ = inputs()
    state = randn(2, 3, 8, 8)
    norm = torch.linalg.matrix_norm(state, 2)
    for t in range(75):
        rows = slice(t, t + 1)
        zero = torch.zeros(2, 3, 1, 8, dtype=torch.float64)
        _, state = delta_rule(q[:, :, rows], k[:, :, rows], zero, beta[:, :, rows], state=state)
        after = torch.linalg.matrix_norm(state, 2)
        assert (after <= norm * (1 + 1e-12)).all()
        norm = after


@pytest.mark.parametrize("beta", [0.97, 1.94])
def test_only_strong_writes_keep_an_alternating_state(beta):
    """A run of one token: with beta below 1 the state settles, and the token's count is lost."""
    key = torch.nn.functional.normalize(randn(1, 1, 1, 8), dim=-1).expand(1, 1, 21, 8)
    zero, strength = torch.zeros(1, 1, 21, 8, dtype=torch.float64), torch.full((1, 1, 21), beta, dtype=torch.float64)
    states = [randn(1, 1, 8, 8, seed=3)]
    for t in range(21):
        rows = slice(t, t + 1)
        states.append(
            delta_rule(key[:, :, rows], key[:, :, rows], zero[:, :, rows], strength[:, :, rows], None, states[-1])[1]
        )
    moved = float((states[20] - states[21]).norm() / states[20].norm())
    assert moved <= 1e-6 if beta < 1 else moved >= 0.1


def test_segment_products_with_signs():
    a = 2 * torch.rand(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    found = signed_segment_products(a)
    for i in range(40):
        for j in range(40):
            exact = a[:, j + 1 : i + 1].prod(1) if j <= i else torch.zeros(3, dtype=torch.float64)
            assert float((found[:, i, j] - exact).abs().max()) <= 1e-10


def test_gradients():
    q, k, v, beta, g = (t[:1, :1, :6, ...].clone().requires_grad_() for t in inputs())
    with torch.no_grad():
        k.mul_(0.9)  # steps of the check must not lengthen a key above 1
    assert torch.autograd.gradcheck(lambda *t: delta_rule(*t, chunk_size=4), (q, k, v, beta, g))
    u, dt = randn(1, 2, 5).requires_grad_(), (randn(1, 2, 5, seed=1).abs() + 0.1).requires_grad_()
    A, B = (-randn(2, 3, seed=2).abs()).requires_grad_(), randn(1, 3, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, scale=1.7), (u, dt, A, B, randn(1, 3, 5, seed=4)))


def test_householder_micro_steps():
    """Two factors a token are two tokens, of which the second is read."""
    torch.manual_seed(0)
    layer = DeltaNetLayer(16, 2, n_householder=2)
    x = torch.randn(3, 9, 16)
    y, state = layer(x)
    again, _ = layer(x, mode="recurrent")
    torch.testing.assert_close(y, again, rtol=1e-4, atol=1e-5)
    first, carried = layer(x[:, :4])
    second, end = layer(x[:, 4:], carried)
    torch.testing.assert_close(torch.cat((first, second), 1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, state, rtol=1e-4, atol=1e-5)


# --- learning --------------------------------------------------------------------------------------------------------


def best(task, make, seeds, enough=2.0, **options):
    found = 0.0
    for seed in seeds:
        found = max(found, StateTrackingProbe(task, **options).accuracy(make, 64, seed))
        if found >= enough:
            break
    print(task, f"{found:.3f}")
    return found


def delta(scale):
    return lambda: DeltaNetLayer(64, 4, scale)


def diagonal(scale):
    return lambda: SelectiveDiagonalLayer(64, 64, scale)


def test_parity_needs_a_negative_eigenvalue():
    """Trained on 24 tokens, tested at positions 40 to 160."""
    assert best("parity", diagonal(2.0), [0], 0.95) >= 0.95
    assert best("parity", diagonal(1.0), [0]) <= 0.65


@pytest.mark.slow
def test_parity_best_of_three_seeds():
    for make in (diagonal, delta):
        assert best("parity", make(2.0), range(3), 0.95) >= 0.95
        assert best("parity", make(1.0), range(3)) <= 0.65


@pytest.mark.slow
def test_swaps_of_three_need_reflections():
    assert best("s3", delta(2.0), range(3), 0.95, steps=500) >= 0.95
    assert best("s3", delta(1.0), range(3), steps=500) <= 0.4
    assert best("s3", diagonal(2.0), range(3), steps=500) <= 0.85


@pytest.mark.parametrize(("task", "labels", "tokens"), [("parity", 2, 3), ("mod", 3, 4), ("s3", 6, 5), ("s5", 120, 12)])
def test_labels_are_products(task, labels, tokens):
    probe = StateTrackingProbe(task)
    assert (probe.labels, probe.tokens) == (labels, tokens)
    drawn, states = probe.sample(4, 30, torch.Generator().manual_seed(0))
    assert (drawn[:, 0] == 0).all()
    if task in ("parity", "mod"):
        assert torch.equal(states, (drawn[:, 1:] - 1).cumsum(1) % labels)
        return
    size = 3 if task == "s3" else 5
    elements = list(itertools.permutations(range(size)))
    moved = [p for p in elements if sum(i != j for i, j in enumerate(p)) in (0, 2)]
    matrices = {p: np.eye(size)[:, list(p)] for p in elements}
    for row in range(4):
        product = np.eye(size)
        for t in range(30):
            product = matrices[moved[int(drawn[row, t + 1]) - 1]] @ product
            np.testing.assert_array_equal(product, matrices[elements[int(states[row, t])]])


# --- transformers models ---------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
LINEAR = {
    "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "pad_token_id": 0,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MODELS = {
    "mamba": (MambaForCausalLM, MambaConfig, {"state_size": 4}),
    "falcon_mamba": (FalconMambaForCausalLM, FalconMambaConfig, {"state_size": 4}),
    "qwen3_next": (Qwen3NextForCausalLM, Qwen3NextConfig,
                   {**LINEAR, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                    "shared_expert_intermediate_size": 16}),
    "olmo_hybrid": (OlmoHybridForCausalLM, OlmoHybridConfig, {**LINEAR, "linear_allow_neg_eigval": False}),
}  # fmt: skip


def tiny(name, **changes):
    cls, config, own = MODELS[name]
    torch.manual_seed(0)
    model = cls(config(**SIZES, **own, **changes))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


TOKENS = torch.randint(1, 50, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_function_at_one_and_change_it_at_two(name, tmp_path):
    model = tiny(name)
    before = logits(model)
    report = extend_range(model, 1.0)
    assert set(report.kind) == ({"diagonal"} if "mamba" in name else {"delta"})
    assert torch.equal(logits(model), before)
    set_range_scale(model, 2.0)
    after = logits(model)
    assert float((after - before).abs().max()) > 1e-3
    assert torch.equal(logits(tiny(name)), before), "another model of the class is left alone"
    steps, cache = [], None
    with torch.no_grad():
        for t in range(TOKENS.shape[1]):
            key = "past_key_values" if "mamba" not in name else "cache_params"
            given = {key: cache} if cache is not None else {}
            output = model(input_ids=TOKENS[:, t : t + 1], use_cache=True, **given)
            cache = output.past_key_values if "mamba" not in name else output.cache_params
            steps.append(output.logits)
    gap = float((torch.cat(steps, 1) - after).abs().max())
    print(f"{name}: prefill against decoding {gap:.1e}")
    assert gap <= 1e-5
    attach(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), after, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), after, rtol=0, atol=0)


def test_training_follows_the_scale():
    """The fused prefill knows only the usual range: in training too the scan with the scale runs."""
    model = tiny("mamba")
    extend_range(model, 2.0)
    expected = logits(model)
    model.train()
    found = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_only_the_named_blocks_change():
    model = tiny("mamba")
    assert extend_range(model, 2.0, layers=[1]).names == ["backbone.layers.1.mixer"]
    with pytest.raises(InputError, match=r"layers: block 7 has no such recurrence; those that have: 0, 1"):
        extend_range(model, 2.0, layers=[7])
    hybrid = tiny("qwen3_next")
    assert list(supported_layers(hybrid)) == ["model.layers.0.linear_attn"]


def test_the_report_sees_the_eigenvalues():
    model = tiny("qwen3_next")
    before = eigenvalue_report(model, TOKENS)
    assert before.column("share below 0") == [0.0]
    assert "0 of 1 layers" in before.findings[0]
    extend_range(model, 2.0)
    after = eigenvalue_report(model, TOKENS)
    assert after.column("share below 0")[0] > 0.1
    assert after.column("least")[0] >= -1
    gates = eigenvalue_report(tiny("mamba"), TOKENS)
    assert min(gates.column("least")) >= 0
    assert max(gates.column("largest")) <= 1
    backend = NegativeEigenvalues(NegativeEigenvaluesOptions())
    with pytest.raises(InputError, match=r"no layer whose range can be extended; .* none, but Llama"):
        eigenvalue_report(LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32, num_attention_heads=2)), TOKENS)
    assert backend.callbacks()[0].fraction == 0.1


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_scales():
    for scale in (0.9, 2.1, float("nan")):
        with pytest.raises(InputError, match=r"scale must be in \[1, 2\]"):
            extend_range(tiny("mamba"), scale)


def test_log_space_models_are_refused():
    config = Mamba2Config(**SIZES, state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=8)
    with pytest.raises(InputError, match="log-space"):
        extend_range(Mamba2ForCausalLM(config), 2.0)


def test_long_keys_are_refused_where_the_state_could_grow():
    q, k, v, beta, g = inputs()
    delta_rule(q, 2 * k, v, beta / 2, g)
    with pytest.raises(InputError, match="unit norm"):
        delta_rule(q, 2 * k, v, beta, g)


def test_bad_shapes():
    q, k, v, beta, _ = inputs()
    with pytest.raises(InputError, match="must fit one another"):
        delta_rule(q, k, v[:, :, :3], beta)
    with pytest.raises(InputError, match="T must be at least 1"):
        delta_rule(q[:, :, :0], k[:, :, :0], v[:, :, :0], beta[:, :, :0])
    u, A, B = randn(1, 2, 5), -randn(2, 3).abs(), randn(1, 3, 5)
    with pytest.raises(InputError, match="dt is not finite"):
        selective_scan(u, torch.full_like(u, math.nan), A, B, B)
    with pytest.raises(InputError, match="must fit"):
        selective_scan(u, u[:, :1], A, B, B)
    with pytest.raises(InputError, match="T must be at least 1"):
        selective_scan(u[..., :0], u[..., :0], A, B[..., :0], B[..., :0])
    with pytest.raises(InputError, match=r"a permutation of 0\.\.2"):
        permutation_as_reflections([0, 0, 1])
    with pytest.raises(InputError, match="must be a contraction"):
        contraction_as_gh(2 * torch.eye(3))
    with pytest.raises(InputError, match="n_heads must divide"):
        DeltaNetLayer(10, 3)
    with pytest.raises(InputError, match="unknown task"):
        StateTrackingProbe("s4")
