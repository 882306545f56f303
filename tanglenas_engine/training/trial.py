"""A trial of an optimizer and a schedule at a training's start: two steps, and their state saved and read again.

A training may run for days before it is cut off, and a search before retrain begins. What would fail then fails here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.runtime.checkpoint import decoded, encoded
from tanglenas_engine.runtime.foreign import blamed, unusable
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.training.optim import (
    OPTIMIZER,
    SCHEDULE,
    OptimizerFactory,
    SchedulerFactory,
    call_factory,
    make_scheduler,
)
from tanglenas_engine.training.state import check_part

TRIED = 2
"""The number of steps: state is made in the first one and changed in the second."""


def try_steps(
    optimizer: tuple[str, OptimizerFactory],
    parameters: Sequence[Any],
    scheduler: tuple[str, SchedulerFactory] | None = None,
    steps: int = TRIED,
) -> None:
    """Take the first steps of an optimizer and a schedule on small parameters, and load their state.

    Factories that ignore the parameters they are given, or fail with small ones, are not tried.

    Args:
        optimizer: The name and the factory of the optimizer.
        parameters: The parameters of the training, or groups of them.
        scheduler: The name and the factory of the schedule.
        steps: The number of steps of the training.

    Raises:
        TangleNASError: A step fails, or the state after it could not be read from a checkpoint.
    """
    with seeded(0, accelerators=False):  # nothing below draws on a GPU
        try:
            tried, fresh = (_made(optimizer, _small(parameters), scheduler, steps) for _ in range(2))
        except _UntriedError:
            return
        taken = min(TRIED, steps)
        for _ in range(taken):
            for name, part, kind in tried:
                with blamed(name, kind, "its step() fails: "):
                    part.step()
        for (name, part, kind), (_, new, _) in zip(tried, fresh, strict=True):
            with _readable(name, kind):
                state = decoded(encoded(part.state_dict()))
                check_part(name, new, state, taken)
                new.load_state_dict(state)


class _UntriedError(Exception):
    """The error for factories that need the parameters of the training themselves."""


def _made(
    optimizer: tuple[str, OptimizerFactory],
    parameters: Sequence[Any],
    scheduler: tuple[str, SchedulerFactory] | None,
    steps: int,
) -> list[tuple[str, Any, str]]:
    """Return the name, the object and the kind of the optimizer and of the schedule."""
    given = {id(tensor) for tensor in _flat(parameters)}
    try:
        made = call_factory(*optimizer, parameters)
        if not {id(tensor) for group in made.param_groups for tensor in group["params"]} <= given:
            raise _UntriedError
        for group in made.param_groups:  # a schedule moves tensors in place, and the factory gives them again
            group.update({key: value.clone() for key, value in group.items() if isinstance(value, Tensor)})
        schedule = make_scheduler(*scheduler, made, steps) if scheduler else None
    except TangleNASError as error:
        raise _UntriedError from error
    return [(optimizer[0], made, OPTIMIZER), *([(scheduler[0], schedule, SCHEDULE)] if scheduler else [])]


def _small(parameters: Sequence[Any]) -> list[Any]:
    """Return small parameters with gradients, in groups as those given: one for each number of dimensions."""
    if parameters and isinstance(parameters[0], dict):
        return [{**group, "params": _small(group["params"])} for group in parameters]
    return [_twin(it) for it in {(it.dim(), it.dtype, it.device): it for it in parameters}.values()]


def _twin(parameter: Tensor) -> nn.Parameter:
    shape = [min(size, 2) for size in parameter.shape]
    value, gradient = (torch.randn(shape, dtype=parameter.dtype).to(parameter.device) for _ in range(2))
    twin = nn.Parameter(value)
    twin.grad = gradient
    return twin


def _flat(parameters: Sequence[Any]) -> list[Tensor]:
    return [tensor for it in parameters for tensor in (it["params"] if isinstance(it, dict) else [it])]


@contextmanager
def _readable(name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, TangleNASError) else describe(error)
        raise unusable(name, f"a cut-off training could not go on with its state: {what}", kind) from error
