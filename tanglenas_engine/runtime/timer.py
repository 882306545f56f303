"""A timer for work that has a budget in seconds: it measures a few steps, so that the caller can plan the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal, get_args

import torch

from tanglenas_engine.errors import TangleNASError, positive, quoted
from tanglenas_engine.runtime import distributed

Clock = Literal["processor", "wall"]
"""Seconds of processors, added up over threads and ranks, or seconds on the wall."""
UNTIMED, TIMED = 2, 20
"""The steps of a trial: those before the clock starts, as the first ones allocate memory, and those that it counts."""


def check_clock(stage: str, clock: str) -> None:
    """Check the clock that an option names.

    Raises:
        TangleNASError: There is no such clock.
    """
    if clock not in get_args(Clock):
        raise TangleNASError(f"{stage}.clock is {quoted(clock)}, expected 'processor' or 'wall'")


class Timer:
    """A number of seconds, and a clock that starts when the timer is made.

    Args:
        seconds: The seconds for all work, the trial included.
        clock: The clock.
        device: The device of the work. Its queue is emptied before the clock is read.
        stage: The stage, for error messages.
        otherwise: What counts the work where no seconds are given, for an error message.

    Raises:
        TangleNASError: `seconds` is not positive and finite, or there is no such clock.
    """

    def __init__(self, seconds: float, clock: Clock, device: torch.device, stage: str, otherwise: str):
        self.seconds, self.clock, self.device = positive(f"{stage}.seconds", seconds, infinite=True), clock, device
        if seconds == math.inf:
            raise TangleNASError(f"{stage}.seconds is inf, expected a finite number, or None to count {otherwise}")
        check_clock(stage, clock)
        self._start = self._now()

    def measure(self, step: Callable[[int], object], untimed: int = UNTIMED, timed: int = TIMED) -> float:
        """Return the seconds of a step, of all ranks together. `step` is called with the number of each step."""
        for number in range(untimed):
            step(number)
        start = self._now()
        for number in range(untimed, untimed + timed):
            step(number)
        return self._agreed(self._now() - start) / timed

    def used(self) -> float:
        """Return the seconds since the timer was made, of all ranks together."""
        return self._agreed(self._now() - self._start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.clock == "processor" else time.monotonic()

    def _agreed(self, seconds: float) -> float:
        """Return one number for all ranks: the sum of their processor seconds, or the longest wall time."""
        each = distributed.gather(seconds)
        return float(sum(each) if self.clock == "processor" else max(each))
