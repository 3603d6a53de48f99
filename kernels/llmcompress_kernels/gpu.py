"""Triton kernels and their launchers. Imported on first use: only a GPU, or Triton's interpreter, needs them.

Each accumulates in float32 with tl.dot over at least 16 rows, since what bounds few rows is the bytes of the weight.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

#: Triton's interpreter runs kernels on CPU tensors, without tuning
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _tuned(configs: list[dict[str, int]], key: list[str]) -> Any:
    """The fastest of the configurations by measurement, remembered on disk; the first one under the interpreter."""
    if INTERPRETED:
        return triton.heuristics({name: _constant(value) for name, value in configs[0].items()})
    choices = [triton.Config(config, num_warps=4) for config in configs]
    return triton.autotune(choices, key=key, cache_results=True)


def _constant(value: int) -> Any:
    return lambda _: value


@triton.jit
def _dot(left, right, total, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDEN:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@_tuned([{"COLUMNS": c, "DEPTH": d} for c, d in ((32, 64), (16, 128), (32, 128), (64, 64), (64, 128))], ["rank", "n"])
@triton.jit
def _low_rank_expand(  # type: ignore[no-untyped-def]
    z, z_stride, weight, places, out, rows, rank, n, pivots, offset,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d_out = n + pivots
    products = tl.cdiv(n, COLUMNS)
    program = tl.program_id(0)
    if program < products:
        column = program * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, rank, DEPTH):
            i = start + tl.arange(0, DEPTH)
            left = tl.load(z + row[:, None] * z_stride + i[None, :], (row[:, None] < rows) & (i[None, :] < rank), 0.0)
            inside = (i[:, None] < rank) & (column[None, :] < n)
            right = tl.load(weight + i[:, None] * n + column[None, :], inside, 0.0)
            total = _dot(left, right, total, WIDEN)
        place = tl.load(places + pivots + column, column < n, 0)
        inside = (row[:, None] < rows) & (column[None, :] < n)
        tl.store(out + row[:, None] * d_out + place[None, :], total.to(out.dtype.element_ty), inside)
    else:
        pivot = (program - products) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (pivot[None, :] < pivots)
        own = tl.load(z + row[:, None] * z_stride + offset + pivot[None, :], inside, 0.0)
        place = tl.load(places + pivot, pivot < pivots, 0)
        tl.store(out + row[:, None] * d_out + place[None, :], own, inside)


def low_rank_expand(z: Tensor, B: Tensor, places: Tensor, offset: int) -> Tensor:
    """out[:, places] = cat(z[:, offset : offset + p], z B) for z (rows, r) with a unit last stride: (rows, d_out)."""
    z, B = (z if z.stride(-1) == 1 else z.contiguous()), B.contiguous()
    (rank, n), d_out, rows = B.shape, len(places), len(z)
    out = z.new_empty(rows, d_out)
    if out.numel():
        _low_rank_expand[
            lambda meta: (
                triton.cdiv(n, meta["COLUMNS"]) + triton.cdiv(d_out - n, meta["COLUMNS"]),
                triton.cdiv(rows, meta["ROWS"]),
            )
        ](z, z.stride(0), B, places, out, rows, rank, n, d_out - n, offset, INTERPRETED, ROWS=16)
    return out


@_tuned(
    [{"OUTPUTS": o, "ATOMS": a} for o, a in ((16, 128), (16, 64), (32, 64), (32, 128), (64, 64))], ["atoms", "d_out"]
)
@triton.jit
def _sparse_expand(  # type: ignore[no-untyped-def]
    z, z_stride, mask, mask_bytes, values, out, rows, atoms, nonzeros, d_out,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, ATOMS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    count = tl.zeros((OUTPUTS,), tl.int32)  # values used so far by each output
    first = output.to(tl.int64) * nonzeros
    for start in range(0, atoms, ATOMS):
        atom = start + tl.arange(0, ATOMS)
        inside = (output[:, None] < d_out) & (atom[None, :] < atoms)
        byte = tl.load(mask + output[:, None].to(tl.int64) * mask_bytes + atom[None, :] // 8, inside, 0)
        bits = (byte.to(tl.int32) >> (atom[None, :] % 8)) & 1
        rank = count[:, None] + tl.cumsum(bits, 1) - bits
        codes = tl.load(values + first[:, None] + rank, bits != 0, 0.0)
        left = tl.load(
            z + row[:, None] * z_stride + atom[None, :], (row[:, None] < rows) & (atom[None, :] < atoms), 0.0
        )
        total = _dot(left, tl.trans(codes.to(left.dtype)), total, WIDEN)
        count += tl.sum(bits, 1)
    inside = (row[:, None] < rows) & (output[None, :] < d_out)
    tl.store(out + row[:, None] * d_out + output[None, :], total.to(out.dtype.element_ty), inside)


def sparse_expand(z: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """z S for z (rows, k) with a unit last stride, codes as a mask and values (d_out, s): (rows, d_out)."""
    z = z if z.stride(-1) == 1 else z.contiguous()
    mask, values = mask.contiguous(), values.contiguous()
    (rows, atoms), (d_out, nonzeros) = z.shape, values.shape
    out = z.new_empty(rows, d_out)
    if out.numel():
        _sparse_expand[lambda meta: (triton.cdiv(d_out, meta["OUTPUTS"]), triton.cdiv(rows, meta["ROWS"]))](
            z,
            z.stride(0),
            mask,
            mask.shape[1],
            values,
            out,
            rows,
            atoms,
            nonzeros,
            d_out,
            INTERPRETED,
            ROWS=16 if rows <= 16 else 64,
        )
    return out


@_tuned([{"COLUMNS": c, "DEPTH": d} for c, d in ((32, 64), (16, 128), (32, 128), (64, 64))], ["inner", "n"])
@triton.jit
def _block_product(  # type: ignore[no-untyped-def]
    x, x_stride, weight, out, rows, blocks, inner, n, x_block, x_step, out_block, out_step,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, DEPTH):
        i = start + tl.arange(0, DEPTH)
        place = row[:, None] * x_stride + block * x_block + i[None, :] * x_step
        left = tl.load(x + place, (row[:, None] < rows) & (i[None, :] < inner), 0.0)
        inside = (column[:, None] < n) & (i[None, :] < inner)
        right = tl.load(weight + (block * n + column[:, None]) * inner + i[None, :], inside, 0.0)
        total = _dot(left, tl.trans(right), total, WIDEN)
    place = row[:, None] * (blocks * n) + block * out_block + column[None, :] * out_step
    tl.store(out + place, total.to(out.dtype.element_ty), (row[:, None] < rows) & (column[None, :] < n))


def block_product(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    """x (rows, B * p) times the block-diagonal weight (B, q, p): (rows, B * q).

    interleaved: block l has the coordinates l, l + B, l + 2 B, ... of both x and the result.
    """
    x, weight = (x if x.stride(-1) == 1 else x.contiguous()), weight.contiguous()
    (blocks, n, inner), rows = weight.shape, len(x)
    out = x.new_empty(rows, blocks * n)
    steps = (1, blocks, 1, blocks) if interleaved else (inner, 1, n, 1)
    if out.numel():
        _block_product[
            lambda meta: (triton.cdiv(n, meta["COLUMNS"]), triton.cdiv(rows, meta["ROWS"]), blocks)
        ](x, x.stride(0), weight, out, rows, blocks, inner, n, *steps, INTERPRETED, ROWS=16)  # fmt: skip
    return out
