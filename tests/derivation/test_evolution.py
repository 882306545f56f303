"""Evolution: children that are architectures, generations as they were asked for, and better finds than at random."""

from functools import partial

import pytest
import torch
from known import Known, additive, seconds_of
from spaces import vit
from tiny import ALL, tiny

from tanglenas_engine.derivation.evolution import Variation, evolution
from tanglenas_engine.errors import TangleNASError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ALL)
def test_children_are_architectures_in_every_space(name):
    space, draw = tiny(name), generator()
    for _ in range(5):
        one, other = space.sample(draw), space.sample(draw)
        child = Variation(space, draw).crossed(one, other)
        assert space.assignment_of(child)  # raises if it is none
        picks, pair = space.assignment_of(child), [space.assignment_of(one), space.assignment_of(other)]
        for row in space.rows:
            if row.active(picks):
                assert picks[row] in [parent[row] for parent in pair if row.active(parent)]
        mutant = Variation(space, draw).mutated(one)
        assert space.assignment_of(mutant)


@pytest.mark.parametrize("name", ["convolutional", "autoformer_nano", "nb201", "darts", "toy_conv_macro"])
def test_crossover_mixes_and_mutation_changes(name):
    space, draw = tiny(name), generator()
    one, other = space.sample(draw), space.sample(draw)
    children = {Variation(space, draw).crossed(one, other).digest for _ in range(20)}
    assert len(children - {one.digest, other.digest}) > 3
    assert Variation(space, draw).crossed(one, one) == one
    variation = Variation(space, draw, mutation_probability=0, single_probability=0)
    mutants = [variation.mutated(one) for _ in range(20)]
    assert all(mutant != one for mutant in mutants) and len({mutant.digest for mutant in mutants}) > 3


def test_darts_nodes_come_whole_from_one_parent():
    space, draw = tiny("darts"), generator(1)
    one, other = space.sample(draw), space.sample(draw)
    child = Variation(space, draw).crossed(one, other)
    groups = [list(alternatives[0]) for alternatives in space.decisions()]
    assert len(groups) == 8
    picks, pair = space.assignment_of(child), [space.assignment_of(one), space.assignment_of(other)]
    for group in groups:
        assert any(all(picks[row] == parent[row] for row in group) for parent in pair)


def test_a_space_that_does_not_say_what_is_decided_together_gets_a_parent_where_a_child_is_none():
    space, draw = tiny("darts"), generator()
    one, other = space.sample(draw), space.sample(draw)
    space.decisions = super(type(space), space).decisions
    children = [Variation(space, draw).crossed(one, other) for _ in range(10)]
    assert all(space.assignment_of(child) for child in children) and one in children


def test_without_a_probability_exactly_one_row_moves():
    space, draw = tiny("nb201"), generator()
    variation = Variation(space, draw, mutation_probability=0, single_probability=0)
    for _ in range(20):
        one = space.sample(draw)
        before, after = space.assignment_of(one), space.assignment_of(variation.mutated(one))
        assert sum(before[row] != after[row] for row in space.rows) == 1


def test_each_kind_of_row_has_its_own_probability():
    space, draw = vit(), generator()
    one = space.architecture(embed_dim=8, depth=2, num_heads=[1, 1], mlp_ratio=[2, 2])
    for probability, single in ((1.0, 0.0), (0.0, 1.0)):
        child = Variation(space, draw, "evolution", probability, single).mutated(one)
        once = [child.choices[name] != one.choices[name] for name in ("embed_dim", "depth")]
        assert all(once) if single else not any(once)
        if probability:
            assert child.choices["num_heads"] == (3, 3) and child.choices["mlp_ratio"] == (1.5, 1.5)


def test_a_network_that_grows_deeper_has_random_options_in_its_new_layers():
    space, draw = vit(depth=(1, 3)), generator()
    one = space.architecture(embed_dim=8, depth=1, num_heads=[1], mlp_ratio=[1.5])
    variation = Variation(space, draw, "evolution", 0, 1)
    grown = [variation.mutated(one).choices["num_heads"][1:] for _ in range(30)]
    assert len(set(grown)) == 4


def test_generations_are_as_large_and_as_many_as_asked_for():
    space = tiny("autoformer_nano")
    with Known(space, additive(space, 0), limit=1000) as tried:
        evolution(tried, None, population=12, parents=4, crossovers=5, mutations=5, generations=3)
    assert [row["generation"] for row in tried.records] == [g for g in range(4) for _ in range(12)]
    assert len({row["digest"] for row in tried.records}) == 48
    with Known(space, additive(space, 0), limit=30) as tried:
        evolution(tried, None, population=12, parents=4, crossovers=5, mutations=5)
    assert [row["generation"] for row in tried.records] == [0] * 12 + [1] * 12 + [2] * 6


