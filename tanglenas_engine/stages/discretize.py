"""The discretize stage: from a searched supernet to one architecture, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tanglenas_engine.data import DataView
from tanglenas_engine.derivation.budget import Budget, Projection
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.evolution import evolution
from tanglenas_engine.derivation.pareto import front, nsga2
from tanglenas_engine.errors import TangleNASError, at_least, unknown
from tanglenas_engine.optimizers.optimizer import argmax as most_probable
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.runtime.progress import Progress
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.cost import METRICS, Cost
from tanglenas_engine.spaces.fit import check_fit
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture

Method = Callable[..., Projection | None]
"""Judges candidates: takes the `Candidates` to draw from and the mixture of the search, or None, and its options.

What brings that mixture's most probable architecture into the budget, and judges nothing else, returns how.
"""


def argmax(candidates: Candidates, mixture: Mixture | None) -> Projection:
    """Judge one candidate: the most probable architecture within the budget."""
    if mixture is None:
        raise TangleNASError(
            "discretize.method 'argmax' needs the mixture of a gradient search, and the search has none: "
            "use method 'random' or 'evolution' for a sampled supernet"
        )
    found = candidates.budget.project(mixture)
    candidates.judge([found.architecture])
    return found


def random(candidates: Candidates, mixture: Mixture | None) -> None:
    """Judge random candidates, uniform over the rows' options where the budget leaves room, or drawn from the prior.

    The paper's numbers of candidates are 2,000 for AutoFormer, 5,000 for GPT and 10,000 for the toy spaces.
    """
    candidates.judge(candidates.first(candidates.limit))


METHODS: Mapping[str, Method] = {"argmax": argmax, "random": random, "evolution": evolution, "nsga2": nsga2}
"""Ways to derive an architecture."""


@dataclass(frozen=True)
class DiscretizeResult:
    """The architecture found, its cost, and its validation accuracy in % with the supernet's weights.

    `candidates` has one row per architecture that was tried, best first; argmax tries one. `front` has those that no
    other one dominates in accuracy and in the cost named `front_cost`, cheapest first. `exact`, of argmax: whether the
    architecture is known to be the most probable one within the budget, or is what a local search found.
    """

    architecture: Architecture
    cost: Cost
    validation_accuracy: float
    candidates: list[Record] = field(default_factory=list)
    front: list[Architecture] = field(default_factory=list)
    front_cost: str = "params"
    exact: bool | None = None


def limits_of(
    max_params: int | None = None, max_flops: int | None = None, limits: Mapping[str, float] | None = None
) -> dict[str, float | None]:
    """Return the limits that the options of `discretize` ask for.

    Raises:
        TangleNASError: The limits are no mapping, or one is given twice.
    """
    if not isinstance(limits, Mapping | None):
        raise TangleNASError(f"discretize.limits is {limits!r}, expected numbers by name, such as {{'latency': 2.5}}")
    every: dict[str, float | None] = {"params": max_params, "flops": max_flops}
    for name, most in (limits or {}).items():
        if every.get(name) is not None:
            raise TangleNASError(
                f"discretize.limits has {name!r}: {most!r}, and discretize.max_{name} is {every[name]!r}: leave one out"
            )
        every[name] = most
    return every


def discretize(
    space: SearchSpace,
    data: DataView,
    mixture: Mapping[str, Tensor] | None,
    *,
    method: str = "auto",
    derivation: str = "argmax",
    candidates: int = 100,
    prior: Literal["uniform", "mixture"] = "uniform",
    cost: str = "params",
    max_params: int | None = None,
    max_flops: int | None = None,
    objectives: Sequence[Objective] = (),
    limits: Mapping[str, float] | None = None,
    recalibration_batches: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    device: str | None = None,
    methods: Mapping[str, Method] = METHODS,
    checkpoints: CheckpointFolder | None = None,
    progress: Progress | None = None,
) -> DiscretizeResult:
    """Derive an architecture from a trained supernet.

    Args:
        space: The supernet with its trained weights.
        data: A view that reaches `weights` (for statistics of batch norms), `architecture` (to rank candidates)
            and `validation` (to judge the result).
        mixture: What alpha stands for after a gradient search, by choice; None or empty after a
            sampled one.
        method: "argmax" takes the most probable option of every row. The others judge candidates with the supernet's
            weights on the architecture split, and take the best: "random", "evolution", and "nsga2", which looks for
            the whole front of accuracy and cost. "auto": what `derivation` says.
        derivation: The way that goes with the optimizer that searched.
        candidates: How many architectures are judged at most: the price of a method.
        prior: Where the first candidates come from. "uniform" draws every row's options alike; "mixture" draws from
            the mixture, beginning with what argmax would take.
        cost: What the front trades against accuracy: "params", "flops" or the name of an objective.
        max_params: Hard budget in parameters, met by construction: argmax takes the most probable architecture
            within it; the others never look beyond it.
        max_flops: The same in multiply-accumulates for one input.
        objectives: Further costs, bound to the space, that the table of candidates has.
        limits: Hard budgets by name, of objectives too.
        recalibration_batches: Batches that set the statistics of batch norms for each candidate; 0 keeps the
            supernet's. The space has its own again at the end.
        methods: What the names of methods stand for, here with other options, say.
        checkpoints: Where to keep what candidates are worth, from time to time and when interrupted; a derivation
            that finds it there goes on from it and ends as if it had not been cut off.

    Raises:
        TangleNASError: An unknown method, options that cannot be, a method or prior that needs a mixture without
            one, or a budget below the smallest architecture.
    """
    method = derivation if method == "auto" else method
    if method not in methods:
        raise unknown("discretize.method", method, methods)
    at_least("discretize.candidates", candidates, 1)
    at_least("discretize.recalibration_batches", recalibration_batches, 0)
    costs = [*METRICS, *(objective.name for objective in objectives)]
    if cost not in costs:
        raise unknown("discretize.cost", cost, costs)
    if prior not in ("uniform", "mixture"):
        raise TangleNASError(f"discretize.prior is {prior!r}, expected 'uniform' or 'mixture'")
    if prior == "mixture" and not mixture:
        raise TangleNASError(
            "discretize.prior 'mixture' needs the mixture of a gradient search, and the search has none: use 'uniform'"
        )
    budget = Budget(space, limits_of(max_params, max_flops, limits), objectives)
    budget.check()
    for one in objectives:
        if one.source and progress is not None:
            progress.note(f"discretize: {one.name} in {one.unit}, of {one.source}")
    check_fit(space, data.validation)
    target = device_of(device)
    space.to(target)
    weights = space.mixture(mixture) if mixture else None
    with Candidates(
        space,
        data.weights,
        data.architecture,
        budget=budget,
        objectives=objectives,
        cost=cost,
        limit=candidates,
        prior=weights if prior == "mixture" else None,
        recalibration_batches=recalibration_batches,
        batch_size=batch_size,
        seed=seed,
        device=target,
        checkpoints=checkpoints,
        progress=progress,
    ) as tried:
        found = methods[method](tried, weights)
        best: Architecture = tried.best()[0]["architecture"]
        accuracy = tried.measured(best, data.validation)
    rows = [{**row, "architecture": str(row["architecture"])} for row in tried.best(len(tried.rows))]
    nondominated: list[Architecture] = [row["architecture"] for row in front(tried.rows, cost)]
    exact = found.exact if isinstance(found, Projection) else None
    if exact is not None and weights is not None and best != most_probable(space, weights) and progress is not None:
        progress.note(
            "discretize: the mixture's most probable architecture is beyond the budget; this is the most probable "
            "one within it. What the mixture leaves open is rather judged on data: method 'evolution', prior 'mixture'"
        )
    if exact is False and progress is not None:
        progress.note(
            "discretize: a local search found the architecture within the budget, which has a limit without tables or "
            "leaves too much to look at: a more probable one may fit"
        )
    return DiscretizeResult(best, space.cost(best), accuracy, rows, nondominated, cost, exact)
