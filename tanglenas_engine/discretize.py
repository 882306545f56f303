"""The discretize stage: from a searched supernet to one architecture, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tanglenas_engine.architecture import Architecture
from tanglenas_engine.budget import Budget, check_budget, project, shrunk
from tanglenas_engine.cost import Cost
from tanglenas_engine.data import DataView, Samples
from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.mixture import Mixture
from tanglenas_engine.progress import Progress, SilentProgress
from tanglenas_engine.search import check_fit
from tanglenas_engine.seeding import seeded
from tanglenas_engine.space import SearchSpace
from tanglenas_engine.training import Row, at_least, device_of, measure, random_inputs, recalibrate


@dataclass(frozen=True)
class DiscretizeResult:
    """The architecture found, its cost, and its validation accuracy in % with the supernet's weights.

    `candidates` has one row per architecture that was tried, best first; argmax tries one.
    """

    architecture: Architecture
    cost: Cost
    validation_accuracy: float
    candidates: list[Row] = field(default_factory=list)


def discretize(
    space: SearchSpace,
    data: DataView,
    mixture: Mapping[str, Tensor] | None,
    *,
    method: str | None = None,
    derivation: str = "argmax",
    candidates: int = 100,
    max_params: int | None = None,
    max_flops: int | None = None,
    recalibration_batches: int = 8,
    batch_size: int = 256,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> DiscretizeResult:
    """Derive an architecture from a trained supernet.

    Args:
        space: The supernet with its trained weights.
        data: A view that reaches `weights` (for statistics of batch norms), `architecture` (to rank candidates)
            and `validation` (to judge the result).
        mixture: What alpha stands for after a gradient search, by choice; None or empty after a
            sampled one.
        method: "argmax" takes the most probable option of every row. "random" evaluates random architectures with
            the supernet's weights and takes the best on the architecture split. None: what `derivation` says.
        derivation: The way that goes with the optimizer that searched.
        candidates: How many architectures "random" tries.
        max_params: Hard budget in parameters, met by construction: argmax takes the most probable architecture
            within it that `project` finds; random draws within it only.
        max_flops: The same in multiply-accumulates for one input.
        recalibration_batches: Batches that set the statistics of batch norms for each candidate; 0 keeps the
            supernet's. The space has its own again at the end.

    Raises:
        TangleNASError: An unknown method, a method that needs a mixture without one, or a budget below the
            smallest architecture.
    """
    method = method or derivation
    if method not in METHODS:
        raise unknown("discretize.method", method, METHODS)
    at_least("discretize.candidates", candidates, 1)
    at_least("discretize.recalibration_batches", recalibration_batches, 0)
    budget = {"params": max_params, "flops": max_flops}
    check_budget(space, budget)
    check_fit(space, data.validation)
    target = device_of(device)
    space.to(target)
    weights = space.mixture(mixture) if mixture else None
    statistics = random_inputs(data.weights, batch_size, recalibration_batches, seed, target)
    generator = torch.Generator().manual_seed(seed)

    def judge(architecture: Architecture, samples: Samples) -> float:
        """Accuracy in % with inherited weights, and with batch norms that fit this architecture."""
        space.select(architecture)
        if statistics:
            recalibrate(space, statistics)
        return measure(space, samples, batch_size).accuracy

    rows: list[Row] = []
    with seeded(seed), _unchanged(space):
        tried = METHODS[method](space, weights, budget, candidates, generator)
        with (progress or SilentProgress()).stage("discretize", len(tried), 0) as line:
            best = -1.0
            for number, architecture in enumerate(tried, 1):
                cost = space.cost(architecture)
                rows.append(
                    {
                        "digest": architecture.digest,
                        "accuracy": judge(architecture, data.architecture),
                        "params": cost.params,
                        "flops": cost.flops,
                        "architecture": architecture,
                    }
                )
                best = max(best, rows[-1]["accuracy"])
                line.advance()
                line.epoch(number, len(tried), f"best {best:.1f} %")
        rows.sort(key=lambda row: -row["accuracy"])  # stable: the first found wins a tie
        found: Architecture = rows[0]["architecture"]
        result = judge(found, data.validation)
    table = [{**row, "architecture": str(row["architecture"])} for row in rows]
    return DiscretizeResult(found, space.cost(found), result, table)


@contextmanager
def _unchanged(space: SearchSpace) -> Iterator[None]:
    """Leave a space released, in its mode and with its statistics: each candidate sets its own."""
    training, buffers = space.training, [(buffer, buffer.clone()) for buffer in space.buffers()]
    try:
        yield
    finally:
        space.release().train(training)
        for buffer, before in buffers:
            buffer.copy_(before)


def _argmax(
    space: SearchSpace, mixture: Mixture | None, budget: Budget, candidates: int, generator: torch.Generator
) -> list[Architecture]:
    if mixture is None:
        raise TangleNASError(
            "discretize.method 'argmax' needs the mixture of a gradient search, and the search has none: "
            "use method 'random' for a sampled supernet"
        )
    return [project(space, mixture, budget)]


def _random(
    space: SearchSpace, mixture: Mixture | None, budget: Budget, candidates: int, generator: torch.Generator
) -> list[Architecture]:
    """Distinct architectures within the budget, uniform over the rows' options where the budget leaves room."""
    found: dict[str, Architecture] = {}
    for _ in range(20 * candidates):
        architecture = shrunk(space, space.sample(generator), budget, generator)
        found.setdefault(architecture.digest, architecture)
        if len(found) == min(candidates, space.size):
            break
    return list(found.values())


METHODS: dict[str, Callable[..., list[Architecture]]] = {"argmax": _argmax, "random": _random}
"""Ways to derive: from (space, mixture, budget, candidates, generator) to the architectures to evaluate."""
