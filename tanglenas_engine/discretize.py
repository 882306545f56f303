"""The discretize stage: from a searched supernet to one architecture, within a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tanglenas_engine.architecture import Architecture
from tanglenas_engine.cost import METRICS, Cost
from tanglenas_engine.data import DataView, batches
from tanglenas_engine.elastic.norm import recalibrate
from tanglenas_engine.errors import TangleNASError, unknown
from tanglenas_engine.mixture import Mixture
from tanglenas_engine.optimizer import argmax
from tanglenas_engine.progress import Progress, SilentProgress
from tanglenas_engine.search import check_fit
from tanglenas_engine.size import Row
from tanglenas_engine.space import SearchSpace
from tanglenas_engine.training import Row as HistoryRow
from tanglenas_engine.training import accuracy, at_least, device_of


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
    mixture: Mixture | None,
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
        mixture: What alpha stands for after a gradient search; None after a sampled one.
        method: "argmax" takes the most probable option of every row. "random" evaluates random architectures with
            the supernet's weights and takes the best on the architecture split. None: what `derivation` says.
        derivation: The way that goes with the optimizer that searched.
        candidates: How many architectures "random" tries.
        max_params: Hard budget in parameters, met by construction: argmax changes the rows in which that costs
            the least probability per cost saved; random draws within the budget only.
        max_flops: The same in multiply-accumulates for one input.
        recalibration_batches: Batches that set the statistics of batch norms for each candidate.

    Raises:
        TangleNASError: An unknown method, a method that needs a mixture without one, or a budget below the
            smallest architecture.
    """
    method = method or derivation
    if method not in METHODS:
        raise unknown("discretize.method", method, METHODS)
    at_least("discretize.candidates", candidates, 1)
    budget = {"params": max_params, "flops": max_flops}
    check_budget(space, budget)
    check_fit(space, data.validation)
    space.to(device_of(device)).eval()
    statistics = [inputs for inputs, _ in batches(data.weights, batch_size)][:recalibration_batches]
    progress = progress or SilentProgress()

    def judge(architecture: Architecture, split: str) -> float:
        """Accuracy in % on a split with inherited weights; batch norms as the last recalibration left them."""
        return accuracy(space.select(architecture), getattr(data, split), batch_size)

    def adapt(architecture: Architecture) -> None:
        reference = next(space.parameters())
        recalibrate(space.select(architecture), [inputs.to(reference.device) for inputs in statistics])

    generator = torch.Generator().manual_seed(seed)
    rows: list[HistoryRow] = []
    with progress.stage("discretize", candidates if method == "random" else 1, 0) as line:
        for number, architecture in enumerate(METHODS[method](space, mixture, budget, candidates, generator), 1):
            adapt(architecture)
            cost = space.cost(architecture)
            rows.append(
                {
                    "digest": architecture.digest,
                    "accuracy": judge(architecture, "architecture"),
                    "params": cost.params,
                    "flops": cost.flops,
                    "architecture": architecture,
                }
            )
            line.advance()
            best = max(rows, key=lambda row: row["accuracy"])
            line.epoch(number, candidates if method == "random" else 1, f"best {best['accuracy']:.1f} %")
    rows.sort(key=lambda row: -row["accuracy"])  # stable: the first found wins a tie
    found: Architecture = rows[0]["architecture"]
    adapt(found)
    result = judge(found, "validation")
    space.release()
    table = [{**row, "architecture": str(row["architecture"])} for row in rows]
    return DiscretizeResult(found, space.cost(found), result, table)


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
                f"no architecture of {space.name!r} has at most {limit:,} {metric}: the smallest has "
                f"{getattr(smallest, metric):,}. Raise max_{metric}"
            )


def fits(cost: Cost, budget: Budget) -> bool:
    """Whether a cost is within the budget."""
    return all(limit is None or getattr(cost, metric) <= limit for metric, limit in budget.items())


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
    uniform = space.mixture({count: torch.full((rows, count), 1 / count) for count, rows in space.stacks.items()})
    found: dict[str, Architecture] = {}
    for _ in range(20 * candidates):
        architecture = space.sample(generator)
        if not fits(space.cost(architecture), budget):
            architecture = project(space, uniform, budget, start=architecture, generator=generator)
        found.setdefault(architecture.digest, architecture)
        if len(found) == min(candidates, space.size):
            break
    return list(found.values())


METHODS: dict[str, Callable[..., list[Architecture]]] = {"argmax": _argmax, "random": _random}
"""Ways to derive: from (space, mixture, budget, candidates, generator) to the architectures to evaluate."""


def project(
    space: SearchSpace,
    mixture: Mixture,
    budget: Budget,
    start: Architecture | None = None,
    generator: torch.Generator | None = None,
) -> Architecture:
    """The most probable architecture, moved into the budget.

    While it does not fit, the one row changes that loses the least log-probability per share of the budget saved;
    each change saves, so this ends, at the smallest architecture at the latest. With a `generator` the row is
    drawn instead, for random candidates.
    """
    assignment = space.assignment_of(start or argmax(space, mixture))
    stacks = {count: stack.clamp_min(1e-12).log().tolist() for count, stack in mixture.detach().stacks.items()}

    def excess(picks: dict[Row, int]) -> float:
        cost = space.cost(space.architecture_of(picks))
        limits = {metric: limit for metric, limit in budget.items() if limit is not None}
        return float(sum(max(0.0, getattr(cost, metric) / limit - 1) for metric, limit in limits.items()))

    over = excess(assignment)
    while over > 0:
        moves = []
        for row in space.rows:
            logs = stacks[len(row.options)][row.slot]
            for option in range(len(row.options)):
                after = excess({**assignment, row: option})
                if after < over:
                    moves.append(((logs[assignment[row]] - logs[option]) / (over - after), after, row, option))
        if not moves:
            # No single change helps: a choice further along does only together with another.
            return space.smallest()
        pick = int(torch.randint(len(moves), (), generator=generator)) if generator else None
        _, over, row, option = moves[pick] if pick is not None else min(moves, key=lambda move: move[0])
        assignment = {**assignment, row: option}
    return space.architecture_of(assignment)
