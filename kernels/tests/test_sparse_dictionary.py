import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmcompress_kernels import cpu, cpu_kernels, layout, sparse_dictionary_linear, use
from llmcompress_kernels.cpu_threads import Kernel
from llmcompress_kernels.sparse_dictionary import dense_codes, sparse_expand

from kernels.tests.shapes import LAYOUTS, ROWS, SETTINGS, SIZES, assert_close, codes, random, strided

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@SETTINGS
@given(ROWS, SIZES, SIZES, SIZES, st.sampled_from(["one", "half", "all"]), st.booleans(), LAYOUTS, DTYPES,
       st.sampled_from(["kernel", "library", "dense"]), st.booleans())  # fmt: skip
def test_product_is_that_of_float64(rows, d_in, d_out, atoms, share, biased, strides, dtype, path, arranged):
    nonzeros = {"one": 1, "half": max(1, atoms // 2), "all": atoms}[share]
    x, D = strided(rows, d_in, 1, dtype, strides), random(d_in, atoms, seed=2, dtype=torch.bfloat16)
    D = layout.arranged(D) if arranged else D
    mask, values, S = codes(d_out, atoms, nonzeros)
    bias = random(d_out, seed=4, dtype=dtype) if biased else None
    product = D.double().numpy() @ S.T
    dense = torch.from_numpy(product.T).to(dtype) if path == "dense" else None
    with torch.no_grad(), use("kernel" if path == "kernel" else "library"):
        found = sparse_dictionary_linear(x, D, mask, values, bias, dense)
    expected = x.double().numpy() @ product + (0 if bias is None else bias.double().numpy())
    size = abs(x.double().numpy()) @ abs(D.double().numpy()) @ abs(S.T)
    assert found.dtype == dtype
    assert_close(found, expected, np.hstack([size, abs(expected)]))


def problem(rows=3, dtype=torch.float32, d_in=13, d_out=21, atoms=19, nonzeros=8):
    mask, values, S = codes(d_out, atoms, nonzeros)
    return random(rows, d_in, dtype=dtype), random(d_in, atoms, seed=1, dtype=torch.bfloat16), mask, values, S


@pytest.mark.parametrize("nonzeros", [1, 50, 100, 101])
def test_codes_that_the_vector_kernel_and_the_plain_one_read_alike(nonzeros):
    """13 bytes of mask an output: whole groups of the unrolled loop and a rest, and five rows: four and one."""
    mask, values, S = codes(40, 101, nonzeros)
    z = torch.nn.functional.pad(random(5, 101), (0, 3))
    plain, table = torch.empty(5, 40), torch.from_numpy(cpu_kernels.shuffle_table())
    Kernel(cpu_kernels.compile_kernel("expand_any"))(
        1,
        mask.data_ptr(),
        13,
        values.data_ptr(),
        nonzeros,
        z.data_ptr(),
        5,
        104,
        table.data_ptr(),
        plain.data_ptr(),
        40,
        7,
    )
    for found in (plain, cpu.expand(z, mask, values)):
        assert_close(found, z[:, :101].double().numpy() @ S.T)


GUARDED = """
import ctypes, mmap, sys, torch
from kernels.tests.shapes import codes, random
from llmcompress_kernels import cpu

mask, values, S = codes(3, 16, 5)
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), mmap.PAGESIZE, 0):
    sys.exit("mprotect failed")
last = torch.frombuffer(pages, dtype=torch.bfloat16, count=15, offset=mmap.PAGESIZE - 30).view(3, 5)
last.copy_(values)
z = random(2, 16)
torch.testing.assert_close(cpu.expand(z, mask, last).double(), z.double() @ torch.from_numpy(S).T, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page of memory by mprotect")
def test_values_are_not_read_past_their_end():
    """The values end where a page begins that must not be touched: in a process of its own, which would die."""
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", GUARDED], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])


@pytest.mark.parametrize("arranged", [False, True])
def test_the_next_row_of_the_dictionary_does_not_leak_into_padding(arranged):
    """A vector that reads on beyond its own values meets what overflows here; times zero it would be NaN."""
    x, D, mask, values, S = problem(1)
    x[0] = 0
    x[0, 0] = 10
    D[1] = 3e38
    with torch.no_grad(), use("kernel"):
        found = sparse_dictionary_linear(x, layout.arranged(D) if arranged else D, mask, values)
    assert_close(found, x.double().numpy() @ D.double().numpy() @ S.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6])
def test_nothing_beyond_the_end_of_a_column_or_row_is_read(rows, dtype):
    """Times zero it would still be NaN."""
    x, D, *_ = problem(rows)
    x = torch.full((rows, 24), torch.nan)[:, :13].copy_(x)
    D = torch.full((19, 24), torch.nan, dtype=dtype)[:, :13].T.copy_(D)
    found = cpu.product(x, D)
    assert_close(found[:, :19], x.double().numpy() @ D.double().numpy())
    assert not found[:, 19:].any()


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("threads", [1, 2])
def test_result_does_not_depend_on_threads(threads, rows):
    x, D, mask, values, S = problem(rows, d_in=2100, d_out=1500, atoms=1203, nonzeros=600)
    D = layout.arranged(D)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad(), use("kernel"):
            found = sparse_dictionary_linear(x, D, mask, values)
    finally:
        torch.set_num_threads(before)
    with torch.no_grad(), use("kernel"):
        assert torch.equal(found, sparse_dictionary_linear(x.clone(), D, mask, values))
    assert_close(found, x.double().numpy() @ D.double().numpy() @ S.T)


def test_dense_codes_are_numpys():
    _, _, mask, values, S = problem()
    np.testing.assert_array_equal(dense_codes(mask, values, 19).double(), S)


def test_gradients():
    _, _, mask, values, _ = problem()
    inputs = [random(3, 13, dtype=torch.float64), random(13, 19, seed=1, dtype=torch.float64), values.double(),
              random(21, seed=2, dtype=torch.float64)]  # fmt: skip
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, D, v, bias: sparse_dictionary_linear(x, D, mask, v, bias), inputs)
    z = random(3, 19, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, v: sparse_expand(z, mask, v), (z, inputs[2]))


def test_gradients_of_float32_rows_that_the_kernel_multiplies():
    x, D, mask, values, S = problem(2)
    x.requires_grad_(), D.requires_grad_(), values.requires_grad_()
    y = sparse_dictionary_linear(x, D, mask, values)
    y.square().sum().backward()
    grad = 2 * y.detach().double().numpy()
    size = abs(grad).max() * abs(S).sum(0).max() * abs(D.detach().double().numpy()).max() * 2
    assert_close(x.grad, grad @ S @ D.detach().double().numpy().T, np.array([size]))
    assert_close(D.grad, x.detach().double().numpy().T @ grad @ S)
    by_atom = grad.T @ (x.detach().double().numpy() @ D.detach().double().numpy())
    marks = np.unpackbits(mask.numpy(), axis=1, bitorder="little")[:, :19].astype(bool)
    assert_close(values.grad, by_atom[marks].reshape(21, 8))


def test_gradients_of_an_arranged_dictionary_for_many_rows():
    x, D, mask, values, _ = problem(40)
    single = [t.requires_grad_() for t in (x.clone(), layout.arranged(D.float()), values.float())]
    double = [t.double().detach().requires_grad_() for t in (x, D, values)]
    assert not single[1].is_contiguous()
    for x, D, values in (single, double):
        sparse_dictionary_linear(x, D, mask, values).square().sum().backward()
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-3)


def test_operator_is_well_formed():
    _, _, mask, values, _ = problem()
    torch.library.opcheck(sparse_expand, (random(4, 19).requires_grad_(), mask, values))


@pytest.mark.parametrize("rows", [1, 40])
def test_compiles_whole(rows):
    x, D, mask, values, _ = problem(rows)
    compiled = torch.compile(sparse_dictionary_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, D, mask, values), sparse_dictionary_linear(x, D, mask, values))


def test_without_numba_torch_multiplies_and_the_reason_is_logged_once(monkeypatch, caplog):
    x, D, mask, values, S = problem(1)
    monkeypatch.setitem(sys.modules, "numba", None)
    cpu.available.cache_clear()
    try:
        with torch.no_grad(), caplog.at_level("WARNING", "llmcompress"):
            for _ in range(2):
                found = sparse_dictionary_linear(x.clone(), D, mask, values)
        assert_close(found, x.double().numpy() @ D.double().numpy() @ S.T)
        assert sum("numba does not import" in record.message for record in caplog.records) == 1
    finally:
        monkeypatch.undo()
        cpu.available.cache_clear()


def changed(mask, row, byte):
    mask = mask.clone()
    mask[row, 0] = byte
    return mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 12)}, "x: the last dimension must be 13, as dictionary has it"),
        ({"x": torch.ones(3, 13).half()}, None),
        (
            {"dictionary": torch.ones(13, 19).half()},
            "dictionary: dtype must be torch.float32, as x has it, or bfloat16",
        ),
        ({"mask": torch.zeros(21, 3)}, r"mask: must be uint8 \(21, 3\); got torch.float32"),
        ({"mask": torch.zeros(20, 3, dtype=torch.uint8)}, r"mask: must be uint8 \(21, 3\); got torch.uint8 \(20, 3\)"),
        ({"mask": torch.full((21, 3), 255, dtype=torch.uint8)}, "mask: each output must have 8 of 19 atoms marked"),
        ({"mask": torch.zeros(21, 3, dtype=torch.uint8)}, "mask: each output must have 8 of 19 atoms marked"),
        ({"values": torch.ones(21, 20)}, "values: 1 to 19 an output"),
        ({"values": torch.ones(21, 8, dtype=torch.int32)}, "values: dtype must be a floating-point one"),
        ({"bias": torch.ones(5)}, r"bias: shape must be \(21,\)"),
        ({"dense": torch.ones(13, 21)}, r"dense: shape must be \(21, 13\)"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    x, D, mask, values, _ = problem()
    arguments = {"x": x, "dictionary": D, "mask": mask, "values": values} | change
    if message is None:  # float16 has no CPU kernel: torch multiplies
        assert sparse_dictionary_linear(**arguments).dtype == torch.float16
        return
    with pytest.raises(ValueError, match=message):
        sparse_dictionary_linear(**arguments)
