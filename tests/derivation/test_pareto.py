"""Fronts: what no other dominates, and NSGA-II that finds it."""

import math
import random
import sys
from collections import Counter

import pytest
from known import Known, Raced, Spared, additive, volume
from spaces import vit
from tiny import tiny

from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.pareto import final_front, nsga2, undominated
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import figures


def dominates(one, other, cost):
    at_most = one["loss"] <= other["loss"] and one[cost] <= other[cost]
    return at_most and (one["loss"], one[cost]) != (other["loss"], other[cost])


def test_a_front_is_what_no_other_dominates_each_pair_of_values_once():
    numbers = random.Random(0)
    for _ in range(200):
        rows = [
            {"loss": numbers.randrange(6), "params": numbers.randrange(6), "samples": 8, "place": i} for i in range(12)
        ]
        found = undominated(rows)
        wanted = [row for row in rows if not any(dominates(other, row, "params") for other in rows)]
        values = [(row["params"], row["loss"]) for row in found]
        assert values == sorted({(row["params"], row["loss"]) for row in wanted})
        for row in found:  # the first of equals
            equals = [r["place"] for r in rows if (r["params"], r["loss"]) == (row["params"], row["loss"])]
            assert row["place"] == min(equals)


@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf])
def test_only_records_of_the_most_samples_are_on_a_front_and_only_finite_losses(worst):
    whole = [{"loss": loss, "params": params, "samples": 64} for loss, params in ((worst, 1), (3.0, 2), (1.0, 5))]
    parts = [{"loss": loss, "params": params, "samples": 16} for loss, params in ((0.5, 1), (0.1, 9))]
    assert undominated([*parts, *whole]) == whole[1:]
    assert undominated(parts) == parts and undominated([]) == [] == undominated(whole[:1])


@pytest.mark.exhaustive
def test_after_a_race_the_whole_front_is_judged_on_all_samples():
    space = tiny("autoformer_nano")
    luck, high = additive(space, 1), space.cost(space.largest()).params

    def worth(architecture):
        return 0.5 * luck(architecture) + 50 * space.cost(architecture).params / high

    with Known(space, worth, limit=200) as every:
        drawn = every.fresh(200)
        every.judge(drawn)
    measured = []
    for ease in (0.0, 20.0, -20.0):
        with Raced(space, worth, ease=ease, samples=640, batch_size=10, limit=200) as tried:
            tried.judge(drawn)
            assert Counter(record["samples"] for record in tried.records)[640] == 4
            found = final_front(tried)
        assert [record["digest"] for record in found] == [record["digest"] for record in undominated(every.records)]
        assert all(record["loss"] == 100 - worth(record["architecture"]) for record in found)
        assert found == undominated(tried.records) and tried.best()[0] is found[-1] and len(found) > 4
        assert sum(record["samples"] == 640 for record in tried.records) < 40
        assert len(set(tried.measurements)) == len(tried.measurements)
        measured.append(tried.measurements)
    assert measured[0] == measured[1] == measured[2]


@pytest.mark.parametrize("name, cost", [("autoformer_nano", "params"), ("mobilenetv3_nano", "macs")])
@pytest.mark.exhaustive
def test_it_finds_a_better_front_than_as_many_random_candidates(name, cost):
    space = tiny(name)
    most, better = getattr(space.cost(space.largest()), cost), 0
    for seed in range(3):
        worth = additive(space, seed)
        with Known(space, worth, limit=160, seed=seed, cost=cost) as bred:
            nsga2(bred, None)
        with Known(space, worth, limit=160, seed=seed) as drawn:
            drawn.judge(drawn.fresh(160))
        assert len(bred.records) == len({row["digest"] for row in bred.records}) == 160
        better += volume(bred.records, cost, most) > volume(drawn.records, cost, most)
    assert better == 3


@pytest.mark.slow
def test_the_cost_can_be_an_objective():
    space = tiny("autoformer_nano")
    worth = additive(space, 0)
    share = []
    for cost in ("params", "spared"):
        with Known(space, worth, limit=120, cost=cost, objectives=[Spared().bind(space)]) as bred:
            nsga2(bred, None)
        share.append(sum(row["params"] for row in bred.records[20:]) / 100 / space.cost(space.largest()).params)
    assert share[0] + 0.05 < share[1]


@pytest.mark.slow
def test_it_finds_the_whole_front_of_a_small_space():
    space = vit()
    worth = additive(space, 0)
    with Known(space, worth, limit=10**4) as every:
        every.judge(every.fresh(space.size))
    assert len(every.records) == space.size == 168
    with Known(space, worth, limit=80) as bred:
        nsga2(bred, None, population=16)
    exact = {row["digest"] for row in undominated(every.records)}
    found = {row["digest"] for row in undominated(bred.records)}
    assert len(exact) > 3 and len(found & exact) >= 0.7 * len(exact)


@pytest.mark.slow
def test_it_covers_all_costs_within_a_budget_and_judges_each_candidate_on_all_samples():
    space = tiny("autoformer_nano")
    high = space.cost(space.largest()).params
    budget = Budget(space, {"params": int(0.9 * high)})
    with Raced(space, additive(space, 0), samples=40, batch_size=10, limit=60, budget=budget, fill=0.95) as tried:
        nsga2(tried, None)
    assert {samples for _, samples in tried.measurements} == {40} and len(tried.measurements) == 60
    assert min(record["params"] for record in tried.records[:20]) < 0.6 * high
    assert max(record["params"] for record in tried.records) <= 0.9 * high


def test_candidates_without_a_loss_are_dominated_by_all_others():
    space = tiny("autoformer_nano")
    worth = additive(space, 0)

    def broken(architecture):
        return math.nan if architecture.choices["depth"] == min(space.choices["depth"].options) else worth(architecture)

    with Known(space, broken, limit=80) as tried:
        nsga2(tried, None, population=10)
    lost = [math.isnan(record["loss"]) for record in tried.records]
    assert 0 < sum(lost[40:]) < sum(lost[:40])
    assert not any(math.isnan(record["loss"]) for record in final_front(tried))


def test_equal_seeds_give_equal_fronts_and_a_small_space_ends_the_search():
    space = vit(depth=(1,), num_heads=(1, 3), mlp_ratio=(1.5, 2))
    runs = []
    for _ in range(2):
        with Known(space, additive(space, 0), limit=100) as tried:
            nsga2(tried, None, population=4)
        runs.append(tried.records)
    assert runs[0] == runs[1] and len(runs[0]) == space.size == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"population": 1}, "nsga2.population is 1, expected a whole number of at least 2"),
        ({"mutation_probability": 2}, "nsga2.mutation_probability is 2, expected a share from 0 to 1"),
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


@pytest.mark.slow
def test_the_figure_shows_the_candidates_and_their_front(tmp_path):
    rows = [{"loss": 5.0 - i % 7, "params": 1000 * i, "macs": 10**7 * (9 - i), "samples": 8} for i in range(1, 9)]
    drawn = []
    for name, shown, points, cost in (
        ("one", rows, undominated(rows), "params"),
        ("same", rows, undominated(rows), "params"),
        ("macs", rows, undominated(rows, "macs"), "macs"),
        ("less", rows, undominated(rows)[:2], "params"),
        ("single", rows[:1], rows[:1], "params"),
        ("none", [], [], "params"),
    ):
        figures.pareto(shown, points, cost, tmp_path / f"{name}.png")
        drawn.append((tmp_path / f"{name}.png").read_bytes())
    assert drawn[0] == drawn[1] and len(set(drawn)) == 5 and all(image[:4] == b"\x89PNG" for image in drawn)
