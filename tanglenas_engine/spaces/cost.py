"""Costs: parameters and multiply-accumulates, exact for an architecture and in expectation.

A network's cost is a sum of products of Sizes, `constant * out * in * ...`, times one factor per depth that
decides whether the layer is there. All terms over the same rows of choices add up to one table, and rows are
independent under a mixture, so the expectation is a product of these tables with the rows' probabilities:
exact, differentiable, and a handful of operations for a whole space.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tanglenas_engine.elastic.base import Elastic, tied
from tanglenas_engine.elastic.depth import walk
from tanglenas_engine.superposition.mixture import Mixture, Superposition
from tanglenas_engine.superposition.size import Assignment, Axis, Row, Size, combinations

METRICS = ("params", "flops")


@dataclass(frozen=True)
class Cost:
    """Cost of a network: `params` as a count of numbers, `flops` as multiply-accumulates for one input.

    Multiply-accumulates of linear layers, convolutions and attention products; additions of a bias,
    normalisation and activations are not counted. Ints for an architecture, tensors in expectation.
    """

    params: Any
    flops: Any


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
        """Return the expectation over independent rows, a differentiable float64 scalar."""
        # Counts exceed what float32 holds exactly.
        mixture = Mixture({}, {count: stack.double() for count, stack in mixture.stacks.items()})
        total = next(iter(mixture.stacks.values())).new_zeros(())
        for rows, slots, tables in self._batches:
            probabilities = mixture.joint(rows, slots.to(total.device))
            total = total + (probabilities * tables.to(total.device)).sum()
        return total


class CostModel:
    """The costs of a network by metric, as tables over the rows that its terms depend on.

    Args:
        superposition: The state that the network's elastic layers share.
        example_input: A function that returns a batch of inputs of a given length.
    """

    def __init__(self, network: nn.Module, superposition: Superposition, example_input: Callable[[int], Tensor]):
        self.metrics: dict[str, Additive] = {}
        for metric, terms in (
            ("params", _parameter_terms(network)),
            ("flops", _mac_terms(network, superposition, example_input)),
        ):
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

    def expected(self, mixture: Mixture) -> Cost:
        return Cost(**{metric: terms.expected(mixture) for metric, terms in self.metrics.items()})


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


def _mac_terms(network: nn.Module, superposition: Superposition, example_input: Callable[[int], Tensor]) -> list[Term]:
    """Return the terms of all layers, each by its output for one input in the largest network."""
    terms: list[Term] = []
    hooks = []

    def record(module: nn.Module, gates: tuple[Size, ...]) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            for constant, factors in module_macs(module, output):
                terms.append((constant, (*gates, *factors)))

        return hook

    state = superposition.mixture, superposition.assignment
    training = {module: module.training for module in network.modules()}
    superposition.release()
    for _, module, gates in walk(network):
        hooks.append(module.register_forward_hook(record(module, gates)))
    try:
        # Only shapes matter. The meta device computes nothing, whatever the network's type.
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        with torch.random.fork_rng(devices=[]):  # looking at a cost changes no number of a run
            example = example_input(1)
        example = example.to("meta", next(network.parameters()).dtype if example.is_floating_point() else None)
        with torch.no_grad():
            torch.func.functional_call(network.eval(), meta, (example,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
        mixture, assignment = state
        if assignment is not None:
            superposition.select(assignment, mixture)
        elif mixture is not None:
            superposition.relax(mixture)
    return terms


def module_macs(module: nn.Module, output: Any) -> list[Term]:
    """Return the multiply-accumulates of one module, without its children, for a forward that gave `output`."""
    if isinstance(module, Elastic):
        return module.macs(output)
    if isinstance(module, nn.Linear):
        return [(output.numel() * module.in_features, ())]
    if isinstance(module, nn.Conv2d):
        return [(output.numel() * module.weight[0].numel(), ())]
    return []
