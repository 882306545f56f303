"""What search and retrain share: a loop over epochs that reports, checkpoints and resumes exactly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import Progress, SilentProgress
from tanglenas_engine.runtime.seeding import restore_rng_state, rng_state
from tanglenas_engine.runtime.tracking import NullTracker, Tracker

Row = dict[str, Any]


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Interrupted(KeyboardInterrupt):
    """A stage was asked to stop and has saved its state."""


def run(
    *,
    name: str,
    epochs: int,
    steps_per_epoch: int,
    step: Callable[[int], Mapping[str, Tensor]],
    end_epoch: Callable[[int, Row], Row],
    describe: Callable[[Row], str],
    stateful: Mapping[str, Stateful],
    parameters: Sequence[Tensor],
    checkpoints: CheckpointFolder | None = None,
    checkpoint_every: int | None = None,
    tracker: Tracker | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Run `step` for all steps of all epochs and return one history row per epoch.

    Several ranks run it side by side. What is decided (rows, a reason to stop, a request to) holds on all of them.

    Args:
        step: Takes the number of the step, counted over all epochs, and returns scalar tensors; they stay on
            their device until the epoch ends, where their means go to `end_epoch`. It leaves equal state on all ranks.
        end_epoch: Takes the epoch, counted from 1, and the means, and returns the history row, that of rank 0 on all
            ranks. A reason under "stopped" makes it the last one.
        describe: The row as a person reads it in the progress line.
        stateful: What a checkpoint holds beside the position, the history and the random generators.
        parameters: What is trained. It must be finite, as the means must, or nothing is saved.
        checkpoints: Where rank 0 saves; None on the others.
        checkpoint_every: Steps between checkpoints within an epoch; there is one after every epoch anyway.

    Raises:
        TangleNASError: Training diverged; the first step in which a mean was not finite is named, and the checkpoint
            from before it stays.
        Interrupted: On SIGINT or SIGTERM, after the current step was finished and saved.
    """
    if checkpoint_every is not None:
        at_least(f"{name}.checkpoint_every", checkpoint_every, 1)
    progress = progress or SilentProgress()
    tracker = tracker or NullTracker()
    history: list[Row] = []
    sums: dict[str, Tensor] = {}
    # The first step in which a value was not finite, 0 while there is none; on the device, so that no step waits.
    broken_in: dict[str, Tensor] = {}
    position = 0
    saving = distributed.anywhere(checkpoints is not None)
    state = distributed.broadcast(checkpoints.load() if checkpoints else None)
    if state is None:
        distributed.diverge()
    else:
        with _own(name, checkpoints):
            for key, part in stateful.items():
                part.load_state_dict(state[key])
            position, history, ranks = state["position"], state["history"], state["ranks"]
            own = distributed.rank() if len(ranks) == distributed.world() else 0
            restore_rng_state(ranks[own]["rng"])
            if len(ranks) == distributed.world():
                sums = ranks[own]["sums"]
            else:  # another number of them
                sums = {key: torch.stack([one["sums"][key] for one in ranks]).mean(0) for key in ranks[0]["sums"]}
                distributed.diverge()
        progress.note(f"{name}: resuming at step {position} of {epochs * steps_per_epoch}")

    def check_finite() -> None:
        broken = [(first, key) for key, step in broken_in.items() if (first := int(step))]
        if not bool(torch.stack([parameter.isfinite().all() for parameter in parameters]).all()):
            broken.append((position, "a parameter"))
        broken = [pair for pairs in distributed.gather(broken) for pair in pairs]
        if broken:
            first, what = min(broken, key=lambda pair: pair[0])
            raise TangleNASError(
                f"{name}: {what} is not finite by step {first} of {epochs * steps_per_epoch}: training "
                "diverged. Lower the learning rate, or clip gradients"
            )

    def save() -> None:
        if not saving:
            return
        check_finite()
        ranks = distributed.gather({"sums": sums, "rng": rng_state()})
        if checkpoints:
            parts = {key: part.state_dict() for key, part in stateful.items()}
            checkpoints.save({**parts, "position": position, "history": history, "ranks": ranks})

    with _stop_requests() as stop, progress.stage(name, epochs * steps_per_epoch, position) as line:
        while position < epochs * steps_per_epoch and not (history and history[-1].get("stopped")):
            for key, value in step(position).items():
                sums[key] = value.detach() + sums[key] if key in sums else value.detach().clone()
                first = torch.where(value.detach().isfinite(), 0, position + 1)
                broken_in[key] = torch.where(broken_in[key] > 0, broken_in[key], first) if key in broken_in else first
            position += 1
            line.advance()
            if position % steps_per_epoch == 0:
                epoch = position // steps_per_epoch
                check_finite()
                distributed.check_equal(parameters)
                distributed.average(sums.values())
                means = {key: float(value) / steps_per_epoch for key, value in sums.items()}
                row = distributed.broadcast({"epoch": epoch, **end_epoch(epoch, means)})
                history.append(row)
                sums = {}
                numbers = {key: n for key, n in row.items() if isinstance(n, int | float) and key != "epoch"}
                tracker.log_metrics({f"{name}/{key}": value for key, value in numbers.items()}, step=epoch)
                line.epoch(epoch, epochs, describe(row))
                save()
            elif checkpoint_every and position % checkpoint_every == 0:
                save()
            if distributed.anywhere(stop.is_set()) and position < epochs * steps_per_epoch:
                save()
                where = f" and is saved in {checkpoints.folder}" if checkpoints else ", but it had nowhere to save"
                raise Interrupted(
                    f"{name} stopped at step {position} of {epochs * steps_per_epoch}{where}. "
                    "Run the same command again to continue"
                )
    return history


@contextmanager
def _own(name: str, checkpoints: CheckpointFolder | None) -> Iterator[None]:
    """Every optimizer, schedule and average refuses the state of another one in its own way: here, in one."""
    try:
        yield
    except TangleNASError:
        raise
    except Exception as error:
        raise TangleNASError(
            f"{name}: the checkpoint{f' in {checkpoints.folder}' if checkpoints else ''} is not of this run "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Delete the folder to start afresh"
        ) from error


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set once; a second signal acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        event.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
