"""One judging for a whole front: what it finds at each level of cost, and what it judges for that."""

import itertools
import math

import pytest
from known import Known, Notes, Raced, Spared, additive, volume
from spaces import SPACES, vit
from tiny import tiny

from tanglenas_engine.derivation.budget import Budget, cheapest, dearest
from tanglenas_engine.derivation.levels import front
from tanglenas_engine.derivation.pareto import final_front
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.spaces.cost import Additive
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.superposition.size import combinations


class Counted(Objective):
    """A cost with tables that falls where the parameters grow: 1 for each row at its first option."""

    name = "counted"

    def terms(self, space):
        rows = {(*(row.gate[0].rows if row.gate else ()), row): row for row in space.rows}
        return Additive(
            {
                key: [
                    float(row.active(picks) and row.options[picks[row]] == min(row.options))
                    for picks in combinations(key)
                ]
                for key, row in rows.items()
            }
        )


def judged(space, worth, **options):
    """Return the records of all architectures of a space, or of so many."""
    with Known(space, worth, **{"limit": space.size} | options) as every:
        every.judge(every.fresh(every.limit))
    return every.records


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_best_network_of_each_level_of_a_small_space(seed):
    space = vit(depth=(1, 2, 3))
    worth = additive(space, seed)
    every = judged(space, worth)
    costs = sorted(row["macs"] for row in every)
    levels = [costs[len(costs) * part // 8] for part in (1, 3, 5)] + [costs[-1]]
    with Known(space, worth, limit=45, cost="macs", fill=0.9, seed=seed) as tried:
        front(tried, None, levels=levels)
        found = final_front(tried)
    assert len(tried.records) == 45 and len(every) == space.size == 168
    hits = 0
    for level in levels:
        best, least = (min(row["loss"] for row in rows if row["macs"] <= level) for rows in (found, every))
        hits += best == pytest.approx(least)
    assert hits >= 3


@pytest.mark.parametrize("name, cost", [("autoformer_nano", "params"), ("mobilenetv3_nano", "macs")])
@pytest.mark.exhaustive
def test_its_front_is_better_than_that_of_as_many_random_candidates(name, cost):
    space = tiny(name)
    most = getattr(space.cost(space.largest()), cost)
    for seed in range(3):
        worth = additive(space, seed)
        with Known(space, worth, limit=160, seed=seed, cost=cost) as tried:
            front(tried, None)
            final_front(tried)
        assert len({row["digest"] for row in tried.records}) == 160
        drawn = judged(space, worth, limit=160, seed=seed)
        assert volume(tried.records, cost, most) > volume(drawn, cost, most)


def test_only_the_front_is_judged_on_all_samples():
    space = tiny("autoformer_nano")
    worth = additive(space, 0)
    with Raced(space, worth, ease=5.0, samples=640, batch_size=10, limit=120) as tried:
        front(tried, None)
        assert {samples for _, samples in tried.measurements} == {10} and len(tried.measurements) == 120
        found = final_front(tried)
    rungs = [[digest for digest, samples in tried.measurements if samples == count] for count in (10, 40, 160, 640)]
    assert len(rungs[0]) == 120 and sum(map(len, rungs)) == len(tried.measurements)
    assert {row["digest"] for row in found} == set(rungs[1]) == set(rungs[2]) == set(rungs[3])
    assert 3 < len(found) < 60 and all(row["loss"] == 100 - worth(row["architecture"]) for row in found)


def test_random_candidates_are_of_the_costs_between_levels_or_fill_those_that_are_given():
    space = tiny("autoformer_nano")
    low, high = (space.cost(end(space, "macs")).macs for end in (cheapest, dearest))
    with Known(space, additive(space, 0), limit=100, cost="macs", fill=0.95) as tried:
        front(tried, None, levels=4, rounds=5)
    first = [row["macs"] for row in tried.records if row["generation"] == 0]
    edges = [low * (high / low) ** (step / 4) for step in range(5)]
    numbers = [sum(a <= cost <= b for cost in first) for a, b in itertools.pairwise(edges)]
    assert len(first) == 80 and all(15 <= number <= 25 for number in numbers)  # the cheapest costs are few
    levels = [0.4 * high, 0.7 * high]
    with Known(space, additive(space, 0), limit=100, cost="macs", fill=0.95) as tried:
        front(tried, None, levels=levels, rounds=5)
    first = [row["macs"] for row in tried.records if row["generation"] == 0]
    numbers = [sum(0.95 * level <= cost <= level for cost in first) for level in levels]
    assert sum(numbers) == 90 and min(numbers) > 30


def test_every_candidate_is_within_the_budget_and_levels_beyond_it_are_its_own():
    space = tiny("autoformer_nano")
    high = space.cost(space.largest())
    budget = Budget(space, {"macs": int(0.5 * high.macs), "params": int(0.6 * high.params)})
    for levels in (5, [0.3 * high.macs, 0.8 * high.macs, high.macs]):
        notes = Notes()
        with Known(space, additive(space, 0), limit=60, cost="macs", budget=budget, fill=0.9, progress=notes) as tried:
            front(tried, None, levels=levels)
        assert len(tried.records) == 60
        assert any("no architecture within the budget has more" in line for line in notes.lines) == (levels != 5)
        assert max(row["macs"] for row in tried.records) <= 0.5 * high.macs
        assert max(row["params"] for row in tried.records) <= 0.6 * high.params
        if levels != 5:  # of two limits, each level's cost is what candidates fill
            first = [row["macs"] for row in tried.records if row["generation"] == 0]
            filled = [
                sum(0.9 * level <= cost <= level for cost in first) for level in (0.3 * high.macs, 0.5 * high.macs)
            ]
            assert sum(filled) == len(first) and min(filled) > 15
        assert {row["generation"] for row in tried.records} == {0, 1, 2, 3}


def test_levels_start_at_the_cheapest_architecture_within_the_budget():
    """What is cheap in parameters may be dear in the cost that is limited."""
    space = tiny("autoformer_nano")
    objective, low = Counted().bind(space), space.cost(space.smallest()).params
    most = 0.5 * objective.cost(space.smallest())
    budget = Budget(space, {"counted": most}, [objective])
    with Known(space, additive(space, 0), limit=60, budget=budget, objectives=[objective]) as tried:
        front(tried, None, levels=4)
    assert len(tried.records) == 60 and {row["generation"] for row in tried.records} == {0, 1, 2, 3}
    assert all(row["counted"] <= most for row in tried.records) and min(row["params"] for row in tried.records) > low


def test_a_cost_in_place_of_a_number_of_levels_ends_at_once():
    space = tiny("autoformer_nano")
    notes = Notes()
    with Known(space, additive(space, 0), limit=60, progress=notes) as tried:
        front(tried, None, levels=4_500_000)
    assert len(tried.records) == 60 and "too few to fit" in notes.lines[0]


def test_the_cost_can_be_an_objective_by_which_one_architecture_is_free():
    space = tiny("autoformer_nano")
    notes = Notes()
    objective = Spared().bind(space)
    with Known(space, additive(space, 0), limit=60, cost="spared", objectives=[objective], progress=notes) as tried:
        front(tried, None)
        found = final_front(tried)
    assert len(tried.records) == 60 and len(found) > 1
    assert any("a cost of the budget has no tables" in line for line in notes.lines)


def test_losses_that_are_no_numbers_are_left_out():
    space = tiny("autoformer_nano")
    worth = additive(space, 0)

    def broken(architecture):
        return math.nan if architecture.choices["depth"] == min(space.choices["depth"].options) else worth(architecture)

    with Known(space, broken, limit=80) as tried:
        front(tried, None)
        found = final_front(tried)
    assert found and all(math.isfinite(row["loss"]) for row in found)


def test_a_prior_draws_the_first_candidates():
    space = tiny("autoformer_nano")
    largest = space.mixture(space.one_hot(space.largest()).tensors())
    with Known(space, additive(space, 0), limit=60, prior=largest) as tried:
        front(tried, None)
    assert tried.records[0]["architecture"] == space.largest()


def test_equal_seeds_give_equal_candidates_and_a_small_space_ends_the_search():
    space = vit(depth=(1, 2), num_heads=(1, 3), mlp_ratio=(1.5, 2))
    runs = []
    for _ in range(2):
        with Known(space, additive(space, 0), limit=1000) as tried:
            front(tried, None, levels=3)
        runs.append(tried.records)
    assert runs[0] == runs[1] and len(runs[0]) == space.size


def test_without_enough_candidates_or_decisions_all_are_random_and_that_is_said():
    class Silent(SPACES["convolutional"]):
        def moves(self, assignment):
            return super().moves(assignment)

    silent = Silent()
    silent.name = "silent"
    for space, limit, reason in (
        (vit(), 30, "30 candidates without 36 proposals are too few to fit, which takes 10"),
        (silent, 60, "the space does not tell its decisions"),
    ):
        notes = Notes()
        with Known(space, additive(space, 0), limit=limit, progress=notes) as tried:
            front(tried, None)
        assert len(tried.records) == limit and {row["generation"] for row in tried.records} == {0}
        assert reason in next(line for line in notes.lines if "no regression" in line)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"levels": 0}, "front.levels is 0, expected a whole number of at least 1"),
        ({"levels": "macs"}, "front.levels is 'macs', expected a whole number"),
        ({"levels": []}, "the number of front.levels is 0, expected a whole number of at least 1"),
        ({"levels": [-1]}, "front.levels is -1, expected a positive number"),
        ({"levels": True}, "front.levels is True, expected a whole number"),
        ({"levels": [1, 10**4]}, r"at most 1 params: the smallest has [\d,]+\. Raise"),
        ({"levels": [10**4, 10**9]}, r"has 1,000,000,000 params, but no architecture of .* more than [\d,]+: lower it"),
        ({"rounds": 0}, "front.rounds is 0, expected a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be(options, message):
    space = vit()
    with Known(space, additive(space, 0)) as tried, pytest.raises(TangleNASError, match=message):
        front(tried, None, **options)
