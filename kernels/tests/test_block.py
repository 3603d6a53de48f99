import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmcompress_kernels import block_dense_linear, block_shuffle_linear
from llmcompress_kernels.block import block_product
from scipy.linalg import block_diag

from kernels.tests.shapes import LAYOUTS, ROWS, SETTINGS, assert_close, random, strided

SMALL = st.integers(1, 9)


def dense_of(V, U):
    """Weights (d_out, d_in) by explicit block-diagonal and permutation matrices in numpy."""
    first = block_diag(*V.detach().double().numpy())
    if U.ndim == 2:
        return U.detach().double().numpy() @ first
    blocks, h = V.shape[:2]
    gather = np.eye(blocks * h)[np.arange(blocks * h).reshape(h, blocks).T.ravel()]
    second = block_diag(*U.detach().double().numpy())
    d_out = len(second)
    scatter = np.eye(d_out)[np.arange(d_out).reshape(d_out // blocks, blocks).T.ravel()].T
    return scatter @ second @ gather @ first


@SETTINGS
@given(
    ROWS,
    SMALL,
    SMALL,
    SMALL,
    SMALL,
    st.booleans(),
    LAYOUTS,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_products_are_those_of_the_dense_weights(rows, blocks, p, h, s, biased, layout, dtype):
    x, V = strided(rows, blocks * p, 0, dtype, layout), random(blocks, h, p, seed=1, dtype=dtype)
    for linear, U in (
        (block_dense_linear, random(blocks * s, blocks * h, seed=2, dtype=dtype)),
        (block_shuffle_linear, random(blocks, s, h, seed=3, dtype=dtype)),
    ):
        bias = random(blocks * s, seed=4, dtype=dtype) if biased else None
        expected = x.double().numpy() @ dense_of(V, U).T + (0 if bias is None else bias.double().numpy())
        size = (abs(x.double().numpy()).sum(1, keepdims=True) + 1) * abs(V.double()).max().item()
        size = size * blocks * h * abs(U.double()).max().item() + abs(expected).max(initial=0)
        assert_close(linear(x, V, U, bias), expected, size)


@pytest.mark.parametrize("interleaved", [False, True])
def test_operator_and_its_gradients(interleaved):
    x, weight = random(4, 12, dtype=torch.float64), random(3, 5, 4, seed=1, dtype=torch.float64)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: block_product(x, w, interleaved), inputs)
    torch.library.opcheck(block_product, (*inputs, interleaved))


def test_gradients_and_compilation():
    x, V, U = (
        random(4, 12, dtype=torch.float64),
        random(3, 5, 4, dtype=torch.float64),
        random(3, 2, 5, dtype=torch.float64),
    )
    flat = random(7, 15, dtype=torch.float64)
    for linear, second in ((block_dense_linear, flat), (block_shuffle_linear, U)):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, V, second)]
        assert torch.autograd.gradcheck(linear, inputs)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), linear(*inputs))


@pytest.mark.parametrize(
    ("linear", "change", "message"),
    [
        (block_dense_linear, {"x": torch.ones(2, 11)}, "x: the last dimension must be 12, as V has it"),
        (block_dense_linear, {"V": torch.ones(3, 5)}, "V: must have 3 dimensions"),
        (block_dense_linear, {"U": torch.ones(6, 14)}, r"U: shape must be \(6, 15\)"),
        (block_dense_linear, {"U": torch.ones(6, 15).half()}, "x, V and U must have one dtype"),
        (block_dense_linear, {"bias": torch.ones(5)}, r"bias: shape must be \(6,\)"),
        (block_shuffle_linear, {"U": torch.ones(3, 2, 4)}, r"U: shape must be \(3, 2, 5\)"),
        (block_shuffle_linear, {"U": torch.ones(6, 15)}, "U: must have 3 dimensions"),
        (block_shuffle_linear, {"bias": torch.ones(5)}, r"bias: shape must be \(6,\)"),
    ],
)
def test_bad_input_names_the_argument(linear, change, message):
    U = torch.ones(6, 15) if linear is block_dense_linear else torch.ones(3, 2, 5)
    with pytest.raises(ValueError, match=message):
        linear(**{"x": torch.ones(2, 12), "V": torch.ones(3, 5, 4), "U": U} | change)
