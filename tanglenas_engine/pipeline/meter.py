"""A meter of what a stage costs: seconds, seconds of processors, and memory."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Mapping

import psutil
import torch

from tanglenas_engine.runtime import distributed

try:
    import resource
except ImportError:  # Windows has no such module, and no peak of the memory is known there
    resource = None  # type: ignore[assignment]

MIB = 2**20


class Meter:
    """A meter that starts when it is made. A stage that was cut off goes on with the numbers of its last checkpoint.

    Processor seconds are those of all ranks. Until the stage has its result, every rank counts as this one.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._processor_start = _processor_seconds()
        self._earlier: Mapping[str, float] = {}
        self._begun: tuple[float, float] | None = None
        self._ended: tuple[float, float] | None = None
        self._others: list[float] | None = None  # processor seconds of other ranks: of all, and of the stage's own work

    def begin(self) -> None:
        """Note that the stage begins its own work: it is configured, and its data and its space are there."""
        self._begun = _now()

    def end(self) -> None:
        """Note that the stage has its result, and writes it from now on. All ranks call this together."""
        self._ended = _now()
        own = self._processors(self._ended[1])
        self._others = [total - mine for total, mine in zip(distributed.sum_over_ranks(own), own, strict=True)]

    def go_on(self, earlier: Mapping[str, float]) -> None:
        """Count from the numbers that `read` gave before the stage was cut off.

        Raises:
            ValueError: A number is not finite, or negative.
        """
        if odd := [name for name, value in earlier.items() if not (math.isfinite(value) and value >= 0)]:
            raise ValueError(f"{odd[0]} is {earlier[odd[0]]!r}")
        self._earlier = earlier

    def read(self) -> dict[str, float]:
        """Return `seconds`, `processor_seconds` (all ranks and their children) and `peak_memory_MiB` of this process.

        `work_seconds` and `work_processor_seconds` are those of the stage's own work, without its start and what it
        writes at the end.
        `peak_gpu_memory_MiB` is what torch allocated at most on the GPU, where it used one.
        """
        wall, processors = _now()
        all_own, work_own = self._processors(processors)
        others = self._others or [(distributed.world_size() - 1) * own for own in (all_own, work_own)]
        now = {"seconds": wall - self._start, "processor_seconds": all_own + others[0]}
        if self._begun is not None:
            until = self._ended[0] if self._ended else wall
            now |= {"work_seconds": until - self._begun[0], "work_processor_seconds": work_own + others[1]}
        total = {name: value + self._earlier.get(name, 0.0) for name, value in now.items()}
        peaks = {}
        if resource is not None:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
            peaks["peak_memory_MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            peaks["peak_gpu_memory_MiB"] = torch.cuda.max_memory_allocated() / MIB
        total |= {name: max(value, self._earlier.get(name, 0.0)) for name, value in peaks.items()}
        return {name: round(value, 1) for name, value in total.items()}

    def _processors(self, now: float) -> list[float]:
        """Return the processor seconds of this rank until now, and those of the stage's own work."""
        until = self._ended[1] if self._ended else now
        return [now - self._processor_start, until - self._begun[1] if self._begun else 0.0]


def _now() -> tuple[float, float]:
    """Return the wall time and the processor time, in seconds."""
    return time.monotonic(), _processor_seconds()


def _processor_seconds() -> float:
    """Return the seconds of this process and its children: those that ended, and those that run, as a race has them."""
    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            used = child.cpu_times()
            total += used.user + used.system + getattr(used, "children_user", 0) + getattr(used, "children_system", 0)
    return total
