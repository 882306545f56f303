"""The surrogate: what regression finds in losses, and that its best architecture is the best there is."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from known import Known, Notes, seconds_of
from spaces import SPACES, vit
from tiny import ALL, tiny

from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.surrogate import Terms, fitted, surrogate
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.superposition.size import Size


@pytest.mark.parametrize("proposals", [1, 8])
@pytest.mark.parametrize("seconds", [20.0, 35.0])
def test_seconds_are_those_of_a_race_and_of_all_samples_for_each_proposal(proposals, seconds, monkeypatch):
    spent = seconds_of(partial(surrogate, proposals=proposals), seconds, monkeypatch)
    # A second is kept for the measurement of the result, and some for the front, of which this race has judged most.
    assert 0.8 * seconds < spent < 1.05 * seconds


def interacting(space, seed):
    """A worth to which every row in use adds a number for its option, and every pair with the first row another."""
    generator = torch.Generator().manual_seed(seed)
    values = {row: torch.rand(len(row.options), generator=generator).tolist() for row in space.rows}
    first = next(row for row in space.rows if row.layer is None)
    pairs = {row: torch.rand(len(row.options), len(first.options), generator=generator).tolist() for row in space.rows}

    def worth(architecture):
        picks = space.assignment_of(architecture)
        return sum(values[row][i] + pairs[row][i][picks[first]] for row, i in picks.items() if row.active(picks))

    return worth


def everything(space):
    found = {}
    for picks in itertools.product(*space.decisions()):
        one = space.architecture_of({row: option for part in picks for row, option in part.items()})
        found[one.digest] = one
    return list(found.values())


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.part(2)
@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_finds_the_best_of_all_from_a_few(share):
    space = vit(depth=(1, 2, 3))
    low, high = space.cost(space.smallest()).macs, space.cost(space.largest()).macs
    limits = {"macs": int(low + share * (high - low))}
    every = [one for one in everything(space) if space.cost(one).macs <= limits["macs"]]
    hits = 0
    for seed in range(3):
        worth = interacting(space, seed)
        with Known(space, worth, limit=60, budget=Budget(space, limits), seed=seed) as candidates:
            surrogate(candidates, None)
            found = candidates.best()[0]["architecture"]
        assert space.cost(found).macs <= limits["macs"]
        assert len(candidates.records) <= 60 < len(every)
        hits += worth(found) == pytest.approx(max(map(worth, every)))
    assert hits == 3


@pytest.mark.parametrize("name", ALL)
def test_tables_add_up_to_what_the_regression_says(name):
    space = tiny(name)
    terms, generator = Terms(space), torch.Generator().manual_seed(0)
    weights = np.random.default_rng(0).normal(size=len(terms.features(space.largest())))
    tables = terms.tables(weights)
    for one in (space.largest(), space.smallest(), *(space.sample(generator) for _ in range(5))):
        picks = space.assignment_of(one)
        summed = sum(Size(rows, values).number(picks) for rows, values in tables.items())
        assert summed == pytest.approx(float(terms.features(one) @ weights))


def test_the_correlation_is_of_candidates_that_were_held_out():
    features = np.random.default_rng(0).integers(0, 2, (60, 8)).astype(float)
    truth = np.random.default_rng(1).normal(size=8)
    _, right = fitted(features, features @ truth)
    _, noise = fitted(features, np.random.default_rng(2).normal(size=60))
    assert right > 0.99 and abs(noise) < 0.4
    weights, unknown = fitted(features, np.ones(60))
    assert math.isnan(unknown) and not weights.any()


@pytest.mark.slow
def test_losses_that_are_no_numbers_are_left_out():
    space = vit(depth=(1, 2, 3))
    worth = interacting(space, 0)

    def broken(architecture):
        return math.nan if architecture.choices["depth"] == 3 else worth(architecture)

    with Known(space, broken, limit=60) as candidates:
        surrogate(candidates, None)
        assert math.isfinite(candidates.best()[0]["loss"])


def test_too_few_candidates_are_all_random_and_that_is_said():
    notes = Notes()
    with Known(vit(), lambda one: 1.0, limit=12, progress=notes) as candidates:
        surrogate(candidates, None)
    assert len(candidates.records) == 12
    (said,) = (line for line in notes.lines if "no regression" in line)
    assert "12 candidates without 10 proposals are too few to fit" in said and "raise discretize.candidates" in said


def test_a_space_that_does_not_tell_its_decisions_has_random_candidates():
    class Silent(SPACES["convolutional"]):
        def moves(self, assignment):
            return super().moves(assignment)

    space, notes = Silent(), Notes()
    space.name = "silent"
    with Known(space, lambda one: 1.0, limit=30, progress=notes) as candidates:
        surrogate(candidates, None)
    assert any("the space does not tell its decisions" in line for line in notes.lines)


@pytest.mark.slow
def test_a_mixture_is_not_needed_but_taken():
    space = vit(depth=(1, 2, 3))
    mixture: Mixture = space.mixture({k: torch.full((n, k), 1 / k) for k, n in space.stacks.items()})
    with Known(space, interacting(space, 1), limit=40, prior=mixture) as candidates:
        surrogate(candidates, mixture)
    assert 30 <= len(candidates.records) <= 40
