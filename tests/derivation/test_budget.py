"""Budgets: the most probable architecture that fits, the cheapest one, and what happens where there is none."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from spaces import SPACES, vit
from tiny import DISTINCT, tiny
from torch import nn

import tanglenas_engine.derivation.budget as budgets
from tanglenas_engine import Objective, SearchSpace, elastic
from tanglenas_engine.derivation.budget import Budget, cheapest, dearest, whole
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import create_objective, create_space
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


@pytest.mark.parametrize("metrics", [("params",), ("macs",), ("params", "macs")], ids="+".join)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.part(3)
def test_the_projection_is_the_most_probable_architecture_that_fits(name, metrics):
    space = CASES[name]()
    possible = everything(space)
    changed = 0
    for trial in range(12):
        mixture = random_mixture(space, (0.1, 1, 4)[trial % 3])
        budget = random_budget(possible, metrics)
        best = max(probability(space, mixture, picks) for picks, costs in possible if within(costs, budget))
        found = Budget(space, budget).project(mixture)
        picks = space.assignment_of(found.architecture)
        assert found.exact
        assert within({metric: getattr(space.cost(found.architecture), metric) for metric in METRICS}, budget)
        assert probability(space, mixture, picks) == pytest.approx(best, abs=1e-9)
        changed += found.architecture != space.most_probable(mixture)
    assert changed > 3


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.part(2)
@pytest.mark.slow
@pytest.mark.exhaustive
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
            found = Budget(space, budget, objectives).project(mixture)
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
                Budget(space, budget, objectives).check()
            with pytest.raises(TangleNASError, match="together"):
                Budget(space, budget, objectives).project(mixture)
    assert met > 3 and refused > 3


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
@pytest.mark.exhaustive
@pytest.mark.slow
def test_decisions_of_hundreds_of_alternatives_are_taken_together(share):
    """Of darts, too large to enumerate: decision by decision, what no other beats in score and cost is kept."""
    space = tiny("darts")
    scores = space.scores(mixture := random_mixture(space, 2.0))
    constant = sum(values[0] for rows, values in space.terms("params").tables.items() if not rows)
    front = [(constant, 0.0)]
    for alternatives in space.decisions():
        options = [
            (
                sum(
                    values[Additive({rows: range(len(values))}).cost(picks)]
                    for rows, values in space.terms("params").tables.items()
                    if rows and set(rows) <= set(picks)
                ),
                sum(scores[row][option] for row, option in picks.items()),
            )
            for picks in alternatives
        ]
        front = beaten_by_none((a + b, s + t) for (a, s), (b, t) in itertools.product(front, beaten_by_none(options)))
    limit = int(front[0][0] + share * (front[-1][0] - front[0][0]))
    found = Budget(space, {"params": limit}).project(mixture)
    picks = space.assignment_of(found.architecture)
    assert found.exact and space.cost(found.architecture).params <= limit
    assert sum(scores[row][option] for row, option in picks.items()) == pytest.approx(
        max(score for cost, score in front if cost <= limit), abs=1e-9
    )


def beaten_by_none(points):
    """The (cost, score) of which none is at least as cheap and as good, cheapest first."""
    front = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def test_whole_numbers_beyond_the_solvers_tolerance_count():
    """Costs of ten digits that differ in the last one: the limit is between two of them."""
    space = SPACES["convolutional"]()
    rows = [row for row in space.rows if row.gate is None]
    table = {(row,): [10**9 * (i + 1) + int(torch.randint(3, ())) for i in range(len(row.options))] for row in rows}
    objective = Weighed("digits", table).bind(space)
    possible = [(picks, objective.additive.cost(picks)) for picks in assignments(space)]
    costs = sorted({cost for _, cost in possible})
    assert objective.cost(cheapest(space, objective)) == costs[0]
    assert objective.cost(dearest(space, objective)) == costs[-1]
    for limit in [*costs[1::4], *(cost - 1 for cost in costs[1::4])]:
        mixture = random_mixture(space)
        found = Budget(space, {"digits": limit}, [objective]).project(mixture)
        best = max(probability(space, mixture, picks) for picks, cost in possible if cost <= limit)
        assert found.exact and objective.cost(found.architecture) <= limit
        assert probability(space, mixture, space.assignment_of(found.architecture)) == pytest.approx(best, abs=1e-9)


def test_what_the_solver_lets_through_by_its_tolerance_is_excluded_and_the_rest_solved_again(monkeypatch):
    space = vit()
    possible = everything(space)
    solve, solved = budgets.optimize.milp, []

    def tolerant(*arguments, constraints, **options):
        most = [high * (1.03 if high > 100 else 1) for high in constraints.ub]  # the limit's, of all right-hand sides
        solved.append(most)
        return solve(
            *arguments, constraints=budgets.optimize.LinearConstraint(constraints.A, constraints.lb, most), **options
        )

    again = 0
    monkeypatch.setattr(budgets.optimize, "milp", tolerant)
    for _ in range(8):
        mixture, budget = random_mixture(space), random_budget(possible, ("params",))
        before = len(solved)
        found = Budget(space, budget).project(mixture)
        again += len(solved) - before > 1
        best = max(probability(space, mixture, picks) for picks, costs in possible if within(costs, budget))
        assert found.exact and space.cost(found.architecture).params <= budget["params"]
        assert probability(space, mixture, space.assignment_of(found.architecture)) == pytest.approx(best, abs=1e-9)
    assert again > 0


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.part(3)
def test_every_space_meets_the_tightest_budgets_there_are(name):
    space = tiny(name)
    for metric in METRICS:
        least = getattr(space.cost(cheapest(space, metric)), metric)
        assert least <= getattr(space.cost(space.smallest()), metric)
        found = Budget(space, {metric: least}).project(random_mixture(space, 3.0))
        assert found.exact and getattr(space.cost(found.architecture), metric) == least


def test_a_budget_that_binds_nothing_changes_nothing():
    space = vit()
    mixture = random_mixture(space)
    largest = space.cost(space.largest())
    free = space.most_probable(mixture)
    for budget in ({}, {"params": None}, {"params": largest.params, "macs": largest.flops}):
        assert Budget(space, budget).project(mixture) == budgets.Projection(free, True)


# The cheapest


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CASES)
def test_the_cheapest_architecture_costs_least_of_all_and_the_dearest_most(name, metric):
    space = CASES[name]()
    costs = [costs[metric] for _, costs in everything(space)]
    least = min(costs)
    assert getattr(space.cost(cheapest(space, metric)), metric) == least
    assert getattr(space.cost(dearest(space, metric)), metric) == max(costs)
    Budget(space, {metric: least}).check()
    with pytest.raises(TangleNASError) as caught:
        Budget(space, {metric: least - 1}).check()
    called = {"params": "params", "macs": "MACs"}[metric]
    assert f"has at most {least - 1:,} {called}: the smallest has {least:,}. Raise the limit of {metric}" in str(
        caught.value
    )


def test_the_cheapest_is_not_always_the_one_of_smallest_options():
    space = vit()
    (width,) = (row for row in space.rows if row.choice == "embed_dim")  # 12 or 8
    objective = Weighed("energy", {(width,): [1.5, 2.5]}).bind(space)
    assert cheapest(space, objective).choices["embed_dim"] == 12
    with pytest.raises(TangleNASError, match=r"at most 1.4 energy: the smallest has 1.5. Raise the limit of energy"):
        Budget(space, {"energy": 1.4}, [objective]).check()


# The other way


@pytest.mark.parametrize("name", CASES)
def test_where_the_solver_gives_up_a_local_search_keeps_the_budget(name, monkeypatch):
    space = CASES[name]()
    possible = everything(space)
    cases = []
    for _ in range(6):
        mixture, budget = random_mixture(space, 2.0), random_budget(possible, METRICS)
        cases.append((mixture, budget, Budget(space, budget).project(mixture).architecture))
    monkeypatch.setattr(budgets.optimize, "milp", lambda *_, **__: SimpleNamespace(x=None, status=1))
    for mixture, budget, exact in cases:
        found = Budget(space, budget).project(mixture)
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
    thick = space.architecture(kinds=("none", "thick", "thick"), width=8)
    found = Budget(space, {"params": least + 9}).project(space.one_hot(thick))
    assert not found.exact and least <= space.cost(found.architecture).params <= least + 9
    assert found.architecture.choices["kinds"].count("none") == 1

    objective = Squared().bind(space := Wired())
    assert space.cost(cheapest(space, objective)).params == least
    thick = space.architecture(kinds=("none", "thick", "thick"), width=8)
    found = Budget(space, {"squared": least**2}, [objective]).project(space.one_hot(thick))
    assert not found.exact and space.cost(found.architecture).params == least
    with pytest.raises(TangleNASError, match=r"was found that has at most 1 squared: the smallest has [\d,]+\. Raise"):
        Budget(space, {"squared": 1}, [objective]).check()
    beyond = {"squared": least**2, "params": least - 1}
    with pytest.raises(TangleNASError, match=r"has at most .* params: the smallest has"):
        Budget(space, beyond, [objective]).check()


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
    found = Budget(space, {"pairs": 1}, [objective]).shrink(space.largest(), torch.Generator().manual_seed(0))
    assert objective.cost(found) == 1


# From random architectures


def neighbours(space, architecture):
    picks = space.assignment_of(architecture)
    return [space.cost(space.architecture_of({**picks, **change})) for change in space.moves(picks)]


@pytest.mark.parametrize("metrics", [("params",), ("params", "macs")], ids="+".join)
@pytest.mark.parametrize("name", [*CASES, "darts_nano"])
@pytest.mark.part(3)
def test_random_architectures_shrink_and_grow_to_the_limits(name, metrics):
    space = CASES[name]() if name in CASES else tiny(name)
    generator = torch.Generator().manual_seed(0)
    low, high = (space.cost(extreme) for extreme in (space.smallest(), space.largest()))
    limits = {m: int(0.4 * getattr(low, m) + 0.6 * getattr(high, m)) for m in metrics}
    budget = Budget(space, limits)

    def share(cost):
        return max(getattr(cost, metric) / limits[metric] for metric in metrics)

    starts = [space.smallest(), space.largest(), *(space.architecture_of(random_picks(space)) for _ in range(4))]
    grown = []
    for start in starts:
        shrunk, larger = budget.shrink(start, generator), budget.grow(start, generator)
        assert share(space.cost(shrunk)) <= 1 and share(space.cost(larger)) <= 1
        if share(space.cost(start)) <= 1:
            assert shrunk == space.architecture_of(space.assignment_of(start))
            assert share(space.cost(larger)) >= share(space.cost(start))
        nearer = [cost for cost in neighbours(space, larger) if share(space.cost(larger)) < share(cost) <= 1]
        assert not nearer
        grown.append(share(space.cost(larger)))
    assert min(grown) > share(low)


def random_picks(space):
    """A random assignment that the decisions of a space allow."""
    return {
        row: option
        for alternatives in map(list, space.decisions())
        for row, option in alternatives[int(torch.randint(len(alternatives), ()))].items()
    }


def test_moves_follow_the_generator():
    space = vit(depth=(1, 2, 3))
    limit = (space.cost(space.smallest()).params + space.cost(space.largest()).params) // 2
    budget = Budget(space, {"params": limit})
    for change, start in ((budget.grow, space.smallest()), (budget.shrink, space.largest())):
        found = [change(start, torch.Generator().manual_seed(seed)) for seed in (0, 0, *range(1, 9))]
        assert found[0] == found[1] and len(set(found)) > 2


def test_without_limits_nothing_changes():
    space = vit()
    budget = Budget(space, {"params": None})
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert budget.grow(space.smallest(), generator) == budget.shrink(space.smallest(), generator) == space.smallest()
    assert before.equal(generator.get_state())
    budget.check()


def test_a_share_that_an_architecture_has_is_no_limit_below_it():
    space = create_space("autoformer_nano")
    largest = space.cost(space.largest()).macs
    generator = torch.Generator().manual_seed(0)
    for architecture in [space.smallest(), *(space.sample(generator) for _ in range(200))]:
        macs = space.cost(architecture).macs
        target = Target(create_objective("macs"), share=macs / largest).bind(space)
        (limit,) = Budget(space, {"macs": target.limit}).limits
        assert limit.most == macs == whole(macs / largest * largest)
    assert whole(macs - 1e-3) == macs - 1


def test_a_limit_of_a_count_is_rounded_down_and_another_is_not():
    space = vit()
    objective = Weighed("energy", {(space.rows[0],): [1.5, 2.5]}).bind(space)
    limits = Budget(space, {"params": 1e3 + 0.5, "energy": 2.5}, [objective]).limits
    assert [limit.most for limit in limits] == [1000, 2.5]


# Bad input


@pytest.mark.parametrize(
    "budget, message",
    [
        ({"params": 0}, "the limit of params is 0, expected a positive number"),
        ({"macs": -5}, "the limit of macs is -5, expected a positive number"),
        ({"params": 0.5}, "the limit of params is 0.5, expected a whole number of at least 1"),
        ({"energy": 0}, "the limit of energy is 0, expected a positive number"),
        ({"energy": float("nan")}, "the limit of energy is nan, expected a positive number"),
        ({"energy": "3"}, "the limit of energy is '3', expected a positive number"),
        ({"enrgy": 3}, "unknown cost in a budget 'enrgy'. Did you mean 'energy'? Choose one of: energy, macs, params"),
    ],
)
def test_budgets_that_cannot_be(budget, message):
    space = vit()
    objective = Weighed("energy", {(space.rows[0],): [1.5, 2.5]}).bind(space)
    with pytest.raises(TangleNASError) as caught:
        Budget(space, budget, [objective]).check()
    assert message in str(caught.value)