def test_a_small_space_is_searched_through_and_no_further():
    space = vit(depth=(1,), num_heads=(1, 3), mlp_ratio=(1.5, 2))
    with Known(space, additive(space, 0), limit=100) as tried:
        evolution(tried, None, population=3, parents=2, crossovers=1, mutations=1)
    assert len(tried.records) == space.size == 8


@pytest.mark.parametrize("name", ["autoformer_nano", "mobilenetv3_nano"])
@pytest.mark.exhaustive
def test_it_finds_better_architectures_than_as_many_random_ones(name):
    space = tiny(name)
    better = 0
    for seed in range(5):
        worth = additive(space, seed)
        with Known(space, worth, limit=120, seed=seed) as bred:
            evolution(bred, None)
        with Known(space, worth, limit=120, seed=seed) as drawn:
            drawn.judge(drawn.fresh(120))
        assert len(bred.records) == len(drawn.records) == 120
        better += bred.best()[0]["loss"] < drawn.best()[0]["loss"]
    assert better == 5


@pytest.mark.parametrize("population", [4, 20])
@pytest.mark.parametrize("seconds", [20.0, 40.0])
def test_seconds_are_those_of_a_race_for_each_generation(population, seconds, monkeypatch):
    method = partial(evolution, population=population, parents=2, crossovers=2, mutations=2)
    assert 0.85 * seconds < seconds_of(method, seconds, monkeypatch) < 1.05 * seconds


def test_equal_seeds_breed_the_same():
    space = tiny("autoformer_nano")
    runs = []
    for seed in (3, 3, 4):
        with Known(space, additive(space, 0), limit=60, seed=seed) as tried:
            evolution(tried, None)
        runs.append(tried.records)
    assert runs[0] == runs[1] != runs[2]


def one_move_away(space, architecture):
    picks = space.assignment_of(architecture)
    return {space.architecture_of({**picks, **change}).digest for change in space.moves(picks)}


@pytest.mark.slow
def test_a_large_tournament_breeds_from_the_best_alone():
    space = tiny("nb201")
    with Known(space, additive(space, 0), limit=30) as tried:
        evolution(
            tried, None, population=10, parents=5, crossovers=0, mutations=10, mutation_probability=0.0,
            generations=1, tournament=200,
        )  # fmt: skip
    best = min(tried.records[:10], key=lambda row: row["loss"])["architecture"]
    near = one_move_away(space, best)
    assert all(row["digest"] in near for row in tried.records[10:])


@pytest.mark.slow
def test_parents_retire(monkeypatch):
    mutated = Variation.mutated
    space, worth = tiny("nb201"), additive(tiny("nb201"), 0)
    for lifetime, most in ((1, 1), (2, 2), (None, 99)):
        ages = set()
        with Known(space, lambda architecture: worth(space.architecture(**architecture.choices)), limit=60) as tried:
            known = {}

            def spy(variation, architecture, tried=tried, ages=ages, known=known):
                known.update({row["digest"]: row["generation"] for row in tried.records})
                ages.add(max(known.values()) + 1 - known[architecture.digest])
                return mutated(variation, architecture)

            monkeypatch.setattr(Variation, "mutated", spy)
            evolution(tried, None, population=10, parents=5, crossovers=0, mutations=10, lifetime=lifetime)
        assert max(ages) <= most and (lifetime is not None or max(ages) > 2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"population": 0}, "evolution.population is 0, expected a whole number of at least 1"),
        ({"parents": 0}, "evolution.parents is 0"),
        ({"crossovers": -1}, "evolution.crossovers is -1, expected a whole number of at least 0"),
        ({"mutations": 1.5}, "evolution.mutations is 1.5"),
        ({"tournament": 0}, "evolution.tournament is 0"),
        ({"generations": 0}, "evolution.generations is 0"),
        ({"lifetime": 0}, "evolution.lifetime is 0"),
        ({"mutation_probability": 1.1}, "evolution.mutation_probability is 1.1, expected a share from 0 to 1"),
        ({"single_probability": -0.1}, "evolution.single_probability is -0.1, expected a share from 0 to 1"),
        ({"mutation_probability": True}, "evolution.mutation_probability is True"),
        ({"population": 4, "parents": 5, "crossovers": 2, "mutations": 2}, "parents is 5, more than the 4 of a popul"),
        ({"population": 10, "crossovers": 6, "mutations": 5}, "are 6 and 5, together more than the 10 of a population"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_judged(options, message):
    space = vit()
    with Known(space, additive(space, 0)) as tried, pytest.raises(TangleNASError) as caught:
        evolution(tried, None, **options)
    assert message in str(caught.value) and not tried.records
