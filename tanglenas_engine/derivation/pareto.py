"""Fronts of loss against cost, and NSGA-II for them (Deb et al., 2002), by pymoo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.evolution import Variation
from tanglenas_engine.errors import TangleNASError, at_least
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.superposition.mixture import Mixture


def front(records: Sequence[Record], cost: str = "params") -> list[Record]:
    """Return the records that no other one dominates, cheapest first: each has a smaller loss than all that cost less.

    Only records that were judged on the most samples count, as others are not comparable.
    """
    found: list[Record] = []
    most = max((record.get("samples", 0) for record in records), default=0)
    for record in sorted(records, key=lambda record: (record[cost], record["loss"])):
        if record.get("samples", 0) == most and (not found or record["loss"] < found[-1]["loss"]):
            found.append(record)
    return found


def nsga2(
    candidates: Candidates,
    mixture: Mixture | None,
    *,
    population: int = 20,
    mutation_probability: float = 0.2,
    single_probability: float = 0.4,
) -> None:
    """Judge generations that spread along the front of loss and cost, until the candidates are used up.

    Parents by binary tournament, and who survives by rank and crowding, as in NSGA-II; what is bred from two parents
    is crossed and mutated as in `evolution`, and was not judged before.

    Args:
        population: How many survive, and how many are bred a generation.
        mutation_probability: Of a change to each row of a choice that is made per layer.
        single_probability: Of a change to each choice that is made once.

    Raises:
        TangleNASError: pymoo is not installed, or an option cannot be.
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
    Config.warnings["not_compiled"] = False  # a hint on stdout, where pymoo has no wheel

    def individuals(architectures: Sequence[Architecture]) -> Any:
        return Population.new("X", np.array([[architecture] for architecture in architectures], dtype=object))

    class Breeding(InfillCriterion):  # type: ignore[misc]
        def do(self, problem: Any, population: Any, count: int, algorithm: Any, **context: Any) -> Any:
            def child() -> Architecture:
                ((one, other),) = select.do(problem, population, 1, 2, algorithm=algorithm, **context)
                return variation.mutated(variation.crossed(one.X[0], other.X[0]))

            return individuals(candidates.fresh(count, child))

    algorithm = NSGA2(population, sampling=individuals(candidates.first(population)), eliminate_duplicates=False)
    select, algorithm.mating = algorithm.mating.selection, Breeding()
    seed = int(torch.randint(2**31, (), generator=generator))
    algorithm.setup(Problem(n_var=1, n_obj=2), termination=NoTermination(), seed=seed)
    while (asked := algorithm.ask()) is not None and len(asked):
        records = candidates.judge([one.X[0] for one in asked], candidates.limit, race=False)
        asked.set("F", np.array([[record["loss"], record[candidates.cost]] for record in records]))
        algorithm.tell(infills=asked)
