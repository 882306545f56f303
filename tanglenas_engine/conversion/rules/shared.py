"""What rules ask of tensors and of their dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from tanglenas_engine.conversion.analysis import Dims
from tanglenas_engine.conversion.dimensions import Dim, length, resolved, unite


def tensors_in(value: Any) -> list[fx.Node]:
    """Return the nodes of tensors in arguments, in order."""
    found: list[fx.Node] = []

    def visit(item: Any) -> None:
        if isinstance(item, fx.Node):
            if not item.meta.get("special"):
                found.append(item)
        elif isinstance(item, tuple | list):
            for part in item:
                visit(part)
        elif isinstance(item, Mapping):
            for part in item.values():
                visit(part)

    visit(value)
    return found


def aligned(tensors: Sequence[Dims], reason: str) -> Dims:
    """Unite the dimensions of tensors that are broadcast against each other, from the last one on."""
    rank = max(map(len, tensors), default=0)
    result: Dims = []
    for position in range(-rank, 0):
        found = [dims[position] for dims in tensors if len(dims) >= -position]
        wide = [dim for dim in found if length(dim) > 1]
        for dim in wide[1:]:
            unite(wide[0], dim, reason)
        result.append((wide or found)[0])
    return result


def position_of(position: int, rank: int) -> int:
    """Return the number of a dimension, which may be counted from the last one, from the first one."""
    return position + rank if position < 0 else position


def varies(dim: Dim) -> bool:
    """Return True if a factor of a dimension may still vary."""
    return any(atom.fixed is None for atom in resolved(dim))
