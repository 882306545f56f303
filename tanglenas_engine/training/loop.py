"""The loop that every training shares: epochs of steps that report, checkpoint, and resume exactly."""

from __future__ import annotations

import abc
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tanglenas_engine.errors import DivergedError, TangleNASError, at_least, describe, shown
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder, encoded
from tanglenas_engine.runtime.progress import Line, SilentProgress
from tanglenas_engine.runtime.seeding import restore_rng_state, rng_state
from tanglenas_engine.runtime.tracking import NullTracker, Record
from tanglenas_engine.spaces.fit import REMEDY, not_finite
from tanglenas_engine.training.options import Session
from tanglenas_engine.training.state import (
    Stateful,
    UnfitError,
    check_history,
    check_part,
    check_ranks,
    check_start,
    options_of,
)

REPEATED = 1.0
"""Seconds in which a signal that comes again is the same request.

Schedulers and `timeout` send one to all processes of a run, and torchrun passes its own on to the processes it started.
"""


Summand: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""A scalar that a step measured, or one and its weight in the mean over an epoch."""
WEIGHT = "weight of "
"""What stands before the name of a value for the sum of its weights."""


class Interrupted(KeyboardInterrupt):
    """The exception of a stage that was asked to stop. It is raised after the state is saved."""


class Training(abc.ABC):
    """A training of several epochs. A subclass writes `step`, `end_epoch`, `describe` and `stateful`.

    All ranks of a process group run it together. Decisions are the same on all ranks: records of the history, a reason
    to stop, a request to stop.

    Args:
        name: The stage's name in messages, metrics and option names.
        epochs: The number of epochs.
        steps_per_epoch: The number of steps in each epoch.
        session: The device, checkpoints and reports of the training.

    Attributes:
        parameters: The trained tensors. If one is not finite, the training raises an error instead of saving.
        history: One record per finished epoch.
        schedule_start: The number of the step at which the schedule of the learning rate began.
    """

    parameters: Sequence[Tensor]

    def __init__(self, name: str, epochs: int, steps_per_epoch: int, session: Session):
        if session.checkpoint_every is not None:
            at_least(f"{name}.checkpoint_every", session.checkpoint_every, 1)
        self.name, self.epochs, self.steps_per_epoch, self.session = name, epochs, steps_per_epoch, session
        self.history: list[Record] = []
        self._position = self.schedule_start = 0
        self._sums: dict[str, Tensor] = {}
        # The first step, counted from 1, in which a value was not finite, or 0. It stays on the device, so that no
        # step waits for it.
        self._first_broken: dict[str, Tensor] = {}
        self._saves = False
        self._start: dict[str, list[dict[str, Any]]] = {}

    @abc.abstractmethod
    def step(self, position: int) -> Mapping[str, Summand]:
        """Take one step and return scalar tensors, some with a weight. Their means over the epoch go to `end_epoch`.

        The step must leave equal state on all ranks.

        Args:
            position: The number of the step, counted from 0 over all epochs.
        """

    @abc.abstractmethod
    def end_epoch(self, epoch: int, means: Record) -> Record:
        """Return the record of an epoch, counted from 1. If it has a reason under "stopped", this epoch is the last."""

    @abc.abstractmethod
    def describe(self, record: Record) -> str:
        """Return a record as text for the progress line."""

    @abc.abstractmethod
    def stateful(self) -> Mapping[str, Stateful | None]:
        """Return the objects that a checkpoint holds beside the position, the history and the random generators."""

    def inputs(self, position: int) -> Iterable[Tensor]:
        """Return this rank's inputs of a step again, so that they are blamed where a training did not diverge.

        Args:
            position: The number of the step, counted from 0.
        """
        return ()

    def record_like(self) -> Record | None:
        """Return an example of what every record holds beside its epoch, or None for anything.

        A record of a checkpoint has to be like it. "stopped" is in it if the training can end early. NaN stands for a
        number that need not be finite, such as the validation loss of a network that is worth nothing yet.
        """
        return None

    def prepare(self, saved: Mapping[str, Any] | None) -> None:  # noqa: B027  # most trainings know their steps
        """Get ready for the first step, or for a saved state, of which nothing is loaded yet. Called on all ranks.

        Args:
            saved: The state of the checkpoint, unchecked, or None if there is none.
        """

    def resumed(self, last: int) -> None:  # noqa: B027  # most trainings have it all in their checkpoint
        """Set what the steps before set and no checkpoint holds. Called on all ranks after a checkpoint was loaded.

        Args:
            last: The number of the last step that was taken.
        """

    def start(self, **optimizers: Any) -> None:
        """Note the options that optimizers begin with, once their schedule is made. A checkpoint of others is refused.

        What a schedule moves later tells no training from another.

        Args:
            optimizers: The optimizers by their names.
        """
        self._start = {name: options_of(optimizer) for name, optimizer in optimizers.items()}

    @property
    def steps(self) -> int:
        """The number of steps of all epochs."""
        return self.epochs * self.steps_per_epoch

    def run(self, until: int | None = None) -> list[Record]:
        """Take all steps and return the history. If there is a checkpoint, continue from it.

        Args:
            until: The number of epochs after which the training pauses. A later call goes on from its checkpoint. None
                takes all steps.

        Raises:
            DivergedError: The training diverged. The message names the first step in which a value was not finite. The
                last checkpoint before it is kept.
            TangleNASError: It did so as its inputs in this step are not finite. Or no checkpoint can hold the state of
                an optimizer or a schedule.
            Interrupted: SIGINT or SIGTERM arrived. The current step was finished and saved, unless it diverged. If it
                was the last one, a later call returns the history at once.
        """
        progress = self.session.progress or SilentProgress()
        self._resume()
        if self._saves:
            self._check_states()
        end = self.steps if until is None else min(until * self.steps_per_epoch, self.steps)
        with _stop_requests() as stop, progress.stage(self.name, self.steps, self._position) as line:
            while self._position < end and not (self.history and self.history[-1].get("stopped")):
                self._take_step()
                line.advance()
                if self._position % self.steps_per_epoch == 0:
                    self._end_epoch(line)
                    self._save()
                elif self.session.checkpoint_every and self._position % self.session.checkpoint_every == 0:
                    self._save()
                if distributed.any_rank(bool(stop)):  # also after the last step: what called this training may go on
                    self._save()
                    raise Interrupted(self._interruption())
        return self.history[:until]

    def _check_states(self) -> None:
        """Refuse an optimizer or a schedule whose state no checkpoint can hold, before it costs the first epoch."""
        for name, part in self._parts().items():
            if hasattr(part, "step"):
                try:
                    encoded(part.state_dict())
                except TangleNASError as error:
                    raise TangleNASError(f"{self.name}.{name} cannot be used: {error}") from error

    def _take_step(self) -> None:
        measured = _summands(self.step(self._position))
        if self._sums and self._sums.keys() != measured.keys():  # only those of a checkpoint can differ
            raise TangleNASError(
                f"{self.name}: the checkpoint has sums of {shown(sorted(self._sums))}, and a step gives "
                f"{', '.join(sorted(measured))}: it is not of this run. Delete its folder to start afresh"
            )
        for key, value in measured.items():
            value = value.detach()
            self._sums[key] = value + self._sums[key] if key in self._sums else value.clone()
            first = torch.where(value.isfinite(), 0, self._position + 1)
            seen = self._first_broken.get(key)
            self._first_broken[key] = first if seen is None else torch.where(seen > 0, seen, first)
        self._position += 1

    def _end_epoch(self, line: Line) -> None:
        epoch = self._position // self.steps_per_epoch
        self._check_finite()
        distributed.check_equal(self.parameters)
        distributed.average(self._sums.values())
        means = _means({key: float(value) for key, value in self._sums.items()}, self.steps_per_epoch)
        record = distributed.broadcast({"epoch": epoch, **self.end_epoch(epoch, means)})
        self.history.append(record)
        self._sums = {}
        numbers = {key: n for key, n in record.items() if isinstance(n, int | float) and key != "epoch"}
        tracker = self.session.tracker or NullTracker()
        tracker.log_metrics({f"{self.name}/{key}": value for key, value in numbers.items()}, step=epoch)
        line.epoch(epoch, self.epochs, self.describe(record))

    def _check_finite(self) -> None:
        broken = [(first, key) for key, step in self._first_broken.items() if (first := int(step))]
        if not bool(torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all()):
            broken.append((self._position, "a parameter"))
        broken = [pair for pairs in distributed.gather(broken) for pair in pairs]
        if broken:
            first, what = min(broken, key=lambda pair: pair[0])
            told = [not_finite(inputs) for inputs in self.inputs(first - 1)]
            if bad := [one for every in distributed.gather(told) for one in every if one]:
                raise TangleNASError(
                    f"{self.name}: {bad[0]} in a batch of step {first} of {self.steps} are not finite, and so {what} "
                    f"is not: {REMEDY}"
                )
            raise DivergedError(
                f"{self.name}: {what} is not finite by step {first} of {self.steps}: training diverged. Lower the "
                "learning rate, or clip gradients"
            )

    # Checkpoints.

    def _save(self) -> None:
        if not self._saves:
            return
        self._check_finite()
        ranks = distributed.gather({"sums": self._sums, "rng": rng_state()})
        if self.session.checkpoints:
            state = {key: part.state_dict() for key, part in self._parts().items()}
            place = {
                "position": self._position,
                "history": self.history,
                "start": self._start,
                "ranks": ranks,
                "threads": torch.get_num_threads(),
            }
            self.session.checkpoints.save({**state, **place})

    def _parts(self) -> dict[str, Stateful]:
        return {name: part for name, part in self.stateful().items() if part is not None}

    def _resume(self) -> None:
        checkpoints = self.session.checkpoints
        self._saves = distributed.any_rank(checkpoints is not None)
        state = distributed.broadcast(checkpoints.load() if checkpoints else None)
        if state is None:
            self.prepare(None)
            distributed.seed_ranks_apart()
            return
        with _refusals(self.name, checkpoints):
            self.prepare(state)
            parts = self._parts()
            self._check(state, parts)
            for key, part in parts.items():
                part.load_state_dict(state[key])
            self._position, self.history, ranks = state["position"], state["history"], state["ranks"]
            own = distributed.rank() if len(ranks) == distributed.world_size() else 0
            restore_rng_state(ranks[own]["rng"])
            if len(ranks) == distributed.world_size():
                self._sums = ranks[own]["sums"]
            else:  # another number of ranks wrote the checkpoint
                self._sums = {k: torch.stack([one["sums"][k] for one in ranks]).mean(0) for k in ranks[0]["sums"]}
                distributed.seed_ranks_apart()
            self.resumed(max(self._position - 1, 0))
        self.session.note(f"{self.name}: resuming at step {self._position} of {self.steps}")
        threads, now = state["threads"], torch.get_num_threads()
        if threads != now and all(parameter.device.type == "cpu" for parameter in self.parameters):
            self.session.note(
                f"{self.name}: the steps before were taken with {threads} thread{'s' * (threads > 1)}, and these have "
                f"{now}. Sums are rounded otherwise, so that the result is not that of a run which was never cut off. "
                f"For that, stop, and run the same command with OMP_NUM_THREADS={threads}"
            )

    def _check(self, state: Mapping[str, Any], parts: Mapping[str, Stateful]) -> None:
        """Raise an UnfitError for a state that cannot be one of this training. Nothing is loaded before."""
        names = {*parts, "position", "history", "start", "ranks", "threads"}
        if names != state.keys():
            raise UnfitError(f"it holds {shown(sorted(map(str, state)))}, expected {', '.join(sorted(names))}")
        position = state["position"]
        if type(position) is not int or not 0 <= position <= self.steps:
            raise UnfitError(f"its position is {shown(position, 60)}, expected a step from 0 to {self.steps}")
        if type(state["threads"]) is not int or state["threads"] < 1:
            raise UnfitError(f"it was made by {shown(state['threads'], 60)} threads, expected a number of at least 1")
        check_start(self._start, state["start"])
        for key, part in parts.items():
            check_part(key, part, state[key], position - (self.schedule_start if key == "scheduler" else 0))
        check_history(state["history"], self.record_like(), position // self.steps_per_epoch)
        check_ranks(state["ranks"], position % self.steps_per_epoch == 0)

    def _interruption(self) -> str:
        checkpoints = self.session.checkpoints
        where = f" and is saved in {checkpoints.folder}" if checkpoints else ", but it had nowhere to save"
        step = f"step {self._position} of {self.steps}"
        return f"{self.name} stopped at {step}{where}. Run the same command again to continue"


def _summands(measured: Mapping[str, Summand]) -> dict[str, Tensor]:
    """Return what a step adds to the sums of its epoch: every value, multiplied by its weight, and every weight."""
    found = {}
    for key, value in measured.items():
        if isinstance(value, tuple):
            value, found[WEIGHT + key] = value[0] * value[1], value[1]
        found[key] = value
    return found


def _means(sums: Mapping[str, float], steps: int) -> Record:
    """Return the means of an epoch. A value whose weights are all 0 has a mean of 0."""
    return {
        key: total / (sums.get(WEIGHT + key, steps) or 1.0) for key, total in sums.items() if not key.startswith(WEIGHT)
    }


@contextmanager
def _refusals(name: str, checkpoints: CheckpointFolder | None) -> Iterator[None]:
    """Turn every error of loading a foreign state into a TangleNASError."""
    try:
        yield
    except Exception as error:
        what = shown(error) if isinstance(error, TangleNASError) else describe(error)
        raise TangleNASError(
            f"{name}: the checkpoint{f' in {checkpoints.folder}' if checkpoints else ''} is not of this run "
            f"({what}). Delete the folder to start afresh"
        ) from error


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Yield a list that gets the number of the first SIGINT and of the first SIGTERM.

    Another one of the same kind acts as usual, unless it comes within `REPEATED` seconds.

    A block that ends without an exception has not acted on the signals in the list. They act as usual then. Where a
    training diverged, too, the exception is `Interrupted`, which says so: what called it has to stop.
    """
    arrived: list[int] = []
    since: dict[int, float] = {}
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        if number not in since:
            arrived.append(number)
            since[number] = time.monotonic()
        elif time.monotonic() - since[number] >= REPEATED:
            signal.signal(number, previous[signal.Signals(number)])
            signal.raise_signal(number)

    for number in previous:
        signal.signal(number, request)
    try:
        yield arrived
    except DivergedError as error:
        if arrived:
            raise Interrupted(str(error)) from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for missed in arrived:
        signal.raise_signal(missed)
