"""A backend as a recipe names it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from llmcompress import catalog


class Backend(BaseModel, extra="allow"):
    """A backend by name with its options: `name`, or `{name: ..., option: value}`."""

    name: str = Field(description="name in the catalogue")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def build(self, port: str) -> Any:
        """The backend at that port, with its options. InputError if there is none of that name."""
        entry = catalog.get("backend", self.name, port).load()
        return entry(entry.Options(**self.options))
