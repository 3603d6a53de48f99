"""Problems of drawn shapes and their float64 results, which every implementation is compared with."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 31, 33, 64, 65, 100])
ROWS = st.sampled_from([0, 1, 2, 3, 4, 5, 9, 16, 17])
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(rows, columns, seed, dtype, layout):
    """A random matrix in several layouts: contiguous, every second column, transposed, a slice of wider rows."""
    if layout == "columns":
        return random(rows, 2 * columns, seed=seed, dtype=dtype)[:, ::2]
    if layout == "transposed":
        return random(columns, rows, seed=seed, dtype=dtype).T
    if layout == "slice":
        return random(rows, columns + 3, seed=seed, dtype=dtype)[:, 2 : 2 + columns]
    return random(rows, columns, seed=seed, dtype=dtype)


LAYOUTS = st.sampled_from(["contiguous", "columns", "transposed", "slice"])


def assert_close(found, expected, scale=None):
    """Largest difference over the largest magnitude that the sums could have, by the dtype of `found`."""
    assert tuple(found.shape) == tuple(expected.shape)
    scale = np.abs(expected).max(initial=1e-3) if scale is None else scale.max(initial=1e-3)
    difference = np.abs(found.detach().double().numpy() - expected).max(initial=0)
    assert difference <= TOLERANCE[found.dtype] * scale, difference / scale


def codes(d_out, atoms, nonzeros, seed=0, dtype=torch.bfloat16):
    """Mask (d_out, ceil(atoms / 8)) by numpy's packbits, values, and the dense codes that they stand for."""
    generator = np.random.default_rng(seed)
    dense, marks = np.zeros((d_out, atoms)), np.zeros((d_out, atoms), bool)
    values = random(d_out, nonzeros, seed=seed, dtype=dtype)
    for row in range(d_out):
        chosen = np.sort(generator.choice(atoms, nonzeros, replace=False))
        marks[row, chosen] = True
        dense[row, chosen] = values[row].double().numpy()
    return torch.from_numpy(np.packbits(marks, axis=1, bitorder="little")), values, dense


def gap_problem(d_out, atoms, nonzeros, seed=0):
    """Ascending indices, values of 14 bits in bfloat16, and the dense codes (d_out, atoms) that they stand for."""
    generator = np.random.default_rng(seed)
    index = np.stack([np.sort(generator.choice(atoms, nonzeros, replace=False)) for _ in range(d_out)])
    values = (random(d_out, nonzeros, seed=seed).bfloat16().view(torch.int16) & ~3).view(torch.bfloat16)
    dense = np.zeros((d_out, atoms))
    np.put_along_axis(dense, index, values.double().numpy(), 1)
    return torch.from_numpy(index), values, dense


def pivoted(x, A, B, places, offset):
    """The pivot form in float64 numpy, one output at a time."""
    x, A, B = (tensor.detach().double().numpy() for tensor in (x, A, B))
    z, pivots = x @ A, len(places) - B.shape[1]
    out = np.empty((len(x), len(places)))
    for j, place in enumerate(places.tolist()):
        out[:, place] = z[:, offset + j] if j < pivots else z @ B[:, j - pivots]
    return out
