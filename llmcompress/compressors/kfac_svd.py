"""Two-sided whitened truncated SVD: the least second-order loss increase of any rank-r factors under a
Kronecker-factored curvature (K-FAC, arXiv 1503.05671; for low rank: GFWSVD, arXiv 2505.17974, and KFAC-SVD, 2026)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.compressors.factors import LowRankFactors
from llmcompress.compressors.low_rank import JointStatistics, LowRankCompressor, LowRankOptions, Whitened
from llmcompress.compressors.whitening import checked_gram, checked_weight, damped_cholesky
from llmcompress.errors import InputError

DAMPING = (1e-6, 1e-2)  # the output side comes from fewer and noisier rows


class KFACSVDOptions(LowRankOptions):
    damping_in: float = Field(
        default=DAMPING[0], ge=0, description="share of its mean diagonal added to the input Gram's diagonal"
    )
    damping_out: float = Field(
        default=DAMPING[1], ge=0, description="share of its mean diagonal added to the output-gradient Gram's diagonal"
    )


def two_sided_factorize(
    weight: Tensor,
    gram_in: Tensor,
    gram_out: Tensor | Sequence[Tensor],
    rank: int,
    damping: tuple[float, float] = DAMPING,
) -> LowRankFactors:
    """Minimiser of tr(H dW G dWᵀ) over rank-r products, dW = weight - (A B)ᵀ; dropping sigma_j costs exactly sigma_j².

    weight (d_out, d_in); gram_in G (d_in, d_in) = mean of x xᵀ; gram_out H (d_out, d_out) = mean of g gᵀ, g the
    gradient of the token-summed loss at the output, or the diagonal blocks of H from the top. `damping` of the mean
    diagonal is added to G and to (each block of) H. Half the dropped squares is the expected loss increase a token.
    Factors in float64. Raises InputError for bad weights, Grams, ranks.
    Source: arXiv 1503.05671, section 3 (the curvature); arXiv 2505.17974 (the truncation).
    """
    blocks = [gram_out] if isinstance(gram_out, Tensor) else list(gram_out)
    return two_sided_space(checked_weight(weight), gram_in, blocks, damping).factors(rank)


def two_sided_space(
    weight: Tensor, gram_in: Tensor, gram_out: Sequence[Tensor], damping: tuple[float, float]
) -> Whitened:
    """R Wᵀ Uᵀ with Rᵀ R = G and Uᵀ U = H, both damped. weight (d_out, d_in) float64; gram_out the blocks of H."""
    right, repair_in = _root(checked_gram(gram_in, weight, "input Gram"), damping[0])
    sizes = [len(gram) for gram in gram_out]
    if sum(sizes) != len(weight):
        raise InputError(f"the output-gradient Grams must cover {len(weight)} outputs; got {sizes}")
    rows = weight.split(sizes)
    roots = [_output_root(gram, part, damping[1]) for gram, part in zip(gram_out, rows, strict=True)]
    matrix = torch.cat([right @ part.T @ root.T for part, (root, _) in zip(rows, roots, strict=True)], dim=1)

    def undo(a: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(right, a, upper=True)

    def undo_output(b: Tensor) -> Tensor:
        parts = zip(b.split(sizes, dim=1), roots, strict=True)
        return torch.cat([torch.linalg.solve_triangular(root, part.T, upper=True).T for part, (root, _) in parts], 1)

    found = [("input", repair_in), *(("output-gradient", repair) for _, repair in roots)]
    repairs = [f"{side} {repair}" for side, repair in found if repair]
    return Whitened(matrix, undo, undo_output, repair="; ".join(repairs) or None)


def _root(gram: Tensor, damping: float) -> tuple[Tensor, str | None]:
    """Upper triangular R with Rᵀ R = gram + damping · mean(diag) · I, float64; and what else it took."""
    shift = damping * gram.diagonal().mean()
    return damped_cholesky(gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def _output_root(gram: Tensor, rows: Tensor, damping: float) -> tuple[Tensor, str | None]:
    if not gram.any():
        raise InputError("the output-gradient Gram is zero: the loss does not depend on this site")
    return _root(checked_gram(gram, rows.T, "output-gradient Gram"), damping)


class KFACSVD(LowRankCompressor):
    """Grams are divided by their tokens, so that the squared spectra of all sites are in one unit: loss a token."""

    Options: ClassVar[type[KFACSVDOptions]] = KFACSVDOptions
    needs = frozenset({"gram", "output_gram"})
    options: KFACSVDOptions

    def space(self, weight: Tensor, statistics: JointStatistics, name: str) -> Whitened:
        gram = statistics.require("gram", name)
        grams_out = [part.require("output_gram", name) for part in statistics.parts]
        counts = [part.backward_tokens for part in statistics.parts]
        if statistics.tokens <= 0 or min(counts) <= 0:
            raise InputError("the Grams sum over no tokens")
        damping = (self.options.damping_in, self.options.damping_out)
        blocks = [part / count for part, count in zip(grams_out, counts, strict=True)]
        space = two_sided_space(weight, gram / statistics.tokens, blocks, damping)
        return _noted(space, damping, statistics, [len(block) for block in blocks])


def _noted(space: Whitened, damping: tuple[float, float], statistics: JointStatistics, sizes: list[int]) -> Whitened:
    """The space with the damping, and where there were fewer tokens than a Gram has rows, said in `repair`."""
    notes = [f"Grams damped by {damping[0]:g} (input) and {damping[1]:g} (output gradients) of their mean diagonals"]
    if statistics.tokens < len(space.matrix):
        notes.append(f"{statistics.tokens:g} calibration tokens for {len(space.matrix)} inputs")
    counts = {(part.backward_tokens, size) for part, size in zip(statistics.parts, sizes, strict=True)}
    notes += [f"{n:g} tokens with gradients for {size} outputs" for n, size in sorted(counts) if n < size]
    if space.repair:
        notes.append(space.repair)
    return dataclasses.replace(space, repair="; ".join(notes))
