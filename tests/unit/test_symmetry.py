"""Symmetry groups found by structure: on every architecture a random element keeps the function, and is undone."""

import pytest
import torch
import transformers

from llmcompress.backends.merging.alignment import Alignment, aligned, folded
from llmcompress.backends.merging.decoder_matching import match_decoder
from llmcompress.errors import InputError
from llmcompress.models.symmetry import RESIDUAL, find_groups
from tests.scramble import reading, scrambled, with_values
from tests.tiny import ARCHITECTURES, tiny_model

TOKENS = torch.arange(20, 52).reshape(2, 16)
RMS_NORM = {"llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma3", "phi3"}
ROTATABLE = {"llama", "qwen2", "qwen3", "mistral", "phi3"}


def model_of(architecture, **changes):
    """With norm gains and biases of their own: those of a new model are ones and zeros, which hide a mistake."""
    model = tiny_model(architecture, **changes)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def outputs(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_element_keeps_the_logits_and_is_undone_exactly(architecture):
    model = model_of(architecture)
    groups = find_groups(model)
    moved, drawn = scrambled(model)
    assert not drawn.is_identity
    assert set(groups.axes) == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(outputs(moved), outputs(model), rtol=0, atol=2e-5)
    found = match_decoder(groups, reading(model), reading(moved), signed=groups.flips)
    back = aligned(reading(moved), groups, found.alignment)
    assert all(torch.equal(back(name), reading(model)(name)) for name in groups.axes)
    assert min(found.gains) > 0
    assert match_decoder(groups, reading(model), reading(model), signed=groups.flips).alignment.is_identity


def test_every_axis_of_a_block_belongs_to_a_group_that_is_drawn():
    model = model_of("llama", num_key_value_heads=4)
    groups = find_groups(model)
    _, drawn = scrambled(model)
    assert {group for axes in groups.axes.values() for group in axes} - {None} == set(drawn.index)
    for group, index in drawn.index.items():
        assert not torch.equal(index, torch.arange(len(index))), group
    for name, axes in groups.axes.items():
        if name.startswith("model.layers"):
            assert None not in axes, name


def test_fused_maps_are_taken_apart():
    stacked, interleaved = (find_groups(tiny_model(name)).blocks[0].heads for name in ("gpt2", "gpt_neox"))
    assert stacked.q[1, 0].tolist() == list(range(8, 16))
    assert stacked.k[1].tolist() == list(range(40, 48))
    assert stacked.v[1].tolist() == list(range(72, 80))
    assert interleaved.q[1, 0].tolist() == list(range(24, 32))
    assert interleaved.k[1].tolist() == list(range(32, 40))
    assert interleaved.v[1].tolist() == list(range(40, 48))
    grouped = find_groups(tiny_model("phi3")).blocks[0].heads
    assert (grouped.q.shape, grouped.k.shape) == ((2, 2, 8), (2, 8))


def test_what_the_norms_allow():
    for name in ARCHITECTURES:
        groups = find_groups(tiny_model(name))
        assert groups.flips == (name in RMS_NORM), name
        assert (groups.no_fold is None) == (name in ROTATABLE), name
    assert "lm_head is tied to the embedding" in find_groups(tiny_model("llama-tied")).no_fold
    assert "post_attention_layernorm is followed by no linear map" in find_groups(tiny_model("gemma3")).no_fold
    assert "ln_1 is no RMSNorm" in find_groups(tiny_model("gpt2")).no_fold


def test_a_map_between_two_streams_in_one_order_follows_on_both_axes():
    """BERT's head: a square map whose output is read by the tied embedding."""
    axes = find_groups(tiny_model("bert")).axes
    assert axes["cls.predictions.transform.dense.weight"] == (RESIDUAL, RESIDUAL)
    assert axes["cls.predictions.transform.LayerNorm.weight"] == (RESIDUAL,)


@pytest.mark.parametrize("architecture", sorted(ROTATABLE))
def test_a_rotated_stream_is_found_again(architecture):
    model = model_of(architecture, tie_word_embeddings=False)
    groups = find_groups(model)
    base = folded(reading(model), groups)
    torch.testing.assert_close(outputs(with_values(model, groups, base)), outputs(model), rtol=0, atol=2e-5)
    rotation = Alignment.identity(groups)
    rotation.rotation = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    moved = with_values(model, groups, aligned(base, groups, rotation))
    torch.testing.assert_close(outputs(moved), outputs(model), rtol=0, atol=2e-5)
    found = match_decoder(groups, base, reading(moved), orthogonal=True)
    back = aligned(reading(moved), groups, found.alignment)
    for name in groups.axes:
        torch.testing.assert_close(back(name), base(name), rtol=0, atol=1e-5)


def test_a_norm_over_all_heads_follows_them():
    """OLMo 2 normalises queries and keys over all heads, and its blocks' outputs."""
    config = transformers.Olmo2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Olmo2ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moved, _ = scrambled(model)
    torch.testing.assert_close(outputs(moved), outputs(model), rtol=0, atol=2e-5)
    assert find_groups(model).axes["model.layers.0.self_attn.q_norm.weight"] == ("0.q",)


def test_what_is_not_understood_is_named():
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"model\.layers\.0: its attention and FFN are not understood; use match: none"
    ):
        find_groups(transformers.MixtralForCausalLM(config))


def test_what_a_model_does_not_allow_is_refused():
    gpt2, tied = tiny_model("gpt2"), tiny_model("llama-tied")
    groups = find_groups(gpt2)
    with pytest.raises(InputError, match="signs cannot flip in this model, whose norms subtract a mean"):
        match_decoder(groups, reading(gpt2), reading(gpt2), signed=True)
    with pytest.raises(InputError, match="the residual stream cannot be rotated: lm_head is tied to the embedding"):
        match_decoder(find_groups(tied), reading(tied), reading(tied), orthogonal=True)
    wrong = Alignment.identity(groups)
    wrong.index["0.ffn"] = torch.zeros(48, dtype=torch.long)
    with pytest.raises(InputError, match=r"group '0\.ffn': not a permutation of its 128 places"):
        match_decoder(groups, reading(gpt2), reading(gpt2), signed=False, init=wrong)
