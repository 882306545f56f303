"""What rules share: the call that a rule is for, and what they ask of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from tanglenas_engine.conversion.dimensions import Dim, length, resolved, unite

if TYPE_CHECKING:
    from tanglenas_engine.conversion.analysis import Analysis

Dims = list[Dim]
"""The dimensions of a tensor."""

Rule = Callable[["Analysis", fx.Node, "Call"], Any]


class Call:
    """The arguments of a node with the numbers of the recorded batch in place of nodes for numbers."""

    def __init__(self, node: fx.Node, name: str):
        self.node, self.name = node, name
        self.args, self.kwargs = node.meta.get("numbers", (node.args, node.kwargs))

    def get(self, position: int, key: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(key, default)

    @property
    def of_module(self) -> bool:
        """True for a call of a module, which has its parameters and options itself."""
        return self.node.op == "call_module"

    def rest(self, position: int, *keys: str) -> Any:
        """Return arguments that are given as one sequence or one by one: `view(2, 3)` or `view((2, 3))`."""
        for key in keys:
            if key in self.kwargs:
                return self.kwargs[key]
        given = self.args[position:]
        return given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given


class Unknown(Exception):
    """An error for a call that a rule does not cover."""


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
