"""Neighbouring blocks share one basis per projection (Basis Sharing, arXiv 2410.03765)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.backends.choice import Backend
from llmcompress.compressors.low_rank import LowRankCompressor, PivotOptions, Whitened
from llmcompress.compressors.svd_llm import svd_llm_factorize, whitened
from llmcompress.compressors.whitening import checked_weight
from llmcompress.errors import InputError
from llmcompress.types import Site, Statistics

SHARING_ROLES = frozenset({"q", "k", "v", "qkv", "gate", "up", "gate_up"})


class BasisSharingOptions(PivotOptions):
    layers: int = Field(
        default=2, ge=1, description="neighbouring blocks whose q, k, v, gate and up share a basis each"
    )
    grouping: Backend | None = Field(
        default=None, description="backend that chooses which blocks share, `layers` of them on average"
    )

    BACKENDS: ClassVar[dict[str, str]] = {"grouping": "grouping"}


def basis_sharing_factorize(weights: list[Tensor], grams: list[Tensor], rank: int) -> tuple[Tensor, list[Tensor]]:
    """One basis A (d_in, r) and coefficients B_i (r, d_out_i) with weight_i ≈ (A B_i)ᵀ, float64.

    weights (d_out_i, d_in), grams (d_in, d_in) of each one's inputs. Whitened SVD of [W_1 ... W_n] under the sum of the
    Grams. Raises InputError for bad weights, Grams, ranks, or lists that differ in length. Source: arXiv 2410.03765.
    """
    if not weights or len(weights) != len(grams):
        raise InputError(f"as many Grams as weights are needed, at least one; got {len(weights)} and {len(grams)}")
    if len({weight.shape[1] for weight in weights}) > 1 or len({gram.shape for gram in grams}) > 1:
        raise InputError("weights that share a basis must have the same d_in")
    stacked = torch.cat([checked_weight(weight) for weight in weights])
    factors = svd_llm_factorize(stacked, torch.stack([gram.double() for gram in grams]).sum(0), rank)
    return factors.A, list(factors.B.split([len(weight) for weight in weights], dim=1))


class BasisSharing(LowRankCompressor):
    """q, k, v, gate and up of `layers` neighbouring blocks are one unit each; all other sites are on their own."""

    Options: ClassVar[type[BasisSharingOptions]] = BasisSharingOptions
    needs = frozenset({"gram"})
    options: BasisSharingOptions

    def units(self, sites: Sequence[Site]) -> list[list[Site]]:
        units: list[list[Site]] = []
        open_units: dict[tuple[str, int, int], list[Site]] = {}
        for site in sites:
            key = (site.role, site.d_in, site.d_out)
            unit = open_units.get(key) if site.role in SHARING_ROLES else None
            if unit and len(unit) < self.options.layers and site.block == unit[-1].block + 1:
                unit.append(site)
            else:
                open_units[key] = [site]
                units.append(open_units[key])
        return units

    def space(self, weight: Tensor, statistics: Statistics, name: str) -> Whitened:
        return whitened(weight, statistics.require("gram", name))
