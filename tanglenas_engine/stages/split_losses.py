"""The loss of one network on each split: whether it learned or forgot, and whether the splits are of one distribution.

Alpha and the candidates are judged on the architecture split. If its loss is far from the validation split's, it has
other data, and what is found there does not hold elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from tanglenas_engine.data import DataView, Samples, batches
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.fit import REMEDY, not_finite
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.training.measure import LossEstimate, estimate_loss, inherited

SPLIT_DEVIATIONS = 5.0
"""Standard errors between the losses of two splits that chance allows: neighbouring windows of a text are alike."""
HARDLY = 0.95
"""The share of the loss of guessing that a network which learned stays below."""
LOST = 0.1
"""The share of what trained weights are better by than guessing that a search may lose without a warning."""
SPLIT_TOLERANCE = 0.05
"""The share of the loss below which a difference between splits does no harm."""


def split_losses(
    space: SearchSpace,
    network: Architecture,
    data: DataView,
    statistics: Sequence[Tensor],
    note: Callable[[str], None],
    trained: float = 0.0,
    before: LossEstimate | None = None,
) -> dict[str, float]:
    """Return the loss of a network on each split, with the supernet's weights.

    Warn if two splits differ, if the supernet does no better than guessing on the samples that it was trained on, and
    if it started from trained weights and made them worse.

    Args:
        data: A view of the splits `weights`, `architecture` and `validation`.
        statistics: Inputs that set the statistics of batch norms.
        note: A function that tells a person a sentence.
        trained: The cross-entropy of what was trained, over the last epoch; 0 if it had another loss.
        before: The `largest_loss` before the first step; None if another loss was trained.
    """
    with inherited(space, network, statistics):
        found = {name: estimate_loss(space, data.plain(name)) for name in ("weights", "architecture", "validation")}
    note("loss of one network on the splits: " + ", ".join(f"{name} {loss.mean:.3f}" for name, loss in found.items()))
    for name in (name for name in ("architecture", "validation") if not math.isfinite(found[name].mean)):
        note(
            f"warning: the loss on the {name} split is {found[name].mean}, so that nobody can tell whether the splits "
            f"are alike: {_why_not_finite(data.plain(name))}"
        )
    weights, architecture, validation = found["weights"], found["architecture"], found["validation"]
    # A mixture may have learned where the one network has not, and dropout may hide in training what was learned.
    if min(trained, weights.mean) > HARDLY * weights.guessing > 0:
        note(
            f"warning: the search ended with a loss of {trained:.3f}, and guessing by the frequencies of targets "
            f"has {weights.guessing:.3f}. The supernet has hardly learned, so what it says of architectures is chance. "
            "Train longer, change the learning rate, or look at how fresh weights and inputs are scaled"
        )
    chance = SPLIT_DEVIATIONS * math.hypot(architecture.error, validation.error)
    if abs(architecture.mean - validation.mean) > max(chance, SPLIT_TOLERANCE * validation.mean):
        note(
            f"warning: the loss on the architecture split is {architecture.mean:.3f}, on validation "
            f"{validation.mean:.3f}: they differ by more than chance allows ({chance:.3f}). The splits are of "
            "different data, so what was found may not hold. Look at a sample of each, or make the splits anew"
        )
    if before is not None and before.mean < HARDLY * before.guessing:
        largest = largest_loss(space, data, statistics)
        after = min(validation, largest)  # a search that decided for small networks may leave the largest behind
        lost = max(SPLIT_DEVIATIONS * math.hypot(before.error, after.error), LOST * (before.guessing - before.mean))
        if after.mean - before.mean > lost:
            note(
                f"warning: before the search, the largest network had a loss of {before.mean:.3f} on validation. "
                f"Now it has {largest.mean:.3f}, and the network above {validation.mean:.3f}: the search has spoilt "
                "the weights that it started from. Lower the learning rate of search.weight_optimizer, and that of "
                "retrain.optimizer if it tunes these weights. The recipe 'pretrained' has rates for trained weights"
            )
    return {name: loss.mean for name, loss in found.items()}


def largest_loss(space: SearchSpace, data: DataView, statistics: Sequence[Tensor]) -> LossEstimate:
    """Return the loss of the largest network on the validation split, with the supernet's weights."""
    with inherited(space, space.largest(), statistics):
        return estimate_loss(space, data.plain("validation"))


def _why_not_finite(samples: Samples) -> str:
    """Return why the loss on a split may not be finite, and what to do."""
    for inputs, _ in batches(samples, 256):
        if told := not_finite(inputs):
            return f"{told} in a batch of it are not finite. {REMEDY[0].upper()}{REMEDY[1:]}"
    return "its inputs are finite, so the network's outputs are not. Lower the learning rate"
