"""The paper's solver: orthogonal matching pursuit and K-SVD sweeps with power iterations (Aharon et al., 2006)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmcompress.compressors.dictionary_learning import DictionaryFactors
from llmcompress.compressors.hard_thresholding import check_sparsity

COLUMNS = 64  # coded together: their bases take columns * s * k values
POWER_ITERATIONS = 8


def omp(y: Tensor, dictionary: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit: indices, values (d_out, s), by ascending atom, of codes of y over unit atoms.

    y (d_in, d_out), dictionary (d_in, k). A column whose residual vanishes early is filled up with zero values.
    InputError if s is not in 1..k.
    """
    check_sparsity(s, dictionary.shape[1])
    gram, products = dictionary.T @ dictionary, y.T @ dictionary
    coded = [_omp_columns(gram, part, s) for part in products.split(COLUMNS)]
    indices, values = (torch.cat(parts) for parts in zip(*coded, strict=True))
    indices, order = indices.sort(dim=1)
    return indices, values.gather(1, order)


def _omp_columns(gram: Tensor, products: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """All columns at once, in coefficient space.

    The chosen atoms are orthogonalised to q_1, q_2, ...; what is kept of each is Dᵀ q_t, from which the correlations
    with the residual, the next q and the triangular factor all follow: nothing is solved until the end.
    """
    n, k = products.shape
    every = torch.arange(n, device=products.device)
    basis = products.new_zeros(n, s, k)  # Dᵀ q_t
    indices = torch.zeros(n, s, dtype=torch.int64, device=products.device)
    coordinates = products.new_zeros(n, s)  # q_t · y
    correlations = products.clone()
    free = torch.ones_like(products, dtype=torch.bool)
    for t in range(s):
        chosen = torch.where(free, correlations.abs(), -1.0).argmax(1)
        free[every, chosen] = False
        indices[:, t] = chosen
        past = basis[:, :t]
        share = past[every, :, chosen]
        rest = gram[chosen] - torch.einsum("nt,ntk->nk", share, past)
        square = rest[every, chosen]
        independent = square > 100 * torch.finfo(square.dtype).eps
        scale = torch.where(independent, square, 1.0).rsqrt() * independent
        basis[:, t] = rest * scale[:, None]
        coordinates[:, t] = correlations[every, chosen] * scale
        correlations -= coordinates[:, t, None] * basis[:, t]
    triangle = basis.gather(2, indices[:, None, :].expand(n, s, s)).triu()  # [i, t] = q_i · d_t
    dependent = triangle.diagonal(dim1=1, dim2=2) == 0
    triangle.diagonal(dim1=1, dim2=2)[dependent] = 1  # its coordinate is zero, and so its value
    values = torch.linalg.solve_triangular(triangle, coordinates[..., None], upper=True)[..., 0]
    return indices, values


def ksvd_sweep(y: Tensor, dictionary: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
    """One pass over the atoms: each becomes, with its values, the best rank-1 term of what the others leave of y.

    The support is kept. The rank-1 term comes from power iterations that start at the atom. An atom that no column uses
    becomes the column with the largest error. Returns dictionary, values, and the number of unused atoms.
    """
    dictionary = dictionary.clone()
    codes = values.new_zeros(len(values), dictionary.shape[1]).scatter_(1, indices, values).T.contiguous()
    used = torch.zeros_like(codes, dtype=torch.bool).scatter_(0, indices.T, True)
    residual = y - dictionary @ codes
    unused = 0
    for atom in range(dictionary.shape[1]):
        columns = used[atom].nonzero()[:, 0]
        if not len(columns) or not codes[atom].any():
            unused += 1
            worst = residual[:, residual.square().sum(0).argmax()]
            if worst.any():
                dictionary[:, atom] = worst / worst.norm()
            continue
        direction = dictionary[:, atom]
        own = residual[:, columns] + torch.outer(direction, codes[atom, columns])
        for _ in range(POWER_ITERATIONS):
            turned = own @ (own.T @ direction)
            length = turned.norm()
            direction = torch.where(length > 0, turned / length, direction)
        coefficients = own.T @ direction
        residual[:, columns] = own - torch.outer(direction, coefficients)
        dictionary[:, atom], codes[atom, columns] = direction, coefficients
    return dictionary, codes.T.gather(1, indices), unused


def learn_ksvd(
    y: Tensor, k: int, s: int, iterations: int, tolerance: float, generator: torch.Generator
) -> DictionaryFactors:
    """Alternates OMP and K-SVD sweeps, from random normalised columns of y; the paper runs 60 and never stops early.

    A tolerance above 0 stops once the squared error changes by less than that fraction. Source: arXiv 2509.22075.
    """
    dictionary = _random_columns(y, k, generator)
    energy = float(y.double().square().sum())
    history: list[float] = []
    unused = 0
    for _ in range(iterations):
        indices, values = omp(y, dictionary, s)
        dictionary, values, unused = ksvd_sweep(y, dictionary, indices, values)
        found = DictionaryFactors(dictionary, indices, values, history, unused)
        error = float((y - found.to_dense()).double().square().sum())
        history.append(math.sqrt(error / energy) if energy else 0.0)
        if len(history) > 1 and abs(history[-2] ** 2 - history[-1] ** 2) < tolerance * history[-2] ** 2:
            break
    return found


def _random_columns(y: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the non-zero columns, normalised; random directions where there are not that many."""
    usable = y.norm(dim=0).nonzero()[:, 0]
    order = torch.randperm(len(usable), generator=generator, device=y.device)[:k]
    random = torch.randn(len(y), k - len(order), generator=generator, dtype=y.dtype, device=y.device)
    atoms = torch.cat((y[:, usable[order]], random), dim=1)
    return atoms / atoms.norm(dim=0)
