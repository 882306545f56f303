"""Targets that do not count, and means over those that do."""

from collections.abc import Callable

import torch
from torch import Tensor

IGNORED = -100
"""A target that counts for no loss and no accuracy, as in torch's losses: padding, or a token that is no answer."""

Mean = Callable[[Tensor, Tensor], Tensor]
"""A mean of values over the targets that are not `IGNORED`, from one value for each target, and the targets."""


def mean_over_targets(values: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of values over the targets that are not `IGNORED`; 0 if all are.

    Args:
        values: One value for each target, such as a loss.
        targets: The targets, `(B,)` or `(B, T)`.
    """
    counted = (targets != IGNORED).reshape(values.shape)
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)  # an index would wait for the device
