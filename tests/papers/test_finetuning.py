"""LRC fine-tuning (WeLore, arXiv 2407.11239), the losses around it, and the fit of a block."""

import copy

import numpy as np
import pytest
import torch
from llmcompress_eval.perplexity import perplexity, windows
from scipy.special import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

import llmcompress
from llmcompress.calibration.text import pack, tokenize
from llmcompress.checkpoint.install import install, structured_layers
from llmcompress.compressors.allocation.welore import global_threshold, normalize_spectrum, split_components
from llmcompress.compressors.svd import svd_factorize
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.errors import InputError
from llmcompress.finetune.block_recovery import recover_block
from llmcompress.finetune.losses import block_output_loss, distillation_loss, next_token_loss, relative_error
from llmcompress.finetune.lrc import freeze_to_lrc, optimizer_bytes, pack_layers, trainable, unpack_layers
from llmcompress.finetune.train import train
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.layers.sparse_dictionary import SparseDictionaryLinear
from llmcompress.recipe import BlockRecovery, Finetune

TINY = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 256}  # fmt: skip
SETTING = {"loss": "ce", "lr": 1e-3, "length": 64, "batch": 32, "validation": 0, "clip": 0, "warmup": 0}


# --- the losses ------------------------------------------------------------------------------------------------------


def logits(seed, shape=(2, 5, 11)):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * 3).float()


def test_next_token_loss_is_the_mean_negative_log_probability():
    given, tokens = logits(0), torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))
    log_p = log_softmax(given.double().numpy(), axis=-1)
    expected = -np.mean([log_p[i, t, tokens[i, t + 1]] for i in range(2) for t in range(4)])
    assert next_token_loss(given, tokens).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_is_the_divergence_of_the_softened_distributions(temperature):
    student, teacher = logits(1), logits(2)
    p = log_softmax(teacher.double().numpy() / temperature, axis=-1)
    q = log_softmax(student.double().numpy() / temperature, axis=-1)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-6)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_the_distillation_loss_pulls_to_the_teacher():
    student, teacher = logits(1).requires_grad_(), logits(2)
    distillation_loss(student, teacher).backward()
    expected = (student.detach().softmax(-1) - teacher.softmax(-1)) / 10
    torch.testing.assert_close(student.grad, expected)


def test_relative_errors_weigh_every_position_alike():
    target = logits(3, (2, 4, 6))
    target[0, 0] *= 1000
    output = target.clone()
    output[0, 0] *= 1.1
    output[1, 2] *= 0.5
    assert relative_error(output, target).item() == pytest.approx((0.1**2 + 0.5**2) / 8, rel=1e-4)
    embeddings = logits(4, (2, 4, 6))
    found = block_output_loss([embeddings, output, target], [target, target, target])
    assert found.item() == pytest.approx(relative_error(output, target).item() / 2)


# --- what trains -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_llama():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**TINY, "num_hidden_layers": 2, "attention_bias": True})).eval()


def compressed(model, **step):
    model = copy.deepcopy(model)
    tokens = torch.randint(256, (24, 32), generator=torch.Generator().manual_seed(1))
    return llmcompress.compress(model, tokens=tokens, **{"ratio": 0.4, **step})


