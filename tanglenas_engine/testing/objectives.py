"""The contract of an objective: the costs of architectures, and their expectation under mixtures."""

from __future__ import annotations

import itertools
import math
from collections import ChainMap
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.architectures import weights_of
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.size import Row

ENUMERATED = 64
"""The largest number of architectures over which an expectation is enumerated, where rows are independent."""
ENUMERATED_ALONE = 1000
"""The largest number of alternatives of one decision about several rows that is enumerated, if there is a choice."""

MakeObjective = Callable[[], Objective]
MakeSpace = Callable[[], SearchSpace]


def check_objective(make_objective: MakeObjective, make_space: MakeSpace) -> None:
    """Run all checks of this module on one space.

    Args:
        make_objective: Makes the objective anew, with the same options each time.
        make_space: Makes a space that the objective can be bound to; a small one is enough.
    """
    check_measure(make_objective, make_space)
    check_expectation(make_objective, make_space)
    check_slope(make_objective, make_space)


def check_measure(make_objective: MakeObjective, make_space: MakeSpace) -> None:
    """Check that it has a name, a unit, and costs that repeat and are no less for the largest architecture."""
    space = make_space()
    objective, again = (make_objective().bind(space) for _ in range(2))
    assert objective.name, "it has no name, under which histories and budgets list it"
    assert objective.unit, "it has no unit: say what its numbers count, as a person reads it"
    costs = {architecture: objective.cost(architecture) for architecture in _architectures(space, 5)}
    for architecture, cost in costs.items():
        repeated = objective.cost(architecture), again.cost(architecture)
        assert repeated == (cost, cost), f"{architecture} costs {cost}, and asked again {repeated}"
        if objective.additive is not None:
            summed = float(objective.additive.cost(space.assignment_of(architecture)))
            assert _close(summed, cost), (
                f"{architecture} costs {cost} by measure(), but {summed} by terms(), which hard budgets are kept in"
            )
    smallest, largest = costs[space.smallest()], costs[space.largest()]
    assert largest >= smallest, f"the largest architecture costs {largest}, less than the smallest: {smallest}"


@torch.no_grad()
def check_expectation(make_objective: MakeObjective, make_space: MakeSpace) -> None:
    """Check that the expected cost is the mean over architectures, at the corners and in between."""
    space = make_space()
    objective = make_objective().bind(space)
    for architecture in _architectures(space, 5):
        exact, expected = objective.cost(architecture), float(objective.expected(space.one_hot(architecture)))
        assert _close(exact, expected), f"{architecture} costs {exact}, but at its corner {expected} are expected"
    generator = torch.Generator().manual_seed(0)
    for architecture in _architectures(space, 1):
        free, weights = _soft(space, architecture, generator)
        mixture = space.mixture(_stacked(space, weights))
        expected, scores = float(objective.expected(mixture)), space.scores(mixture)
        corner, mean = space.assignment_of(architecture), 0.0
        shares = [weights_of(alternatives, scores) for alternatives in free]
        for picks in itertools.product(*(range(len(alternatives)) for alternatives in free)):
            chosen = dict(ChainMap(*(alternatives[i] for alternatives, i in zip(free, picks, strict=True))))
            probability = math.prod(share[i] / sum(share) for share, i in zip(shares, picks, strict=True))
            mean += probability * objective.cost(space.architecture_of({**corner, **chosen}))
        assert _close(mean, expected), (
            f"under a mixture over {', '.join(repr(row) for one in free for row in one[0])} the architectures cost "
            f"{mean} in the mean, but {expected} are expected"
        )


def check_slope(make_objective: MakeObjective, make_space: MakeSpace) -> None:
    """Check that the gradient of the expected cost agrees with the differences of its values."""
    space = make_space()
    objective = make_objective().bind(space)
    generator = torch.Generator().manual_seed(0)
    point = {count: torch.randn(rows, count, generator=generator).double() for count, rows in space.stacks.items()}
    direction = {count: torch.randn(x.shape, generator=generator, dtype=x.dtype) for count, x in point.items()}

    def value(step: Tensor | float) -> Tensor:
        return objective.expected(space.mixture({c: (x + step * direction[c]).softmax(1) for c, x in point.items()}))

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    expected = value(step)
    assert expected.requires_grad, "the expectation does not depend on the mixing weights: a search cannot follow it"
    (slope,) = torch.autograd.grad(expected, step, allow_unused=True)
    assert slope is not None and bool(slope.isfinite()), f"its gradient by the mixing weights is {slope}"
    small = 1e-2
    measured = (float(value(small).detach()) - float(value(-small).detach())) / (2 * small)
    scale = abs(float(expected.detach()))
    assert abs(measured - float(slope)) <= 0.02 * abs(measured) + 1e-3 * scale, (
        f"its gradient in a direction is {float(slope)}, but its values rise by {measured}"
    )


def _architectures(space: SearchSpace, samples: int) -> list[Architecture]:
    generator = torch.Generator().manual_seed(0)
    return [space.smallest(), space.largest(), *(space.sample(generator) for _ in range(samples))]


def _soft(
    space: SearchSpace, architecture: Architecture, generator: torch.Generator
) -> tuple[list[list[dict[Row, int]]], dict[Row, Tensor]]:
    """Draw decisions whose alternatives can be enumerated together, and weights for all rows.

    The weights of the rows that are decided there are random, those of the others a corner. Where rows are decided
    together, one such decision comes first, since an expectation by rows would be another there.
    """
    decisions = list(space.decisions())
    joint = sorted((one for one in decisions if len(one[0]) > 1), key=len)
    free = ([one for one in joint if len(one) <= ENUMERATED_ALONE] or joint[:1])[-1:]
    for i in torch.randperm(len(decisions), generator=generator).tolist():
        if math.prod(map(len, [*free, decisions[i]])) <= ENUMERATED and decisions[i] not in free:
            free.append(decisions[i])
    corner = space.assignment_of(architecture)
    weights = {
        row: torch.nn.functional.one_hot(torch.tensor(corner[row]), len(row.options)).double() for row in space.rows
    }
    weights |= {
        row: torch.randn(len(row.options), generator=generator).double().softmax(0) for one in free for row in one[0]
    }
    return free, weights


def _stacked(space: SearchSpace, weights: Mapping[Row, Tensor]) -> dict[int, Tensor]:
    """Stack weights by row as a mixture does, by number of options."""
    ordered = sorted(space.rows, key=lambda row: row.slot)
    return {
        count: torch.stack([weights[row] for row in ordered if len(row.options) == count]) for count in space.stacks
    }


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-9)
