"""A trial of an optimizer and a schedule that are thrown away: two steps, and their state saved and read again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.runtime.checkpoint import decoded, encoded
from tanglenas_engine.runtime.foreign import unusable
from tanglenas_engine.training.optim import stepping
from tanglenas_engine.training.state import check_part

TRIED = 2
"""The number of steps: state is made in the first one and changed in the second."""


def try_steps(parts: Sequence[tuple[str, Any, str]], parameters: Iterable[Tensor], steps: int) -> None:
    """Take the first steps of an optimizer and its schedule with small random gradients, and let them load their state.

    Args:
        parts: The optimizer and the schedule, each with its name and with what it should be.
        parameters: The parameters of the optimizer. They move.
        steps: The number of steps of the training.

    Raises:
        TangleNASError: A step fails, or the state after it could not be read from a checkpoint.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:  # an optimizer may divide by the norm of the gradient
        gradient = 1e-3 * torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter) if parameter.requires_grad else None
    firsts = [_saved(*part) for part in parts]
    taken = min(TRIED, steps)
    for _ in range(taken):
        for name, part, kind in parts:
            with stepping(name, kind):
                part.step()
    for (name, part, kind), first in zip(parts, firsts, strict=True):
        state = _saved(name, part, kind)
        with _readable(name, kind):
            part.load_state_dict(first)
            check_part(name, part, state, taken)
            part.load_state_dict(state)


def _saved(name: str, part: Any, kind: str) -> Any:
    with _readable(name, kind):
        return decoded(encoded(part.state_dict()))


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, TangleNASError) else describe(error)
        raise unusable(name, f"a cut-off training could not go on with its state: {what}", kind) from error
