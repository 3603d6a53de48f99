"""Triton kernels and their launchers. Imported on first use: only a GPU, or Triton's interpreter, needs them.

What bounds few rows is the bytes of the weight: each is read once, sums are float32.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: Triton's interpreter runs kernels on CPU tensors, without tuning
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COPIED = 256  # pivots that a program of `_one_row` copies
MAX_THREADS = 1024  # of a program
EARLY_VALUES = 1 << 24  # weights up to which a launch ahead of its input pays: larger ones are slower for it


def _tuned(sizes: list[tuple[dict[str, int], int]], key: list[str]) -> Any:
    """The fastest of the (sizes, warps) by measurement, remembered on disk; the first under the interpreter."""
    if INTERPRETED:
        return triton.heuristics({name: _constant(value) for name, value in sizes[0][0].items()})
    return triton.autotune([triton.Config(each, num_warps=warps) for each, warps in sizes], key=key, cache_results=True)


def _constant(value: int) -> Any:
    return lambda _: value


@_tuned(
    [({"COLUMNS": c, "DEPTH": d}, w) for c, d, w in ((8, 1024, 8), (4, 1024, 4), (4, 2048, 8), (8, 512, 4))],
    ["depth", "n"],
)
@triton.jit
def _one_row(  # type: ignore[no-untyped-def]
    x, weight, stride, places, out, depth, n, width, pivots, offset,
    EARLY: tl.constexpr, PLACED: tl.constexpr, COPIED: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    products = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    if program < products:
        column = program * COLUMNS + tl.arange(0, COLUMNS)
        i = tl.arange(0, DEPTH)
        tile = weight + column[:, None].to(tl.int64) * stride + i[None, :]
        total = tl.zeros((COLUMNS, DEPTH), tl.float32)
        if EARLY:  # weights are read while the kernel before, which makes x, still runs
            right = tl.load(tile, (column[:, None] < n) & (i[None, :] < depth), 0.0)
            gdc_wait()
            gdc_launch_dependents()
            for start in range(0, depth, DEPTH):
                left = tl.load(x + start + i, start + i < depth, 0.0)
                after = start + DEPTH + i[None, :]
                following = tl.load(tile + start + DEPTH, (column[:, None] < n) & (after < depth), 0.0)
                total += left.to(tl.float32)[None, :] * right.to(tl.float32)
                right = following
        else:
            for start in range(0, depth, DEPTH):
                weights = tl.load(tile + start, (column[:, None] < n) & (start + i[None, :] < depth), 0.0)
                left = tl.load(x + start + i, start + i < depth, 0.0)
                total += left.to(tl.float32)[None, :] * weights.to(tl.float32)
        place = column
        if PLACED:
            place = tl.load(places + pivots + column, column < n, 0)
        tl.store(out + place, tl.sum(total, 1).to(out.dtype.element_ty), column < width)
    elif PLACED:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        pivot = (program - products) * COPIED + tl.arange(0, COPIED)
        own = tl.load(x + offset + pivot, pivot < pivots, 0.0)
        target = tl.load(places + pivot, pivot < pivots, 0)
        tl.store(out + target, own.to(out.dtype.element_ty), pivot < pivots)


def one_row(x: Tensor, weight: Tensor, places: Tensor | None = None, offset: int = 0, width: int = 0) -> Tensor:
    """x W for one row x (1, >= d) and weight (d, n) with a unit first stride: (1, max(n, width)), zeros after n.

    With places (d_out,): out[:, places] = cat(x[:, offset : offset + d_out - n], x W), (1, d_out).
    """
    x, (depth, n) = x.contiguous(), weight.shape
    pivots = 0 if places is None else len(places) - n
    width = max(n, width) if places is None else n
    out = x.new_empty(1, width + pivots)
    if out.numel():
        hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
        early = hopper and weight.numel() <= EARLY_VALUES
        _one_row[lambda meta: (triton.cdiv(width, meta["COLUMNS"]) + triton.cdiv(pivots, COPIED),)](
            x, weight, weight.stride(1), places, out, depth, n, width, pivots, offset,
            early, places is not None, COPIED, launch_pdl=early,
        )  # fmt: skip
    return out


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    z, z_stride, y, y_stride, sources, out, d_out, pivots, offset, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + column, column < d_out, 0)
    own = tl.load(z + row * z_stride + offset + source, (column < d_out) & (source < pivots), 0.0)
    product = tl.load(y + row * y_stride + source - pivots, (column < d_out) & (source >= pivots), 0.0)
    tl.store(out + row * d_out + column, tl.where(source < pivots, own, product), column < d_out)


#: places -> where each output comes from, int32
_sources = WeakIdKeyDictionary()


def _sources_of(places: Tensor) -> Tensor:
    found = _sources.get(places)
    if found is None:
        found = places.argsort().int()
        if not (places.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph's memory is its own
            _sources[places] = found
    return found


def place(z: Tensor, y: Tensor, places: Tensor, offset: int) -> Tensor:
    """out[:, places] = cat(z[:, offset : offset + p], y) for z (rows, r), y (rows, d_out - p): (rows, d_out)."""
    z, y = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (z, y))
    (rows, n), d_out = y.shape, len(places)
    out = y.new_empty(rows, d_out)
    if out.numel():
        _place[(rows, triton.cdiv(d_out, 1024))](
            z, z.stride(0), y, y.stride(0), _sources_of(places), out, d_out, d_out - n, offset, BLOCK=1024
        )
    return out


@triton.jit
def _four_words(pack, position, total, z):  # type: ignore[no-untyped-def]
    for i in tl.static_range(4):
        word = (pack >> (16 * i)).to(tl.int32)
        position += (word & 3) + 1
        value = ((word & 0xFFFC) << 16).to(tl.float32, bitcast=True)
        total += value * tl.load(z + position).to(tl.float32)
    return position, total


@triton.jit
def _gap_expand(  # type: ignore[no-untyped-def]
    z, width, words, starts, out, packs, d_out, PARTS: tl.constexpr, OUTPUTS: tl.constexpr
):
    row = tl.program_id(0)  # rows of one tile run together, so that the second finds the words in the cache
    # one dimension, an element a thread: two would be laid out anew around every gather
    thread = tl.arange(0, PARTS * OUTPUTS)
    part = thread // OUTPUTS
    output = tl.program_id(1) * OUTPUTS + thread % OUTPUTS
    inside = output < d_out
    position = tl.load(starts + part * d_out + output, inside, 0).to(tl.int32)
    each = tl.cdiv(packs, PARTS)
    limit = tl.where(inside, tl.minimum(each, packs - part * each), 0)
    place = words + (part * each).to(tl.int64) * d_out + output
    z += row * width
    total = tl.zeros((PARTS * OUTPUTS,), tl.float32)
    for step in range(0, each, 4):
        first = tl.load(place, step < limit, 0)
        second = tl.load(place + d_out, step + 1 < limit, 0)
        third = tl.load(place + 2 * d_out, step + 2 < limit, 0)
        fourth = tl.load(place + 3 * d_out, step + 3 < limit, 0)
        place += 4 * d_out
        position, total = _four_words(first, position, total, z)
        position, total = _four_words(second, position, total, z)
        position, total = _four_words(third, position, total, z)
        position, total = _four_words(fourth, position, total, z)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    result = tl.sum(tl.reshape(total, (PARTS, OUTPUTS)), 0)
    tl.store(out + row * d_out + output, result.to(out.dtype.element_ty), output < d_out)


def gap_expand(z: Tensor, words: Tensor, starts: Tensor) -> Tensor:
    """z S for z (rows, width), codes as `gap_codes.encode` makes them: (rows, d_out)."""
    z = z.contiguous()
    (packs, d_out), rows, parts = words.shape, len(z), len(starts)
    out = z.new_empty(rows, d_out)
    if out.numel():
        outputs = min(MAX_THREADS // parts, max(16, triton.next_power_of_2(d_out // 256 + 1)))
        _gap_expand[(rows, triton.cdiv(d_out, outputs))](
            z, z.shape[1], words, starts, out, packs, d_out, parts, outputs, num_warps=parts * outputs // 32
        )
    return out


@triton.jit
def _dot(left, right, total, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDEN:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@_tuned([({"COLUMNS": c, "DEPTH": d}, 4) for c, d in ((32, 64), (16, 128), (32, 128), (64, 64))], ["inner", "n"])
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
