"""Options of analyses that look at several texts."""

from __future__ import annotations

from pydantic import BaseModel, Field

TARGET = "target"  # the name under which an analysis is shown the target


class TextOptions(BaseModel, extra="forbid"):
    domains: list[str] = Field(
        default=[], description="further text sources beside the analysed one, as in calibration"
    )
    target: str | None = Field(default=None, description="text source that is compared with the others")

    @property
    def texts(self) -> dict[str, str]:
        """Further texts that the analysis is shown, by name."""
        found = {source: source for source in self.domains}
        return found | {TARGET: self.target} if self.target else found
