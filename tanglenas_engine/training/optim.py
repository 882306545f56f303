"""Optimizers and schedules of a training, made by the factories that a user configures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from tanglenas_engine.errors import TangleNASError

T = TypeVar("T")
OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]

FUSED = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers with a fused step: on a CPU it takes a quarter of the time of one operation after another.

That of SGD fails where a parameter gets its first gradient after others, as on a path that is sampled.
"""


def cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.01
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a share of the steps, then a cosine down to a share `final` of the learning rate."""
    rising = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, total_steps - rising))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Parameters for an optimizer: biases, norms and tokens apart, without weight decay."""
    decayed = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if id(p) in decayed]},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def made(name: str, factory: Callable[..., T], *arguments: Any) -> T:
    """What a factory makes that someone configured: of an optimizer, or of what goes with it.

    An optimizer of torch takes its steps in one pass over the parameters where it can, unless it was told how.

    Raises:
        TangleNASError: It makes nothing of the kind from what such a factory is given.
    """
    try:
        result = factory(*arguments)
        what = "" if hasattr(result, "state_dict") else f"it makes a {type(result).__name__}"
    except (TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if what:
        raise TangleNASError(
            f"{name} cannot be used ({what}). Expected what takes {len(arguments)} argument"
            f"{'s' * (len(arguments) > 1)} and makes something that can be saved, such as torch.optim.SGD or cosine"
        )
    if type(result) in FUSED:
        _fuse(result)
    return result


def _fuse(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        untold = group["fused"] is None and not group["foreach"] and not group["differentiable"]
        if untold and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"]):
            group["fused"] = True
    optimizer.register_step_pre_hook(_align)


def _align(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Lay gradients out in memory as their parameters are: a fused step goes through both as they lie.

    Backward passes do; a gradient that a search method sets itself may be the transposed one of a product.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if parameter.grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
