"""The Triton kernels on CPU tensors, under Triton's interpreter: run by test_gpu.py in a process of its own."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from llmcompress_kernels import block, gap_codes, gpu, low_rank
from llmcompress_kernels.layout import arranged

from kernels.tests.shapes import LAYOUTS, SETTINGS, assert_close, gap_problem, pivoted, random, strided

ROWS, SIZES = st.sampled_from([0, 1, 3, 17]), st.sampled_from([1, 5, 33, 70, 130])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FEW = type(SETTINGS)(SETTINGS, max_examples=15)


@FEW
@given(ROWS, SIZES, SIZES, st.integers(0, 200), LAYOUTS, DTYPES, st.sampled_from(["kernel", "library"]), st.booleans())
def test_low_rank_expand(rows, rank, rest, pivots, layout, dtype, path, in_pieces):
    pivots = pivots % (rank + 1)
    offset = (rank - pivots) // 2
    z, B = strided(rows, rank, 0, dtype, layout), random(rank, rest, seed=1, dtype=dtype)
    places = torch.from_numpy(np.random.default_rng(0).permutation(pivots + rest))
    expected, size = (
        pivoted(z, torch.eye(rank), B, places, offset),
        np.abs(z.double().numpy()) @ np.abs(B.double().numpy()),
    )
    if in_pieces:
        z, B = F.pad(z, (0, -rank % 8)), arranged(B)
    assert_close(low_rank._expand_cuda(z, B, places, offset, path), expected, size)


@FEW
@given(SIZES, SIZES, st.integers(0, 40), LAYOUTS, DTYPES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_row(d, n, more, layout, dtype, stored):
    x, weight = strided(1, d, 0, dtype, layout), arranged(random(d, n, seed=1, dtype=stored))
    found = gpu.one_row(x, weight, width=n + more)
    size = np.abs(x.double().numpy()) @ np.abs(weight.double().numpy())
    assert_close(found[:, :n], x.double().numpy() @ weight.double().numpy(), size)
    assert found.shape == (1, n + more)
    assert not found[:, n:].any()


@FEW
@given(ROWS, st.sampled_from([1, 5, 33, 130, 300]), SIZES, st.sampled_from(["most", "half", "all"]), DTYPES)
def test_gap_expand(rows, atoms, d_out, share, dtype):
    nonzeros = {"most": -(-3 * atoms // 4), "half": -(-atoms // 2), "all": atoms}[share]
    z = F.pad(random(rows, atoms, dtype=dtype), (0, gap_codes.width(atoms) - atoms))
    index, values, S = gap_problem(d_out, atoms, nonzeros)
    words, starts = gap_codes.encode(index, values, atoms)
    size = np.abs(z[:, :atoms].double().numpy()) @ np.abs(S.T)
    assert_close(gpu.gap_expand(z, words, starts), z[:, :atoms].double().numpy() @ S.T, size)


@FEW
@given(ROWS, st.integers(1, 4), SIZES, SIZES, st.booleans(), LAYOUTS, DTYPES)
def test_block_product(rows, blocks, n, inner, interleaved, layout, dtype):
    x, weight = strided(rows, blocks * inner, 0, dtype, layout), random(blocks, n, inner, seed=1, dtype=dtype)
    expected = block.reference(x.double().contiguous(), weight.double(), interleaved).numpy()
    size = block.reference(x.double().abs().contiguous(), weight.double().abs(), interleaved).numpy()
    assert_close(gpu.block_product(x, weight, interleaved), expected, size)


def test_these_run_under_the_interpreter():
    assert gpu.INTERPRETED
