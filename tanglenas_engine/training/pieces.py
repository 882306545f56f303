"""The loss and the accuracy of a batch in pieces, on one rank or several: means over all of its targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tanglenas_engine.data import Samples, TokenSamples
from tanglenas_engine.runtime import distributed
from tanglenas_engine.training.losses import IGNORED, batch_accuracy


def may_ignore(samples: Samples) -> bool:
    """Return False if no target of the samples is `IGNORED`. Targets that are not in memory may be."""
    if samples.labels is not None:
        return bool((samples.labels == IGNORED).any())
    return not isinstance(samples, TokenSamples)  # every target of these is a token


class PieceLoss:
    """A loss of pieces of batches, whose mean over the pieces of a batch on all ranks is the loss of the batch.

    The loss of a piece is a mean over its targets that are not `IGNORED`. Pieces of one size may have unequally many of
    these. So each loss is multiplied by the piece's number of targets, relative to the mean number in all pieces of its
    batch. A piece without targets has a loss of 0, and so has a batch without targets.

    The host does not wait for the numbers. The ranks exchange one number for each batch.

    Args:
        loss: The loss of outputs and targets.
        batches: For each batch, the targets of this rank's pieces.
        ignoring: False if no target is `IGNORED`. Then nothing is counted, and nothing exchanged.
    """

    def __init__(
        self, loss: Callable[[Any, Tensor], Tensor], batches: Sequence[Sequence[Tensor]], ignoring: bool = True
    ):
        self._loss = loss
        self._factors: list[tuple[Tensor, Tensor]] = []
        if ignoring:
            pieces = [piece for batch in batches for piece in batch]
            counts = torch.stack([(piece != IGNORED).sum() for piece in pieces])
            counts = counts.float().view(len(batches), -1)  # (batches, pieces)
            means = counts.mean(1, keepdim=True)
            distributed.average([means])
            factors = counts / means.clamp_min(torch.finfo(means.dtype).tiny)
            self._factors = list(zip(pieces, factors.flatten(), strict=True))

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of a piece, given the targets that are its own. Other targets have a factor of 1."""
        factor = self._factor(targets)
        if factor is None:
            return self._loss(outputs, targets)
        loss = self._loss(outputs, targets * (factor > 0))  # a mean over no targets would be nan
        return factor.to(loss.dtype) * loss

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the accuracy of a piece in %, multiplied likewise."""
        factor = self._factor(targets)
        accuracy = batch_accuracy(outputs, targets)
        return accuracy if factor is None else factor * accuracy

    def _factor(self, targets: Tensor) -> Tensor | None:
        return next((factor for piece, factor in self._factors if piece is targets), None)
