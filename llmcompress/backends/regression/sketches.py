"""Random sketching matrices S (m, n): dense ones with an l_inf guarantee, and sparse ones to compare with."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.backends.checks import choose
from llmcompress.errors import InputError

GUARANTEED = ("srht", "gaussian_pooled", "gaussian", "rademacher")
BASELINES = ("countsketch", "osnap", "uniform")
DIGITS = 6  # powers of two transformed by one product with a small Hadamard matrix


@dataclass(frozen=True)
class Sketch:
    """S: X (n, k) -> (m, k). shape (m, n); exact: whether SᵀS = I."""

    apply: Callable[[Tensor], Tensor]
    shape: tuple[int, int]
    exact: bool = False

    def __call__(self, X: Tensor) -> Tensor:
        """S X in X's dtype, at least float32. InputError unless X has n rows."""
        if X.shape[0] != self.shape[1]:
            raise InputError(f"the sketch is for {self.shape[1]} rows; got {X.shape[0]}")
        X = X.float() if X.dtype in (torch.float16, torch.bfloat16) else X
        return self.apply(X[:, None])[:, 0] if X.ndim == 1 else self.apply(X)

    def to_dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self(torch.eye(self.shape[1], dtype=dtype))


def fwht(X: Tensor, dim: int = 0) -> Tensor:
    """Unnormalised Walsh-Hadamard transform, natural order, along `dim`, whose size must be a power of two.

    In groups of 6 binary digits, each one matrix product: O(N log N) values pass through memory log_64 N times.
    Half precision is promoted to float32.
    """
    n = X.shape[dim]
    if n & (n - 1):
        raise InputError(f"a Walsh-Hadamard transform needs a power of two of rows; got {n}")
    X = X.float() if X.dtype in (torch.float16, torch.bfloat16) else X
    moved = X.movedim(dim, 0)
    shape, out, after, width = moved.shape, moved.reshape(n, -1), 1, moved[0].numel()
    bits = n.bit_length() - 1
    while bits:
        size = 2 ** min(bits, DIGITS)
        bits -= min(bits, DIGITS)
        out = _hadamard(size, X.dtype, X.device) @ out.reshape(-1, size, after * width)
        after *= size
    return out.reshape(shape).movedim(0, dim)


@functools.lru_cache(maxsize=16)
def _hadamard(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while len(H) < n:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H


def next_power_of_two(n: float) -> int:
    return 1 << max(0, math.ceil(n) - 1).bit_length()


def make_sketch(
    kind: str, n: int, m: int, generator: torch.Generator, *, replace: bool = True, nonzeros: int = 4,
    theory_padding: bool = False, d: int = 1, delta: float = 0.01,
) -> Sketch:  # fmt: skip
    """A sketch with m rows for n rows.

    srht: m^-1/2 P H D, rows drawn with replacement unless `replace` is false (then m = N, n padded to a power of two,
    is exact). gaussian_pooled: signs, Hadamard, permutation, N(0, 1) factors, then sums of blocks; m is rounded up to a
    power of two, and `theory_padding` pads as much as the proof for d columns and failure probability delta asks.
    gaussian, rademacher: dense. countsketch, osnap (`nonzeros` a column), uniform: baselines without a guarantee.
    InputError for an unknown kind, m < 1, or m > N without replacement. Source: arXiv 2302.00248 and its successor.
    """
    choose("sketch", kind, GUARANTEED + BASELINES)
    if m < 1 or n < 1:
        raise InputError(f"a sketch needs at least one row on both sides; got {m} of {n}")
    if kind == "srht":
        return _srht(n, m, generator, replace)
    if kind == "gaussian_pooled":
        return _pooled(n, next_power_of_two(m), generator, _theory_block(n, m, d, delta) if theory_padding else 1)
    if kind == "gaussian":
        return _dense(lambda: torch.randn(m, n, generator=generator, dtype=torch.float64, device=generator.device), m)
    if kind == "rademacher":
        return _dense(lambda: _signs((m, n), generator), m)
    if kind == "uniform":
        place = torch.randint(n, (m,), generator=generator, device=generator.device)
        return Sketch(lambda X: math.sqrt(n / m) * X[place], (m, n))
    return _osnap(n, m, generator, 1 if kind == "countsketch" else nonzeros)


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=generator.device).double() * 2 - 1


def _pad(X: Tensor, rows: int) -> Tensor:
    return torch.cat((X, X.new_zeros(rows - len(X), X.shape[1]))) if rows > len(X) else X


def _dense(matrix: Callable[[], Tensor], m: int) -> Sketch:
    S = matrix() / math.sqrt(m)
    return Sketch(lambda X: S.to(X) @ X, (S.shape[0], S.shape[1]))


def _srht(n: int, m: int, generator: torch.Generator, replace: bool) -> Sketch:
    N = next_power_of_two(n)
    if not replace and m > N:
        raise InputError(f"m = {m} rows exceed N = {N} without replacement")
    signs = _signs((n, 1), generator)  # a Gaussian diagonal would fail at every m
    device = generator.device
    place = (
        torch.randint(N, (m,), generator=generator, device=device)
        if replace
        else torch.randperm(N, generator=generator, device=device)[:m]
    )
    apply = lambda X: fwht(_pad(signs.to(X) * X, N))[place] / math.sqrt(m)  # noqa: E731
    return Sketch(apply, (m, n), exact=not replace and m == N)


def _theory_block(n: int, m: int, d: int, delta: float) -> int:
    """Rows summed to one: kappa⁻² (d + 1) Lambda², kappa = d^-1/2, Lambda = log(n m d / (kappa delta))."""
    logarithm = math.log(n * m * d * math.sqrt(d) / delta)
    return next_power_of_two(d * (d + 1) * logarithm**2)


def _pooled(n: int, m: int, generator: torch.Generator, least: int) -> Sketch:
    block = max(least, next_power_of_two(n / m))
    N = m * block
    signs = _signs((n, 1), generator)
    order = torch.randperm(N, generator=generator, device=generator.device)
    factors = torch.randn(N, 1, generator=generator, dtype=torch.float64, device=generator.device) / math.sqrt(N)

    def apply(X: Tensor) -> Tensor:
        mixed = factors.to(X) * fwht(_pad(signs.to(X) * X, N))[order]
        return mixed.view(m, block, -1).sum(1)

    return Sketch(apply, (m, n))


def _osnap(n: int, m: int, generator: torch.Generator, nonzeros: int) -> Sketch:
    """`nonzeros` entries ±1/sqrt(nonzeros) a column, one in each of as many equal bands of rows."""
    if not 1 <= nonzeros <= m:
        raise InputError(f"nonzeros must be between 1 and m = {m}; got {nonzeros}")
    edges = [m * i // nonzeros for i in range(nonzeros + 1)]
    device = generator.device
    place = [torch.randint(a, b, (n,), generator=generator, device=device)
             for a, b in itertools.pairwise(edges)]  # fmt: skip
    signs = [_signs((n, 1), generator) / math.sqrt(nonzeros) for _ in range(nonzeros)]

    def apply(X: Tensor) -> Tensor:
        out = X.new_zeros(m, X.shape[1])
        for rows, sign in zip(place, signs, strict=True):
            out.index_add_(0, rows, sign.to(X) * X)
        return out

    return Sketch(apply, (m, n))
