"""The supernet of a search that went on after its best epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

RISE = 1.1
"""The loss at the end over the lowest one, as means over some epochs, from which on a search says so."""
MEANS = 10
"""The epochs of a search over those of a mean."""
LEAST = 3
"""The least epochs of a mean. That of fewer may be lowest by chance."""


def overfitted(history: Sequence[Mapping[str, Any]], alpha: bool) -> str:
    """Return a sentence about a search whose loss on other data rose while its training loss fell, or "".

    A supernet that learns its samples by heart judges small networks best, as they overfit least. Single epochs are
    unsteady, so means of as many epochs are compared.

    Without alpha, the other data are those of validation: one network is measured there in every epoch. With alpha, it
    is the current architecture, whose loss also changes with its size. So the mixture's loss on the architecture split
    counts there. A search without such a loss is told nothing.

    Args:
        history: A record for each epoch, with `weight_loss`, and `validation_loss` or `architecture_loss`.
        alpha: Whether the search has architecture parameters.
    """
    split = "architecture" if alpha else "validation"
    losses = [
        (epoch, float(record[f"{split}_loss"]), float(record["weight_loss"]))
        for epoch, record in enumerate(history, start=1)
        if math.isfinite(record.get(f"{split}_loss", math.nan))
    ]
    window = max(LEAST, len(losses) // MEANS)
    starts = range(len(losses) - window + 1)
    means = [[fmean(column) for column in zip(*losses[start : start + window], strict=True)] for start in starts]
    if len(means) <= window:
        return ""
    (epoch, best, before), (_, end, after) = min(means, key=lambda mean: mean[1]), means[-1]
    if not (end > RISE * best and after < before):
        return ""
    return (
        f"warning: the loss on the {split} split was lowest around epoch {epoch:.0f} ({best:.3f}) and rose to "
        f"{end:.3f}, while the training loss fell from {before:.3f} to {after:.3f} (means of {window} epochs). Such a "
        f"supernet knows its samples by heart, and judges small networks best. Search for about {epoch:.0f} epochs, or "
        "with more data or augmentation"
    )
