"""Sparse coders and solvers at work on a learned dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.backends.ports import Codes, Solver, SparseCoder
from llmcompress.errors import InputError


def code_again(
    y: Tensor, dictionary: Tensor, indices: Tensor, values: Tensor, coder: SparseCoder, generator: torch.Generator
) -> tuple[Codes, list[str]]:
    """Codes of the columns of y (d, m) by a coder in place of those given (m, s), with exactly s entries a column.

    dictionary (d, k) of unit atoms. A coder's shorter codes are filled up with zeros at atoms that they leave out. The
    note tells both relative errors, and that the coder loses where it does.
    """
    found = coder.code(dictionary, y, indices.shape[1], generator)
    s = indices.shape[1]
    if found.dictionary.shape[1] < s:
        raise InputError(f"the coder's dictionary has {found.dictionary.shape[1]} atoms, fewer than {s} non-zeros")
    codes = Codes(found.dictionary, *_filled(found, s), found.notes)
    before, after = _error(y, dictionary, indices, values), _error(y, codes.dictionary, codes.indices, codes.values)
    verdict = "" if after <= before else ": worse, leave the coder out"
    return codes, [*found.notes, f"coder: relative error {after:.4f}, {before:.4f} without it{verdict}"]


def _filled(codes: Codes, s: int) -> tuple[Tensor, Tensor]:
    m, k = len(codes.indices), codes.dictionary.shape[1]
    dense = codes.dictionary.new_zeros(m, k).scatter_(1, codes.indices, codes.values.to(codes.dictionary))
    chosen = torch.zeros_like(dense).scatter_(1, codes.indices, 1.0)
    indices = chosen.topk(s, dim=1).indices.sort(1).values
    return indices, dense.gather(1, indices)


def solve_again(
    y: Tensor, dictionary: Tensor, indices: Tensor, values: Tensor, solver: Solver, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[str]]:
    """The dictionary that is best for given codes, by a solver: unit atoms (d, k), the codes' values to match, notes.

    Atoms that no column uses stay as they are.
    """
    codes = values.new_zeros(len(values), dictionary.shape[1]).scatter_(1, indices, values).double()
    used = codes.any(0)
    solution = solver.solve(codes[:, used], y.double().T, generator)
    atoms = dictionary.double().clone()
    atoms[:, used] = solution.x.T.to(atoms)
    length = atoms.norm(dim=0)
    used &= length > 0
    atoms = torch.where(used, atoms / length.clamp_min(1e-300), dictionary.double()).to(dictionary)
    scaled = (values.double() * torch.where(used, length, 1.0)[indices]).to(values)
    before, after = _error(y, dictionary, indices, values), _error(y, atoms, indices, scaled)
    return atoms, scaled, [*solution.notes, f"dictionary refit: relative error {after:.4f}, {before:.4f} before it"]


def _error(y: Tensor, dictionary: Tensor, indices: Tensor, values: Tensor) -> float:
    codes = values.new_zeros(len(values), dictionary.shape[1]).scatter_(1, indices, values).to(y)
    return float((y - dictionary.to(y) @ codes.T).norm() / y.norm().clamp_min(1e-30))
