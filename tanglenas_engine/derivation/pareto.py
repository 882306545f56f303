"""Fronts of loss against cost, and NSGA-II for them (Deb et al., 2002), by pymoo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tanglenas_engine.derivation.candidates import Candidates, judges
from tanglenas_engine.derivation.evolution import Variation
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.superposition.mixture import Mixture

DOMINATED = 1e30
"""The loss and the cost, for NSGA-II, of a candidate whose loss is not finite."""


def undominated(records: Sequence[Record], cost: str = "params") -> list[Record]:
    """Return the records that no other one dominates, cheapest first: each has a smaller loss than all that cost less.

    Only records that were judged on the most samples count, because losses on other samples are not comparable. A
    record whose loss is not finite does not count.
    """
    most = max((record["samples"] for record in records), default=0)
    return _of_equal_samples([record for record in records if record["samples"] == most], cost)


def final_front(candidates: Candidates) -> list[Record]:
    """Return the front of the candidates, each judged on all samples.

    A race drops candidates of a large loss, and with them most of the cheap ones. So the front of every rung goes on to
    the next one here. Losses are compared within a rung, where they are of the same samples.
    """
    candidates.promote(lambda records: _of_equal_samples(records, candidates.cost))
    return undominated(candidates.records, candidates.cost)


def _of_equal_samples(records: Sequence[Record], cost: str) -> list[Record]:
    found: list[Record] = []
    finite = [record for record in records if math.isfinite(record["loss"])]
    for record in sorted(finite, key=lambda record: (record[cost], record["loss"])):
        if not found or record["loss"] < found[-1]["loss"]:
            found.append(record)
    return found


@judges("all samples")
def nsga2(
    candidates: Candidates,
    mixture: Mixture | None,
    *,
    population: int = 20,
    mutation_probability: float = 0.2,
    single_probability: float = 0.4,
) -> None:
    """Judge generations that spread along the front of loss and cost, until the candidates are used up.

    As in NSGA-II, a binary tournament selects parents, and rank and crowding select survivors. A child is a crossover
    of two parents that is then mutated, as in `evolution`, and it was not judged before. A front has networks of every
    cost, so candidates do not fill the budget. They run no race, because the cheap ones would lose it.

    Args:
        population: The number of survivors, and of children per generation.
        mutation_probability: The probability of a change to each row of a choice that is made per layer.
        single_probability: The probability of a change to each choice that is made once.

    Raises:
        TangleNASError: pymoo is not installed, or an option is out of its range.
    """
    at_least("nsga2.population", population, 2)
    generator = candidates.generator
    variation = Variation(candidates.space, generator, "nsga2", mutation_probability, single_probability)
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.config import Config
        from pymoo.core.infill import InfillCriterion
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination
    except ImportError:
        raise TangleNASError("discretize.method 'nsga2' needs pymoo: pip install 'tanglenas[pareto]'") from None
    Config.warnings["not_compiled"] = False  # pymoo prints a hint where it has no wheel

    def individuals(architectures: Sequence[Architecture]) -> Any:
        return Population.new("X", np.array([[architecture] for architecture in architectures], dtype=object))

    class Breeding(InfillCriterion):  # type: ignore[misc]
        def do(self, problem: Any, population: Any, count: int, algorithm: Any, **context: Any) -> Any:
            def child() -> Architecture:
                ((one, other),) = select.do(problem, population, 1, 2, algorithm=algorithm, **context)
                return variation.mutated(variation.crossed(one.X[0], other.X[0]))

            return individuals(candidates.fresh(count, child, fill=False))

    drawn = individuals(candidates.first(population, fill=False))
    algorithm = NSGA2(population, sampling=drawn, eliminate_duplicates=False)
    select, algorithm.mating = algorithm.mating.selection, Breeding()
    seed = int(torch.randint(2**31, (), generator=generator))
    algorithm.setup(Problem(n_var=1, n_obj=2), termination=NoTermination(), seed=seed)
    while (asked := algorithm.ask()) is not None and len(asked):
        records = candidates.judge([one.X[0] for one in asked], candidates.limit, on="all samples")
        asked.set("F", np.array([_objectives(record, candidates.cost) for record in records]))
        algorithm.tell(infills=asked)


def _objectives(record: Record, cost: str) -> tuple[float, float]:
    """Return loss and cost. Without a finite loss, every other candidate dominates."""
    return (record["loss"], record[cost]) if math.isfinite(record["loss"]) else (DOMINATED, DOMINATED)
