"""Fronts: what no other dominates, and NSGA-II that finds it."""

import random
import sys

import pytest
from known import Known, additive
from spaces import vit
from tiny import tiny

from tanglenas_engine.derivation.pareto import front, nsga2
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import figures
from tanglenas_engine.spaces.objective import Objective


def dominates(one, other, cost):
    at_least = one["accuracy"] >= other["accuracy"] and one[cost] <= other[cost]
    return at_least and (one["accuracy"], one[cost]) != (other["accuracy"], other[cost])


def test_a_front_is_what_no_other_dominates_each_pair_of_values_once():
    numbers = random.Random(0)
    for _ in range(200):
        rows = [{"accuracy": numbers.randrange(6), "params": numbers.randrange(6), "place": i} for i in range(12)]
        found = front(rows)
        wanted = [row for row in rows if not any(dominates(other, row, "params") for other in rows)]
        values = [(row["params"], row["accuracy"]) for row in found]
        assert values == sorted({(row["params"], row["accuracy"]) for row in wanted})
        for row in found:  # the first of equals
            equals = [r["place"] for r in rows if (r["params"], r["accuracy"]) == (row["params"], row["accuracy"])]
            assert row["place"] == min(equals)


def volume(rows, cost, space):
    """The area that a front dominates, of that between no accuracy and the largest cost."""
    most, area, points = getattr(space.cost(space.largest()), cost), 0.0, front(rows, cost)
    for point, following in zip(points, [*points[1:], {cost: most}], strict=True):
        area += point["accuracy"] * (following[cost] - point[cost])
    return area


@pytest.mark.parametrize("name, cost", [("autoformer_nano", "params"), ("mobilenetv3_nano", "flops")])
def test_it_finds_a_better_front_than_as_many_random_candidates(name, cost):
    space = tiny(name)
    better = 0
    for seed in range(3):
        worth = additive(space, seed)
        with Known(space, worth, limit=160, seed=seed, cost=cost) as bred:
            nsga2(bred, None)
        with Known(space, worth, limit=160, seed=seed) as drawn:
            drawn.judge(drawn.fresh(160))
        assert len(bred.rows) == len({row["digest"] for row in bred.rows}) == 160
        better += volume(bred.rows, cost, space) > volume(drawn.rows, cost, space)
    assert better == 3


class Spared(Objective):
    """The parameters that an architecture has less than the largest: what is cheap by it is large."""

    name = "spared"

    def measure(self, architecture):
        return float(self.space.cost(self.space.largest()).params - self.space.cost(architecture).params)


def test_the_cost_can_be_an_objective():
    space = tiny("autoformer_nano")
    worth = additive(space, 0)
    share = []
    for cost in ("params", "spared"):
        with Known(space, worth, limit=120, cost=cost, objectives=[Spared().bind(space)]) as bred:
            nsga2(bred, None)
        share.append(sum(row["params"] for row in bred.rows[20:]) / 100 / space.cost(space.largest()).params)
    assert share[0] + 0.05 < share[1]


def test_it_finds_the_whole_front_of_a_small_space():
    space = vit()
    worth = additive(space, 0)
    with Known(space, worth, limit=10**4) as every:
        every.judge(every.fresh(space.size))
    assert len(every.rows) == space.size == 168
    with Known(space, worth, limit=80) as bred:
        nsga2(bred, None, population=16)
    exact = {row["digest"] for row in front(every.rows)}
    found = {row["digest"] for row in front(bred.rows)}
    assert len(exact) > 3 and len(found & exact) >= 0.7 * len(exact)


def test_equal_seeds_give_equal_fronts_and_a_small_space_ends_the_search():
    space = vit(depth=(1,), num_heads=(1, 3), mlp_ratio=(1.5, 2))
    runs = []
    for _ in range(2):
        with Known(space, additive(space, 0), limit=100) as tried:
            nsga2(tried, None, population=4)
        runs.append(tried.rows)
    assert runs[0] == runs[1] and len(runs[0]) == space.size == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"population": 1}, "nsga2.population is 1, expected a whole number of at least 2"),
        ({"mutation_probability": 2}, "nsga2.mutation_probability is 2, expected a number from 0 to 1"),
        ({"single_probability": None}, "nsga2.single_probability is None"),
    ],
)
def test_settings_that_cannot_be(options, message):
    space = vit()
    with Known(space, additive(space, 0)) as tried, pytest.raises(TangleNASError) as caught:
        nsga2(tried, None, **options)
    assert message in str(caught.value)


def test_without_pymoo_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    space = vit()
    with Known(space, additive(space, 0)) as tried, pytest.raises(TangleNASError, match=r"pip install 'tanglenas\[pa"):
        nsga2(tried, None)


def test_the_figure_shows_the_candidates_and_their_front(tmp_path):
    rows = [{"accuracy": 50.0 + i % 7, "params": 1000 * i, "flops": 10**7 * (9 - i)} for i in range(1, 9)]
    drawn = []
    for name, shown, points, cost in (
        ("one", rows, front(rows), "params"),
        ("same", rows, front(rows), "params"),
        ("flops", rows, front(rows, "flops"), "flops"),
        ("less", rows, front(rows)[:2], "params"),
        ("single", rows[:1], rows[:1], "params"),
        ("none", [], [], "params"),
    ):
        figures.pareto(shown, points, cost, tmp_path / f"{name}.png")
        drawn.append((tmp_path / f"{name}.png").read_bytes())
    assert drawn[0] == drawn[1] and len(set(drawn)) == 5 and all(image[:4] == b"\x89PNG" for image in drawn)
