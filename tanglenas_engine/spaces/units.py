"""Units in order of importance: an architecture keeps the first ones of every size, so the best should come first.

A unit is an entry of a size: a hidden unit of an MLP, a channel, an attention head. All dimensions that are declared
with one Size hold the same units: those that write a unit, that read it, and that normalise it. So one permutation of
them all changes no output of the largest network. No layer needs a rule of its own, as `Elastic.declare` says it all.

- Dimensions of equal Sizes (the same choices, the same values) are permuted together, as all that touch a residual.
- `Axis.unit` is the number of consecutive entries that move as one (the dimensions of a head), or None for entries
  whose place has a meaning. Sizes that always have equally many units move together: a head of keys takes along the
  heads of queries that read it.
- Not every use of a unit is declared. A reshape may read it, or a grouped convolution may tie it to its neighbours. So
  the outputs of the largest network are compared, and a size whose units cannot move keeps their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic
from tanglenas_engine.elastic.parts import part, reference
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.size import Axis, Row, Size

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
"""The largest difference between outputs that rounding explains, as a share of the largest output."""


@dataclass(frozen=True)
class Place:
    """A dimension of a parameter or buffer: the module that holds it, its name there, and the dimension's number."""

    label: str
    module: nn.Module
    name: str
    dim: int
    axis: Axis

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = part(self.module, self.name)
        return tensor


@dataclass(frozen=True)
class Units:
    """The units of one size, or of several with equally many units: `count` of them in all `places`."""

    size: Size
    count: int
    places: tuple[Place, ...]

    @property
    def parameters(self) -> list[Place]:
        return [place for place in self.places if isinstance(place.tensor, nn.Parameter)]

    def sums(self, place: Place, values: Tensor) -> Tensor:
        """Return the sum of `values`, a tensor like that of the place, over each unit: `(count,)` in float64."""
        by_unit = values.movedim(place.dim, 0).reshape(place.axis.blocks, self.count, -1)
        return by_unit.double().sum((0, 2))

    def move(self, order: Tensor) -> None:
        """Put unit `order[i]` into place i, everywhere."""
        for place in self.places:
            length = place.axis.size.max
            entries = length // self.count
            within = (order[:, None] * entries + torch.arange(entries, device=order.device)).flatten()
            index = torch.cat([within + block * length for block in range(place.axis.blocks)])
            with torch.no_grad():
                place.tensor.copy_(place.tensor.index_select(place.dim, index.to(place.tensor.device)))

    def __str__(self) -> str:
        more = f" and {len(self.places) - 1} more" if len(self.places) > 1 else ""
        return f"{self.size!r} ({self.places[0].label}{more})"


Importance = Callable[[Sequence[Units]], list[Tensor]]
"""A function that returns the importance of each unit of each size, `(count,)`."""


