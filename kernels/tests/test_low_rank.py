import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmcompress_kernels import dispatch, layout, low_rank_linear, shared, use
from llmcompress_kernels.low_rank import low_rank_expand, low_rank_forward

from kernels.tests.shapes import LAYOUTS, ROWS, SETTINGS, SIZES, assert_close, pivoted, random, strided

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@SETTINGS
@given(
    ROWS,
    SIZES,
    SIZES,
    SIZES,
    st.integers(0, 100),
    st.booleans(),
    LAYOUTS,
    DTYPES,
    st.sampled_from(["kernel", "library"]),
    st.booleans(),
)
def test_product_is_that_of_float64(rows, d_in, rank, rest, pivots, biased, strides, dtype, path, arranged):
    rank = min(rank, d_in)
    pivots = pivots % (rank + 1)
    offset, d_out = (rank - pivots) // 2, pivots + rest
    x = strided(rows, d_in, 1, dtype, strides)
    A, B = random(d_in, rank, seed=2, dtype=dtype), random(rank, rest, seed=3, dtype=dtype)
    if arranged:
        A, B = layout.arranged(A), layout.arranged(B)
    places = torch.from_numpy(np.random.default_rng(d_out).permutation(d_out)) if pivots else None
    bias = random(d_out, seed=4, dtype=dtype) if biased else None
    with torch.no_grad(), use(path):
        found = low_rank_linear(x, A, B, bias, places, offset if pivots else 0)
    order = torch.arange(rest) if places is None else places
    expected = pivoted(x, A, B, order, offset) + (0 if bias is None else bias.double().numpy())
    size = abs(x.double().numpy()) @ abs(A.double().numpy())
    assert found.dtype == dtype
    assert_close(found, expected, np.hstack([size, size @ abs(B.double().numpy()), abs(expected)]))


def problem(rows=3, dtype=torch.float32, d_in=13, rank=6, pivots=4, rest=9):
    places = torch.from_numpy(np.random.default_rng(0).permutation(pivots + rest))
    return (
        random(rows, d_in, dtype=dtype),
        random(d_in, rank, seed=1, dtype=dtype),
        random(rank, rest, seed=2, dtype=dtype),
        places,
    )


