"""Sparse dictionary learning by alternating hard-thresholding pursuit and the method of optimal directions.

Signals y (d_in, d_out), dictionary D (d_in, k) of unit atoms, s-sparse codes: min ||y - D S||_F. Everything is a
matrix product over all columns, so it runs at the speed of the machine's GEMM. Sources: MOD, Engan et al., 1999; the
start from singular vectors and their residual, and the extrapolation of the dictionary between the updates, are this
project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compressors.hard_thresholding import LAST_STEPS, entries, largest, pursue, refit

STEPS = 6  # conjugate-gradient steps of a refit, at most: the codes are nearly right when it begins
ENOUGH = 3e-4  # a refit stops when a step lowers the squared error by less than this fraction
MOMENTUM = 0.8


@dataclass(frozen=True)
class DictionaryFactors:
    """y ≈ D S. dictionary (d_in, k) with unit atoms; indices (d_out, s) int64, ascending; values (d_out, s).

    history: relative error ||y - D S||_F / ||y||_F after every iteration. unused_atoms: how many no column uses.
    """

    dictionary: Tensor
    indices: Tensor
    values: Tensor
    history: list[float]
    unused_atoms: int

    def to_dense(self) -> Tensor:
        """The approximation of y, (d_in, d_out)."""
        codes = self.values.new_zeros(len(self.values), self.dictionary.shape[1])
        return self.dictionary @ codes.scatter_(1, self.indices, self.values).T


def mod_update(y: Tensor, dictionary: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, int]:
    """The best dictionary for given codes: y S (SᵀS + 1e-8 mean(diag) I)⁻¹, S = codes (d_out, k); solved in float64.

    Returns unit atoms, the codes scaled to match, and the number of unused atoms, which keep their direction.
    """
    used = codes.any(dim=0)
    unused = len(used) - int(used.sum())
    if unused == len(used):
        return dictionary, codes, unused
    atoms = _ridge_solution(y, codes, used)
    length = atoms.norm(dim=0)
    used &= length > 0
    atoms = torch.where(used, atoms / length, dictionary.double())
    return atoms.to(y), codes * torch.where(used, length, 1.0).to(y), unused


def _ridge_solution(y: Tensor, codes: Tensor, used: Tensor) -> Tensor:
    """y S (SᵀS + 1e-8 mean(diag) I)⁻¹ in float64; the sums too, where their float32 rounding would be magnified."""
    normal = _ridge(codes, used)
    lower, failed = torch.linalg.cholesky_ex(normal)
    if failed or lower.diagonal().min() ** 2 < 1e-4 * normal.diagonal().mean():
        y, codes = y.double(), codes.double()
        lower = torch.linalg.cholesky(_ridge(codes, used))
    return torch.cholesky_solve((y @ codes).T.double(), lower).T


def _ridge(codes: Tensor, used: Tensor) -> Tensor:
    normal = (codes.T @ codes).double()
    normal.diagonal().add_(torch.where(used, 1e-8, 1.0) * normal.diagonal().mean())
    return normal


def learn_fast(
    y: Tensor, k: int, s: int, iterations: int, tolerance: float, generator: torch.Generator
) -> DictionaryFactors:
    """Alternates sparse coding and MOD until the squared error falls by less than `tolerance`; the error never rises.

    Between the updates the dictionary is extrapolated along its last change, for the coding alone. Where that makes the
    error rise, the round is undone and done again without.
    """
    best = _first_round(y, k, s, generator)
    errors = [best.error]
    trial, previous = best.dictionary, best.dictionary
    for _ in range(iterations - 1):
        found = _round(y, trial, best, s)
        if found.error > best.error:
            if trial is best.dictionary:
                break
            trial = previous = best.dictionary
            continue
        fallen = best.error - found.error
        best = found
        errors.append(best.error)
        if fallen < tolerance * errors[-2]:
            break
        trial = _unit(best.dictionary + MOMENTUM * (best.dictionary - previous), best.dictionary)
        previous = best.dictionary
    gram, products, codes = best.dictionary.T @ best.dictionary, y.T @ best.dictionary, best.codes.clone()
    refit(gram, products, codes, best.support, LAST_STEPS, 0.1 * ENOUGH * best.error)
    error = _squared_error(y, best.dictionary, codes)
    if error < best.error:
        best.codes = codes
        errors.append(error)
    energy = float(y.double().square().sum())
    history = [math.sqrt(error / energy) if energy else 0.0 for error in errors]
    return DictionaryFactors(best.dictionary, *entries(best.codes, best.support, s), history, best.unused)


def learning_operations(d_in: int, d_out: int, k: int, iterations: int) -> float:
    """Multiplications and additions of `learn_fast` at most, which stops early in most refits."""
    return iterations * 2.0 * d_out * k * ((STEPS + 3) * k + 3 * d_in)


@dataclass
class _State:
    dictionary: Tensor
    codes: Tensor
    support: Tensor
    error: float
    unused: int


def _first_round(y: Tensor, k: int, s: int, generator: torch.Generator) -> _State:
    dictionary = initial_dictionary(y, k, s, generator)
    gram, products = dictionary.T @ dictionary, y.T @ dictionary
    support = largest(products, s)
    codes = products * support
    refit(gram, products, codes, support, STEPS, ENOUGH * _squared_error(y, dictionary, codes))
    return _updated(y, dictionary, codes, support)


def _round(y: Tensor, trial: Tensor, best: _State, s: int) -> _State:
    """Codes on the trial dictionary, then the dictionary that is best for them."""
    codes, support = best.codes.clone(), best.support.clone()
    pursue(trial.T @ trial, y.T @ trial, codes, support, s, STEPS, ENOUGH * best.error)
    return _updated(y, trial, codes, support)


def _updated(y: Tensor, dictionary: Tensor, codes: Tensor, support: Tensor) -> _State:
    dictionary, codes, unused = mod_update(y, dictionary, codes)
    return _State(dictionary, codes, support, _squared_error(y, dictionary, codes), unused)


def initial_dictionary(y: Tensor, k: int, s: int, generator: torch.Generator) -> Tensor:
    """The leading left singular vectors of y (d_in, d_out); beyond its rank, those of what the first ones leave of it.

    What they leave is taken after keeping each column's largest products, as sparse coding will. (d_in, k), unit atoms.
    """
    dictionary, residual = y[:, :0], y
    while (have := dictionary.shape[1]) < k:
        atoms = _leading_directions(residual, k - have)
        if not atoms.shape[1]:  # nothing is left to approximate: any directions will do
            random = torch.randn(len(y), k - have, generator=generator, dtype=y.dtype, device=y.device)
            atoms = _unit(random, random)
        dictionary = torch.cat((dictionary, atoms), dim=1)
        have = dictionary.shape[1]
        if have < k:
            products = y.T @ dictionary
            residual = y - dictionary @ (products * largest(products, max(1, s * have // k))).T
    return dictionary.contiguous()


def _leading_directions(matrix: Tensor, count: int) -> Tensor:
    """At most `count` leading left singular vectors, fewer if the rank is lower; from the smaller Gram, in float64."""
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = (matrix if wide else matrix.T).double()
    squares, vectors = torch.linalg.eigh(rows @ rows.T)
    count = min(count, int((squares > 1e-10 * squares[-1]).sum()))
    vectors = vectors[:, -count:] if count else vectors[:, :0]
    if not wide:
        vectors = rows.T @ vectors / squares[len(squares) - count :].sqrt()
    return vectors.flip(1).to(matrix)


def _unit(atoms: Tensor, fallback: Tensor) -> Tensor:
    length = atoms.norm(dim=0)
    return torch.where(length > 0, atoms / length, fallback)


def _squared_error(y: Tensor, dictionary: Tensor, codes: Tensor) -> float:
    return float(torch.addmm(y, dictionary, codes.T, alpha=-1).square().sum(dtype=torch.float64))
