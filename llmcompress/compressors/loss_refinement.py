"""Sparse dictionaries refined under a Kronecker-factored loss: errors of different outputs count together.

With Y = R Wᵀ (Rᵀ R the input Gram) and H the Gram of the output gradients, the second-order loss of W ≈ D S is
tr(E H Eᵀ), E = Y - D S. The diagonal of H alone leaves a problem that is separate for every column of S, on which a
dictionary is learnt first; here the whole of H is taken, which couples the columns. Source of the loss: K-FAC, arXiv
1503.05671; the alternation is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.compressors.dictionary_learning import DictionaryFactors
from llmcompress.compressors.hard_thresholding import entries, largest

STEPS = 8  # of conjugate gradients a round
RIDGE = 1e-5  # of the mean diagonal, on the change of the dictionary
ROUNDS = 4
TOLERANCE = 1e-2


def refine(
    y: Tensor,
    factors: DictionaryFactors,
    output_grams: Sequence[Tensor],
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
) -> DictionaryFactors:
    """Lowers tr((y - D S) H (y - D S)ᵀ) from the given factors on; it never rises.

    y (d_in, d_out) float32 or float64; output_grams: the diagonal blocks of H, (d_out_i, d_out_i), from the first
    column of y on, best scaled to a unit diagonal, since conjugate gradients are not preconditioned. A round updates D
    by least squares, then moves the supports along the gradient and refits all values at once; the last is the one
    that gains less than `tolerance`, relative. `history` is sqrt(loss / loss without factors), from the start on.
    """
    blocks = [gram.to(y) for gram in output_grams]
    dictionary = factors.dictionary
    codes = y.new_zeros(y.shape[1], dictionary.shape[1]).scatter_(1, factors.indices, factors.values)
    support = torch.zeros_like(codes).scatter_(1, factors.indices, 1.0)
    sparsity = factors.indices.shape[1]
    total = _loss(y, blocks)
    losses = [_loss(y - dictionary @ codes.T, blocks)]
    for _ in range(rounds):
        dictionary, codes, loss = _update_dictionary(y, dictionary, codes, blocks, losses[-1])
        codes, support, loss = _update_codes(y, dictionary, codes, support, blocks, sparsity, loss)
        losses.append(loss)
        if losses[-2] - loss < tolerance * losses[-2]:
            break
    indices, values = entries(codes, support, sparsity)
    history = [math.sqrt(max(loss, 0.0) / total) if total > 0 else 0.0 for loss in losses]
    return replace(factors, dictionary=dictionary, indices=indices, values=values, history=history)


def _weighted(blocks: Sequence[Tensor], rows: Tensor) -> Tensor:
    """H rows, block by block; rows (d_out, k)."""
    parts = rows.split([len(block) for block in blocks])
    return torch.cat([block @ part for block, part in zip(blocks, parts, strict=True)])


def _loss(residual: Tensor, blocks: Sequence[Tensor]) -> float:
    return float((_weighted(blocks, residual.T) * residual.T).sum(dtype=torch.float64))


def _update_dictionary(
    y: Tensor, dictionary: Tensor, codes: Tensor, blocks: Sequence[Tensor], loss: float
) -> tuple[Tensor, Tensor, float]:
    """The best dictionary for the codes, with unit atoms, and its loss; as it was where rounding makes that rise."""
    weighted = _weighted(blocks, codes)
    normal = (codes.T @ weighted).double()
    normal.diagonal().add_(RIDGE * normal.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(normal)
    if failed:
        return dictionary, codes, loss
    residual = y - dictionary @ codes.T
    change = torch.cholesky_solve((residual @ weighted).T.double(), lower).T
    moved = dictionary + change.to(y)
    length = moved.norm(dim=0)
    lowered = _loss(y - moved @ codes.T, blocks)
    if not bool((length > 0).all()) or not lowered < loss:
        return dictionary, codes, loss
    return moved / length, codes * length, lowered


def _update_codes(
    y: Tensor,
    dictionary: Tensor,
    codes: Tensor,
    support: Tensor,
    blocks: Sequence[Tensor],
    sparsity: int,
    before: float,
) -> tuple[Tensor, Tensor, float]:
    """Codes, support and loss after a gradient step on the supports and a refit, or after the refit alone."""
    gram, products = dictionary.T @ dictionary, y.T @ dictionary
    stepped = codes + _weighted(blocks, products - codes @ gram)
    moved = largest(stepped, sparsity)
    for start, allowed in ((stepped * moved, moved), (codes, support)):
        found = _conjugate_gradients(gram, products, start, allowed, blocks)
        loss = _loss(y - dictionary @ found.T, blocks)
        if loss < before:
            return found, allowed, loss
    return codes, support, before


def _conjugate_gradients(
    gram: Tensor, products: Tensor, codes: Tensor, support: Tensor, blocks: Sequence[Tensor]
) -> Tensor:
    """A few steps towards the values of least loss on the support, all columns together."""
    codes = codes.clone()
    residual = _weighted(blocks, products - codes @ gram) * support
    direction = residual.clone()
    square = residual.square().sum(dtype=torch.float64)
    for _ in range(STEPS):
        image = _weighted(blocks, direction @ gram)
        curvature = (direction * image).sum(dtype=torch.float64)
        if not curvature > 0:
            break
        step = square / curvature
        codes.add_(direction, alpha=float(step))
        residual.sub_(image * support, alpha=float(step))
        following = residual.square().sum(dtype=torch.float64)
        direction.mul_(float(following / square)).add_(residual)
        square = following
    return codes
