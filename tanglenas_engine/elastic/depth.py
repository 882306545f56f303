"""Elastic depth: a stack of layers. An architecture uses the first few of them, or the most important ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic, plain
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.mixture import Factor
from tanglenas_engine.superposition.size import Assignment, Axis, Row, Size


class Depth(Elastic, nn.ModuleList):
    """The first `depth` of `layers` in sequence; under a mixture, `sum_d p(d) x_d` over the outputs after d layers.

    A layer is called as `layer(x, *context)`. The context is the same for all, such as the positions of the tokens.

    After `put_in_order`, a depth keeps the layers of the lowest ranks, in their sequence. Under a mixture, a layer then
    counts by the probability that it is kept, `x + P(depth > rank) (layer(x) - x)`. This is exact at the corners. In
    between, it is not the expectation over depths, which would need a pass for every depth. The order is an entry
    `order` of the `state_dict`. Loading weights of the layers without one brings back the first order.

    Raises:
        TangleNASError: The largest depth differs from the number of layers, or a layer is given twice.
    """

    interchangeable = True
    """False if the layers differ by more than their weights, and networks are built by the layers' places."""

    def __init__(self, depth: Size | int, layers: Iterable[nn.Module]):
        nn.ModuleList.__init__(self, layers)
        self.depth = Size.of(depth)
        if self.depth.max != len(self):
            raise TangleNASError(f"the depth can be {self.depth.max}, but {len(self)} layers are given")
        if len({*self}) < len(self):
            raise TangleNASError(
                "a layer of the depth is given twice. Give layers of their own, which may share their parameters: "
                "second.weight = first.weight"
            )
        self._depths = sorted({int(value) for value in self.depth.values})
        self.declare(outputs=(Axis(self.depth, layout="value", role="value"),))

    @property
    def _key(self) -> tuple[Row, tuple[Any, ...]]:
        """The key of the layers' ranks, which depths of equal sizes share."""
        return self.depth.rows[0], self.depth.values

    @property
    def order(self) -> tuple[int, ...] | None:
        """The numbers of the layers from the one that is kept longest to the one that goes first; None for 0, 1, ..."""
        if self._superposition is None or not self._superposition.ranks:
            return None
        ranks = self._superposition.ranks.get(self._key)
        return ranks and tuple(sorted(range(len(ranks)), key=ranks.__getitem__))

    def put_in_order(self, order: Sequence[int]) -> None:
        """Keep layers in this order of their numbers, the one that is kept longest first. Equal depths follow it, too.

        Raises:
            TangleNASError: The depth is fixed, or the order is not one of all layers.
        """
        if self._superposition is None or sorted(order) != list(range(len(self))):
            raise TangleNASError(f"{list(order)} is no order of the {len(self)} layers of a depth that is chosen")
        if not self.interchangeable and list(order) != sorted(order):
            raise TangleNASError(
                f"the {len(self)} layers differ, so that they cannot be kept in the order {list(order)}"
            )
        ranks = tuple(order.index(layer) for layer in range(len(self)))
        self._superposition.ranks[self._key] = ranks

    def kept(self, assignment: Assignment) -> dict[str, nn.Module]:
        """Return the layers of an architecture by their names in the stack, in sequence."""
        return {name: layer for name, layer in self.named_children() if self.gate(name).value(assignment)}

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        if self.order is not None:
            return self._ordered(x, *context)
        depth = len(self) if self.assignment is None else self.depth.value(self.assignment)
        probabilities = self.factors("outputs")
        shares = dict(zip(self._depths, probabilities[0].whole(), strict=True)) if probabilities else {}
        total = x * shares[0] if 0 in shares else None
        for i, layer in enumerate(list(self)[:depth], start=1):
            x = layer(x, *context)
            if i in shares:
                total = x * shares[i] if total is None else torch.addcmul(total, x, shares[i])
        return x if total is None else total

    def _ordered(self, x: Tensor, *context: Tensor) -> Tensor:
        assignment, probabilities = self.assignment, self.factors("outputs")
        shares = list(probabilities[0].whole()) if probabilities else []
        for name, layer in self.named_children():
            gate = self.gate(name)
            if assignment is not None and not gate.value(assignment):
                continue
            y = layer(x, *context)
            if shares and not gate.min:
                rank = self._rank(name)
                use = sum(p for d, p in zip(self._depths, shares, strict=True) if d > rank)
                y = torch.addcmul(x * (1 - use), y, use)
            x = y
        return x

    def _rank(self, child: str) -> int:
        return int(child) if self._superposition is None else self._superposition.rank(self.depth, int(child))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.order is not None:
            destination[f"{prefix}order"] = torch.tensor(self.order)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if (order := state_dict.pop(f"{prefix}order", None)) is not None:
            self.put_in_order(order.tolist())
        elif self.order is not None and any(key.startswith(prefix) for key in state_dict):
            assert self._superposition is not None
            del self._superposition.ranks[self._key]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def factors(self, name: str) -> list[Factor]:
        """Return the probabilities of all depths, on the hard path too.

        The hard path computes the outputs of smaller depths on the way, so alpha can learn from them.
        """
        state = self._superposition
        return [] if state is None or state.mixture is None else state.factors(self.axes[name])

    def gate(self, child: str) -> Size:
        """Return a Size that is 1 if the depth exceeds the layer's rank, by default its number from 0, else 0."""
        rank = self._rank(child)
        return self.depth.map(lambda depth: int(int(depth) > rank))

    def plain(self, assignment: Assignment) -> nn.Sequential:
        layers = [plain(layer, assignment) for layer in self.kept(assignment).values()]
        contextual = any(len(inspect.signature(layer.forward).parameters) > 1 for layer in layers)
        return (InSequence if contextual else nn.Sequential)(*layers)


class InSequence(nn.Sequential):
    """Layers that are called with the same context, `layer(x, *context)`."""

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, *context)
        return x


def walk(
    module: nn.Module, name: str = "", gates: tuple[Size, ...] = ()
) -> Iterator[tuple[str, nn.Module, tuple[Size, ...]]]:
    """Yield all modules with their names and gates. A gate is a Size: 1 if an architecture has the module, else 0."""
    yield name, module, gates
    for key, child in module._modules.items():  # named_children() leaves the second name of a module out
        if child is None:
            continue
        gate = module.gate(key) if isinstance(module, Elastic) else None
        yield from walk(child, f"{name}.{key}" if name else key, gates if gate is None else (*gates, gate))
