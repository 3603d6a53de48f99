"""CPU kernels for few rows, compiled by numba when first used: what bounds them is the bytes of the stored factors.

`product`: out = x W for W (d_in, n) float32 or bfloat16, each column in one piece, with the outputs put in their places
(the pivot form of low rank). Bytes read: those of W. `expand`: out[o] = sum over the atoms that output o's mask marks
of value times z[atom]. Bytes read: k / 8 of the mask and 2 s of the values an output. A byte of the mask picks, from a
table, the shuffle that spreads the next values over 8 lanes, so that half of the lanes are zeros but every load is a
vector.

Accumulation is in float32, in an order that depends on neither threads nor chunks. The vector code is written as LLVM
IR: numba's own loops do not vectorise the conversion from bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
AHEAD = 1024  # bytes between what is multiplied and what is fetched
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, HALVES, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I16, LANES), ir.VectorType(I32, LANES)
BYTES16, BYTES32 = ir.VectorType(I8, 16), ir.VectorType(I8, 32)
#: whether this processor shuffles bytes in vectors of 32
HAS_AVX2 = bool(llvmlite.binding.get_host_cpu_features().get("avx2"))


def _load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _at(builder: Any, base: Any, index: Any, size: int) -> Any:
    """base + size * index, in bytes."""
    return builder.add(base, builder.mul(index, ir.Constant(I64, size)))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v8f32"), [a, b, c])


def _prefetch(builder: Any, address: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
    builder.call(prefetch, [builder.inttoptr(address, ir.PointerType()), read, keep, data])


def _splat(builder: Any, scalar: Any) -> Any:
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(WORDS, [0] * LANES))


def _pointer(kind: Any, numba_type: Any) -> Any:
    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], kind.as_pointer())

        return types.CPointer(numba_type)(types.int64), code

    return pointer


float32_at = _pointer(F32, types.float32)
int64_at = _pointer(I64, types.int64)
uint8_at = _pointer(I8, types.uint8)
uint16_at = _pointer(I16, types.uint16)


@intrinsic
def arguments_of(context: Any, data: Any) -> Any:
    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.voidptr), code


@intrinsic
def take_chunk(context: Any, data: Any) -> Any:
    """The number of the next chunk: 0, 1, ..., each given to one thread."""

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = builder.bitcast(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.voidptr), code


@intrinsic
def widen_bfloat16(context: Any, half: Any) -> Any:
    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(arguments[0], I32), ir.Constant(I32, 16)), F32)

    return types.float32(types.uint16), code


def _dot(rows: int, columns: int, unroll: int, ahead: int, bfloat16: bool) -> Any:
    """The intrinsic out[r, c * apart] = x[r, :d] . W[c * apart, :d], d = vectors * 8, for so many rows and columns.

    `unroll` sums each, so that an addition need not wait for the last one. ahead: bytes between what is multiplied and
    what is fetched, 0 for none.
    """
    size = 2 if bfloat16 else 4
    line = 64 // (size * LANES)  # vectors of W in a cache line

    @intrinsic
    def dot(
        context: Any, x: Any, x_stride: Any, weight: Any, weight_stride: Any, apart: Any, vectors: Any, out: Any,
        out_stride: Any,
    ) -> Any:  # fmt: skip
        def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, weight, weight_stride, apart, vectors, out, out_stride = arguments
            row_starts = [_at(builder, x, x_stride, 4 * r) for r in range(rows)]
            stride = builder.mul(weight_stride, apart)
            column_starts = [_at(builder, weight, stride, size * c) for c in range(columns)]
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            pairs = [(r, c) for r in range(rows) for c in range(columns)]
            sums = {pair: [cgutils.alloca_once_value(builder, zero) for _ in range(unroll)] for pair in pairs}

            def add(index: Any, u: int) -> None:
                left = [_load(builder, _at(builder, start, index, 4 * LANES), FLOATS, 4) for start in row_starts]
                for c, start in enumerate(column_starts):
                    place = _at(builder, start, index, size * LANES)
                    if ahead and u % line == 0:
                        _prefetch(builder, builder.add(place, ir.Constant(I64, ahead)))
                    if bfloat16:
                        wide = builder.zext(_load(builder, place, HALVES, 2), WORDS)
                        right = builder.bitcast(builder.shl(wide, ir.Constant(WORDS, [16] * LANES)), FLOATS)
                    else:
                        right = _load(builder, place, FLOATS, 4)
                    for r in range(rows):
                        total = sums[r, c][u % unroll]
                        builder.store(_multiply_add(builder, left[r], right, builder.load(total)), total)

            _unrolled(builder, vectors, max(unroll, line if ahead else 1), add)
            for r, c in pairs:
                place = _at(builder, _at(builder, out, out_stride, 4 * r), apart, 4 * c)
                _store(builder, _total(builder, [builder.load(part) for part in sums[r, c]]), place)
            return cgutils.get_null_value(target.get_value_type(types.int64))

        return types.int64(*[types.int64] * 8), code

    return dot


def _unrolled(builder: Any, count: Any, step: int, body: Callable[[Any, int], None]) -> None:
    """body(index, u) for each index below count, `step` of them in a pass with u from 0 on; the rest with u = 0."""
    groups = builder.udiv(count, ir.Constant(I64, step))
    with cgutils.for_range(builder, groups, intp=I64) as loop:
        for u in range(step):
            body(_at(builder, ir.Constant(I64, u), loop.index, step), u)
    done = builder.mul(groups, ir.Constant(I64, step))
    with cgutils.for_range(builder, builder.sub(count, done), intp=I64) as loop:
        body(builder.add(done, loop.index), 0)


def _total(builder: Any, parts: list[Any]) -> Any:
    """The sum of all lanes of all parts."""
    total = parts[0]
    for part in parts[1:]:
        total = builder.fadd(total, part)
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (ir.Constant(ir.VectorType(I32, lanes), [*range(start, start + lanes)]) for start in (0, lanes))
        total = builder.fadd(*(builder.shuffle_vector(total, total, half) for half in (low, high)))
    return builder.extract_element(total, ir.Constant(I32, 0))


def _expand_output(rows: int, unroll: int) -> Any:
    """The intrinsic out[r * out_stride] = the product of one output's codes with z[r], for `rows` rows (AVX2)."""

    @intrinsic
    def expand_output(
        context: Any,
        mask: Any,
        mask_bytes: Any,
        values: Any,
        z: Any,
        z_stride: Any,
        table: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            mask, mask_bytes, values, z, z_stride, table, out, out_stride = arguments
            shuffle = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(BYTES32, [BYTES32] * 2), "llvm.x86.avx2.pshuf.b"
            )
            count = builder.module.declare_intrinsic("llvm.ctpop", [I64])
            zero = ir.Constant(FLOATS, [0.0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(unroll)] for _ in range(rows)]
            position = cgutils.alloca_once_value(builder, values)

            def add_byte(index: Any, u: int) -> None:
                byte = builder.zext(_load(builder, builder.add(mask, index), I8, 1), I64)
                place = builder.load(position)
                next_values = _load(builder, place, BYTES16, 2)
                twice = builder.shuffle_vector(
                    next_values, next_values, ir.Constant(ir.VectorType(I32, 32), [*range(16)] * 2)
                )
                pattern = _load(builder, _at(builder, table, byte, 32), BYTES32, 1)
                spread = builder.bitcast(builder.call(shuffle, [twice, pattern]), FLOATS)
                builder.store(_at(builder, place, builder.call(count, [byte]), 2), position)
                for r in range(rows):
                    place = _at(builder, _at(builder, z, z_stride, 4 * r), index, 4 * LANES)
                    total = _multiply_add(builder, spread, _load(builder, place, FLOATS, 4), builder.load(sums[r][u]))
                    builder.store(total, sums[r][u])

            _unrolled(builder, mask_bytes, unroll, add_byte)
            for r in range(rows):
                total = _total(builder, [builder.load(part) for part in sums[r]])
                _store(builder, total, _at(builder, out, out_stride, 4 * r))
            return cgutils.get_null_value(target.get_value_type(types.int64))

        return types.int64(*[types.int64] * 8), code

    return expand_output


