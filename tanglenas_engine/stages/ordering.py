"""The order of a trained network's units and layers, set before a search that starts from it."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

from tanglenas_engine.data import IGNORED, Samples, Stream
from tanglenas_engine.errors import unknown
from tanglenas_engine.optimizers.optimizer import Loss
from tanglenas_engine.runtime.devices import to_device
from tanglenas_engine.spaces.layers import order_layers
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.spaces.units import magnitude, order_units, taylor
from tanglenas_engine.training.channels_last import learns_with_channels_last

Order = Literal["magnitude", "taylor"]
"""The importance by which the units of a trained network are put in order: of its weights, or of its loss."""
ORDER_BATCHES = 8
"""Batches that the importance by the loss is measured on."""


def order_network(
    space: SearchSpace,
    samples: Samples,
    *,
    units: Order | None,
    layers: bool,
    loss: Loss,
    averages: bool,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> list[str]:
    """Put the units of every size, and the layers of every depth, in order of their importance.

    Args:
        samples: Samples without augmentation, for what is measured by the loss.
        units: The importance of units; None leaves them as they are.
        layers: False leaves the layers as they are.
        loss: The loss of outputs and targets.
        averages: True leaves out batches without any target that counts, over which such a loss is no mean.

    Returns:
        A sentence for each size and depth.

    Raises:
        TangleNASError: The importance is unknown, or there are fewer samples than a batch.
    """

    def few_batches() -> list[tuple[Tensor, Tensor]]:
        stream, last = Stream(samples, batch_size, seed=seed), learns_with_channels_last(space)
        drawn = itertools.islice(stream.start(), max(ORDER_BATCHES, stream.batches_per_epoch))
        useful = (batch for batch in drawn if not averages or bool((batch[1] != IGNORED).any()))
        return [to_device(batch, device, last) for batch in itertools.islice(useful, ORDER_BATCHES)]

    told: list[str] = []
    if units == "magnitude":
        told += order_units(space, magnitude)
    elif units == "taylor":
        told += order_units(space, taylor(space, loss, few_batches()))
    elif units is not None:
        raise unknown("search.order", units, ("magnitude", "taylor"))
    if layers:
        told += order_layers(space, loss, few_batches())
    return told
