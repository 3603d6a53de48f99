"""How long work tells what it does: the command shows it, a library call need not."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told about long work, so that it can be shown."""

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, detail: str) -> None: ...


class Silent:
    def start(self, stage: str, total: int) -> None:
        pass

    def advance(self, detail: str) -> None:
        pass
