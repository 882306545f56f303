"""Distillation: a network also learns from the outputs of a larger one (Hinton et al. 2015, arXiv:1503.02531)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine.errors import TangleNASError, positive


class Distillation:
    """A loss that draws the logits of a network to a teacher's.

    It is `(1 - weight) * loss + weight * T^2 * KL(teacher || network)`, with both distributions at temperature T. The
    factor T^2 keeps the size of the gradient.

    Args:
        teacher: The teacher, which is put into eval mode and never trained.
        weight: The share of the teacher, from 0 to 1.
        temperature: The divisor of both networks' logits.

    Raises:
        TangleNASError: The weight is not from 0 to 1, or the temperature is not positive.
    """

    def __init__(self, teacher: nn.Module, weight: float, temperature: float):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise TangleNASError(f"retrain.teacher_weight is {weight!r}, expected a share from 0 to 1")
        self.weight, self.temperature = weight, positive("retrain.temperature", temperature)
        self.teacher = teacher.eval().requires_grad_(False)

    def __call__(self, loss: Tensor, logits: Tensor, inputs: Tensor) -> Tensor:
        """Return the mixed loss of a batch.

        Args:
            loss: The loss of the targets.
            logits: The network's logits, `(B, classes)` or `(B, T, tokens)`.
            inputs: The batch.

        Raises:
            TangleNASError: The teacher has another number of classes.
        """
        with torch.no_grad():
            taught = self.teacher(inputs)
        if taught.shape != logits.shape:
            raise TangleNASError(
                f"the teacher's logits have the shape {tuple(taught.shape)}, the network's {tuple(logits.shape)}: a "
                "teacher needs the same classes"
            )
        ours, theirs = ((it.float() / self.temperature).flatten(0, -2).log_softmax(-1) for it in (logits, taught))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence
