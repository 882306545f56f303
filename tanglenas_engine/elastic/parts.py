"""The parts of a module by name: its parameters, buffers and children.

A space made of a model has the model's parts beside its own methods and attributes, and so have its elastic layers. A
part may have the name of one of them, such as `gate` or `select`. An attribute of the class then hides the part. So
parts are read from where torch stores them, never as attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
"""Layers of torch whose `weight` may have several dimensions and multiplies no features: tables, and gains of norms."""


def part(module: nn.Module, name: str) -> Any:
    """Return a parameter, a buffer or a module by its name in `module`; `module` itself for an empty name.

    A name that no part has is that of an attribute.

    Raises:
        AttributeError: There is neither a part nor an attribute of that name.
    """
    found: Any = module
    for key in name.split(".") if name else ():
        stored = next((parts for parts in (found._modules, found._parameters, found._buffers) if key in parts), None)
        found = getattr(found, key) if stored is None else stored[key]
    return found


def matrices(network: nn.Module) -> set[nn.Parameter]:
    """Return the parameters with which layers multiply features, as linear layers, convolutions and attentions do.

    These are the parameters of several dimensions that a layer calls a weight, such as `weight`, `in_proj_weight` or
    `weight_ih_l0`. Tables, such as embeddings, class tokens and positions, are left out, unless a layer multiplies with
    one (tied weights). A vector in several dimensions, such as a gain of shape `(1, 1, 1, C)`, counts in linear layers
    and convolutions only.
    """
    return {
        parameter
        for module in network.modules()
        if not isinstance(module, _NO_MATRICES)
        for name, parameter in module._parameters.items()
        if parameter is not None
        and "weight" in name.split("_")
        and (
            isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or sum(length > 1 for length in parameter.shape) > 1
        )
    }


def reference(module: nn.Module) -> Tensor:
    """Return the parameter whose device and type are those of a network: the first one of floating type.

    A network without one has torch's defaults.
    """
    return next((parameter for parameter in module.parameters() if parameter.is_floating_point()), torch.empty(0))


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], *inputs: Any) -> Any:
    """Call a module with other tensors in place of its parameters and buffers, which are given by name.

    It does what `torch.func.functional_call` does, for modules whose attributes hide their parts, too. A tensor with
    several names is replaced under all of them.
    """
    new = {part(module, name): tensor for name, tensor in tensors.items()}
    places: list[tuple[dict[str, Any], str, Tensor | None]] = [
        (stored, key, tensor)
        for owner in module.modules()
        for stored in (owner._parameters, owner._buffers)
        for key, tensor in stored.items()
        if tensor in new
    ]
    try:
        for stored, key, tensor in places:
            stored[key] = new[tensor]
        return module(*inputs)
    finally:
        for stored, key, tensor in places:
            stored[key] = tensor
