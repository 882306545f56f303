"""Layers that differ by nothing but their weights, so that any of them may take the place of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tanglenas_engine.elastic.base import plain
from tanglenas_engine.superposition.size import Row

_OF_ALL = vars(nn.Module()).keys()
"""Attributes that every module has: the registries of its parts, hooks, and the mode."""


def alike(layers: Sequence[nn.Module]) -> bool:
    """Return True if layers with the same options are the same network, apart from the values in its `state_dict`.

    They are compared with the first option of all choices, with the second one, and so on. Attributes that cannot be
    compared, such as objects without an `==` of their own, differ.
    """
    first, *others = layers
    position = last = 0
    while position <= last:
        ours = _Each(position)
        network = _built(first, ours)
        for other in others:
            theirs = _Each(position)
            if not _same(network, _built(other, theirs)) or ours.choices != theirs.choices:
                return False
        last = max([last, *(len(row.options) - 1 for row in ours)])
        position += 1
    return True


class _Each(dict[Row, int]):
    """An assignment that gives every row the option at one position, or its last one. It holds the rows read."""

    def __init__(self, position: int):
        super().__init__()
        self.position = position

    def __missing__(self, row: Row) -> int:
        self[row] = min(self.position, len(row.options) - 1)
        return self[row]

    @property
    def choices(self) -> set[str]:
        """The names of the choices of the rows read."""
        return {row.choice for row in self}


def _built(layer: nn.Module, assignment: _Each) -> list[tuple[Any, ...]]:
    """Return the modules of a layer's network: class, attributes, the code that they run, and tensors.

    Parameters and buffers are told by their shapes and types, those that are not saved by their values.
    """
    with torch.random.fork_rng(devices=[]):  # new layers are initialised
        network = plain(layer, assignment)
    return [(name, *_described(module)) for name, module in network.named_modules()]


def _described(module: nn.Module) -> tuple[Any, ...]:
    tensors = {
        key: tensor if key in module._non_persistent_buffers_set else (tensor.shape, tensor.dtype, tensor.requires_grad)
        for key, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None
    }
    if isinstance(module, fx.GraphModule):  # its class is its own, and its attributes follow from its graph
        nodes = module.graph.nodes
        return [(node.name, node.op, node.target, str(node.args), str(node.kwargs)) for node in nodes], tensors
    known = type(module).__module__.startswith("torch.nn.modules.")  # private attributes follow from public ones
    attributes = {k: v for k, v in vars(module).items() if k not in _OF_ALL and not (known and k.startswith("_"))}
    return type(module), attributes, tensors


def _same(one: Any, other: Any) -> bool:
    """Return True if two values are known to be equal."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, partial):
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return bool(one == other)
    except Exception:  # such as that of arrays, which compare their elements
        return False
