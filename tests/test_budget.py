"""Budgets: the most probable architecture that fits, the cheapest one, and what happens where there is none."""

import itertools

import numpy as np
import pytest
import torch
from spaces import SPACES, vit
from tiny import ALL, tiny
from torch import nn

import tanglenas_engine.derivation.budget as budgets
import tanglenas_engine.derivation.elimination as elimination
from tanglenas_engine import Objective, SearchSpace, elastic
from tanglenas_engine.derivation.budget import cheapest, check_budget, project, projection, shrunk
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.cost import METRICS, Additive


class Wired(SearchSpace):
    """Two of three branches, each thin or thick: not every assignment is an architecture."""

    def __init__(self):
        super().__init__()
        kinds = self.choice("kinds", ("none", "thin", "thick"), per=3)
        width = self.choice("width", (8, 4, 6))
        hidden = [kinds[i].map({"none": 1, "thin": 3 + i, "thick": 7}.get) for i in range(3)]
        self.branches = nn.ModuleList(elastic.Linear(width, size) for size in hidden)
        self.heads = nn.ModuleList(elastic.Linear(size, 2) for size in hidden)

    def forward(self, x):
        return sum(head(branch(x)) for branch, head in zip(self.branches, self.heads, strict=True))

    def example_input(self, batch):
        return torch.randn(batch, 8)

    def wirings(self):
        *kinds, width = self.rows
        picks = [picks for picks in itertools.product(range(3), repeat=3) if picks.count(0) == 1]
        return [dict(zip(kinds, pick, strict=True)) for pick in picks], [{width: i} for i in range(3)]

    def decisions(self):
        return iter(self.wirings())

    def moves(self, assignment):
        for alternatives in self.wirings():
            yield from (pick for pick in alternatives if any(assignment[row] != i for row, i in pick.items()))

    def most_probable(self, mixture):
        scores, best = self.scores(mixture), {}
        for alternatives in self.wirings():
            best.update(max(alternatives, key=lambda pick: sum(scores[row][i] for row, i in pick.items())))
        return self.architecture_of(best)

    def smallest(self):
        return self.architecture(kinds=("thin", "thin", "none"), width=4)


class Quiet(Wired):
    """One that does not say which rows are decided together."""

    decisions = SearchSpace.decisions


class Weighed(Objective):
    """Any tables as an objective."""

    def __init__(self, name, tables):
        self.name, self.tables = name, tables

    def terms(self, space):
        return Additive(self.tables)


CASES = {
    "convolutional": SPACES["convolutional"],
    "language": SPACES["language"],
    "stages": SPACES["stages"],
    "vit": lambda: vit(depth=(1, 2, 3)),
    "wired": Wired,
}


def random_mixture(space, scale=1.0):
    return space.mixture({k: (scale * torch.randn(n, k).double()).softmax(1) for k, n in space.stacks.items()})


def assignments(space):
    """All that the decisions of a space allow."""
    for picks in itertools.product(*space.decisions()):
        yield {row: option for part in picks for row, option in part.items()}


def everything(space):
    """Every assignment with its costs, by metric."""
    return [(picks, {metric: space.terms(metric).cost(picks) for metric in METRICS}) for picks in assignments(space)]


def probability(space, mixture, picks):
    """The log-probability of an assignment, with the rows beyond its depths at their most probable options."""
    scores = space.scores(mixture)
    return sum(scores[row][option] if row.active(picks) else max(scores[row]) for row, option in picks.items())


def within(costs, budget):
    return all(costs[metric] <= most for metric, most in budget.items())


def random_budget(possible, metrics):
    """Limits from the smallest cost up, rather tight, that something meets."""
    while True:
        budget = {}
        for metric in metrics:
            values = sorted({costs[metric] for _, costs in possible})
            budget[metric] = values[int(float(torch.rand(())) ** 2 * (len(values) - 1))]
        if any(within(costs, budget) for _, costs in possible):
            return budget


# The most probable


@pytest.mark.parametrize("metrics", [("params",), ("flops",), ("params", "flops")], ids="+".join)
@pytest.mark.parametrize("name", CASES)
def test_the_projection_is_the_most_probable_architecture_that_fits(name, metrics):
    space = CASES[name]()
    possible = everything(space)
    changed = 0
    for trial in range(12):
        mixture = random_mixture(space, (0.1, 1, 4)[trial % 3])
        budget = random_budget(possible, metrics)
        best = max(probability(space, mixture, picks) for picks, costs in possible if within(costs, budget))
        found = projection(space, mixture, budget)
        picks = space.assignment_of(found.architecture)
        assert found.exact
        assert within({metric: getattr(space.cost(found.architecture), metric) for metric in METRICS}, budget)
        assert probability(space, mixture, picks) == pytest.approx(best, abs=1e-9)
        changed += found.architecture != space.most_probable(mixture)
    assert changed > 3


