"""Elastic forms of the layers, parameters and operations of a recorded model.

A layer of torch gets the class of its elastic form and keeps everything else: its tensors, arguments and place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tanglenas_engine import elastic
from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.norm import default_eps, weighted_layer_norm
from tanglenas_engine.superposition.size import Axis, Size

Axes = Sequence[Axis | None]

FORMS: dict[type[nn.Module], type[Elastic]] = {
    nn.Linear: elastic.Linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: elastic.Linear,
    nn.Conv1d: elastic.Conv1d,
    nn.Conv2d: elastic.Conv2d,
    nn.ConvTranspose2d: elastic.ConvTranspose2d,
    nn.BatchNorm1d: elastic.BatchNorm1d,
    nn.BatchNorm2d: elastic.BatchNorm2d,
    nn.LayerNorm: elastic.LayerNorm,
    nn.RMSNorm: elastic.RMSNorm,
    nn.GroupNorm: elastic.GroupNorm,
    nn.Embedding: elastic.Embedding,
}
"""The elastic form of each layer of torch."""


def make_elastic(module: nn.Module, axes: Mapping[str, Axes], groups: Size, width: Axis | None) -> None:
    """Turn a layer into its elastic form.

    Args:
        module: The layer.
        axes: The axes of its parameters and buffers; None for a dimension that never varies.
        groups: The number of groups of a convolution or of a group norm.
        width: The features that a norm goes over.
    """
    module.__class__ = FORMS[type(module)]
    assert isinstance(module, Elastic)
    if isinstance(module, nn.modules.conv._ConvNd):
        module._groups = groups  # type: ignore[assignment]
        if (padding := equal_padding(module)) is not None:
            module.padding = padding
        kernel = [Axis(Size.of(length), "window") for length in module.kernel_size]
        first, second, *_ = axes["weight"]
        channels = (first or _fixed(module.weight.shape[0]), second or _fixed(module.weight.shape[1]))
        axes = {**axes, "weight": (*channels, *kernel)}
    elif isinstance(module, nn.GroupNorm):
        module._groups = groups  # type: ignore[assignment]
        single = module.num_groups == 1
        module.declare(
            role="statistics" if single else "buffer",
            statistics=(width and width.in_role("statistics" if single else "buffer"),),
        )
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.declare(role="statistics", statistics=(width and width.in_role("statistics"),))
    elif isinstance(module, nn.Embedding):
        module.declare(output=axes["weight"][1:])
    elif isinstance(module, nn.Linear):
        first, second = axes["weight"]
        axes = {**axes, "weight": (first or _fixed(module.out_features), second or _fixed(module.in_features))}
    if "weight" not in axes and width is not None:  # a norm without gain still covers its output
        gain = width.in_role("write")
        axes = {**axes, "weight": (gain,), "bias": (gain,)}
    for name, dimensions in axes.items():
        module.declare("write", **{name: dimensions})


def equal_padding(module: nn.modules.conv._ConvNd) -> tuple[int, ...] | None:
    """Return the padding of a convolution as numbers, or None if "same" needs more on one side than on the other."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    missing = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "valid":
        return tuple(0 for _ in missing)
    return None if any(total % 2 for total in missing) else tuple(total // 2 for total in missing)


def _fixed(length: int) -> Axis:
    return Axis(Size.of(length))


class Holder(Elastic):
    """A module of the given model whose forward is a part of the recording. It only holds tensors.

    An attribute of its class may hide a part of it (see `elastic.parts`).
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the class as such, even if a part has its name."""
        if hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class Number(Elastic):
    """A number in the recording that an architecture decides, such as the width that a reshape is given."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.declare(number=(Axis(size, role="fixed"),))

    def forward(self) -> int:
        return self.size.max if self.assignment is None else self.size.value(self.assignment)


class Product(Elastic):
    """A product of tensors, called as a function.

    Args:
        function: The function.
        constant: Its multiply-accumulates for one input, as the product of this number and the sizes.
        sizes: The sizes.
    """

    def __init__(self, function: Callable[..., Any], constant: int, sizes: tuple[Size, ...]):
        super().__init__()
        self.function = function
        self._constant, self._sizes = constant, sizes
        self.declare(role="fixed", sizes=sizes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def macs(self, output: Any) -> list[tuple[int, tuple[Size, ...]]]:
        return [(self._constant, self._sizes)]


class FixedProduct(nn.Module):
    """A product of tensors whose shapes never vary, called as a function."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class WidthNorm(Elastic):
    """A call of `F.layer_norm` or `F.rms_norm` over an elastic width, with statistics weighted by its coverage."""

    def __init__(self, width: Axis, centre: bool):
        super().__init__()
        self.centre = centre
        self.declare(role="statistics", statistics=(width.in_role("statistics"),))

    def forward(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        coverage = self.factors("statistics")
        if coverage:
            eps = (1e-5 if self.centre else default_eps(input)) if eps is None else eps
            return weighted_layer_norm(input, coverage[0].whole(), weight, bias, eps, self.centre)
        if self.centre:
            return F.layer_norm(input, input.shape[-1:], weight, bias, 1e-5 if eps is None else eps)
        return F.rms_norm(input, input.shape[-1:], weight, eps)


class WidthMean(Elastic):
    """A mean over an elastic dimension, weighted by its coverage, as norms written out have it.

    Args:
        function: The call that was recorded.
        width: The dimension.
        dim: Its number, counted from the last one.
    """

    def __init__(self, function: Callable[..., Tensor], width: Axis, dim: int):
        super().__init__()
        self.function, self.dim = function, dim
        self.declare(role="statistics", statistics=(width.in_role("statistics"),))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        coverage = self.factors("statistics")
        if coverage:
            # The plain mean divides by the largest number of entries.
            weights = coverage[0].whole()
            input = input * (weights * (len(weights) / weights.sum())).view(-1, *[1] * (-self.dim - 1))
        return self.function(input, *args, **kwargs)


def method(name: str) -> Callable[..., Any]:
    """Return the function that calls a method of a tensor."""
    return functools.partial(_call, name)


def _call(name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return getattr(tensor, name)(*args, **kwargs)
