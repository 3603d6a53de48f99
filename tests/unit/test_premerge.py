"""Pre-merged layers: where the product serves, what drops it, and that the measurement decides."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmcompress
from llmcompress import InputError
from llmcompress.checkpoint.install import structured_layers
from llmcompress.layers import premerge as module
from llmcompress.layers.block import BlockDenseLinear, BlockShuffleLinear
from llmcompress.layers.low_rank import LowRankLinear
from tests.tiny import tiny_model


def layer(kind):
    generator = torch.Generator().manual_seed(0)
    found = {
        "low_rank": lambda: LowRankLinear(24, 36, 4, bias=True),
        "pivots": lambda: LowRankLinear(24, 36, 4, pivot_count=4, bias=True),
        "block_dense": lambda: BlockDenseLinear(24, 36, 6, 2, bias=True),
        "block_shuffle": lambda: BlockShuffleLinear(24, 36, 2, 4, bias=True),
    }[kind]()
    for parameter in found.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    if kind == "pivots":
        found.pivots[0] = 0b1111
        found.after_load()
    return found.eval()


KINDS = ("low_rank", "pivots", "block_dense", "block_shuffle")
X = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))


def used(layer, x):
    """Whether the product multiplied: it alone feels a change of it."""
    with torch.no_grad():
        kept = layer.merged.clone()
        layer.merged.zero_()
        answer = torch.equal(layer(x), layer.bias.expand(*x.shape[:-1], -1))
        layer.merged.copy_(kept)
    return answer


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_serves_few_rows_without_gradients(kind):
    found = layer(kind)
    expected = found(X).detach()
    found.premerge(tokens=4)
    with torch.no_grad():
        assert float((found(X) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert used(found, X)
        assert used(found, X[None, :1])
        assert not used(found, torch.cat([X, X]))
    assert found(X).requires_grad, "with gradients the factors multiply"
    assert "merged" not in found.state_dict()
    assert found.num_parameters == layer(kind).num_parameters
    assert found.storage_bits == layer(kind).storage_bits
    torch.compiler.reset()  # all layers share one forward, which is compiled for no more than eight of them
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), expected)


def step(layer):
    with torch.no_grad():
        layer.U.mul_(2)


def load(layer):
    layer.load_state_dict({name: 2 * tensor for name, tensor in layer.state_dict().items()})


def replace(layer):
    layer.U = torch.nn.Parameter(2 * layer.U.detach())


def point(layer):
    layer.U.data = 2 * layer.U.data


@pytest.mark.parametrize("change", [step, load, replace, point, lambda layer: layer.train().eval()])
def test_a_stale_product_is_never_used(change):
    found = layer("block_dense")
    found.premerge()
    change(found)
    with torch.no_grad():
        served = found(X)
        assert found.merged_rows == 0
        assert not hasattr(found, "merged")
        torch.testing.assert_close(served, found.product(X))


def test_copies_and_casts_stay_right():
    found = layer("block_shuffle")
    found.premerge()
    for other in (copy.deepcopy(found), copy.deepcopy(found).double()):
        with torch.no_grad():
            x = X.to(other.U.dtype)
            torch.testing.assert_close(other(x), other.product(x))


@pytest.mark.parametrize("faster", [True, False])
def test_the_measurement_decides_for_every_layer(faster, monkeypatch, tmp_path):
    tokens = torch.arange(20, 52).reshape(2, 16)
    model = llmcompress.compress(tiny_model(), tokens=tokens, method="structured_ffn", ratio=0.4)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    timed = []

    def seconds(layer, x):
        timed.append((layer.merged_rows, len(x)))
        return (0.5 if faster else 2.0) if layer.merged_rows else (1.0 if len(x) == 8 else 1.5)

    monkeypatch.setattr(module, "_seconds", seconds)
    before = model(tokens[:, :4]).logits
    found = llmcompress.premerge(model, tokens=8)
    assert [entry.name for entry in found] == list(structured_layers(model))
    assert all(entry.merged == faster for entry in found)
    assert {layer.merged_rows for layer in structured_layers(model).values()} == ({8} if faster else {0})
    assert timed == 2 * [(0, 1), (0, 8), (8, 1), (8, 8)], "each of the two shapes once"
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :4]).logits, before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_it_must_be_the_faster_at_every_row_count():
    assert not module.Premerged("m", (1.0, 2.0), (1.1, 1.0)).merged
    assert not module.Premerged("m", (1.0, 2.0), (0.9, 2.1)).merged
    assert module.Premerged("m", (1.0, 2.0), (0.9, 1.9)).merged


def test_it_takes_real_seconds_of_real_layers():
    (found,) = llmcompress.premerge(torch.nn.Sequential(layer("block_dense")), tokens=2)
    assert all(0 < seconds < 0.1 for seconds in (*found.factors, *found.product))


def test_tokens_below_one():
    with pytest.raises(InputError, match="premerge: tokens must be at least 1; got 0"):
        llmcompress.premerge(torch.nn.Sequential(layer("block_dense")), tokens=0)
