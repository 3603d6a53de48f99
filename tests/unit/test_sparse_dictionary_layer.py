import copy
import json

import numpy as np
import pytest
import torch

from llmcompress.checkpoint.install import build_layer, layer_spec
from llmcompress.errors import InputError
from llmcompress.layers.sparse_dictionary import SparseDictionaryLinear, narrow, pack_codes, unpack_codes, widen

D_IN, D_OUT, ATOMS, NONZEROS = 13, 21, 11, 5


def factors(seed=0):
    """Dictionary (float64, exact in bfloat16), ascending indices, values."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(D_IN, ATOMS, generator=generator).bfloat16().double()
    indices = torch.rand(D_OUT, ATOMS, generator=generator).topk(NONZEROS).indices.sort(1).values
    values = torch.randn(D_OUT, NONZEROS, generator=generator, dtype=torch.float64)
    return dictionary, indices, values, torch.randn(D_OUT, generator=generator, dtype=torch.float64)


def layer_of(bits=14, dtype=torch.float64, **options):
    dictionary, indices, values, bias = factors()
    return SparseDictionaryLinear.from_factors(
        dictionary, indices, values, bias, value_bits=bits, dtype=dtype, **options
    )


def rounded(value, bits):
    """The nearest float of 8 exponent bits and `bits` in all, in plain arithmetic."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.round(mantissa * 2 ** (bits - 8)), exponent - (bits - 8))


def dense_oracle(bits):
    dictionary, indices, values, _ = factors()
    weight = np.zeros((D_OUT, D_IN))
    for row in range(D_OUT):
        for atom, value in zip(indices[row].tolist(), values[row].tolist(), strict=True):
            weight[row] += rounded(np.float32(value).item(), bits) * dictionary[:, atom].numpy()
    return weight


@pytest.mark.parametrize("bits", [10, 13, 14, 16])
def test_product_is_that_of_the_rounded_factors(bits):
    layer, x = layer_of(bits), torch.randn(2, 3, D_IN, dtype=torch.float64)
    np.testing.assert_allclose(layer.to_dense().detach(), dense_oracle(bits), atol=1e-12)
    np.testing.assert_allclose(layer(x).detach(), x.numpy() @ dense_oracle(bits).T + factors()[3].numpy(), atol=1e-12)


@pytest.mark.parametrize("bits", range(10, 17))
def test_narrow_floats_round_to_nearest_and_pack_without_loss(bits):
    values = torch.randn(7, 43) * torch.logspace(-30, 30, 43)
    codes = narrow(values, bits)
    assert (codes >= 0).all()
    assert (codes < 2**bits).all()
    np.testing.assert_array_equal(widen(codes, bits).numpy(), rounded(values.numpy(), bits).astype(np.float32))
    packed = pack_codes(codes, bits)
    assert packed.shape == (7, -(-43 * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, 43), codes)
    stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : 43 * bits].reshape(7, 43, bits)
    np.testing.assert_array_equal(stream @ (1 << np.arange(bits)), codes.numpy())


