"""The loss and the accuracy of a batch in pieces, on one rank or several: means over all of its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tanglenas_engine.data import IGNORED, Samples, TokenSamples, mean_over_targets
from tanglenas_engine.runtime import distributed
from tanglenas_engine.training.loop import Summand
from tanglenas_engine.training.losses import batch_accuracy


def may_ignore(samples: Samples) -> bool:
    """Return False if no target of the samples is `IGNORED`. Targets that are not in memory may be."""
    if samples.labels is not None:
        return bool((samples.labels == IGNORED).any())
    return type(samples) is not TokenSamples  # every target of these is a token; a subclass may mask some


class PieceLoss:
    """A loss of pieces of batches, whose mean over the pieces of a batch on all ranks is the loss of the batch.

    Where the loss of a piece is a mean over its targets that are not `IGNORED`, pieces of one size may have unequally
    many of these. So each loss is multiplied by the piece's number of targets, relative to the mean number in all
    pieces of its batch. A piece without targets has a loss of 0, and so has a batch without targets. Any other loss is
    left as it is. The accuracy and `mean` always are such means.

    The host does not wait for the numbers. The ranks exchange one number for each batch.

    Args:
        loss: The loss of outputs and targets.
        batches: For each batch, the targets of this rank's pieces.
        averages: True if the loss is a mean over the targets that are not `IGNORED` (see `losses.averages_targets`).
        ignoring: False if no target is `IGNORED`. Then nothing is counted, and nothing exchanged.
    """

    def __init__(
        self,
        loss: Callable[[Any, Tensor], Tensor],
        batches: Sequence[Sequence[Tensor]],
        *,
        averages: bool,
        ignoring: bool = True,
    ):
        self._loss, self._averages = loss, averages
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._shares: list[Tensor] = []
        if ignoring:
            pieces = [piece for batch in batches for piece in batch]
            counts = torch.stack([(piece != IGNORED).sum() for piece in pieces])
            counts = counts.float().view(len(batches), -1)  # (batches, pieces)
            means = counts.mean(1, keepdim=True)
            distributed.average([means])
            factors = counts / means.clamp_min(torch.finfo(means.dtype).tiny)
            self._factors = list(zip(pieces, factors.flatten(), strict=True))
            self._shares = [mean / batch[0].numel() for mean, batch in zip(means[:, 0], batches, strict=True)]

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of a piece, given the targets that are its own. Other targets have a factor of 1."""
        factor = self._factor(targets)
        if factor is None or not self._averages:
            return self._loss(outputs, targets)
        loss = self._loss(outputs, targets * (factor > 0))  # a mean over no targets would be nan
        return factor.to(loss.dtype) * loss

    def mean(self, values: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of values over the targets of a piece, one value for each, multiplied likewise."""
        factor = self._factor(targets)
        mean = mean_over_targets(values, targets)
        return mean if factor is None else factor.to(mean.dtype) * mean

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the accuracy of a piece in %, multiplied likewise."""
        factor = self._factor(targets)
        accuracy = batch_accuracy(outputs, targets)
        return accuracy if factor is None else factor * accuracy

    def weigh(
        self, measured: Mapping[str, Tensor], losses: Sequence[str] = ("loss",), accuracy: str = "accuracy"
    ) -> dict[str, Summand]:
        """Add the weights of means over targets: the share of a batch's targets that are not `IGNORED`.

        So the mean over an epoch is one over its targets, and a batch without any does not lower it.

        Args:
            measured: What a step measured.
            losses: The names of the losses of the batches, in their order.
            accuracy: The name of the accuracy of the first batch.
        """
        if not self._shares:
            return dict(measured)
        weights = dict(zip(losses, self._shares, strict=False)) if self._averages else {}
        weights[accuracy] = self._shares[0]
        return {name: (value, weights[name]) if name in weights else value for name, value in measured.items()}

    def _factor(self, targets: Tensor) -> Tensor | None:
        return next((factor for piece, factor in self._factors if piece is targets), None)