def units_of(space: SearchSpace) -> list[Units]:
    """Return the units of every size that a choice of the space decides, in the order of its modules."""
    found: dict[tuple[object, ...], list[Place]] = {}
    seen: set[tuple[int, int]] = set()
    for label, module in space.named_modules():
        for name, axes in module.axes.items() if isinstance(module, Elastic) else ():
            tensor = {**module._parameters, **module._buffers}.get(name)
            for dim, axis in enumerate(axes):
                size = axis.size
                fixed = axis.unit is None or axis.layout != "prefix" or size.min == size.max
                # Tied weights are one tensor. A dimension of length 1 broadcasts.
                if tensor is None or fixed or tensor.shape[dim] == 1 or (id(tensor), dim) in seen:
                    continue
                seen.add((id(tensor), dim))
                place = Place(f"{label}.{name}" if label else name, module, name, dim, axis)
                found.setdefault((size.rows, tuple(map(int, size.values))), []).append(place)
    groups: dict[tuple[tuple[Row, ...], tuple[int, ...]], list[Place]] = {}
    for places in found.values():
        entries = math.lcm(*(place.axis.unit or 1 for place in places))
        size = places[0].axis.size
        if all(int(value) % entries == 0 for value in size.values):
            counts = tuple(int(value) // entries for value in size.values)
            groups.setdefault((size.rows, counts), []).extend(places)
    return [Units(places[0].axis.size, max(counts), tuple(places)) for (_, counts), places in groups.items()]


def magnitude(groups: Sequence[Units]) -> list[Tensor]:
    """Return the sums of the squared weights of each unit. Every tensor counts alike: its mean over the units is 1."""
    found = []
    for units in groups:
        total = torch.zeros(units.count, dtype=torch.float64)
        for place in units.parameters:
            squares = units.sums(place, place.tensor.detach().square()).cpu()
            total += squares / squares.mean().clamp_min(1e-300)
        found.append(total)
    return found


def taylor(
    space: SearchSpace, loss: Callable[[Tensor, Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> Importance:
    """Return the importance by the first-order change of the loss without a unit (Molchanov et al. 2019, equation 8).

    It is the mean over batches of `(sum w dL/dw)^2`, with the sum over a unit's weights in one tensor, added up over
    the tensors. The loss is the largest network's.

    Raises:
        TangleNASError: There is no batch (raised when the function is called).
    """

    def importance(groups: Sequence[Units]) -> list[Tensor]:
        totals = [torch.zeros(units.count, dtype=torch.float64) for units in groups]
        parameters, count = list(space.parameters()), 0
        with space.as_largest():
            for inputs, targets in batches:
                count += 1
                value = loss(space(inputs), targets)
                gradients = torch.autograd.grad(value, parameters, allow_unused=True)
                by_parameter = {id(p): g for p, g in zip(parameters, gradients, strict=True) if g is not None}
                for units, total in zip(groups, totals, strict=True):
                    for place in units.parameters:
                        if (gradient := by_parameter.get(id(place.tensor))) is not None:
                            total += units.sums(place, place.tensor.detach() * gradient).square().cpu()
        if not count:
            raise TangleNASError("the importance of units by the loss needs a batch of data, but there is none")
        return [total / count for total in totals]

    return importance


def order_units(space: SearchSpace, importance: Importance = magnitude) -> list[str]:
    """Permute the units of every size so that the most important ones come first. The largest network stays the same.

    Returns:
        A sentence for each size whose units keep their order, because moving them would change the largest network.

    Raises:
        TangleNASError: An importance is not finite.
    """
    groups = units_of(space)
    if not groups:
        return [f"no choice of {space.label} decides a number of units, so there is nothing to order"]
    orders = []
    for units, values in zip(groups, importance(groups), strict=True):
        if not bool(values.isfinite().all()):
            raise TangleNASError(f"the importance of the units of {units} is not finite: the weights diverged")
        orders.append(values.argsort(descending=True, stable=True))
    pairs = list(zip(groups, orders, strict=True))
    with _exact(space) as precision:
        before = _outputs(space)
        _move(pairs)
        if _same(before, _outputs(space), precision):
            return []
        _move([(units, order.argsort()) for units, order in pairs])
        kept = []
        for units, order in pairs:
            units.move(order)
            if not _same(before, _outputs(space), precision):
                units.move(order.argsort())
                kept.append(
                    f"the units of {units} keep their order, because moving them changes the largest network: a layer "
                    "that uses them does not declare how"
                )
    return kept


def _move(pairs: Iterable[tuple[Units, Tensor]]) -> None:
    for units, order in pairs:
        units.move(order)


def _outputs(space: SearchSpace) -> Tensor:
    """Return the largest network's outputs for the same random batch at every call."""
    with torch.no_grad(), seeded(0, accelerators=False), space.as_largest():
        x = space.example_input(2)
        return space(x.to(reference(space)) if x.is_floating_point() else x.to(reference(space).device))


def _same(before: Tensor, after: Tensor, precision: torch.dtype) -> bool:
    return bool((before - after).abs().max() <= TOLERANCES[precision] * before.abs().max())


@contextmanager
def _exact(space: SearchSpace) -> Iterator[torch.dtype]:
    """Compute in float64 inside the block, with constant tensors made random; restore both afterwards.

    A network that computes in float32 alone does so here, too. The block gets the type.

    Tensors of equal values, such as a fresh head of zeros, would hide that a permutation changes the network. They are
    the same in every order, so they need no permutation when they are restored.
    """
    dtype = reference(space).dtype
    constants = []
    try:
        try:
            _outputs(space.double())
        except RuntimeError:
            _outputs(space.float())
        with torch.no_grad(), seeded(0, accelerators=False):
            for tensor in (*space.parameters(), *space.buffers()):
                if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                    constants.append((tensor, float(tensor.flatten()[0])))
                    tensor.add_(torch.rand(tensor.shape, dtype=tensor.dtype).to(tensor.device), alpha=0.1)
        yield reference(space).dtype
    finally:
        with torch.no_grad():
            for tensor, value in constants:
                tensor.fill_(value)
        space.to(dtype)