dot_1x1_float32, dot_1x4_float32 = _dot(1, 1, 2, 0, False), _dot(1, 4, 2, 0, False)
dot_1x1_bfloat16, dot_1x4_bfloat16 = _dot(1, 1, 2, 0, True), _dot(1, 4, 2, 0, True)
dot_4x2_float32, dot_4x2_bfloat16 = _dot(4, 2, 1, AHEAD, False), _dot(4, 2, 1, AHEAD, True)
expand_1, expand_4 = _expand_output(1, 4), _expand_output(4, 2)


def shuffle_table() -> np.ndarray[Any, Any]:
    """(256, 32) uint8: for each byte of a mask, where its 8 lanes of 4 bytes find theirs among 8 bfloat16 values.

    The upper half of a lane is the value, the rest of it and the lanes of unmarked atoms are zero (0x80).
    """
    table = np.full((256, 8, 4), 0x80, np.uint8)
    for byte in range(256):
        marked = [bit for bit in range(8) if byte >> bit & 1]
        for rank, bit in enumerate(marked):
            table[byte, bit, 2:] = 2 * rank, 2 * rank + 1
    return table.reshape(256, 32)


def _product(data: Any) -> None:
    """arguments: 1 x, 2 rows, 3 stride of x, 4 d_in, 5 W, 6 whether W is bfloat16, 7 n, 8 sums, 9 stride of sums,
    10 chunk, 11 places or 0, 12 pivots, 13 offset, 14 out, 15 stride of out, 16 stride of W's columns.

    sums (rows, stride) becomes x W with zeros after n; the stride is n rounded up to a multiple of 8. With places
    (pivots + n,): out[r, places[pivots + j]] = sums[r, j] and, of the pivots, out[r, places[j]] = x[r, offset + j].
    """
    a = carray(arguments_of(data), (17,))
    rows, x_stride, d_in, bfloat16, n, stride, chunk = a[2], a[3], a[4], a[6] != 0, a[7], a[9], a[10]
    pivots, offset, out_stride, w_stride = a[12], a[13], a[15], a[16]
    x, sums = carray(float32_at(a[1]), (rows, x_stride)), carray(float32_at(a[8]), (rows, stride))
    wide, narrow = carray(float32_at(a[5]), (n, w_stride)), carray(uint16_at(a[5]), (n, w_stride))
    places, out = carray(int64_at(a[11]), (pivots + n,)), carray(float32_at(a[14]), (rows, out_stride))
    size, vectors = 2 if bfloat16 else 4, d_in // LANES
    while True:
        start = take_chunk(data) * chunk
        if start >= n:
            break
        end = min(start + chunk, n)
        apart = (end - start) // 4  # four regions of columns side by side: one stream asks for too little at once
        for c in range(start, start + apart):
            w, r = a[5] + size * c * w_stride, 0
            while r < rows:
                x_place, place = a[1] + 4 * r * x_stride, a[8] + 4 * (r * stride + c)
                other_w, other = w + 2 * size * apart * w_stride, place + 8 * apart
                if r + 4 > rows:
                    if bfloat16:
                        dot_1x4_bfloat16(x_place, x_stride, w, w_stride, apart, vectors, place, stride)
                    else:
                        dot_1x4_float32(x_place, x_stride, w, w_stride, apart, vectors, place, stride)
                    r += 1
                    continue
                if bfloat16:
                    dot_4x2_bfloat16(x_place, x_stride, w, w_stride, apart, vectors, place, stride)
                    dot_4x2_bfloat16(x_place, x_stride, other_w, w_stride, apart, vectors, other, stride)
                else:
                    dot_4x2_float32(x_place, x_stride, w, w_stride, apart, vectors, place, stride)
                    dot_4x2_float32(x_place, x_stride, other_w, w_stride, apart, vectors, other, stride)
                r += 4
        for c in range(start + 4 * apart, end):
            w = a[5] + size * c * w_stride
            for r in range(rows):
                x_place, place = a[1] + 4 * r * x_stride, a[8] + 4 * (r * stride + c)
                if bfloat16:
                    dot_1x1_bfloat16(x_place, x_stride, w, w_stride, 0, vectors, place, stride)
                else:
                    dot_1x1_float32(x_place, x_stride, w, w_stride, 0, vectors, place, stride)
        for r in range(rows if d_in % LANES else 0):
            for j in range(start, end):
                for i in range(vectors * LANES, d_in):
                    sums[r, j] += x[r, i] * (widen_bfloat16(narrow[j, i]) if bfloat16 else wide[j, i])
        for r in range(rows):
            for j in range(n, stride if end == n else n):
                sums[r, j] = 0
        if a[11] != 0:
            for r in range(rows):
                for j in range(start, end):
                    out[r, places[pivots + j]] = sums[r, j]
                for j in range(pivots if start == 0 else 0):
                    out[r, places[j]] = x[r, offset + j]


