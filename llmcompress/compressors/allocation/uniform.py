"""Every unit the same ratio."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from llmcompress.compressors.allocation.spread import checked_ratio, dense_values
from llmcompress.types import Budget, Profile, Site


class UniformOptions(BaseModel, extra="forbid"):
    pass


class Uniform:
    Options = UniformOptions
    needs_profiles = False
    spectra = "own"

    def __init__(self, options: UniformOptions | None = None) -> None:
        self.options = options or UniformOptions()

    def allocate(
        self, units: Sequence[Sequence[Site]], profiles: Sequence[Profile] | None, ratio: float
    ) -> list[Budget]:
        """(1 - ratio) of each unit's dense values. InputError unless 0 < ratio < 1."""
        checked_ratio(ratio)
        return [Budget((1 - ratio) * dense_values(unit)) for unit in units]