@pytest.mark.parametrize("kind", [int, float])
def test_costs_that_pull_apart_are_met_together_or_refused_together(kind):
    space = SPACES["convolutional"]()
    # Thirds of which sums depend on their order, or whole numbers.
    unit = 1 if kind is int else 1 / 3
    rows = [row for row in space.rows if row.gate is None]
    tables = [
        {(row,): [unit * (7 * i + 3) for i in range(len(row.options))] for row in rows},
        {(row,): [unit * 5 * (3 - i) ** 2 for i in range(len(row.options))] for row in rows},
    ]
    objectives = [Weighed(name, table).bind(space) for name, table in zip(("here", "there"), tables, strict=True)]
    mixture = random_mixture(space)
    met = refused = 0
    possible = [(picks, *(Additive(table).cost(picks) for table in tables)) for picks in assignments(space)]
    heres, theres = ({costs[i] for costs in possible} for i in (1, 2))
    for here, there in itertools.product(sorted(heres), sorted(theres)):
        fitting = [picks for picks, a, b in possible if a <= here and b <= there]
        budget = {"here": here, "there": there}
        if fitting:
            met += 1
            found = projection(space, mixture, budget, objectives)
            best = max(probability(space, mixture, picks) for picks in fitting)
            assert found.exact
            assert probability(space, mixture, space.assignment_of(found.architecture)) == pytest.approx(best, abs=1e-9)
            slack = 0 if kind is int else 1e-9
            assert all(one.cost(found.architecture) <= budget[one.name] + slack for one in objectives)
        else:
            refused += 1
            with pytest.raises(
                TangleNASError, match=r"has at most .* here and .* there together: that with least here"
            ):
                check_budget(space, budget, objectives)
            with pytest.raises(TangleNASError, match="together"):
                project(space, mixture, budget, objectives)
    assert met > 3 and refused > 3


def test_multipliers_change_what_is_looked_at_and_not_what_is_found():
    """Of darts, too large to enumerate: without a bound every partial architecture that no other beats is kept."""
    space = tiny("darts")
    low, high = space.cost(cheapest(space, "params")).params, space.cost(space.largest()).params
    for share in (0.1, 0.4, 0.7):
        mixture = random_mixture(space, 2.0)
        budget = {"params": int(low + share * (high - low))}
        problem = elimination.Problem.of(space, space.scores(mixture), budgets._limits(space, budget, ()))
        whole = problem._eliminated(np.zeros(1), np.inf)
        found = projection(space, mixture, budget)
        assert found.exact and space.cost(found.architecture).params <= budget["params"]
        assert len(whole.scores) > 5
        picks = space.assignment_of(found.architecture)
        score = sum(space.scores(mixture)[row][option] for row, option in picks.items())
        assert score == pytest.approx(whole.scores.max(), abs=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_every_space_meets_the_tightest_budgets_there_are(name):
    space = tiny(name)
    for metric in METRICS:
        least = getattr(space.cost(cheapest(space, metric)), metric)
        assert least <= getattr(space.cost(space.smallest()), metric)
        found = projection(space, random_mixture(space, 3.0), {metric: least})
        assert found.exact and getattr(space.cost(found.architecture), metric) == least


def test_a_budget_that_binds_nothing_changes_nothing():
    space = vit()
    mixture = random_mixture(space)
    largest = space.cost(space.largest())
    free = space.most_probable(mixture)
    for budget in ({}, {"params": None}, {"params": largest.params, "flops": largest.flops}):
        assert projection(space, mixture, budget) == budgets.Projection(free, True)


# The cheapest


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CASES)
def test_the_cheapest_architecture_costs_least_of_all(name, metric):
    space = CASES[name]()
    least = min(costs[metric] for _, costs in everything(space))
    assert getattr(space.cost(cheapest(space, metric)), metric) == least
    check_budget(space, {metric: least})
    with pytest.raises(TangleNASError) as caught:
        check_budget(space, {metric: least - 1})
    assert f"has at most {least - 1:,} {metric}: the smallest has {least:,}. Raise max_{metric}" in str(caught.value)