@pytest.mark.parametrize("path", ["kernel", "library"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("by_columns", [False, True])
def test_what_lies_behind_a_views_edges_is_not_read(rows, path, by_columns):
    x, A, B, places = problem(rows)
    beyond = [torch.full((16, 8), torch.nan), torch.full((8, 16), torch.nan)]
    if by_columns:
        beyond = [whole.T.contiguous().T for whole in beyond]
    views = [whole[: f.shape[0], : f.shape[1]].copy_(f) for whole, f in zip(beyond, (A, B), strict=True)]
    with torch.no_grad(), use(path):
        for order in (None, places):
            torch.testing.assert_close(
                low_rank_linear(x, *views, None, order), low_rank_linear(x, A, B, None, order), rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("path", ["kernel", "library"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_arranged_factors_give_the_same_product(rows, path):
    """Of whole numbers, whose sums are exact in any order."""
    *inputs, places = problem(rows)
    x, A, B = ((4 * tensor).round() for tensor in inputs)
    arranged = [layout.arranged(factor) for factor in (A, B)]
    assert not any(factor.is_contiguous() for factor in arranged)
    with torch.no_grad(), use(path):
        for order in (None, places):
            found = low_rank_forward(x, *arranged, None, order, 0)
            torch.testing.assert_close(found, low_rank_linear(x, A, B, None, order), rtol=1e-6, atol=1e-6)


def test_leading_dimensions_and_no_rows():
    x, A, B, places = problem(6)
    with torch.no_grad():
        flat = low_rank_linear(x, A, B, None, places, 1)
        assert torch.equal(low_rank_linear(x.view(2, 3, -1), A, B, None, places, 1), flat.view(2, 3, -1))
        assert torch.equal(
            low_rank_linear(x[0], A, B, None, places, 1), low_rank_linear(x[:1], A, B, None, places, 1)[0]
        )
        assert low_rank_linear(x[:0], A, B, None, places, 1).shape == (0, 13)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_result_does_not_depend_on_threads(rows, threads):
    """512 x 700 float32 is enough for two threads."""
    x, A, B, places = problem(rows, d_in=512, rank=300, pivots=300, rest=700)
    A, B = layout.arranged(A), layout.arranged(B)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad(), use("kernel"):
            found = low_rank_linear(x, A, B, None, places)
    finally:
        torch.set_num_threads(before)
    with torch.no_grad(), use("kernel"):
        assert torch.equal(found, low_rank_linear(x.clone(), A, B, None, places))
    assert_close(found, pivoted(x, A, B, places, 0))


def test_gradients():
    x, A, B, places = problem(3, torch.float64)
    bias = random(13, seed=5, dtype=torch.float64)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, A, B, bias)]
    assert torch.autograd.gradcheck(lambda x, A, B, bias: low_rank_linear(x, A, B, bias, places, 1), inputs)
    assert torch.autograd.gradcheck(lambda x, A, B, bias: low_rank_linear(x, A, B, bias[:9]), inputs)


def test_gradients_of_float32_rows_that_the_kernel_multiplies():
    x, A, B, places = problem(2)
    single, double = ([t.detach().to(d).requires_grad_() for t in (x, A, B)] for d in (torch.float32, torch.float64))
    for tensors in (single, double):
        low_rank_linear(*tensors, None, places, 1).square().sum().backward()
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("d_in", [13, 16])
@pytest.mark.parametrize("rows", [2, 40])
def test_gradients_of_arranged_factors(rows, d_in, compiled):
    """Sizes padded, d_in x 6 and 6 x 9. As the plain factors' in float64, with nothing of the padding in them."""
    x, A, B, places = problem(rows, d_in=d_in)
    forward = torch.compile(low_rank_forward, fullgraph=True, backend="aot_eager") if compiled else low_rank_forward
    for way in (None, places):
        single = [t.requires_grad_() for t in (x.clone(), layout.arranged(A), layout.arranged(B))]
        double = [t.double().requires_grad_() for t in (x, A, B)]
        forward(*single, None, way, 0).square().sum().backward()
        low_rank_linear(*double, None, way, 0).square().sum().backward()
        for a, b in zip(single, double, strict=True):
            assert a.grad.shape == b.shape
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)
        if d_in == 16:
            assert single[1].grad.stride() == single[1].stride(), "an optimiser goes through both alike"


def test_what_is_frozen_gets_no_gradient():
    x, A, B, places = problem(40)
    B.requires_grad_()
    low_rank_linear(x, A, B, None, places, 1).sum().backward()
    assert x.grad is None
    assert A.grad is None
    assert B.grad.shape == B.shape


def test_operators_are_well_formed():
    x, A, B, places = problem(4)
    torch.library.opcheck(low_rank_expand, (random(4, 6).requires_grad_(), B.requires_grad_(), places, 1))
    torch.library.opcheck(shared._product, (x.requires_grad_(), A.requires_grad_()))


@pytest.mark.parametrize("rows", [1, 40])
def test_compiles_whole(rows):
    x, A, B, places = problem(rows)
    compiled = torch.compile(low_rank_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, A, B, None, places, 1), low_rank_linear(x, A, B, None, places, 1))


def test_siblings_pay_for_their_common_product_once(monkeypatch):
    x, A, B, places = problem(2)
    calls = []
    original = shared.product
    monkeypatch.setattr(shared, "product", lambda *arguments: calls.append(1) or original(*arguments))
    with torch.no_grad():
        first = low_rank_linear(x, A, B, None, places, 1)
        second = low_rank_linear(x, A, B + 1, None, places, 1)
        assert len(calls) == 1
        assert_close(second, pivoted(x, A, B + 1, places, 1))
        x += 1  # the same tensor with other contents
        third = low_rank_linear(x, A, B, None, places, 1)
        assert len(calls) == 2
        assert_close(third, pivoted(x, A, B, places, 1))
        A.mul_(2)
        assert_close(low_rank_linear(x, A, B, None, places, 1), pivoted(x, A, B, places, 1))
        assert len(calls) == 3
        assert_close(first, pivoted(x - 1, A / 2, B, places, 1))
    with torch.inference_mode():
        inner = x * 1
        low_rank_linear(inner, A, B, None, places, 1)
        inner += 1
        assert_close(low_rank_linear(inner, A, B, None, places, 1).clone(), pivoted(inner.clone(), A, B, places, 1))


def test_plan_by_rows_device_and_dtype():
    for operation, device in itertools.product(("low_rank", "sparse_dictionary"), ("cpu", "cuda")):
        limit = dispatch.CROSSOVER[operation, device]
        assert dispatch.plan(operation, limit, device, torch.float32) == "kernel"
        assert dispatch.plan(operation, limit + 1, device, torch.float32) == "library"
        assert dispatch.plan(operation, 1, device, torch.float64) == "library"
    assert dispatch.plan("low_rank", 1, "mps", torch.float32) == "library"
    assert dispatch.plan("low_rank", 1, "cpu", torch.float16) == "library"
    with use("library"):
        assert dispatch.plan("low_rank", 1, "cpu", torch.float32) == "library"
        with use("kernel"):
            assert dispatch.plan("low_rank", 10**6, "cpu", torch.float32) == "kernel"
            assert dispatch.plan("low_rank", 1, "cpu", torch.float64) == "library"
    with pytest.raises(ValueError, match="path must be 'kernel' or 'library'; got 'fast'"), use("fast"):
        pass


def test_bfloat16_under_autocast():
    x, A, B, places = problem(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = low_rank_linear(x, A, B, None, places, 1)
    assert found.dtype == torch.bfloat16
    assert_close(found, pivoted(x, A, B, places, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 12)}, r"x: the last dimension must be 13, as A has it; got shape \(3, 12\)"),
        ({"x": torch.ones(3, 13, dtype=torch.int64)}, "x: dtype must be a floating-point one; got torch.int64"),
        ({"A": torch.ones(13, 6).bfloat16()}, "x, A and B must have one dtype"),
        ({"A": torch.ones(13, 6, device="meta")}, "x: lies on cpu, A on meta"),
        ({"A": torch.ones(13)}, "A: must be a matrix"),
        ({"B": torch.ones(5, 9)}, r"B: shape must be \(6, 9\); got \(5, 9\)"),
        ({"bias": torch.ones(12)}, r"bias: shape must be \(13,\); got \(12,\)"),
        ({"places": torch.arange(8)}, "places: must be int64"),
        ({"places": torch.arange(13).int()}, "places: must be int64"),
        ({"places": torch.arange(13).clamp(max=11)}, "places: must be a permutation of 0 to 12"),
        ({"places": torch.arange(1, 14)}, "places: must be a permutation of 0 to 12"),
        ({"offset": 3}, "offset: 4 pivots from 3 on do not fit rank 6"),
        ({"offset": -1}, "offset: 4 pivots from -1 on do not fit rank 6"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    x, A, B, places = problem()
    with pytest.raises(ValueError, match=message):
        low_rank_linear(**{"x": x, "A": A, "B": B, "places": places, "offset": 1} | change)
