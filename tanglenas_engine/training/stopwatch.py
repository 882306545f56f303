"""The seconds that a training takes, however often it pauses or is cut off."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from tanglenas_engine.runtime import distributed


class Stopwatch:
    """The seconds of a training in all processes that it ran in: those of processors, and those on the wall.

    A checkpoint holds them, so that any number of processes can go on. What a process did after its last checkpoint
    counts once, when it is done again. In a checkpoint amid an epoch, every process counts as the first one.

    Args:
        epochs: The number of epochs.

    Attributes:
        ends: The seconds at the end of each epoch, `(epochs, 2)`, float64; 0 for those to come.
    """

    def __init__(self, epochs: int):
        self.ends = torch.zeros(epochs, 2, dtype=torch.float64)
        self._earlier = torch.zeros(2, dtype=torch.float64)  # the seconds of all processes before the start
        self._start = _now()

    def end_epoch(self, epoch: int) -> None:
        """Note the seconds at the end of an epoch, counted from 1."""
        now = _now()
        each = torch.stack(distributed.gather(now - self._start))  # (ranks, 2)
        self._earlier = self._earlier + torch.stack([each[:, 0].sum(), each[:, 1].max()])
        self._start = now
        self.ends[epoch - 1] = self._earlier

    def state_dict(self) -> dict[str, Any]:
        own = (_now() - self._start) * torch.tensor([distributed.world_size(), 1])
        return {"seconds": self._earlier + own, "ends": self.ends}

    def load_state_dict(self, state: Any) -> None:
        self._earlier, self.ends = state["seconds"], state["ends"].clone()
        self._start = _now()


def _now() -> Tensor:
    """Return the seconds of processors and of the wall, `(2,)`, float64."""
    return torch.tensor([time.process_time(), time.monotonic()], dtype=torch.float64)
