"""What a recovery does for a weight whose largest entries are kept apart, next to truncated SVDs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report

Recover = Callable[[Tensor, Tensor | None, int, torch.Generator], tuple[Tensor, Tensor]]
RANK, OUTLIERS = 32, 0.01


def largest_entries(weight: Tensor, share: float) -> Tensor:
    """Mask (bool, the weight's shape) of the `share` of its entries, rounded, that are largest in absolute value."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.abs().flatten().topk(round(share * weight.numel())).indices] = True
    return mask.view_as(weight)


def masked_error(weight: Tensor, approximation: Tensor, observed: Tensor) -> float:
    """||weight - approximation|| / ||weight||, both on the observed entries alone."""
    return float(((weight - approximation) * observed).norm() / (weight * observed).norm())


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def errors_beside_svd(weight: Tensor, observed: Tensor, A: Tensor, B: Tensor) -> tuple[float, float, float]:
    """`masked_error` of A B, of the weight's truncated SVD, and of the SVD of the weight with zeros for the unseen."""
    rank = A.shape[1]
    approximations = (A @ B, truncated(weight, rank), truncated(weight * observed, rank))
    found = [masked_error(weight, approximation, observed) for approximation in approximations]
    return found[0], found[1], found[2]


def outlier_report(name: str, recover: Recover, subject: Subject) -> Report:
    """Relative errors on the entries that are no outliers, at rank 32 with a hundredth of the entries left out."""
    report = Report(
        f"{OUTLIERS:.0%} of the entries kept apart, rank {RANK}: relative error on the others",
        ["site", name, "SVD", "SVD, zeros for outliers"],
    )
    generator = subject.generator()
    gains = []
    for site in subject.sites:
        weight = subject.weights[site.name].double()
        observed = ~largest_entries(weight, OUTLIERS)
        rank = min(RANK, *weight.shape)
        errors = errors_beside_svd(weight, observed, *recover(weight, observed, rank, generator))
        report.add(site.name, *errors)
        gains.append(min(errors[1:]) / errors[0])
    report.findings.append(
        f"the better SVD's error over this one's: {min(gains):.4f} to {max(gains):.4f}"
        + ("; it wins nowhere" if max(gains) <= 1 else "")
    )
    return report
