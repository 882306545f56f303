"""Optimizers and schedules of a training, made by factories that the user configures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.parts import matrices
from tanglenas_engine.errors import within
from tanglenas_engine.runtime.foreign import blamed, unusable

T = TypeVar("T")
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]

OPTIMIZER = "an optimizer whose step() takes no argument, such as torch.optim.AdamW"
SCHEDULE = "a schedule whose step() takes no argument, such as cosine or one of torch.optim.lr_scheduler"
FUSED_OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW)
"""The torch optimizers that take fused steps. On a CPU a fused step takes a quarter of the time of an unfused one.

SGD is not among them: its fused step fails if a parameter gets its first gradient later than others, as on sampled
paths.
"""


def cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.01
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule with linear warm-up and then cosine decay.

    Args:
        optimizer: The torch optimizer.
        total_steps: The number of steps.
        warmup: The share of the steps with warm-up, from 0 to 1.
        final: The share of the learning rate at the end, from 0 to 1.

    Raises:
        TangleNASError: A share is not from 0 to 1.
    """
    within("cosine.warmup", warmup, 0, 1)
    within("cosine.final", final, 0, 1)
    rising = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, total_steps - rising))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Return two groups of parameters: the matrices of layers (see `matrices`), and others without weight decay."""
    decayed = matrices(network)
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p in decayed]},
        {"params": [p for p in parameters if p not in decayed], "weight_decay": 0.0},
    ]


def call_factory(
    name: str,
    factory: Callable[..., T],
    *arguments: Any,
    needs: Sequence[str] = ("param_groups", "step", "zero_grad"),
    like: str = OPTIMIZER,
) -> T:
    """Call a user's factory for an optimizer, a schedule or a moving average, and check its result.

    torch optimizers in `FUSED_OPTIMIZERS` take fused steps unless the user chose otherwise. Tensors among the options
    of an optimizer are copied: a schedule moves them in place, and the factory would give them again.

    Args:
        name: The option's name in messages.
        factory: The user's factory.
        arguments: The arguments of the factory.
        needs: The attributes that the result needs beside those by which it is saved and loaded, else an optimizer's.
        like: What the factory should make, for messages, with an example.

    Raises:
        TangleNASError: The factory fails, or its result lacks an attribute.
    """
    expected = f"what takes {len(arguments)} argument{'s' * (len(arguments) > 1)} and makes {like}"
    with blamed(name, expected):
        result = factory(*arguments)
    for attribute in ("state_dict", "load_state_dict", *needs):
        if not hasattr(result, attribute):
            raise unusable(name, f"it makes a {type(result).__name__}, which has no {attribute}", expected)
    for group in getattr(result, "param_groups", ()):
        group.update({key: value.clone() for key, value in group.items() if isinstance(value, Tensor)})
    if type(result) in FUSED_OPTIMIZERS:
        _fuse(result)
    return result


def make_scheduler(
    name: str, factory: SchedulerFactory, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Call a user's factory for a learning-rate schedule of so many steps, and check its result.

    Raises:
        TangleNASError: The factory fails, or makes no schedule.
    """
    return call_factory(name, factory, optimizer, steps, needs=("step",), like=SCHEDULE)


def stepping(name: str, like: str = OPTIMIZER) -> AbstractContextManager[None]:
    """Turn an exception of a block, the step of a user's optimizer or schedule, into a sentence about the option."""
    return blamed(name, like, lambda: "its step() fails: ")


def _fuse(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        untold = group["fused"] is None and not group["foreach"] and not group["differentiable"]
        if untold and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"]):
            group["fused"] = True
    if all(group["fused"] for group in optimizer.param_groups):
        # As torch sets it: a gradient scaler then tells the step what to skip, and does not wait to decide it.
        optimizer._step_supports_amp_scaling = True
    optimizer.register_step_pre_hook(_align)


def _align(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give gradients the memory layout of their parameters, because a fused step reads both in memory order.

    Backward passes do this. A gradient that a search method sets itself may have the layout of a transposed product.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if parameter.grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
