"""The regression behind a race's proposals: its features, and what it learns from a few losses."""

import math

import numpy as np
import pytest
import torch
from spaces import REGISTERED, SPACES, make, vit

from tanglenas_engine.derivation.regression import features_of, predicted


def drawn(space, count):
    generator = torch.Generator().manual_seed(0)
    found = {one.digest: one for one in (space.sample(generator) for _ in range(4 * count))}
    return [*found.values()][:count]


def test_features_are_places_of_numbers_and_the_supernet_s_loss():
    space = vit(depth=(3, 1, 2), embed_dim=(8, 12))
    some = drawn(space, 12)
    features = features_of(space, some, [*range(12)])
    names = [row.choice for row in space.rows]
    assert features.shape == (12, len(names) + 1)
    assert features[:, names.index("depth")].tolist() == [one.choices["depth"] - 2 for one in some]
    assert features[:, names.index("embed_dim")].tolist() == [{8: -1, 12: 1}[one.choices["embed_dim"]] for one in some]
    assert features[:, -1].mean() == pytest.approx(0) and features[:, -1].std() == pytest.approx(1)
    assert (np.diff(features[:, -1]) > 0).all()
    for one, values in zip(some, features, strict=True):
        unused = [place for place, row in enumerate(space.rows) if not row.active(space.assignment_of(one))]
        assert (values[unused] == 0).all()


@pytest.mark.parametrize("name", sorted([*SPACES, *REGISTERED]))
def test_what_options_add_is_learned_from_a_third_of_the_networks(name):
    """Of any space, though the supernet says nothing: losses to which every row in use adds a number."""
    space = make(name)
    some = drawn(space, 60)
    known = len(some) // 3
    if known < 10:
        pytest.skip(f"{name} has {len(some)} architectures")
    values = {row: np.random.default_rng(place).permutation(len(row.options)) for place, row in enumerate(space.rows)}
    values |= {row: np.arange(len(row.options)) for row in space.rows if isinstance(row.options[0], int | float)}
    picks = [space.assignment_of(one) for one in some]
    losses = [sum(values[row][each[row]] for row in each if row.active(each)) for each in picks]
    guesses = predicted(features_of(space, some, [0.0] * len(some)), dict(enumerate(losses[:known])))
    assert np.corrcoef(guesses[known:], losses[known:])[0, 1] > 0.3


@pytest.mark.parametrize("worst", [math.nan, math.inf, 50.0, 1e30])
def test_one_loss_that_is_far_off_does_not_hide_the_others(worst):
    space = vit(depth=(1, 2, 3))
    some = drawn(space, 30)
    features = features_of(space, some, [0.0] * 30)
    losses = features[:, :-1].sum(1)
    known = {number: float(loss) for number, loss in enumerate(losses[:12])}
    without = np.corrcoef(predicted(features, known)[12:], losses[12:])[0, 1]
    largest = max(known, key=lambda number: known[number])
    assert np.corrcoef(predicted(features, known | {largest: worst})[12:], losses[12:])[0, 1] > without - 0.1


def test_losses_that_are_no_numbers_count_as_bad():
    space = vit()
    some = drawn(space, 4)
    features = features_of(space, some, [1.0, math.nan, 2.0, math.inf])
    assert features[0, -1] < features[2, -1] < features[1, -1] == features[3, -1]
    assert predicted(features, {0: 1.0, 1: math.nan, 2: 3.0}) == pytest.approx(
        predicted(features, {0: 1.0, 1: 5.0, 2: 3.0})  # the median 2, and three times 2 - 1
    )
    assert np.ptp(predicted(features, {0: math.nan, 1: math.nan})) == 0


@pytest.mark.parametrize(
    "losses, as_if",
    [
        ([1.0, math.nan, math.nan, math.nan], [1.0, 2.0, 2.0, 2.0]),
        ([1.0, 1.0, math.nan, math.nan], [1.0, 1.0, 2.0, 2.0]),
        ([1.0, 1.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 2.0, 3.0]),
        ([1.0, 1.0, 1.0, 2.0, math.nan], [1.0, 1.0, 1.0, 2.0, 3.0]),
        ([1.0, 2.0, -math.inf], [1.0, 2.0, 3.0]),
    ],
)
def test_a_network_that_failed_is_worse_than_one_that_trained_though_few_losses_differ(losses, as_if):
    space = vit(depth=(1, 2, 3))
    some = drawn(space, 12)
    features = features_of(space, some, [*range(12)])
    guesses = predicted(features, dict(enumerate(losses)))
    assert np.ptp(guesses) > 0
    assert guesses == pytest.approx(predicted(features, dict(enumerate(as_if))))


def test_a_few_losses_are_believed_in_part():
    """By 12 networks at the ends of one row: neither as they are nor hardly at all."""
    ends = np.array([[-1.0], [1.0]] * 6)
    guesses = predicted(ends, dict(enumerate(ends[:, 0])))
    assert 1.0 < np.ptp(guesses) < 1.9  # of 2


def test_without_a_loss_all_predictions_are_alike():
    space = vit()
    features = features_of(space, drawn(space, 4), [*range(4)])
    assert predicted(features, {}).tolist() == [0.0] * 4
