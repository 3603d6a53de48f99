"""Checks of weights and statistics, and the square root of a Gram that whitening needs."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.finite import all_finite


def checked_weight(weight: Tensor) -> Tensor:
    """The weight in float64. InputError unless it is a finite matrix."""
    if weight.ndim != 2:
        raise InputError(f"the weight must be a matrix (d_out, d_in); got shape {tuple(weight.shape)}")
    if not all_finite(weight):
        raise InputError("the weight is not finite")
    return weight.detach().double()


def checked_gram(gram: Tensor, weight: Tensor, name: str = "Gram") -> Tensor:
    """The Gram in float64 on the weight's device. InputError unless (d_in, d_in), finite, symmetric and not zero."""
    d_in = weight.shape[1]
    if tuple(gram.shape) != (d_in, d_in):
        raise InputError(f"the {name} must be ({d_in}, {d_in}); got {tuple(gram.shape)}")
    if not all_finite(gram):
        raise InputError(f"the {name} is not finite")
    gram = gram.detach().to(weight.device, torch.float64)
    scale = gram.abs().max()
    if (gram - gram.T).abs().max() > 1e-6 * scale:
        raise InputError(f"the {name} is not symmetric")
    if scale == 0:
        raise InputError(f"the {name} is zero: no input reached this site in calibration")
    return (gram + gram.T) / 2


def checked_vector(vector: Tensor, size: int, name: str, device: torch.device) -> Tensor:
    """The vector in float64. InputError unless (size,), finite and not negative."""
    if tuple(vector.shape) != (size,):
        raise InputError(f"the {name} must have shape ({size},); got {tuple(vector.shape)}")
    if not all_finite(vector):
        raise InputError(f"the {name} are not finite")
    if (vector < 0).any():
        raise InputError(f"the {name} are negative")
    return vector.detach().to(device, torch.float64)


def check_semidefinite(eigenvalues: Tensor) -> None:
    """InputError if an eigenvalue (ascending) is negative beyond what rounding explains."""
    if float(eigenvalues[0]) < -1e-6 * float(eigenvalues[-1].abs()):
        raise InputError(f"the Gram is not positive semi-definite: smallest eigenvalue {float(eigenvalues[0]):.3g}")


def damped_cholesky(gram: Tensor) -> tuple[Tensor, str | None]:
    """Upper triangular R with Rᵀ R = gram (d, d), float64; and the remedy, where the Gram was singular.

    A Gram that is not safely positive definite is shifted by -lambda_min (if negative) plus a ten-billionth of its mean
    diagonal, or what rounding needs if that is more. Source: arXiv 2403.07378.
    """
    d = len(gram)
    epsilon = d * torch.finfo(torch.float64).eps
    upper, info = torch.linalg.cholesky_ex(gram, upper=True)
    if info == 0 and upper.diagonal().square().min() > epsilon * gram.diagonal().max():
        return upper, None
    eigenvalues = torch.linalg.eigvalsh(gram)
    smallest, largest, mean = float(eigenvalues[0]), float(eigenvalues[-1]), float(gram.diagonal().mean())
    check_semidefinite(eigenvalues)
    shift = max(0.0, -smallest) + max(1e-10 * mean, 10 * epsilon * largest)
    rank = int((eigenvalues > epsilon * largest).sum())
    upper = torch.linalg.cholesky(gram + shift * torch.eye(d, dtype=gram.dtype, device=gram.device), upper=True)
    return upper, f"Gram singular (rank {rank} of {d}); diagonal shifted by {shift / mean:.1e} of its mean"
