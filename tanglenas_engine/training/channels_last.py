"""The memory layout of images: whether a network can be trained with channels last."""

from __future__ import annotations

from torch import nn

from tanglenas_engine.elastic.base import Elastic

BLOCK = 16
"""The number of channels that oneDNN takes at a time with AVX-512. Without it, it takes 8."""


def learns_with_channels_last(network: nn.Module) -> bool:
    """Return whether a network, or a supernet, gets right gradients from images whose channels are last on a CPU.

    A pointwise convolution with a stride does not, if it has fewer channels than a block of oneDNN. The gradient of its
    weight is wrong, or the process aborts: https://github.com/uxlfoundation/oneDNN/issues/6035, with torch 2.14.
    """
    return not any(_gets_wrong_gradients(layer) for layer in network.modules() if isinstance(layer, nn.Conv2d))


def _gets_wrong_gradients(layer: nn.Conv2d) -> bool:
    if isinstance(layer, Elastic):
        _, channels, *window = (axis.size.values for axis in layer.axes["weight"])
    else:
        channels, *window = ((length,) for length in layer.weight.shape[1:])
    pointwise = layer.groups == 1 and all(1 in lengths for lengths in window)
    return pointwise and max(layer.stride) > 1 and min(channels) < BLOCK
