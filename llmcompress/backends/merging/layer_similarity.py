"""How alike are the blocks of one model, as they stand and with neurons and heads aligned?

Sources: matching as in Git Re-Basin (arXiv 2209.04836), the R metric of arXiv 2402.04051.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from pydantic import BaseModel, Field
from torch import Tensor

from llmcompress.backends.merging.block_matching import match_layers, permuted
from llmcompress.backends.merging.connectivity import r_metric
from llmcompress.backends.merging.site_maps import check_whole, cosine, site_maps
from llmcompress.backends.ports import Subject
from llmcompress.backends.report import Report
from llmcompress.errors import InputError
from llmcompress.types import Site


class WeightMatchingOptions(BaseModel, extra="forbid"):
    gamma: float = Field(
        default=0.3, ge=0, le=1, description="least singular value that R counts, as a share of the largest"
    )


class WeightMatching:
    """Matches each of the chosen blocks to the one before it; `llmcompress merge` matches whole models."""

    Options: ClassVar[type[WeightMatchingOptions]] = WeightMatchingOptions

    def __init__(self, options: WeightMatchingOptions | None = None) -> None:
        self.options = options or WeightMatchingOptions()

    def analyze(self, subject: Subject) -> Report:
        """A row a pair of blocks: cosine and R of their matrices. InputError for fewer than two blocks, or halves."""
        blocks: dict[int, list[Site]] = {}
        for site in subject.sites:
            blocks.setdefault(site.block, []).append(site)
        if len(blocks) < 2:
            raise InputError("weight_matching compares blocks: name two or more, and attention or ffn, by --site")
        for sites in blocks.values():
            check_whole(sites)
        columns = ["blocks", "cosine", "aligned", "R", "R aligned"]
        report = Report(f"neighbouring blocks, R from {self.options.gamma:.0%} of the largest singular value", columns)
        for (i, first), (j, second) in pairwise(sorted(blocks.items())):
            report.add(f"{i}, {j}", *self._alike([*first, *second], subject.weights))
        best = max(report.rows, key=lambda row: float(row[2] or 0))
        report.findings.append(
            f"blocks {best[0]} are most alike once aligned (cosine {best[2]:.3f}); sharing their mean "
            "(method: layer_sharing) is only worth it with training afterwards"
        )
        return report

    def _alike(self, sites: Sequence[Site], weights: dict[str, Tensor]) -> list[float]:
        (a, b), heads = site_maps(sites, [weights[site.name] for site in sites], [None] * len(sites))
        moved = permuted(b, match_layers(a, b, heads)[0], heads)
        roles, gamma = list(a), self.options.gamma
        return [cosine([a, b]), cosine([a, moved]), r_metric(a, b, roles, gamma), r_metric(a, moved, roles, gamma)]
