"""Sparse codes by hard-thresholding pursuit, for all columns at once (Foucart, 2011).

Codes are kept as rows: column j of the signals y (d_in, d_out) is approximated by dictionary @ codes[j], codes
(d_out, k) with exactly s entries a row that may differ from zero, marked in `support` (d_out, k), 1 or 0 in the dtype
of the codes. With gram = DᵀD and products = yᵀD, the squared error of a row c is ||y||² + c gram c - 2 c products and
`gradient` = products - c gram is half its negative slope.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.errors import InputError

ROWS_ON_CPU = 256  # rows worked on together: their arrays stay in the cache
ROWS_ON_GPU = 16384
ROUNDS = 10
LAST_STEPS = 24


def hard_thresholding_pursuit(
    y: Tensor, dictionary: Tensor, s: int, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """s-sparse codes of the columns of y over unit atoms: indices, values (d_out, s), by ascending atom.

    y (d_in, d_out), dictionary (d_in, k). From the s largest products, or from `start` (indices, values), the support
    moves while that lowers a column's error. InputError if s is not in 1..k.
    """
    check_sparsity(s, dictionary.shape[1])
    gram, products = dictionary.T @ dictionary, y.T @ dictionary
    if start is None:
        support = largest(products, s)
        codes = products * support
    else:
        codes = torch.zeros_like(products).scatter_(1, start[0], start[1])
        support = torch.zeros_like(products).scatter_(1, start[0], 1.0)
    for _ in range(ROUNDS):
        if not pursue(gram, products, codes, support, s, steps=LAST_STEPS):
            break
    refit(gram, products, codes, support, steps=LAST_STEPS)
    return entries(codes, support, s)


def check_sparsity(s: int, k: int) -> None:
    if not 1 <= s <= k:
        raise InputError(f"non-zeros a column must be between 1 and the number of atoms, {k}; got {s}")


def largest(scores: Tensor, s: int) -> Tensor:
    """1 at the s entries of each row that are largest in absolute value, else 0."""
    chosen = scores.abs().topk(s, dim=1, sorted=False).indices
    return torch.zeros_like(scores).scatter_(1, chosen, 1.0)


def entries(codes: Tensor, support: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """Indices (d_out, s), ascending, and values (d_out, s) of the entries on the support."""
    indices = support.nonzero()[:, 1].view(len(support), s)
    return indices, codes.gather(1, indices)


def pursue(
    gram: Tensor, products: Tensor, codes: Tensor, support: Tensor, s: int, steps: int, enough: float = 0.0
) -> int:
    """One round: proposes the s largest of code + gradient as each row's support, refits there, and keeps what falls.

    codes and support are changed in place; returns how many rows moved. `enough`: see `refit`.
    """
    moved = 0
    for rows in _chunks(codes):
        present, wanted = codes[rows], products[rows]
        gradient = torch.addmm(wanted, present, gram, alpha=-1)
        before = _energy(present, wanted, gradient)
        stepped = present + gradient
        proposed = largest(stepped, s)
        stepped.mul_(proposed)
        torch.addmm(wanted, stepped, gram, alpha=-1, out=gradient)
        _conjugate_gradients(gram, stepped, gradient, proposed, steps, enough * len(wanted) / len(codes))
        better = _energy(stepped, wanted, gradient) < before
        moved += int((better & (proposed != support[rows]).any(1)).sum())
        present[better], support[rows][better] = stepped[better], proposed[better]
    return moved


def refit(gram: Tensor, products: Tensor, codes: Tensor, support: Tensor, steps: int, enough: float = 0.0) -> None:
    """Least squares on each row's support by conjugate gradients, from the codes as they are and in place.

    A chunk of rows stops early once a step lowers the squared error, summed over all rows, by less than `enough`. A row
    whose error rises, as rounding makes it where its atoms are dependent, stays as it was.
    """
    for rows in _chunks(codes):
        present, wanted = codes[rows], products[rows]
        found = present.clone()
        gradient = torch.addmm(wanted, found, gram, alpha=-1)
        before = _energy(found, wanted, gradient)
        _conjugate_gradients(gram, found, gradient, support[rows], steps, enough * len(wanted) / len(codes))
        better = _energy(found, wanted, torch.addmm(wanted, found, gram, alpha=-1, out=gradient)) < before
        present[better] = found[better]


def _chunks(codes: Tensor) -> list[slice]:
    size = ROWS_ON_CPU if codes.device.type == "cpu" else ROWS_ON_GPU
    return [slice(start, start + size) for start in range(0, len(codes), size)]


def _energy(codes: Tensor, products: Tensor, gradient: Tensor) -> Tensor:
    """c gram c - 2 c products a row, without another product with the Gram."""
    return -(codes * (products + gradient)).sum(1)


def _conjugate_gradients(
    gram: Tensor, codes: Tensor, gradient: Tensor, support: Tensor, steps: int, enough: float
) -> None:
    """Conjugate gradients on every row at once, each restricted to its support; codes and gradient in place.

    The gradient is kept on all atoms, since the next support is chosen from it.
    """
    residual = gradient * support
    direction = residual.clone()
    square = residual.square().sum(1)
    for _ in range(steps):
        image = direction @ gram
        curvature = (direction * image).sum(1)
        # a direction without curvature lies in the null space, where the residual is rounding: that row stands still
        step = torch.where(curvature > 1e-6 * square, square / curvature, 0.0)
        codes.addcmul_(direction, step[:, None])
        gradient.addcmul_(image, step[:, None], value=-1)
        if float((step * square).sum()) <= enough:
            break
        torch.mul(gradient, support, out=residual)
        following = residual.square().sum(1)
        direction.mul_((following / square.clamp_min(torch.finfo(square.dtype).tiny))[:, None]).add_(residual)
        square = following
