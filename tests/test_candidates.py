"""Candidates: each judged once, by itself, on data fetched once; drawn within the budget and never twice."""

import pytest
import torch
from spaces import Convolutional, vit
from tiny import tiny
from torch import nn

from tanglenas_engine.data import TensorSamples
from tanglenas_engine.derivation import candidates as module
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.testing import random_data, same

SPLITS = ("weights", "architecture")


class Counted(TensorSamples):
    """Samples that count how many were fetched."""

    fetched = 0

    def batch(self, indices):
        self.fetched += len(indices)
        return super().batch(indices)


def counted(space, samples=30):
    inputs = space.example_input(samples)
    return Counted(inputs, torch.arange(samples) % 3)


def candidates(space, **options):
    data = random_data(space, SPLITS, samples=40)
    return Candidates(space, data.weights, data.architecture, device=torch.device("cpu"), **options)


class Normed(Convolutional):
    """Counts its forwards, and may break in one."""

    forwards, limit = 0, None

    def forward(self, x):
        self.forwards += 1
        if self.limit is not None and self.forwards > self.limit:
            raise KeyboardInterrupt
        return super().forward(x)


def test_data_are_fetched_once_however_many_candidates_there_are():
    space = Normed()
    statistics, samples = counted(space), counted(space)
    with Candidates(
        space, statistics, samples, batch_size=8, recalibration_batches=2, device=torch.device("cpu")
    ) as tried:
        tried.judge(tried.fresh(10))
        assert len(tried.rows) == 10
    assert samples.fetched == len(samples) and statistics.fetched == 16


def test_a_space_without_batch_norms_needs_no_statistics():
    space = vit()
    statistics = counted(space)
    with Candidates(space, statistics, counted(space), device=torch.device("cpu")) as tried:
        tried.judge(tried.fresh(2))
    assert statistics.fetched == 0


def test_a_split_too_large_to_stay_is_fetched_for_every_candidate_with_the_same_result(monkeypatch):
    space = Normed()
    samples = counted(space)
    found = []
    for most in (module.HELD_BYTES, samples.batch(torch.arange(1))[0].nbytes):
        monkeypatch.setattr(module, "HELD_BYTES", most)
        samples.fetched = 0
        with Candidates(space, samples, samples, batch_size=8, device=torch.device("cpu")) as tried:
            fetched = samples.fetched
            found.append(tried.judge(tried.fresh(3)))
    assert found[0] == found[1]
    assert samples.fetched - fetched == 3 * len(samples)


def test_what_was_judged_is_not_judged_again():
    space = Normed()
    with candidates(space) as tried:
        drawn = tried.fresh(4)
        rows = tried.judge([*drawn, drawn[0]])[:4]
        before = space.forwards
        assert tried.judge(drawn[::-1]) == rows[::-1]
        assert space.forwards == before and len(tried.rows) == 4
    assert [row["generation"] for row in tried.rows] == [0] * 4


def test_an_architecture_is_worth_the_same_whatever_was_judged_before():
    space = Normed()
    space.colours.append(nn.Dropout(0.5))
    with candidates(space) as one:
        drawn = one.fresh(6)
        forwards = one.judge(drawn)
    with candidates(space) as other:
        backwards = other.judge(drawn[::-1])[::-1]
    accuracies = [row["accuracy"] for row in forwards]
    assert accuracies == [row["accuracy"] for row in backwards] and len(set(accuracies)) > 1


def test_nothing_is_drawn_twice_or_beyond_the_limit():
    space = vit(depth=(1,), num_heads=(1, 3), mlp_ratio=(1.5, 2))
    assert space.size == 8
    with candidates(space, limit=6) as tried:
        drawn = [*tried.fresh(4), *tried.fresh(4), *tried.fresh(4)]
    assert len(drawn) == len({a.digest for a in drawn}) == 6
    with candidates(space, limit=100) as tried:
        assert len(tried.fresh(100)) == 8 and tried.fresh(1) == []
        assert tried.fresh(3, space.largest) == []


def test_the_best_are_those_of_highest_accuracy_and_the_first_of_equals():
    space = vit()
    with candidates(space) as tried:
        tried.judge(tried.fresh(5))
        tried.judge(tried.fresh(5))
        accuracies = [row["accuracy"] for row in tried.rows]
        assert [row["accuracy"] for row in tried.best(10)] == sorted(accuracies, reverse=True)
        assert tried.best()[0] is tried.rows[accuracies.index(max(accuracies))]
        assert all(row["generation"] == 1 for row in tried.best(10, since=1))
        assert len(tried.best(10, since=1)) == 5


def test_a_prior_draws_every_option_as_often_as_the_mixture_says():
    space = vit()
    mixture = space.mixture({count: torch.randn(n, count).softmax(1) for count, n in space.stacks.items()})
    with candidates(space, prior=mixture) as tried:
        drawn = [tried.sample() for _ in range(1500)]
    for name in ("embed_dim", "depth"):
        expected = dict(zip(space.choices[name].options, mixture[name].tolist(), strict=True))
        for option, probability in expected.items():
            share = sum(a.choices[name] == option for a in drawn) / len(drawn)
            assert share == pytest.approx(probability, abs=0.05)


def test_a_prior_draws_architectures_only_where_not_every_assignment_is_one():
    space = tiny("darts")
    mixture = space.mixture({count: torch.randn(n, count).softmax(1) for count, n in space.stacks.items()})
    with candidates(space, prior=mixture) as tried:
        drawn = [tried.sample() for _ in range(20)]
        assert tried.first(3)[0] == space.most_probable(mixture)
    assert len({a.digest for a in drawn}) == 20
    for architecture in drawn:
        space.assignment_of(architecture)


@pytest.mark.parametrize("cut", [3, 17])
def test_an_interrupted_derivation_goes_on_where_it_was(tmp_path, cut):
    torch.manual_seed(0)
    space = Normed()

    space.cost(space.largest())  # forwards of its own

    def run(checkpoints=None, limit=None):
        with candidates(space, checkpoints=checkpoints, batch_size=20, recalibration_batches=2) as tried:
            space.forwards, space.limit = 0, limit
            tried.judge(tried.fresh(5))
            tried.judge(tried.fresh(5))
        return tried.rows

    whole = run()
    forwards = space.forwards
    assert forwards == 10 * (2 + 2)
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, cut)
        same({**space.state_dict()}, before, "the supernet")
        space.limit = None
        assert run(checkpoints) == whole
        assert space.forwards == forwards - cut // 4 * 4


def test_what_was_judged_is_kept_from_time_to_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        with candidates(vit(), checkpoints=checkpoints) as tried:
            tried.judge(tried.fresh(2))
            kept = checkpoints.load()["accuracies"]
            assert kept == {row["digest"]: row["accuracy"] for row in tried.rows}
