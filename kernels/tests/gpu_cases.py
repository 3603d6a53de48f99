"""The Triton kernels on CPU tensors, under Triton's interpreter: run by test_gpu.py in a process of its own."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmcompress_kernels import block, gpu

from kernels.tests.shapes import LAYOUTS, SETTINGS, assert_close, codes, pivoted, random, strided

ROWS, SIZES = st.sampled_from([0, 1, 3, 17]), st.sampled_from([1, 5, 33, 70, 130])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FEW = type(SETTINGS)(SETTINGS, max_examples=15)


@FEW
@given(ROWS, SIZES, SIZES, st.integers(0, 200), LAYOUTS, DTYPES)
def test_low_rank_expand(rows, rank, rest, pivots, layout, dtype):
    pivots = pivots % (rank + 1)
    offset = (rank - pivots) // 2
    z, B = strided(rows, rank, 0, dtype, layout), random(rank, rest, seed=1, dtype=dtype)
    places = torch.from_numpy(np.random.default_rng(0).permutation(pivots + rest))
    found = gpu.low_rank_expand(z, B, places, offset)
    size = np.abs(z.double().numpy()) @ np.abs(B.double().numpy())
    assert_close(found, pivoted(z, torch.eye(rank), B, places, offset), size)


@FEW
@given(ROWS, SIZES, SIZES, st.sampled_from(["one", "half", "all"]), LAYOUTS, DTYPES)
def test_sparse_expand(rows, atoms, d_out, share, layout, dtype):
    nonzeros = {"one": 1, "half": max(1, atoms // 2), "all": atoms}[share]
    z = strided(rows, atoms, 0, dtype, layout)
    mask, values, S = codes(d_out, atoms, nonzeros, dtype=torch.bfloat16)
    size = np.abs(z.double().numpy()) @ np.abs(S.T)
    assert_close(gpu.sparse_expand(z, mask, values), z.double().numpy() @ S.T, size)


@FEW
@given(ROWS, st.integers(1, 4), SIZES, SIZES, st.booleans(), LAYOUTS, DTYPES)
def test_block_product(rows, blocks, n, inner, interleaved, layout, dtype):
    x, weight = strided(rows, blocks * inner, 0, dtype, layout), random(blocks, n, inner, seed=1, dtype=dtype)
    expected = block.reference(x.double().contiguous(), weight.double(), interleaved).numpy()
    size = block.reference(x.double().abs().contiguous(), weight.double().abs(), interleaved).numpy()
    assert_close(gpu.block_product(x, weight, interleaved), expected, size)


def test_these_run_under_the_interpreter():
    assert gpu.INTERPRETED
