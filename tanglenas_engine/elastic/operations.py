"""A choice between operations: their expectation, with the kernels of one family entangled in one weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic, plain
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.size import Assignment, Axis, Size, combinations


class MixedOperation(Elastic, nn.ModuleDict):
    """`sum_g P(g) operation_g(x)` over operations of which an architecture has one.

    An operation may stand for several options at once, say a separable convolution for kernels 3 and 5: its layers
    follow a Size that is 0 where none of them is chosen. Given that one is, its weight is the expectation over
    them (their windows divided by their total probability), and the output is multiplied by that total. So a
    BatchNorm at the end of an operation, which removes any factor in front of it, hides nothing from alpha.
    Differs from the paper's code, which leaves out the factor of an entangled group (kept as
    `relaxation="paper"`): behind a BatchNorm, groups then get almost no gradient against each other.

    Args:
        operations: For each name the Size that is 1 where an architecture has the operation and 0 elsewhere, and
            the module.
    """

    def __init__(self, operations: Mapping[str, tuple[Size, nn.Module]]):
        nn.ModuleDict.__init__(self, {name: module for name, (_, module) in operations.items()})
        self.presence = {name: present for name, (present, _) in operations.items()}
        rows = list(dict.fromkeys(row for present in self.presence.values() for row in present.rows))
        for picks in combinations(rows):
            names = [name for name, present in self.presence.items() if present.value(picks)]
            if len(names) != 1:
                chosen = ", ".join(f"{row!r}={row.options[i]}" for row, i in picks.items())
                raise TangleNASError(f"for {chosen} the operations are {names or 'none'}, expected exactly one")
        for name, present in self.presence.items():
            role = "group" if sum(present.values) > 1 else "value"
            axes = (Axis(present, layout="value", role=role),)
            self.declare(role, **{name: axes})

    def forward(self, x: Tensor) -> Tensor:
        if self.assignment is not None:
            return self._chosen(self.assignment)(x)  # type: ignore[no-any-return]
        terms = list(self._terms(x))
        return sum(terms[1:], terms[0])

    def gate(self, child: str) -> Size:
        return self.presence[child]

    def plain(self, assignment: Assignment) -> nn.Sequential:
        """The chosen operation under its name, so that parameter names stay."""
        name = next(name for name, present in self.presence.items() if present.value(assignment))
        network = nn.Sequential()
        network.add_module(name, plain(self[name], assignment))
        return network

    def _chosen(self, assignment: Assignment) -> nn.Module:
        return next(self[name] for name, present in self.presence.items() if present.value(assignment))

    def _terms(self, x: Tensor) -> Iterator[Tensor]:
        for name, module in self.items():
            masks = self.masks(name)
            if not masks:  # the paper's factor-free groups, and every operation of a network that is not relaxed
                yield module(x)
            else:
                yield module(x) * masks[0][-1]