STEPS = {
    "pivot form": {"method": "svd_llm"},
    "two plain factors": {"method": "svd_llm", "pivot": False},
    "one basis an input": {"method": "svd_llm", "share": "input"},
    "dictionaries": {"method": "cospadi", "structure": "cospadi"},
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("loss", ["ce", "kd"])
def test_only_the_factors_change(random_llama, tmp_path, name, loss):
    """Everything else is bit-identical: embeddings, head, norms, biases, masks, the dense site; and the loss falls."""
    model = compressed(random_llama, **STEPS[name], targets=["q", "k", "v", "gate", "up", "down"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = {site: layer.state_dict() for site, layer in structured_layers(model).items()}
    factors = {f"{site}.{key}" for site, state in states.items() for key in state if key != "bias"}
    masks = {key for key in factors if key.endswith(("mask", "pivots"))}
    tokens = torch.randint(256, (40, 16), generator=torch.Generator().manual_seed(2))
    section = Finetune(**{**SETTING, "loss": loss, "steps": 12, "length": 16, "batch": 40})
    training = train(model, tokens, section, tmp_path / "run", teacher=copy.deepcopy(random_llama))
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == factors - masks, "all factors, and nothing else"
    assert training.losses[-1] < training.losses[0]
    assert training.steps == 12
    assert training.tokens == 12 * 40 * 16


def test_the_optimiser_holds_the_factors_alone(random_llama):
    model = compressed(random_llama, targets=["ffn"])
    named = freeze_to_lrc(model)
    values = sum(layer.A.numel() + layer.B.numel() for layer in structured_layers(model).values())
    assert sum(parameter.numel() for _, parameter in named) == values
    optimizer = torch.optim.AdamW([parameter for _, parameter in named])
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert optimizer_bytes(optimizer) == 8 * values, "two moments of 4 bytes"


def test_a_shared_factor_trains_once(random_llama):
    model = compressed(random_llama, share="input")
    names = [name for name, _ in freeze_to_lrc(model)]
    assert "model.layers.0.self_attn.q_proj.A" in names
    assert "model.layers.0.self_attn.k_proj.A" not in names
    assert model.model.layers[0].self_attn.q_proj.A is model.model.layers[0].self_attn.k_proj.A


def test_packing_returns_the_stored_form_exactly(random_llama):
    model = compressed(random_llama, method="cospadi", structure="cospadi")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    unpack_layers(model)
    assert any(isinstance(layer.values, torch.nn.Parameter) for layer in structured_layers(model).values())
    pack_layers(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_model_without_low_rank_components_is_refused(random_llama):
    with pytest.raises(InputError, match="lrc trains compressed sites, and this model has none; use full"):
        freeze_to_lrc(copy.deepcopy(random_llama))


# --- the card's criteria ---------------------------------------------------------------------------------------------


def train_by_hand(model, text, steps, lr, seed):
    """AdamW on random windows of 64 bytes, 32 at a time, on what requires gradients."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr, weight_decay=0)
    for _ in range(steps):
        batch = text[torch.randint(len(text) - 64, (32, 1), generator=generator) + torch.arange(64)]
        optimizer.zero_grad()
        next_token_loss(model(batch).logits, batch).backward()
        optimizer.step()
    return model


@pytest.mark.slow
def test_lrc_recovers_most_of_what_full_fine_tuning_does(wikitext):
    """ERR 0.6, plain SVD, 60 steps, against all linear maps and against those that stayed dense (N-LRC)."""
    valid, test = (torch.tensor(list(wikitext[split].encode()), dtype=torch.long) for split in ("valid", "test"))
    held_out = test[: 64 * 512].view(512, 64)

    def loss(model):
        with torch.no_grad():
            return float(next_token_loss(model(held_out).logits, held_out))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = LlamaForCausalLM(LlamaConfig(**TINY))
    start = half_low_rank(train_by_hand(dense, valid, 400, 3e-3, 0))
    linear = {name for name, _ in start.named_modules() if name.endswith("_proj")}
    low_rank = structured_layers(start)
    assert 0 < len(low_rank) < len(linear) == 28, "some are factorised, some are not"
    found = {}
    for name, modules in {"full": linear, "n-lrc": linear - set(low_rank), "lrc": None}.items():
        model = copy.deepcopy(start)
        freeze_to_lrc(model)
        if modules is not None:
            model.requires_grad_(False)
            for module in modules:
                model.get_submodule(module).requires_grad_(True)
        found[name] = loss(train_by_hand(model, valid, 60, 1e-3, 1))
    before = loss(start)
    recovered = (before - found["lrc"]) / (before - found["full"])
    print(f"before {before:.3f}, {found}, recovered {recovered:.2f}, low-rank components {len(low_rank)}")
    assert recovered >= 0.7
    assert found["lrc"] <= found["n-lrc"] + 0.003


def half_low_rank(model, err=0.6):
    """Plain SVD at one threshold over all spectra; what loses less than half of its rank stays dense, as published."""
    weights = {name: m.weight.detach() for name, m in model.model.layers.named_modules() if hasattr(m, "in_features")}
    spectra = [torch.linalg.svdvals(weight) for weight in weights.values()]
    k = global_threshold(spectra, err)
    ranks = [max(1, int((normalize_spectrum(s) >= k).sum())) for s in spectra]
    low = split_components(ranks, [tuple(weight.shape) for weight in weights.values()], "half")
    layers = {}
    for (name, weight), rank, chosen in zip(weights.items(), ranks, low, strict=True):
        if chosen:
            factors = svd_factorize(weight, rank)
            layers[f"model.layers.{name}"] = LowRankLinear.from_factors(factors.A.float(), factors.B.float())
    install(model, layers)
    return model


# --- the fit of a block ----------------------------------------------------------------------------------------------


def linear_block(seed=0, d_in=24, d_out=24, rank=8, tokens=32 * 40):
    """A block that is one linear map, its whitened truncation, and inputs with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    scale = np.exp(-np.arange(d_in) / 6)
    hidden = torch.from_numpy(rng.normal(size=(40, tokens // 40, d_in)) * scale).float()
    weight = torch.from_numpy(rng.normal(size=(d_out, d_in)) / d_in**0.5).float()
    x = hidden.reshape(-1, d_in).double()
    factors = svd_llm_factorize(weight, x.T @ x, rank)
    return hidden, weight, LowRankLinear.from_factors(factors.A.float(), factors.B.float())


def test_a_fit_in_the_loss_that_it_lowers_comes_near_its_optimum():
    """With targets of equal length the relative error is the squared error, whose least value the spectrum gives."""
    hidden, weight, layer = linear_block()
    targets = torch.nn.functional.normalize(hidden @ weight.T, dim=-1)
    x, y = hidden.reshape(-1, 24).double(), targets.reshape(-1, 24).double()
    best = torch.linalg.lstsq(x, y).solution
    s = torch.linalg.svdvals(torch.linalg.qr(x).R @ best)
    residual = (y - x @ best).square().sum() + s[8:].square().sum()
    layer.A.data *= 0.7
    found = recover_block(
        layer, {"m": layer}, hidden, targets, 40, BlockRecovery(steps=1500, batch=40, lr=2e-2), torch.Generator()
    )
    reached = relative_error(layer(hidden), targets).item()
    assert found.kept
    assert reached <= 1.03 * residual.item() / len(x)
    assert reached >= residual.item() / len(x) * (1 - 1e-6)


def test_a_fit_that_is_no_gain_on_held_out_sequences_is_undone():
    hidden, weight, layer = linear_block()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    section = BlockRecovery(steps=3, batch=8, lr=1e3)
    found = recover_block(layer, {"m": layer}, hidden, hidden @ weight.T, 8, section, torch.Generator())
    assert not found.kept
    assert found.after > found.before
    assert found.note.endswith("not kept")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_dictionary_is_fitted_within_its_mask_and_ends_in_its_stored_form():
    hidden, weight, _ = linear_block()
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=0)
    indices = torch.rand(24, 16, generator=generator).argsort(1)[:, :8].sort(1).values
    layer = SparseDictionaryLinear.from_factors(dictionary, indices, torch.randn(24, 8, generator=generator) / 5)
    mask = layer.mask.clone()
    found = recover_block(
        layer, {"m": layer}, hidden, hidden @ weight.T, 8, BlockRecovery(steps=200, batch=8, lr=1e-2), generator
    )
    assert found.after < 0.5 * found.before
    assert layer.packed
    assert torch.equal(layer.mask, mask)
    assert layer.dictionary.dtype == torch.bfloat16
    assert relative_error(layer(hidden[-5:]), (hidden @ weight.T)[-5:]).item() == pytest.approx(found.after, rel=1e-5)


def test_a_bfloat16_block_is_fitted_by_steps_below_its_resolution():
    hidden, weight, layer = linear_block()
    layer = LowRankLinear.from_factors(layer.A.bfloat16() * 0.8, layer.B.bfloat16())
    hidden, targets = hidden.bfloat16(), (hidden @ weight.T).bfloat16()
    found = recover_block(
        layer, {"m": layer}, hidden, targets, 40, BlockRecovery(steps=300, batch=40, lr=3e-4), torch.Generator()
    )
    assert layer.A.dtype == torch.bfloat16
    assert found.after < 0.9 * found.before


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_recovers_smollm2(smollm2, smollm2_tokenizer, wikitext, tmp_path):
    """30 % removed, then 16 steps of distillation: well below the start, which few steps suffice to show."""
    model = copy.deepcopy(smollm2)
    valid = tokenize(smollm2_tokenizer, [wikitext["valid"]])
    test = windows(tokenize(smollm2_tokenizer, [wikitext["test"]]), 1024, 4, "test")
    llmcompress.compress(model, tokens=pack(valid, 64, 512, "valid"), ratio=0.3)
    before = perplexity(model, test).perplexity
    section = Finetune(steps=16, lr=1e-4, warmup=0.2, length=512, batch=1, validation=2)
    training = train(model, pack(valid, 64, 512, "valid"), section, tmp_path / "run", teacher=smollm2)
    after = perplexity(model, test).perplexity
    print(f"perplexity {before:.2f} -> {after:.2f}; dense {perplexity(smollm2, test).perplexity:.2f}")
    assert training.kept > 0
    assert after <= 0.9 * before
