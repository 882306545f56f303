"""Elastic depth: a stack of layers. An architecture uses the first few of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic, plain
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.superposition.mixture import Factor
from tanglenas_engine.superposition.size import Assignment, Axis, Size


class Depth(Elastic, nn.ModuleList):
    """The first `depth` of `layers` in sequence; under a mixture, `sum_d p(d) x_d` over the outputs after d layers.

    Raises:
        TangleNASError: The largest depth differs from the number of layers.
    """

    def __init__(self, depth: Size | int, layers: Iterable[nn.Module]):
        nn.ModuleList.__init__(self, layers)
        self.depth = Size.of(depth)
        if self.depth.max != len(self):
            raise TangleNASError(f"the depth can be {self.depth.max}, but {len(self)} layers are given")
        self._depths = sorted({int(value) for value in self.depth.values})
        self.declare(outputs=(Axis(self.depth, layout="value", role="value"),))

    def forward(self, x: Tensor) -> Tensor:
        depth = len(self) if self.assignment is None else self.depth.value(self.assignment)
        probabilities = self.factors("outputs")
        shares = dict(zip(self._depths, probabilities[0].whole(), strict=True)) if probabilities else {}
        total = x * shares[0] if 0 in shares else None
        for i, layer in enumerate(list(self)[:depth], start=1):
            x = layer(x)
            if i in shares:
                total = x * shares[i] if total is None else torch.addcmul(total, x, shares[i])
        return x if total is None else total

    def factors(self, name: str) -> list[Factor]:
        """Return the probabilities of all depths, on the hard path too.

        The hard path computes the outputs of smaller depths on the way, so alpha can learn from them.
        """
        state = self._superposition
        return [] if state is None or state.mixture is None else state.factors(self.axes[name])

    def gate(self, child: str) -> Size:
        """Return a Size that is 1 if the depth exceeds the layer's number, counted from 0, else 0."""
        return self.depth.map(lambda depth: int(int(depth) > int(child)))

    def plain(self, assignment: Assignment) -> nn.Sequential:
        return nn.Sequential(*(plain(layer, assignment) for layer in list(self)[: self.depth.value(assignment)]))


def walk(
    module: nn.Module, name: str = "", gates: tuple[Size, ...] = ()
) -> Iterator[tuple[str, nn.Module, tuple[Size, ...]]]:
    """Yield all modules with their names and gates. A gate is a Size: 1 if an architecture has the module, else 0."""
    yield name, module, gates
    for key, child in module.named_children():
        gate = module.gate(key) if isinstance(module, Elastic) else None
        yield from walk(child, f"{name}.{key}" if name else key, gates if gate is None else (*gates, gate))
