"""Structured feed-forward layers: the structures, the projections, the compressor, models made from scratch."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import llmcompress
from llmcompress import InputError, Recipe
from llmcompress.calibration.text import pack, tokenize
from llmcompress.checkpoint.install import structured_layers
from llmcompress.compressors.block_projection import (
    block_dense_spectrum,
    block_shuffle_spectrum,
    project_block_dense,
    project_block_shuffle,
    relative_output_error,
)
from llmcompress.compressors.structured_ffn import StructuredFFN, polar_factor, random_layer
from llmcompress.compressors.svd import svd_factorize
from llmcompress.compressors.svd_llm import svd_llm_factorize
from llmcompress.finetune.trainer import Rows
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.block import BlockDenseLinear, BlockShuffleLinear
from llmcompress.layers.low_rank import LowRankLinear
from llmcompress.models.structure import analyse
from llmcompress.types import Budget
from tests.tiny import recipe, save_tiny, tiny_model, tiny_tokenizer, write_text

STRUCTURES = ("low_rank", "block_dense", "block_shuffle")
TOKENS = torch.randint(4, 120, (12, 16), generator=torch.Generator().manual_seed(3))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def empty(structure, d_in, d_out, size, num_blocks=2, **options):
    """A layer of the given rank or inner size, filled at random."""
    if structure == "low_rank":
        layer = LowRankLinear(d_in, d_out, size, dtype=torch.float64, **options)
    elif structure == "block_dense":
        layer = BlockDenseLinear(d_in, d_out, size, num_blocks, dtype=torch.float64, **options)
    else:
        layer = BlockShuffleLinear(d_in, d_out, num_blocks, size, dtype=torch.float64, **options)
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = random(*parameter.shape, seed=index)
    return layer


def dense_by_permutations(layer):
    """The weight from explicit block-diagonal and permutation matrices in numpy."""
    if isinstance(layer, LowRankLinear):
        return (layer.A @ layer.B).T.detach().numpy()
    first = block_diag(*layer.V.detach().numpy())
    if layer.U.ndim == 2:
        return layer.U.detach().numpy() @ first
    second, B = block_diag(*layer.U.detach().numpy()), layer.num_blocks
    gather = np.zeros((len(first), len(first)))
    for j in range(len(first)):
        gather[(j % B) * (len(first) // B) + j // B, j] = 1
    scatter = np.zeros((len(second), len(second)))
    for block in range(B):
        for i in range(len(second) // B):
            scatter[i * B + block, block * (len(second) // B) + i] = 1
    return scatter @ second @ gather @ first


# --- the structures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("d_in", "d_out"), [(96, 384), (384, 96)])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_dense_weight_and_permutation_form_agree(structure, d_in, d_out, bias):
    layer = empty(structure, d_in, d_out, 24, 4 if structure == "block_shuffle" else 2, bias=bias)
    x, weight = random(3, 5, d_in, seed=9), dense_by_permutations(layer)
    scale = np.abs(weight).max()
    np.testing.assert_allclose(layer.to_dense().detach(), weight, rtol=0, atol=1e-12 * scale)
    expected = x.numpy() @ weight.T + (layer.bias.detach().numpy() if bias else 0)
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("structure", "size", "num_blocks", "kept"),
    [
        ("low_rank", 48, 1, 0.625), ("block_dense", 64, 2, 0.625), ("block_shuffle", None, 2, 0.625),
        ("low_rank", 24, 1, 0.3125), ("block_dense", 32, 2, 0.3125), ("block_shuffle", 24, 4, 0.3125),
    ],
)  # fmt: skip
def test_a_two_layer_ffn_keeps_what_is_published(structure, size, num_blocks, kept):
    pair = [empty(structure, 96, 384, size, num_blocks), empty(structure, 384, 96, size, num_blocks)]
    assert sum(layer.storage_values for layer in pair) == kept * 2 * 96 * 384
    for layer in pair:
        assert layer.flops == 2 * layer.storage_values
        assert layer.storage_bits == 64 * layer.storage_values


def test_shuffles_give_full_rank_at_the_size_of_a_low_rank_layer():
    rank = torch.linalg.matrix_rank
    assert rank(empty("block_shuffle", 96, 384, 24, 4).to_dense()) == 96
    assert rank(empty("low_rank", 96, 384, 24).to_dense()) == 24


@pytest.mark.parametrize("layer", [BlockDenseLinear(8, 12, 4, 2), BlockShuffleLinear(8, 12, 2, 2)])
def test_gradients(layer):
    names = [name for name, _ in layer.named_parameters()]
    inputs = [random(*p.shape, seed=i).requires_grad_() for i, p in enumerate(layer.parameters())]
    x = random(3, 8, seed=7).requires_grad_()

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *inputs))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_compile_cast_and_run_under_autocast(structure):
    layer = empty(structure, 16, 24, 4, bias=True)
    x = random(3, 16, seed=5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = single(x.float())
    found.float().sum().backward()
    torch.testing.assert_close(found.double(), layer(x), rtol=0.05, atol=0.3)
    assert all(parameter.grad.abs().sum() > 0 for parameter in single.parameters())


# --- projections, in the Frobenius norm ------------------------------------------------------------------------------


def project(structure, weight, size, num_blocks, gram=None, sweeps=0):
    """The approximation (d_out, d_in)."""
    if structure == "low_rank":
        factors = svd_factorize(weight, size) if gram is None else svd_llm_factorize(weight, gram, size)
    elif structure == "block_dense":
        factors = project_block_dense(weight, size, num_blocks, gram, sweeps)
    else:
        factors = project_block_shuffle(weight, num_blocks, size, gram, sweeps)
    return factors.to_dense()


SIZES = {"low_rank": (12, 1), "block_dense": (16, 4), "block_shuffle": (12, 4)}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("with_gram", [False, True])
def test_a_member_is_its_own_projection(structure, with_gram):
    size, num_blocks = SIZES[structure]
    weight = empty(structure, 48, 96, size, num_blocks).to_dense().detach()
    x = random(200, 48, seed=8) * torch.logspace(-1, 1, 48, dtype=torch.float64)
    found = project(structure, weight, size, num_blocks, x.T @ x if with_gram else None)
    assert float((found - weight).norm() / weight.norm()) < 1e-10


@pytest.mark.parametrize("structure", ["block_dense", "block_shuffle"])
def test_the_spectrum_gives_the_error_of_every_size(structure):
    weight = random(24, 12)
    spectrum = block_dense_spectrum(weight, 2) if structure == "block_dense" else block_shuffle_spectrum(weight, 2)
    for level in range(1, 4):
        missed = float((project(structure, weight, 2 * level, 2) - weight).norm())
        assert missed == pytest.approx(float(spectrum[level:].square().sum().sqrt()), rel=1e-9)


def adam(structure, weight, start, steps, upper=None, lr=0.02):
    """Least error that gradient descent on the factors reaches; in the outputs where `upper` is a root of the Gram."""
    layer, root = copy.deepcopy(start), torch.eye(weight.shape[1]).double() if upper is None else upper
    optimizer = torch.optim.Adam(layer.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    least = math.inf
    for _ in range(steps):
        loss = ((layer.to_dense() - weight) @ root.T).norm()
        least = min(least, loss.item())
        optimizer.zero_grad()
        loss.square().backward()
        optimizer.step()
        schedule.step()
    return least


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_gradient_descent_beats_the_projection(structure):
    size, num_blocks = SIZES[structure]
    weight = random(96, 48) / 48**0.5
    found = float((project(structure, weight, size, num_blocks) - weight).norm())
    starts = [empty(structure, 48, 96, size, num_blocks) for _ in range(3)]
    for seed, start in enumerate(starts):
        for index, parameter in enumerate(start.parameters()):
            parameter.data = random(*parameter.shape, seed=10 * seed + index) / 4
    assert found <= min(adam(structure, weight, start, 250, lr=0.05) for start in starts) + 1e-4


# --- projections, under the Gram -------------------------------------------------------------------------------------


def correlated():
    """A weight (96, 48), the Gram of 800 correlated inputs, and its upper triangular root."""
    scale = torch.logspace(-1, 0.5, 48, dtype=torch.float64)
    x = random(800, 48) @ random(48, 48, seed=1) * scale
    gram = x.T @ x
    return random(96, 48, seed=2), gram, torch.linalg.cholesky(gram, upper=True)


def test_low_rank_under_the_gram_loses_the_dropped_spectrum():
    weight, gram, upper = correlated()
    missed = float(((project("low_rank", weight, 12, 1, gram) - weight) @ upper.T).norm())
    expected = np.sqrt((np.linalg.svd((weight @ upper.T).numpy(), compute_uv=False)[12:] ** 2).sum())
    assert missed == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("structure", ["block_dense", "block_shuffle"])
def test_sweeps_never_raise_the_output_error_and_come_near_what_descent_reaches(structure):
    weight, gram, upper = correlated()
    size, num_blocks = SIZES[structure]

    def missed(sweeps):
        return float(((project(structure, weight, size, num_blocks, gram, sweeps) - weight) @ upper.T).norm())

    errors = [missed(sweeps) for sweeps in range(7)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[6] <= 0.8 * errors[0]
    factors = (
        project_block_dense(weight, size, num_blocks, gram, 30)
        if structure == "block_dense"
        else project_block_shuffle(weight, num_blocks, size, gram, 30)
    )
    layer = BlockDenseLinear if structure == "block_dense" else BlockShuffleLinear
    reached = adam(structure, weight, layer.from_factors(factors.V, factors.U), 1500, upper, 3e-3)
    print(f"{structure}: start {errors[0]:.3f}, 6 sweeps {errors[6]:.3f}, 30 {missed(30):.3f}, then Adam {reached:.3f}")
    assert missed(30) <= 1.04 * reached


def test_each_block_is_the_optimum_for_its_own_inputs():
    weight, gram, _ = correlated()
    found = project("block_dense", weight, 16, 4, gram)
    for block in range(4):
        own = slice(12 * block, 12 * block + 12)
        expected = svd_llm_factorize(weight[:, own], gram[own, own], 4).to_dense()
        torch.testing.assert_close(found[:, own], expected, rtol=1e-8, atol=1e-10)


def test_a_singular_gram_is_repaired_and_said():
    weight, x = random(24, 12), random(5, 12, seed=1)
    factors = project_block_dense(weight, 4, 2, x.T @ x, 3)
    assert "rank 5 of 12" in factors.repair
    assert torch.isfinite(factors.V).all()
    gram = x.T @ x
    error = relative_output_error(weight, factors.to_dense(), gram)
    expected = ((x @ (weight - factors.to_dense()).T).norm() / (x @ weight.T).norm()).item()
    assert error == pytest.approx(expected, rel=1e-9)


# --- the compressor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "opt"])
def test_gated_fused_and_plain_ffns_are_converted_within_the_budget(structure, architecture):
    model = tiny_model(architecture)
    dense = {s.name: s for s in analyse(model).sites if s.role in ("gate", "up", "gate_up", "down")}
    biases = {n: model.get_submodule(n).bias.clone() for n, s in dense.items() if s.bias}
    llmcompress.compress(model, tokens=TOKENS, method="structured_ffn", structure=structure, ratio=0.4)
    layers = structured_layers(model)
    assert set(layers) == set(dense)
    for name, layer in layers.items():
        step = {"low_rank": layer.d_in + layer.d_out, "block_dense": 2 * layer.d_out + layer.d_in}
        step["block_shuffle"] = 2 * (layer.d_in + layer.d_out)
        allowed = 0.6 * dense[name].dense_values
        assert allowed - step[structure] < layer.storage_values <= allowed
        assert layer.kind == structure
    assert all(torch.equal(layers[name].bias, bias) for name, bias in biases.items())


def test_the_compressor_projects_under_the_gram_unless_told_not_to():
    weight = tiny_model().model.layers[1].mlp.up_proj.weight.detach()
    found = {}
    for projection in ("gram", "frobenius"):
        model = llmcompress.compress(
            tiny_model(), tokens=TOKENS, method="structured_ffn", ratio=0.4, projection=projection
        )
        found[projection] = model.model.layers[1].mlp.up_proj.to_dense().detach().double()
    layer = model.model.layers[1].mlp.up_proj
    expected = project_block_dense(weight, layer.rank, 2).to_dense()
    torch.testing.assert_close(found["frobenius"], expected, rtol=0, atol=1e-6)
    assert float((found["gram"] - weight).norm()) > float((expected - weight).norm())


def test_a_recipe_targets_the_ffn_and_says_what_it_keeps(tmp_path):
    folder, text = save_tiny(tmp_path / "model"), write_text(tmp_path / "letters.txt")
    data = recipe(folder, text, tmp_path / "out", method="structured_ffn", structure="block_shuffle", sweeps=1)
    metrics = llmcompress.apply(Recipe.parse(data)).metrics
    assert {site["role"] for site in metrics["sites"]} == {"gate", "up", "down"}
    assert metrics["size"]["targeted"]["removed"] >= 0.3
    assert all(0 < site["error"] < 1 for site in metrics["sites"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        direct = llmcompress.compress(
            tiny_model(), tiny_tokenizer(), calibration=data["calibration"], **data["compress"][0]
        )
        assert torch.equal(model(TOKENS).logits, direct(TOKENS).logits)


def test_the_plan_names_the_sizes():
    site = analyse(tiny_model()).in_block(0)[-1]
    found = {
        structure: StructuredFFN(StructuredFFN.Options(structure=structure, num_blocks=4)).plan(
            [site], Budget.for_ratio([site], 0.4)
        )
        for structure in STRUCTURES
    }
    assert found == {
        "low_rank": {"rank": 11, "values": 880},
        "block_dense": {"rank": 20, "num_blocks": 4, "values": 880},
        "block_shuffle": {"inner": 8, "num_blocks": 4, "values": 640},
    }


# --- from scratch ----------------------------------------------------------------------------------------------------


def test_initial_layers_are_those_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    low = random_layer("low_rank", 2, 48, 96, 12, 0.02, generator)
    dense = 0.02 * torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    values = np.linalg.svd(dense.numpy(), compute_uv=False)
    np.testing.assert_allclose(torch.linalg.svdvals(low.to_dense().detach())[:12], values[:12], rtol=1e-4)
    np.testing.assert_allclose(torch.linalg.svdvals(low.A.detach()) ** 2, values[:12], rtol=1e-4)
    for structure in ("block_dense", "block_shuffle"):
        layer = random_layer(structure, 4, 48, 96, 3, 0.02, generator)
        for factor in (layer.V, layer.U):
            np.testing.assert_allclose(torch.linalg.svdvals(factor.detach()), 1, rtol=1e-5)
    gaussian = random(5, 9)
    vectors, positive = np.linalg.eigh((gaussian @ gaussian.T).numpy())[::-1]
    expected = vectors @ np.diag(positive**-0.5) @ vectors.T @ gaussian.numpy()
    np.testing.assert_allclose(polar_factor(gaussian), expected, rtol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_trainer_trains_a_model_from_scratch(structure, tmp_path):
    config = tiny_model("gpt2").config
    model = llmcompress.structured_ffn(config, structure, 0.4, seed=7)
    assert not hasattr(config, "quantization_config"), "the given config stays as it is"
    layers = structured_layers(model)
    assert {name.split(".")[2] for name in layers} == {"1", "2"}, "the first block stays dense"
    before = {name: layer.to_dense().detach().clone() for name, layer in layers.items()}
    args = TrainingArguments(
        tmp_path / "run", max_steps=4, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_strategy="no", per_device_train_batch_size=4, log_level="error",
    )  # fmt: skip
    Trainer(model, args, train_dataset=Rows(TOKENS)).train()
    assert all(float((layer.to_dense().detach() - before[name]).norm()) > 1e-3 for name, layer in layers.items())
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    Trainer(loaded, args, train_dataset=Rows(TOKENS)).train()


def test_the_same_seed_gives_the_same_model_and_the_global_one_is_left_alone():
    state = torch.random.get_rng_state()
    config = LlamaConfig(**{**tiny_model().config.to_dict(), "num_hidden_layers": 2})
    first, again, other = (llmcompress.structured_ffn(config, "block_dense", 0.5, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.model.layers[1].mlp.up_proj.V, other.model.layers[1].mlp.up_proj.V)


def test_a_model_in_memory_is_projected_where_asked():
    weight = tiny_model().model.layers[0].mlp.down_proj.weight.detach()
    model = llmcompress.structured_ffn(tiny_model(), "block_shuffle", 0.4, init="project", skip_first=False)
    layer = model.model.layers[0].mlp.down_proj
    expected = project_block_shuffle(weight, 2, layer.inner).to_dense()
    torch.testing.assert_close(layer.to_dense().detach().double(), expected, rtol=0, atol=1e-6)
    assert len(structured_layers(model)) == 9


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockDenseLinear(576, 1536, 100, 5), "num_blocks: 5 does not divide 576; the nearest that does is 4"),
        (lambda: BlockShuffleLinear(48, 20, 3, 6),
         "num_blocks: 3 does not divide 48 and 20; the nearest that does is 2"),
        (lambda: BlockDenseLinear(48, 96, 6, 4), "rank: must be a positive multiple of num_blocks = 4; got 6"),
        (lambda: BlockShuffleLinear(48, 96, 4, 6), "inner: must be a positive multiple of num_blocks = 4; got 6"),
        (lambda: BlockDenseLinear(48, 96, 44, 4), "rank: 44 stores 4752 values, the dense weight 4608; at most 40"),
        (lambda: BlockShuffleLinear(48, 96, 4, 36), "inner: 36 stores 5184 values, the dense weight 4608; at most 32"),
        (lambda: project_block_dense(random(96, 48), 44, 4), "rank: 44 stores 4752 values"),
        (lambda: project_block_dense(random(2, 48), 16, 4), "rank: 16 stores 224 values, the dense weight 96;"),
        (lambda: project_block_shuffle(random(96, 48), 5, 5), "num_blocks: 5 does not divide 48 and 96"),
        (lambda: project_block_dense(random(96, 48) * torch.nan, 16, 4), "the weight is not finite"),
        (lambda: project_block_dense(random(96, 48), 16, 4, torch.full((48, 48), torch.inf)), "Gram is not finite"),
        (lambda: project_block_dense(random(96, 48), 16, 4, torch.eye(47)), "Gram must be \\(48, 48\\)"),
        (lambda: project_block_dense(random(96, 48), 16, 4, torch.eye(48), -1), "sweeps: must not be negative; got -1"),
    ],
)  # fmt: skip
def test_sizes_and_tensors_that_do_not_fit(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 5}, "num_blocks: 5 does not divide 32 and 48; the nearest that does is 4"),
        ({"targets": ["attention", "ffn"]},
         r"model.layers.0.self_attn.q_proj: structured_ffn works on feed-forward sites; use targets: \[ffn\]"),
        ({"ratio": 0.99}, "15 values are less than the smallest block_dense layer of 2 blocks stores, 128"),
        ({"structure": "monarch"}, "input should be 'low_rank', 'block_dense' or 'block_shuffle'; got 'monarch'"),
        ({"sweeps": 2, "projection": "frobenius"}, "sweeps: low_rank and the frobenius projection are the optimum"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_run(change, message):
    model = tiny_model()
    with pytest.raises(InputError, match=message):
        llmcompress.compress(model, tokens=TOKENS, method="structured_ffn", **change)
    assert not structured_layers(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": "monarch"}, r"structured_ffn\(\).structure: input should be 'low_rank'"),
        ({"ratio": 1.0}, r"structured_ffn\(\): ratio must be in \(0, 1\)"),
        ({"num_blocks": 7}, r"structured_ffn\(\): num_blocks: 7 does not divide 32 and 48; the nearest that does is 8"),
        ({"init": "zeros"}, r"structured_ffn\(\).init: must be random or project; got 'zeros'"),
        ({"config_or_model": "llama"}, r"structured_ffn\(\): give a config or a model of transformers; got str"),
    ],
)
def test_models_that_cannot_be_made(change, message):
    call = {"config_or_model": tiny_model().config, "structure": "block_shuffle", "ratio": 0.5, **change}
    with pytest.raises(InputError, match=message):
        llmcompress.structured_ffn(**call)


def test_a_model_without_a_feed_forward_layer():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.gate_proj = layer.mlp.up_proj = layer.mlp.down_proj = torch.nn.Identity()
    with pytest.raises(InputError, match="LlamaForCausalLM has no feed-forward layer that is understood"):
        llmcompress.structured_ffn(model, "low_rank", 0.5)
    with pytest.raises(InputError, match=r"compress.0.targets: 'ffn' matches no linear map"):
        llmcompress.compress(model, tokens=TOKENS, method="structured_ffn")


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_gram_decides_on_smollm2(structure, smollm2, smollm2_tokenizer, wikitext):
    """FFNs of six middle blocks, 68.5-68.8 % kept, 4,096 calibration tokens: at most 1.22 times the dense figure."""
    from llmcompress_eval.perplexity import perplexity, windows

    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"]]), 8, 512, "valid")
    test = windows(tokenize(smollm2_tokenizer, [wikitext["test"]]), 512, 4, "test")
    found = {}
    for projection in ("gram", "frobenius"):
        model = llmcompress.compress(
            copy.deepcopy(smollm2), tokens=tokens, method="structured_ffn", structure=structure, ratio=0.312,
            projection=projection, targets=[r"layers\.1[2-7]\.mlp"],
        )  # fmt: skip
        kept = [m.storage_values / (m.d_in * m.d_out) for m in model.modules() if isinstance(m, StructuredLinear)]
        assert len(kept) == 18
        found[projection] = perplexity(model, test).perplexity
    dense = perplexity(smollm2, test).perplexity
    print(f"{structure}, {sum(kept) / 18:.4f} kept: dense {dense:.2f}, {found}")
    assert found["gram"] <= 1.22 * dense
    assert found["gram"] <= 0.7 * found["frobenius"]
