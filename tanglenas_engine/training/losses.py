"""Losses and accuracies of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tanglenas_engine.errors import TangleNASError


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean over all targets, of images `(B,)` or of tokens `(B, T)`; `outputs` has the classes last."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


def scalar(loss: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A loss whose result is checked to be one number, a TangleNASError otherwise."""

    def checked(outputs: Any, targets: Tensor) -> Tensor:
        value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.dim():
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TangleNASError(
                f"the loss gives {what}, expected a tensor with one number: of torch's losses, take those with the "
                "reduction 'mean'"
            )
        return value

    return checked


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """Accuracy of a batch in %, as a tensor on its device."""
    return 100.0 * (outputs.detach().argmax(-1) == targets).float().mean()


Outputs = Tensor | tuple[Tensor, ...]
"""What a network gives in train mode: logits, or logits and what else the loss is of."""


def auxiliary(
    outputs: Outputs, targets: Tensor, weight: float = 0.4, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
) -> Tensor:
    """The loss of the logits and, `weight` times, that of each further output, as of an auxiliary head.

    Szegedy et al. (2015, arXiv:1409.4842), who weigh them 0.3; 0.4 is DARTS' (Liu et al., 2019).
    """
    logits, *others = all_outputs(outputs)
    return sum((weight * loss(output, targets) for output in others), loss(logits, targets))


def all_outputs(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