def _arrange(data: Any) -> None:
    """arguments: 1 z, 2 stride of z, 3 pivots, 4 y (rows, n), 5 n, 6 places, 7 out (rows, pivots + n), 8 rows, 9 chunk,
    10 bytes a value (2 or 4), 11 stride of y. out[r, places] = cat(z[r, :pivots], y[r])."""
    a = carray(arguments_of(data), (12,))
    z_stride, pivots, n, rows, chunk, y_stride = a[2], a[3], a[5], a[8], a[9], a[11]
    places = carray(int64_at(a[6]), (pivots + n,))
    z4, y4, out4 = (carray(float32_at(a[1]), (rows, z_stride)), carray(float32_at(a[4]), (rows, y_stride)),
                    carray(float32_at(a[7]), (rows, pivots + n)))  # fmt: skip
    z2, y2, out2 = (carray(uint16_at(a[1]), (rows, z_stride)), carray(uint16_at(a[4]), (rows, y_stride)),
                    carray(uint16_at(a[7]), (rows, pivots + n)))  # fmt: skip
    while True:
        start = take_chunk(data) * chunk
        if start >= rows:
            break
        for r in range(start, min(start + chunk, rows)):
            if a[10] == 4:
                for j in range(pivots):
                    out4[r, places[j]] = z4[r, j]
                for j in range(n):
                    out4[r, places[pivots + j]] = y4[r, j]
            else:
                for j in range(pivots):
                    out2[r, places[j]] = z2[r, j]
                for j in range(n):
                    out2[r, places[pivots + j]] = y2[r, j]


