"""Costs: parameters and multiply-accumulates, exact for an architecture and in expectation.

A network's cost is a sum of products of Sizes, `constant * out * in * ...`, times one factor per depth that
decides whether the layer is there. All terms over the same rows of choices add up to one table. Where rows are
independent under a mixture, the expectation is a product of these tables with the rows' probabilities:
exact, differentiable, and a handful of operations for a whole space. `decisions.py` has the expectation for rows that
are decided together.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tanglenas_engine.elastic.base import Elastic, tied
from tanglenas_engine.elastic.depth import walk
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.products import ProductCounter, Run, counted, in_plain_products
from tanglenas_engine.superposition.mixture import Mixture, Superposition
from tanglenas_engine.superposition.size import Assignment, Axis, Row, Size, combinations

METRICS = ("params", "macs")
FORMER = {"flops": "macs"}
"""The names that costs had before, and those that they have now. Configs may have either; outputs have the latter."""


@dataclass(frozen=True)
class Cost:
    """Cost of a network: `params` as a count of numbers, `macs` as multiply-accumulates for one input.

    Multiply-accumulates of all matrix products, convolutions and attention products; additions of a bias,
    normalisation and activations are not counted. Ints for an architecture, tensors in expectation.
    """

    params: Any
    macs: Any

    @property
    def flops(self) -> Any:
        """The former name of `macs`. A multiply-accumulate is two floating-point operations."""
        return self.macs


Term = tuple[int, tuple[Size, ...]]
"""A constant times Sizes."""


class Additive:
    """A cost that is a sum of tables, each over a few rows of choices. Searches and budgets compute with the tables.

    Args:
        tables: The value of every combination of options, for each tuple of rows; the last row's option varies fastest.
            A row beyond a depth does not matter. The depth's row is then in the tuple too, and values must not differ.
    """

    def __init__(self, tables: Mapping[tuple[Row, ...], Sequence[float]]):
        self.tables = {rows: tuple(values) for rows, values in tables.items()}
        self._batches = _batched(self.tables)

    def cost(self, assignment: Assignment) -> Any:
        """Return the exact value for an assignment. It is an int where the tables hold ints."""
        return sum(Size(rows, values).number(assignment) for rows, values in self.tables.items())

    def expected(self, mixture: Mixture) -> Tensor:
        """Return the expectation over independent rows, a differentiable float64 scalar.

        `SearchSpace.expectation_of` gives that over the architectures of a space, whose rows may be decided together.
        """
        # Counts exceed what float32 holds exactly.
        mixture = Mixture({}, {count: stack.double() for count, stack in mixture.stacks.items()})
        total = next(iter(mixture.stacks.values())).new_zeros(())
        for rows, slots, tables in self._batches:
            probabilities = mixture.joint(rows, slots.to(total.device))
            total = total + (probabilities * tables.to(total.device)).sum()
        return total


class CostModel:
    """The costs of a network by metric, as tables over the rows that its terms depend on.

    The network must be in eval mode, and on the path of the largest network.

    Attributes:
        uncounted: A sentence for each module whose multiply-accumulates are not known for every architecture.

    Args:
        superposition: The state that the network's elastic layers share.
        example_input: A function that returns a batch of inputs of a given length.
        decisions: A function that yields the alternatives of each decision that composes an architecture.
    """

    def __init__(
        self,
        network: nn.Module,
        superposition: Superposition,
        example_input: Callable[[int], Tensor],
        decisions: Callable[[], Iterable[Sequence[Assignment]]],
    ):
        self.metrics: dict[str, Additive] = {}
        products, self.uncounted = _mac_terms(network, superposition, example_input, decisions)
        if self.uncounted:
            warnings.warn(
                f"the multiply-accumulates of this space are not exact: {'; '.join(self.uncounted)}. Its largest form "
                "is counted for all architectures. `tanglenas plugins check` tells the difference",
                stacklevel=2,
            )
        for metric, terms in (("params", _parameter_terms(network)), ("macs", products)):
            tables: dict[tuple[Row, ...], list[int]] = {}
            for constant, factors in terms:
                rows = tuple(sorted({r for f in factors for r in f.rows}, key=superposition.rows.index))
                values = []
                for picks in combinations(rows):
                    value = constant
                    for factor in factors:
                        value *= factor.value(picks)
                    values.append(value)
                table = tables.setdefault(rows, [0] * len(values))
                table[:] = [a + b for a, b in zip(table, values, strict=True)]
            self.metrics[metric] = Additive(tables)

    def cost(self, assignment: Assignment) -> Cost:
        return Cost(**{metric: terms.cost(assignment) for metric, terms in self.metrics.items()})


def _batched(
    tables: Mapping[tuple[Row, ...], Sequence[float]],
) -> list[tuple[tuple[Row, ...], Tensor, Tensor]]:
    """Return (rows of the first, slots, values) for all tables over rows with the same numbers of options together."""
    groups: dict[tuple[int, ...], list[tuple[Row, ...]]] = {}
    for rows in tables:
        groups.setdefault(tuple(len(row.options) for row in rows), []).append(rows)
    return [
        (
            group[0],
            torch.tensor([[row.slot for row in rows] for rows in group], dtype=torch.long).reshape(len(group), -1),
            torch.tensor([tables[rows] for rows in group], dtype=torch.float64),
        )
        for group in groups.values()
    ]


def _parameter_terms(network: nn.Module) -> list[Term]:
    terms: list[Term] = []
    tied(network)  # a parameter that is sliced in two ways has no count
    shared: dict[nn.Parameter, tuple[Sequence[Axis | None], list[tuple[Size, ...]]]] = {}
    for _, module, gates in walk(network):
        declared = module.axes if isinstance(module, Elastic) else {}
        for name, parameter in module.named_parameters(recurse=False):
            plain = (None,) * parameter.dim()
            shared.setdefault(parameter, (declared.get(name, plain), []))[1].append(gates)
    for parameter, (axes, places) in shared.items():
        constant, factors = 1, list(_anywhere(places))
        for length, axis in zip(parameter.shape, axes, strict=True):
            if axis is None or axis.role == "fixed":
                constant *= length
            else:
                constant *= axis.blocks
                factors.append(axis.size)
        terms.append((constant, tuple(factors)))
    return terms


def _anywhere(places: list[tuple[Size, ...]]) -> tuple[Size, ...]:
    """Return the gates of a parameter that several layers share. It is in use where any of these layers is."""
    if len(places) == 1 or () in places:
        return min(places, key=len)
    products = [functools.reduce(operator.mul, gates) for gates in places]
    return (functools.reduce(lambda a, b: a.map(max, b), products),)


Place = tuple[str, tuple[Size, ...]]
"""The name of a module, and its gates."""


def _gates(places: list[Place], calls: int) -> tuple[Size, ...]:
    """Return the gates of a module that computes products in so many calls.

    Raises:
        TangleNASError: It is called in several places, which are not in the same architectures.
    """
    (name, gates), *others = places
    differing = [other for other, its in others if _decisive(its) != _decisive(gates)]
    if not differing:
        return gates
    if calls > 1:
        raise TangleNASError(
            f"{name} and {differing[0]} are one module, but not in the same architectures, so that its products cannot "
            "be counted. Give each place a module of its own; they may share parameters: second.weight = first.weight"
        )
    return _anywhere([its for _, its in places])


def _decisive(gates: tuple[Size, ...]) -> set[tuple[Any, ...]]:
    """Return the gates that can be 0, as a set that identifies them. Gates that are always 1 are left out."""
    return {(gate.rows, gate.values) for gate in gates if not gate.min}


def _mac_terms(
    network: nn.Module,
    superposition: Superposition,
    example_input: Callable[[int], Tensor],
    decisions: Callable[[], Iterable[Sequence[Assignment]]],
) -> tuple[list[Term], list[str]]:
    """Return what each module computes for one input in the largest network, and what cannot be counted.

    Elastic layers say how their count follows from their sizes (`Elastic.macs`). All other modules have a constant
    count: that of the products that they compute themselves, outside of the modules that they call. Where it is not
    that of torch's layers, it is counted in small architectures, too, and should be the same.
    """
    places: dict[nn.Module, list[Place]] = {}
    for name, module, gates in walk(network):
        places.setdefault(module, []).append((name, gates))
    with torch.random.fork_rng(devices=[]):  # looking at a cost changes no number of a run
        example = example_input(1)
    forward = functools.partial(counted, functools.partial(_Forward, network, example, places))
    largest = forward()
    varying: set[nn.Module] = set()
    unseen = [module for module in largest.constant if not (isinstance(module, Elastic) or _is_torchs(module))]
    with superposition.restored():
        while unseen:
            superposition.select(_small([places[module] for module in unseen], decisions()))
            small = forward()
            varying |= {m for m in unseen if small.calls[m] and small.each(m) != largest.each(m)}
            unseen = [module for module in unseen[:-1] if not small.calls[module]]
    gated = {module: _gates(places[module], largest.calls[module]) for module, _ in largest.terms}
    return (
        [(constant, (*gated[module], *factors)) for module, (constant, factors) in largest.terms],
        [sentence for module, found in places.items() for sentence in largest.unknown(module, found[0][0], varying)],
    )


def _small(wanted: Sequence[Sequence[Place]], decisions: Iterable[Sequence[Assignment]]) -> Assignment:
    """Return an architecture of small options, but that as many modules as possible are there, the last ones first."""
    there: dict[Row, int] = {}
    for (_, gates), *_ in reversed(wanted):
        for picks in combinations({row: None for gate in gates for row in gate.rows}):
            if all(there.get(row, pick) == pick for row, pick in picks.items()) and all(g.value(picks) for g in gates):
                there |= picks
                break

    def worth(picks: Assignment) -> tuple[int, int]:
        """Return how many rows are as modules need them, and less for more numbers that are smaller."""
        smaller = sum(
            option < row.options[pick] for row, pick in picks.items() if _numeric(row) for option in row.options
        )
        return sum(there.get(row) == pick for row, pick in picks.items()), -smaller

    return {row: pick for one in decisions for row, pick in max(one, key=worth).items()}


def _numeric(row: Row) -> bool:
    return all(isinstance(option, Real) for option in row.options)


class _Forward:
    """A count of what modules compute in a forward for one input, in a given kind of run.

    Attributes:
        terms: The products of all modules: those that elastic layers say by their method `macs`, and constants.
        constant: The constants of each module: the multiply-accumulates that it computes itself.
        calls: The number of calls of each module.
    """

    def __init__(self, network: nn.Module, example: Tensor, modules: Iterable[nn.Module], run: Run):
        self.terms: list[tuple[nn.Module, Term]] = []
        self.constant = Counter[nn.Module]()
        self.calls = Counter[nn.Module]()
        self._foreign: dict[nn.Module, set[str]] = {}
        self._counter = ProductCounter()
        self._covering: list[nn.Module | None] = []  # for each running module the elastic layer whose `macs` covers it
        hooks = [hook for module in modules for hook in self._watched(module)]
        try:
            with in_plain_products(), self._counter:
                run(network, example)
        finally:
            for hook in hooks:
                hook.remove()

    def each(self, module: nn.Module) -> Fraction:
        """Return the constant count of a call of a module."""
        return Fraction(self.constant[module], self.calls[module])

    def unknown(self, module: nn.Module, name: str, varying: Collection[nn.Module]) -> Iterator[str]:
        """Yield a sentence for each reason why the products of a module are not known for every architecture."""
        label = f"{name or 'the space'} ({type(module).__name__})"
        if module in self.constant and isinstance(module, Elastic):
            yield (
                f"{label} computes products of its own, but has no method `macs` that says how their number follows "
                "from its sizes"
            )
        elif module in varying:
            yield f"{label} computes products of chosen sizes, which count in elastic layers with a method `macs` only"
        if module in self._foreign:
            yield f"{label} calls {', '.join(sorted(self._foreign[module]))}, which torch cannot count"

    def _watched(self, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Register hooks that count the products of a module."""
        before: list[int] = []

        def enter(_: nn.Module, inputs: Any) -> None:
            before.append(self._counter.enter(module))
            self._covering.append(_covering(module, self._covering[-1] if self._covering else None))

        def leave(_: nn.Module, inputs: Any, output: Any) -> None:
            self._counter.leave()
            own, covering = self._counter.own[module] - before.pop(), self._covering.pop()
            self.calls[module] += 1
            if covering is module:
                self.terms.extend((module, term) for term in module.macs(output))  # type: ignore[operator]
            elif covering is None and own:
                self.terms.append((module, (own, ())))
                self.constant[module] += own
            if covering is None and module in self._counter.unknown:
                self._foreign[module] = self._counter.unknown[module]

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)


def _covering(module: nn.Module, outer: nn.Module | None) -> nn.Module | None:
    """Return the elastic layer whose `macs` has the products of `module`, or None where they count by themselves.

    It is the layer itself, or the one around a module that is no layer of its own (a layer is elastic, or torch's).
    """
    if isinstance(module, Elastic):
        return module if type(module).macs is not Elastic.macs else None
    return None if _is_torchs(module) else outer


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