def test_sixteen_bits_are_bfloat16():
    values = torch.randn(3, 50)
    assert torch.equal(widen(narrow(values, 16), 16), values.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_counted_are_the_bytes_of_the_file(dtype, tmp_path):
    from safetensors.torch import load_file, save_file

    owner = layer_of(dtype=dtype)
    second = layer_of(dtype=dtype, shared={"dictionary": "first"})
    for layer, dictionary in ((owner, 16 * D_IN * ATOMS), (second, 0)):
        tensors = {k: v for k, v in layer.state_dict().items() if k != "bias" and k not in layer.shared}
        save_file(tensors, tmp_path / "layer.safetensors")
        held = load_file(tmp_path / "layer.safetensors").values()
        stored = sum(tensor.numel() * tensor.element_size() * 8 for tensor in held)
        assert layer.storage_bits == stored == dictionary + D_OUT * (16 + 8 * 9)  # 11 atoms: 2 bytes; 5 x 14 bits: 9
        assert layer.storage_values == stored / 16
        assert layer.num_parameters == dictionary / 16 + D_OUT * NONZEROS + D_OUT
        assert layer.flops == 2 * (dictionary / 16 + D_OUT * NONZEROS)


def test_layer_built_on_meta_from_its_json_spec_gives_the_same_bits():
    layer = layer_of(dtype=torch.float32)
    spec = json.loads(json.dumps(layer_spec(layer)))
    empty = build_layer("site", spec, torch.float32, "meta")
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert {k: v.dtype for k, v in empty.state_dict().items()} == {k: v.dtype for k, v in layer.state_dict().items()}
    empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(4, D_IN)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("start", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("end", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_stored_bytes_and_equal_a_layer_of_that_dtype(start, end):
    cast, fresh = layer_of(dtype=start).to(end), layer_of(dtype=end)
    assert cast.dictionary.dtype == torch.bfloat16
    assert cast.storage_bits == fresh.storage_bits
    for name in ("dictionary", "mask", "values", "dense"):
        assert torch.equal(getattr(cast, name), getattr(fresh, name)), name
    assert cast.bias.dtype == end


def test_copies_are_independent_and_equal():
    layer = layer_of(dtype=torch.float32)
    twin = copy.deepcopy(layer).to("cpu")
    x = torch.randn(3, D_IN)
    assert torch.equal(twin(x), layer(x))
    twin.unpack()
    assert layer.packed
    assert not twin.packed


def test_compiles_whole():
    for trainable in (False, True):
        layer = layer_of(dtype=torch.float32)
        if trainable:
            layer.unpack()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, D_IN)
        torch.testing.assert_close(compiled(x), layer(x))


def test_gradient_passes_through_to_the_input_while_the_stored_form_is_fixed():
    layer, x = layer_of(), torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = 2 * layer(x).detach() @ layer.to_dense()
    torch.testing.assert_close(x.grad, expected)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}


def test_trainable_form_is_the_same_map_with_gradients_of_dictionary_and_values():
    layer = layer_of()
    x = torch.randn(4, D_IN, dtype=torch.float64)
    before = layer(x)
    layer.unpack()
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-12)

    def run(dictionary, values, bias):
        return torch.func.functional_call(layer, {"dictionary": dictionary, "values": values, "bias": bias}, (x,))

    inputs = tuple(p.detach().clone().requires_grad_() for p in (layer.dictionary, layer.values, layer.bias))
    assert torch.autograd.gradcheck(run, inputs)


def test_packing_rounds_to_what_is_stored_and_unpacking_is_exact():
    layer = layer_of(dtype=torch.float32)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.unpack()
    layer.pack()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())
    layer.unpack()
    with torch.no_grad():
        layer.values.mul_(1.7)
    trained = layer.values.detach().clone()
    layer.pack()
    decoded = widen(unpack_codes(layer.values, 14, NONZEROS), 14)
    np.testing.assert_array_equal(decoded.numpy(), rounded(trained.numpy(), 14).astype(np.float32))
    assert ((decoded - trained).abs() <= trained.abs() * 2**-6).all()


def test_trainable_form_saves_and_loads_as_it_is():
    layer = layer_of(dtype=torch.float32)
    layer.unpack()
    with torch.no_grad():
        layer.dictionary.add_(1e-4)
    loaded = build_layer("site", json.loads(json.dumps(layer_spec(layer))), torch.float32, "cpu")
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(3, D_IN)
    assert torch.equal(loaded(x), layer(x))
    assert layer.storage_bits == 32 * (D_IN * ATOMS + D_OUT * NONZEROS) + 16 * D_OUT


def test_layers_that_share_a_dictionary_train_one_parameter():
    first = layer_of(dtype=torch.float32)
    second = SparseDictionaryLinear.from_factors(first.dictionary, *factors(1)[1:3], shared={"dictionary": "first"})
    for layer in (first, second):
        layer.unpack(torch.float32)
    assert first.dictionary is second.dictionary
    x = torch.randn(3, D_IN)
    (first(x).sum() + second.float()(x).sum()).backward()
    expected = x.sum(0)[:, None] * (first._codes().sum(0) + second._codes().sum(0))
    torch.testing.assert_close(first.dictionary.grad, expected, rtol=1e-4, atol=1e-5)
    for layer in (first, second):
        layer.pack()
    assert first.dictionary is second.dictionary
    assert first.dictionary.dtype == torch.bfloat16


def test_a_corrupt_mask_is_refused():
    layer = layer_of()
    layer.mask[3, 0] ^= 1
    with pytest.raises(InputError, match="corrupt mask: an output does not have 5 of 11 atoms marked"):
        layer.after_load()
    layer = layer_of()
    layer.mask[3] = torch.tensor([0b00001111, 0b10000000], dtype=torch.uint8)  # the last bit is padding
    with pytest.raises(InputError, match="corrupt mask"):
        layer.after_load()


@pytest.mark.parametrize(
    ("sizes", "bits", "message"),
    [
        ((5, 6), 14, "non-zeros a column must be between 1 and the number of atoms, 5; got 6"),
        ((5, 0), 14, "got 0"),
        ((5, 2), 9, "value bits must be between 10 and 16; got 9"),
        ((5, 2), 17, "got 17"),
    ],
)
def test_impossible_sizes(sizes, bits, message):
    with pytest.raises(InputError, match=message):
        SparseDictionaryLinear(4, 3, *sizes, value_bits=bits)