def _expand_avx2(data: Any) -> None:
    """arguments: 1 mask, 2 bytes an output, 3 values (d_out, s) bfloat16, 4 s, 5 z, 6 rows, 7 stride of z, 8 table,
    9 out, 10 d_out, 11 chunk. z (rows, stride) holds zeros up to the mask's last bit."""
    a = carray(arguments_of(data), (12,))
    mask_bytes, s, rows, stride, d_out, chunk = a[2], a[4], a[6], a[7], a[10], a[11]
    flat = carray(uint16_at(a[3]), (d_out * s,))
    while True:
        start = take_chunk(data) * chunk
        if start >= d_out:
            break
        for o in range(start, min(start + chunk, d_out)):
            mask, values = a[1] + o * mask_bytes, a[3] + 2 * o * s
            copy = np.zeros(s + 8 if (o + 1) * s + 8 > d_out * s else 0, np.uint16)
            if copy.size:  # a vector of values may reach past the last one
                copy[:s] = flat[o * s : (o + 1) * s]
                values = copy.ctypes.data
            r = 0
            while r < rows:
                z, out = a[5] + 4 * r * stride, a[9] + 4 * (r * d_out + o)
                if r + 4 <= rows:
                    expand_4(mask, mask_bytes, values, z, stride, a[8], out, d_out)
                    r += 4
                else:
                    expand_1(mask, mask_bytes, values, z, stride, a[8], out, d_out)
                    r += 1


def _expand_any(data: Any) -> None:
    """The same arguments and result on a processor without AVX2: one value at a time."""
    a = carray(arguments_of(data), (12,))
    mask_bytes, s, rows, stride, d_out, chunk = a[2], a[4], a[6], a[7], a[10], a[11]
    mask, values = carray(uint8_at(a[1]), (d_out, mask_bytes)), carray(uint16_at(a[3]), (d_out, s))
    z, out = carray(float32_at(a[5]), (rows, stride)), carray(float32_at(a[9]), (rows, d_out))
    while True:
        start = take_chunk(data) * chunk
        if start >= d_out:
            break
        for o in range(start, min(start + chunk, d_out)):
            for r in range(rows):
                total, position = np.float32(0), 0
                for byte in range(mask_bytes):
                    bits = mask[o, byte]
                    for bit in range(8):
                        if bits >> bit & 1:
                            total += widen_bfloat16(values[o, position]) * z[r, 8 * byte + bit]
                            position += 1
                out[r, o] = total


SOURCES: dict[str, Callable[[Any], None]] = {
    "product": _product,
    "arrange": _arrange,
    "expand_avx2": _expand_avx2,
    "expand_any": _expand_any,
}


@functools.cache
def _compiled(name: str) -> Any:
    decorate = {"sig": types.void(types.voidptr), "fastmath": {"contract"}}
    try:
        return cfunc(**decorate, cache=True)(SOURCES[name])
    except RuntimeError:  # no folder that numba could write its cache to
        return cfunc(**decorate)(SOURCES[name])


def compile_kernel(name: str) -> int:
    """The address of the kernel of that name, compiled now or taken from numba's cache on disk; it stays valid."""
    return int(_compiled(name).address)
