"""The number of epochs that a search of given seconds takes, measured before its first step.

A learning-rate schedule must know its length when it starts. A rate that followed the clock would end on time, but
another load of the machine would give other rates, and a run that was cut off could not go on as if it had not been.
So a search tries a few steps of each kind and one validation, takes back what they changed, and fixes the number of
epochs. The checkpoint holds this number. The search then is one of so many epochs, bit by bit: its steps count, not
its seconds, which differ from those asked for as far as the trial was unlike the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tanglenas_engine.errors import TangleNASError, shown
from tanglenas_engine.runtime.seeding import restore_rng_state, rng_state
from tanglenas_engine.runtime.timer import Clock, Timer
from tanglenas_engine.training.state import Stateful, UnfitError


class Pace(Timer):
    """A number of seconds for a search, and the number of epochs that fit. It starts the clock when it is made.

    Attributes:
        epochs: The number of epochs; 0 before it is known.
    """

    def __init__(self, seconds: float, clock: Clock, device: torch.device):
        super().__init__(seconds, clock, device, "search", "epochs")
        self.epochs = 0

    def fit(self, epoch: float, fixed: Sequence[tuple[str, int, float]] = ()) -> int:
        """Set and return the number of epochs that fit into the seconds that are left.

        Args:
            epoch: The seconds of an epoch in which alpha learns.
            fixed: The epochs that every search has beside these: their name, their number, and the seconds of one.

        Raises:
            TangleNASError: No epoch in which alpha learns fits.
        """
        used = self.used() + sum(count * one for _, count, one in fixed)
        if used + epoch > self.seconds:
            names = " and ".join(f"{count} {name}" for name, count, _ in fixed if count)
            raise TangleNASError(
                f"search.seconds is {self.seconds:g}, but {f'{names} and one more' if names else 'one epoch'} need "
                f"{used + epoch:.1f} {self.clock} seconds: give more seconds, fewer of these epochs or fewer data"
            )
        self.epochs = sum(count for _, count, _ in fixed) + math.floor((self.seconds - used) / epoch)
        return self.epochs

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: Any) -> None:
        """Take the number of epochs of a checkpoint.

        Raises:
            UnfitError: The state has no such number.
        """
        epochs = state.get("epochs") if isinstance(state, Mapping) else None
        if type(epochs) is not int or not 1 <= epochs <= 10**9:
            raise UnfitError(f"its plan is {shown(state, 60)}, expected a number of epochs")
        self.epochs = epochs


@contextmanager
def taken_back(parts: Mapping[str, Stateful]) -> Iterator[None]:
    """Set objects and the global random generators back to their state before the block when it ends."""
    states, generators = copy.deepcopy({name: part.state_dict() for name, part in parts.items()}), rng_state()
    try:
        yield
    finally:
        for name, part in parts.items():
            part.load_state_dict(states[name])
        restore_rng_state(generators)
