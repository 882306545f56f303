"""Successive halving: from a batch to all samples, and as many candidates as seconds allow."""

import pytest

from tanglenas_engine.derivation.halving import Derivation, Trial, rungs


@pytest.mark.parametrize(
    "samples, batch_size, count, expected",
    [
        (640, 10, 100, [10, 40, 160, 640]),
        (640, 10, 5, [40, 160, 640]),
        (640, 10, 2, [160, 640]),
        (640, 10, 1, [640]),
        (639, 10, 10**6, [10, 40, 160, 639]),
        (2250, 256, 300, [256, 759, 2250]),
        (40, 10, 100, [10, 40]),
        (21, 10, 100, [10, 21]),
        (19, 10, 100, [19]),
        (8, 256, 100, [8]),
    ],
)
def test_rungs_go_from_a_batch_to_all_samples_while_there_are_candidates(samples, batch_size, count, expected):
    assert rungs(count, samples, batch_size) == expected


@pytest.mark.parametrize("size, single", [(None, 0), (20, 0), (5, 0), (None, 10), (20, 7)])
@pytest.mark.parametrize("few", [256, 100])
def test_the_number_that_seconds_afford_is_the_largest_though_fewer_may_take_longer(size, single, few):
    """Few candidates have races that begin with many samples. A sample takes a second."""
    most = 90
    for left in range(15_000, 200_000, 5_000):
        trial = Trial(1.0, few, float(few), 1024, 1024.0, left)
        derivation = Derivation(trial, samples=4096, batch_size=256, generation=size, single=single)
        fitting = [number for number in range(1, most + 1) if derivation.seconds(number) <= left]
        assert derivation.affordable(most) == max(fitting, default=0), left
