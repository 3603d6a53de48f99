"""The low-rank plus sparse layer: its product, gradients, storage, and what is corrupt."""

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.layers.sparse_low_rank import SparseLowRankLinear, index_dtype


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parts(dtype=torch.float32):
    A, B, bias = randn(24, 4), randn(4, 36, seed=1), randn(36, seed=2)
    mask = randn(36, 24, seed=3) > 1.5
    mask[7] = False  # an output without an entry
    sparse = randn(36, 24, seed=4)
    return A.to(dtype), B.to(dtype), sparse, mask, bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_its_product_is_that_of_the_dense_weight(dtype):
    A, B, sparse, mask, bias = parts(dtype)
    layer = SparseLowRankLinear.from_factors(A, B, sparse, mask, bias)
    dense = (A @ B).T + torch.where(mask, sparse, 0).to(dtype)
    torch.testing.assert_close(layer.to_dense(), dense)
    x = randn(2, 5, 24, seed=5).to(dtype)
    expected = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(layer(x).double(), expected, atol=tolerance, rtol=tolerance)
    assert layer(x).dtype == dtype


def test_all_of_it_can_be_trained():
    A, B, sparse, mask, bias = parts()
    layer = SparseLowRankLinear.from_factors(A, B, sparse, mask, bias)
    x = randn(5, 24, seed=5).requires_grad_()
    layer(x).square().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    W = layer.to_dense().detach().requires_grad_()
    y = torch.nn.functional.linear(x.detach(), W, bias)
    y.square().sum().backward()
    torch.testing.assert_close(found["values"], W.grad[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["A"], W.grad.T @ B.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["x"], 2 * y @ W, rtol=1e-4, atol=1e-3)


def test_it_is_saved_whole_and_counted_as_it_is_stored():
    A, B, sparse, mask, bias = parts()
    layer = SparseLowRankLinear.from_factors(A, B, sparse, mask, bias)
    assert set(layer.state_dict()) == {"A", "B", "values", "columns", "counts", "bias"}
    copy = SparseLowRankLinear.from_spec(layer.spec(), torch.float32, "cpu")
    copy.load_state_dict(layer.state_dict())
    x = randn(3, 24, seed=6)
    assert torch.equal(copy(x), layer(x))
    entries = int(mask.sum())
    assert layer.entries == entries
    assert layer.storage_bits == 32 * (24 * 4 + 4 * 36 + entries) + 16 * (entries + 36)
    assert layer.storage_values == 24 * 4 + 4 * 36 + 2 * entries + 36
    assert layer.flops == 2 * (24 * 4 + 4 * 36 + entries)
    assert index_dtype(32767) == torch.int16
    assert index_dtype(32768) == torch.int32


def test_what_is_corrupt_or_does_not_fit_is_refused():
    layer = SparseLowRankLinear.from_factors(*parts())
    for name, message in (("counts", "corrupt sparse entries"), ("columns", "corrupt sparse entries")):
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        state[name][0] = 99
        with pytest.raises(InputError, match=message):
            SparseLowRankLinear.from_spec(layer.spec(), torch.float32, "cpu").load_state_dict(state)
    with pytest.raises(InputError, match="rank 25 and 0 entries do not fit a map of 24 inputs, 36 outputs"):
        SparseLowRankLinear(24, 36, 25, 0)
    with pytest.raises(InputError, match="the last dimension of x must be d_in = 24"):
        layer(torch.ones(2, 23))
