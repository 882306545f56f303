"""Layers that differ by nothing but their weights, so that any of them may take the place of another one."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import fx, nn

from tanglenas_engine.elastic.base import plain
from tanglenas_engine.superposition.size import Row


def alike(layers: Sequence[nn.Module]) -> bool:
    """Return True if layers with the same options are the same network, apart from the values in its `state_dict`.

    They are compared with the first option of all choices, with the second one, and so on.
    """
    first, *others = layers
    return all(_alike(first, other) for other in others)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    position = last = 0
    while position <= last:
        ours, theirs = _Each(position), _Each(position)
        with torch.random.fork_rng(devices=[]):  # new layers are initialised
            equal = _equal(plain(one, ours), plain(other, theirs))
        if not equal or {row.choice for row in ours} != {row.choice for row in theirs}:
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


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Return True if two networks are equal, apart from the values in their `state_dict`."""
    saved, others = one.state_dict(), other.state_dict()
    unsaved = {name: buffer for name, buffer in one.named_buffers() if name not in saved}
    theirs = {name: buffer for name, buffer in other.named_buffers() if name not in others}
    return (
        _described(one) == _described(other)
        and {name: (x.shape, x.dtype) for name, x in saved.items()}
        == {name: (x.shape, x.dtype) for name, x in others.items()}
        and unsaved.keys() == theirs.keys()
        and all(torch.equal(buffer, theirs[name]) for name, buffer in unsaved.items())
    )


def _described(network: nn.Module) -> list[tuple[Any, ...]]:
    """Return the modules of a network with their options and the code that they run."""
    simple = (bool, int, float, str, tuple, NoneType)
    found: list[tuple[Any, ...]] = []
    for name, module in network.named_modules():
        options = {k: v for k, v in vars(module).items() if isinstance(v, simple) and k[0] != "_" and k != "training"}
        nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
        code = [(node.name, node.op, node.target, str(node.args), str(node.kwargs)) for node in nodes]
        found.append((name, type(module).__name__, module.extra_repr(), options, code))
    return found
