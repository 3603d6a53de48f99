"""How large a sparse dictionary may be: atoms and non-zeros from stored bits, the mask included (arXiv 2509.22075)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.errors import InputError
from llmcompress.layers.sparse_dictionary import check_value_bits


def dictionary_sizes(d_in: int, d_out: int, ratio: float, rho: float = 2.0, value_bits: int = 14) -> tuple[int, int]:
    """Atoms k and non-zeros s = floor(k / rho) of the largest dictionary within 1 - ratio of the dense 16-bit size.

    Counted: 16 bits a dictionary entry, `value_bits` a code value, one mask bit an atom and column. InputError if
    ratio, rho or bits are out of range, or no dictionary fits. Source: arXiv 2509.22075, with the mask's bits.
    """
    if not 0 < ratio < 1:
        raise InputError(f"ratio must be in (0, 1), the fraction removed; got {ratio}")
    return _sizes((1 - ratio) * d_in * d_out, d_in, d_out, rho, value_bits)


def stored_bits(d_in: int, d_out: int, k: int, s: int, value_bits: int = 14) -> int:
    """Bits of dictionary, values and mask, without the padding of their rows to whole bytes."""
    return 16 * d_in * k + value_bits * s * d_out + k * d_out


def _sizes(values: float, d_in: int, d_out: int, rho: float, value_bits: int) -> tuple[int, int]:
    check_value_bits(value_bits)
    if rho < 1:
        raise InputError(f"rho, atoms for each non-zero of a column, must be at least 1; got {rho}")
    k = int(16 * values / (16 * d_in + d_out * (1 + value_bits / rho)))
    s = int(k / rho)
    if s < 1:
        least = (16 * d_in + d_out * (1 + value_bits / rho)) * math.ceil(rho) / 16
        raise InputError(
            f"the budget of {values:.0f} values is below the smallest dictionary with a non-zero a column, "
            f"which stores {least:.0f}"
        )
    return k, s


@dataclass(frozen=True)
class Sizes:
    """Of a dictionary for sites (d_in, d_outs): atoms, non-zeros, and the dense values that its file takes."""

    atoms: int
    nonzeros: int
    values: float


def sizes_within(budget: float, d_in: int, d_outs: Sequence[int], rho: float, value_bits: int) -> Sizes:
    """The largest dictionary whose stored bytes, padding included, are at most `budget` values of 16 bits."""

    def cost(k: int, s: int) -> float:
        return d_in * k + sum(d_outs) * (math.ceil(k / 8) + math.ceil(s * value_bits / 8)) / 2

    k = _sizes(budget, d_in, sum(d_outs), rho, value_bits)[0] + math.ceil(rho)  # floors leave a little room
    while cost(k, s := int(k / rho)) > budget:
        k -= 1
        if k < rho:
            raise InputError(f"the budget of {budget:.0f} values is below {cost(math.ceil(rho), 1):.0f}, the smallest")
    while s < k and cost(k, s + 1) <= budget:
        s += 1
    return Sizes(k, s, cost(k, s))
