"""Losses and accuracies of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.data import IGNORED
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.foreign import blamed


def cross_entropy(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy over all targets, `(B,)` for images or `(B, T)` for tokens.

    Args:
        outputs: The logits, `(B, classes)` or `(B, T, tokens)`.
        targets: The targets.
        label_smoothing: The share of the target distribution that is uniform, from 0 to 1.
    """
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


def checked_loss(name: str, loss: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return the loss with a check of its result.

    Args:
        name: The option's name in messages.
        loss: The user's loss.

    Raises:
        TangleNASError: A call of the returned loss fails, or gives something other than a tensor with one number.
    """

    def checked(outputs: Any, targets: Tensor) -> Tensor:
        def given() -> str:
            shapes = " and ".join(str(tuple(output.shape)) for output in all_outputs(outputs))
            return f"for outputs of shape {shapes} and {targets.dtype} targets of shape {tuple(targets.shape)}, "

        with blamed(name, "a loss of logits and classes, such as cross_entropy", given):
            value = loss(outputs, targets)
        if not isinstance(value, Tensor) or value.dim():
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TangleNASError(
                f"{name} gives {what}, expected a tensor with one number: of torch's losses, take those with the "
                "reduction 'mean'"
            )
        return value

    return checked


def batch_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the accuracy of a batch in %, as a tensor on its device; 0 if all targets are `IGNORED`."""
    hits = (outputs.detach().argmax(-1) == targets).sum()
    return 100.0 * hits / (targets != IGNORED).sum().clamp(min=1)


Outputs = Tensor | tuple[Tensor, ...]
"""The outputs of a network in train mode: logits, or logits and further outputs that the loss uses."""


def auxiliary(
    outputs: Outputs, targets: Tensor, weight: float = 0.4, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
) -> Tensor:
    """Return the loss of the logits plus `weight` times the loss of each further output, such as an auxiliary head's.

    Szegedy et al. (2015, arXiv:1409.4842) use the weight 0.3. DARTS (Liu et al., 2019) uses 0.4.
    """
    logits, *others = all_outputs(outputs)
    return sum((weight * loss(output, targets) for output in others), loss(logits, targets))


_MEAN = {"weight": None, "ignore_index": IGNORED, "reduction": "mean", "label_smoothing": 0.0}
"""Options with which torch's cross-entropy is a mean over the targets that are not `IGNORED`. It may smooth labels."""


def is_cross_entropy(loss: Callable[..., Any]) -> bool:
    """Return True for `cross_entropy`, and for torch's without weights of classes. Both may smooth labels."""
    function, options = _parts(loss)
    if function is F.cross_entropy:
        return {**_MEAN, **options, "label_smoothing": 0.0} == _MEAN
    return inspect.unwrap(function) is cross_entropy  # a wrapper of gin's hides options: this one has none that matters


def averages_targets(loss: Callable[..., Any]) -> bool:
    """Return True if a loss is known to be a mean over the targets that are not `IGNORED`.

    Known are the cross-entropy and `auxiliary` of it. Nobody can tell of a function of somebody else.
    """
    function, options = _parts(loss)
    return averages_targets(options.get("loss", cross_entropy)) if function is auxiliary else is_cross_entropy(loss)


def _parts(loss: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the function that a loss calls, and the options that it gives."""
    if isinstance(loss, nn.CrossEntropyLoss) and type(loss).forward is nn.CrossEntropyLoss.forward:
        return F.cross_entropy, {name: getattr(loss, name) for name in _MEAN}
    return (loss.func, loss.keywords) if isinstance(loss, partial) else (loss, {})


def all_outputs(outputs: Outputs) -> tuple[Tensor, ...]:
    """Return the outputs as a tuple with the logits first."""
    return (outputs,) if isinstance(outputs, Tensor) else outputs
