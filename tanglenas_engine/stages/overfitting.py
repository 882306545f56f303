"""Whether a search went on after its supernet was at its best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

RISE = 1.1
"""The validation loss at the end over the lowest one, as means over some epochs, from which on a search says so."""
SHARE = 10
"""The epochs of a search over those of a mean."""
LEAST = 3
"""The least epochs of a mean: fewer are as likely to be lowest by chance."""


def overfitted(history: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence about a search whose validation loss rose while its training loss fell, or "".

    A supernet that learns its samples by heart judges small networks best, as they overfit least. Single epochs are
    unsteady, so means of as many epochs are compared.

    Args:
        history: A record for each epoch, with `weight_loss` and `validation_loss`.
    """
    window = max(LEAST, len(history) // SHARE)
    places = range(len(history) - window + 1)
    if len(places) <= window:
        return ""
    validation, training = (
        [fmean(record[name] for record in history[place : place + window]) for place in places]
        for name in ("validation_loss", "weight_loss")
    )
    best = min(places, key=validation.__getitem__)
    if not (validation[-1] > RISE * validation[best] and training[-1] < training[best]):
        return ""
    epoch = best + 1 + window // 2
    return (
        f"warning: the validation loss was lowest around epoch {epoch} ({validation[best]:.3f}) and rose to "
        f"{validation[-1]:.3f}, while the training loss fell from {training[best]:.3f} to {training[-1]:.3f} (means "
        f"of {window} epochs). Such a supernet knows its samples by heart, and judges small networks best. Search for "
        f"about {epoch} epochs, or with more data or augmentation"
    )