def test_the_cheapest_is_not_always_the_one_of_smallest_options():
    space = vit()
    (width,) = (row for row in space.rows if row.choice == "embed_dim")  # 12 or 8
    objective = Weighed("energy", {(width,): [1.5, 2.5]}).bind(space)
    assert cheapest(space, objective).choices["embed_dim"] == 12
    with pytest.raises(TangleNASError, match=r"at most 1.4 energy: the smallest has 1.5. Raise limits\['energy'\]"):
        check_budget(space, {"energy": 1.4}, [objective])


# The other way


@pytest.mark.parametrize("name", CASES)
def test_where_tables_grow_too_large_a_local_search_keeps_the_budget(name, monkeypatch):
    space = CASES[name]()
    possible = everything(space)
    cases = []
    for _ in range(6):
        mixture, budget = random_mixture(space, 2.0), random_budget(possible, METRICS)
        cases.append((mixture, budget, projection(space, mixture, budget).architecture))
    monkeypatch.setattr(elimination, "ENTRIES", 1)
    for mixture, budget, exact in cases:
        found = projection(space, mixture, budget)
        picks = space.assignment_of(found.architecture)
        assert found.exact == (found.architecture == space.most_probable(mixture))
        assert within({metric: space.terms(metric).cost(picks) for metric in METRICS}, budget)
        assert probability(space, mixture, picks) <= probability(space, mixture, space.assignment_of(exact)) + 1e-9
        least = min(costs["params"] for _, costs in possible)
        assert space.cost(cheapest(space, "params")).params == least


def test_a_space_that_does_not_tell_its_decisions_and_a_cost_without_tables_are_searched():
    class Squared(Objective):
        name = "squared"

        def measure(self, architecture):
            return self.space.cost(architecture).params ** 2

    space = Quiet()
    least = space.cost(space.smallest()).params
    found = projection(
        space, space.one_hot(space.architecture(kinds=("none", "thick", "thick"), width=8)), {"params": least + 9}
    )
    assert not found.exact and least <= space.cost(found.architecture).params <= least + 9
    assert found.architecture.choices["kinds"].count("none") == 1

    objective = Squared().bind(space := Wired())
    assert space.cost(cheapest(space, objective)).params == least
    found = projection(
        space,
        space.one_hot(space.architecture(kinds=("none", "thick", "thick"), width=8)),
        {"squared": least**2},
        [objective],
    )
    assert not found.exact and space.cost(found.architecture).params == least
    with pytest.raises(TangleNASError, match=r"was found that has at most 1 squared: the smallest has [\d,]+\. Raise"):
        check_budget(space, {"squared": 1}, [objective])
    beyond = {"squared": least**2, "params": least - 1}
    with pytest.raises(TangleNASError, match=r"has at most .* params: the smallest has"):
        check_budget(space, beyond, [objective])


@pytest.mark.parametrize(
    "value, text",
    [
        (3, "3"),
        (4.0, "4"),
        (0.36659871, "0.3665987"),
        (1234567, "1,234,567"),
        (12345678.9, "12,345,679"),
        (1e-6, "1e-06"),
    ],
)
def test_amounts_read_as_a_person_writes_them(value, text):
    assert budgets.amount(value) == text


def test_an_architecture_shrinks_into_two_budgets_that_no_single_change_leads_to():
    space = vit()
    width, depth = (row for row in space.rows if row.choice in ("embed_dim", "depth"))
    # Cheap together, dear apart.
    objective = Weighed("pairs", {(width, depth): [9, 9, 9, 9, 1, 9]}).bind(space)
    found = shrunk(space, space.largest(), {"pairs": 1}, torch.Generator().manual_seed(0), [objective])
    assert objective.cost(found) == 1


# Bad input


@pytest.mark.parametrize(
    "budget, message",
    [
        ({"params": 0}, "max_params is 0, expected a whole number of at least 1"),
        ({"flops": -5}, "max_flops is -5, expected a whole number of at least 1"),
        ({"params": 1e6}, "max_params is 1000000.0, expected a whole number"),
        ({"energy": 0}, "limits['energy'] is 0, expected a positive number"),
        ({"energy": float("nan")}, "limits['energy'] is nan, expected a positive number"),
        ({"energy": "3"}, "limits['energy'] is '3', expected a positive number"),
        ({"enrgy": 3}, "unknown cost in a budget 'enrgy'. Did you mean 'energy'? Choose one of: energy, flops, params"),
    ],
)
def test_budgets_that_cannot_be(budget, message):
    space = vit()
    objective = Weighed("energy", {(space.rows[0],): [1.5, 2.5]}).bind(space)
    with pytest.raises(TangleNASError) as caught:
        check_budget(space, budget, [objective])
    assert message in str(caught.value)
