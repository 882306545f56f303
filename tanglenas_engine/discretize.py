"""The discretize stage: from a searched supernet to one architecture, within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tanglenas_engine.architecture import Architecture
from tanglenas_engine.cost import METRICS, Cost
from tanglenas_engine.data import DataView, Samples
from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.mixture import Mixture
from tanglenas_engine.optimizer import argmax
from tanglenas_engine.progress import Progress, SilentProgress
from tanglenas_engine.search import check_fit
from tanglenas_engine.seeding import seeded
from tanglenas_engine.size import Row
from tanglenas_engine.space import SearchSpace
from tanglenas_engine.training import Row as HistoryRow
from tanglenas_engine.training import at_least, device_of, measure, random_inputs, recalibrate


@dataclass(frozen=True)
class DiscretizeResult:
    """The architecture found, its cost, and its validation accuracy in % with the supernet's weights.

    `candidates` has one row per architecture that was tried, best first; argmax tries one.
    """

    architecture: Architecture
    cost: Cost
    validation_accuracy: float
    candidates: list[HistoryRow] = field(default_factory=list)


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

    rows: list[HistoryRow] = []
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


Budget = dict[str, int | None]


def check_budget(space: SearchSpace, budget: Budget) -> None:
    """Check that the smallest architecture fits.

    Raises:
        TangleNASError: It does not; the message has the smallest possible cost.
    """
    smallest = space.cost(space.smallest())
    for metric in METRICS:
        limit = budget.get(metric)
        if limit is None:
            continue
        at_least(f"max_{metric}", limit, 1)
        if getattr(smallest, metric) > limit:
            raise TangleNASError(
                f"no architecture of {space._label} has at most {limit:,} {metric}: the smallest has "
                f"{getattr(smallest, metric):,}. Raise max_{metric}"
            )


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
        architecture = _shrunk(space, space.sample(generator), budget, generator)
        found.setdefault(architecture.digest, architecture)
        if len(found) == min(candidates, space.size):
            break
    return list(found.values())


METHODS: dict[str, Callable[..., list[Architecture]]] = {"argmax": _argmax, "random": _random}
"""Ways to derive: from (space, mixture, budget, candidates, generator) to the architectures to evaluate."""

Picks = dict[Row, int]


def project(space: SearchSpace, mixture: Mixture, budget: Budget) -> Architecture:
    """The most probable architecture within the budget, as a local search finds it.

    From the most probable one of all, the move of the space is made that loses the least log-probability per share
    of the budget saved, until it fits. Then what gains probability and still fits is changed, one or two moves at a
    time, until nothing is left: no move and no two moves give a more probable architecture within the budget.
    """
    picks = space.assignment_of(argmax(space, mixture))
    scores = space.scores(mixture)

    def gain(change: Picks) -> float:
        return sum(scores[row][option] - scores[row][picks[row]] for row, option in change.items())

    over = _excess(space, picks, budget)
    if over == 0:
        return space.architecture_of(picks)
    while over > 0:
        moves = []
        for change in space.moves(picks):
            after = _excess(space, {**picks, **change}, budget)
            if after < over:
                moves.append((-gain(change) / (over - after), after, change))
        if not moves:  # a change helps only together with another
            picks = space.assignment_of(space.smallest())
            break
        _, over, change = min(moves, key=lambda move: move[0])
        picks = {**picks, **change}

    better: Picks | None = picks
    while better is not None:
        picks = better
        gains = [(gain(change), change) for change in space.moves(picks)]
        pairs = [
            (a + b, {**one, **two}) for (a, one), (b, two) in itertools.combinations(gains, 2) if not {*one} & {*two}
        ]
        # Smaller gains than this may be rounding, and would go on for ever.
        changes = sorted((c for c in [*gains, *pairs] if c[0] > 1e-9), key=lambda change: -change[0])
        fitting = ({**picks, **change} for _, change in changes if not _excess(space, {**picks, **change}, budget))
        better = next(fitting, None)
    return space.architecture_of(picks)


def _shrunk(space: SearchSpace, architecture: Architecture, budget: Budget, generator: torch.Generator) -> Architecture:
    """The architecture after random changes that bring it into the budget, each of which saves."""
    picks = space.assignment_of(architecture)
    over = _excess(space, picks, budget)
    while over > 0:
        moves = list(space.moves(picks))
        for index in torch.randperm(len(moves), generator=generator).tolist():
            after = _excess(space, {**picks, **moves[index]}, budget)
            if after < over:
                picks, over = {**picks, **moves[index]}, after
                break
        else:
            return space.smallest()
    return space.architecture_of(picks)


def _excess(space: SearchSpace, picks: Picks, budget: Budget) -> float:
    """By which share the budget is exceeded, summed over its limits; 0 within it."""
    cost = space.cost(space.architecture_of(picks))
    limits = {metric: limit for metric, limit in budget.items() if limit is not None}
    return float(sum(max(0.0, getattr(cost, metric) / limit - 1) for metric, limit in limits.items()))
