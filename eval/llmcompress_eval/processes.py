"""The processes that `accelerate launch` started: each works on a share of the windows, all know the whole result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are; device: the GPU that is its own, None without one."""

    rank: int = 0
    size: int = 1
    device: str | None = None

    def share(self, count: int) -> range:
        """This process's part of `count` pieces of work, a run of neighbours."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, own: list[T]) -> list[T]:
        """The results of all processes, in the order of the pieces."""
        everything: list[T] = gather_object(own) if self.size > 1 else own
        return everything


ALONE = Processes()


def join(device: str) -> Processes:
    """Joins the group that a launcher started, if one did; device: the user's choice, as in `choose_device`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    own = str(state.device) if state.device.type == "cuda" else None
    return Processes(state.process_index, state.num_processes, own)


def leave(processes: Processes) -> None:
    """Ends this process's part: it would otherwise wait for the others when it exits."""
    if processes.size > 1:
        PartialState().destroy_process_group()
