"""Options that search and retraining share: those of the computation, and those of its surroundings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

import torch

from tanglenas_engine.errors import TangleNASError, at_least, positive
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.runtime.progress import Progress
from tanglenas_engine.runtime.tracking import Tracker
from tanglenas_engine.training.execution import Precision, backend_of

T = TypeVar("T")


@dataclass(frozen=True)
class Computation:
    """The numerical options of a training.

    Args:
        precision: The type of matrix products: "float32", "bfloat16", or "float16" on a GPU. Weights, alpha, masks and
            losses are always float32.
        compile: True compiles forwards with `torch.compile`; a name chooses one of its backends. The search compiles
            only the forwards of mixtures, because each sampled architecture is another network. In retraining, every
            change of a scheduled drop path compiles the network again.
        accumulate: The number of pieces that a batch is cut into. Their gradients are added up before a step. This
            takes less memory for the same step, except that batch norms see single pieces.
        clip: The largest norm of the weights' gradient, or None.
    """

    precision: str = "float32"
    compile: bool | str = False
    accumulate: int = 1
    clip: float | None = 5.0

    def check(self, device: torch.device) -> None:
        """Check that the device has the precision and torch has the backend.

        Raises:
            TangleNASError: The precision or the backend is not available.
        """
        self.precise(device)
        backend_of(self.compile)

    def precise(self, device: torch.device) -> Precision:
        """Return the precision on a device.

        Raises:
            TangleNASError: The precision is not available on the device.
        """
        return Precision(self.precision, device)

    @property
    def backend(self) -> str | None:
        """The backend of `torch.compile`, or None without compilation."""
        return backend_of(self.compile)

    def share(self, stage: str, batch_size: int) -> tuple[int, int]:
        """Return this rank's number and the count of ranks that share each batch.

        Raises:
            TangleNASError: The batch size is no whole number of at least 1, or does not divide into the ranks' pieces,
                or the gradient is clipped to no length.
        """
        at_least(f"{stage}.batch_size", batch_size, 1)
        if self.clip is not None:
            positive(f"{stage}.clip", self.clip, infinite=True)
        pieces = distributed.world_size() * at_least(f"{stage}.accumulate", self.accumulate, 1)
        if batch_size % pieces:
            raise TangleNASError(
                f"{stage}.batch_size is {batch_size}, expected a multiple of {pieces}: every batch is shared by "
                f"{distributed.world_size()} process(es), each of which takes its part in {self.accumulate} piece(s)"
            )
        return distributed.rank(), distributed.world_size()


@dataclass(frozen=True)
class Session:
    """The surroundings of a training: its device, processes, checkpoints and reports.

    Args:
        device: A name such as "cpu" or "cuda:0". None takes CUDA if there is one.
        num_workers: The number of processes that load data.
        checkpoints: The folder for checkpoints, which are written after every epoch. A training that finds its own
            checkpoint continues from it, and ends as if it had not been interrupted. Only rank 0 has a folder; the
            others have None.
        checkpoint_every: The number of steps between further checkpoints within an epoch, or None.
        tracker: The record of the run, such as MLflow's.
        progress: The progress output for a person.
    """

    device: str | None = None
    num_workers: int = 0
    checkpoints: CheckpointFolder | None = None
    checkpoint_every: int | None = None
    tracker: Tracker | None = None
    progress: Progress | None = None

    def find_device(self) -> torch.device:
        """Return the device.

        Raises:
            TangleNASError: The device cannot be used.
        """
        return device_of(self.device)

    def note(self, text: str) -> None:
        """Print one message for a person."""
        if self.progress is not None:
            self.progress.note(text)


def flattened(function: Callable[..., T]) -> Callable[..., T]:
    """Let callers give the fields of a function's dataclass arguments as options of their own.

    `search(..., precision="bfloat16")` stands for `search(..., computation=Computation(precision="bfloat16"))`, and gin
    binds `search.precision`. The signature lists the fields after the other parameters.
    """
    signature, hints = inspect.signature(function), get_type_hints(function)
    groups = {n: p.default for n, p in signature.parameters.items() if dataclasses.is_dataclass(p.default)}
    homes = {field.name: (name, field) for name, group in groups.items() for field in dataclasses.fields(group)}

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> T:
        for name in homes.keys() & options.keys():
            group = homes[name][0]
            options[group] = dataclasses.replace(options.get(group, groups[group]), **{name: options.pop(name)})
        return function(*arguments, **options)

    fields = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for name, (_, field) in homes.items()
    ]
    call.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *fields]
    )
    for group in groups.values():
        hints |= get_type_hints(type(group))
    call.__annotations__ = hints
    del call.__wrapped__  # gin would look at the function's own parameters
    return call
