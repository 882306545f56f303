"""Candidates: each judged by itself, in a race, on data fetched once; drawn within the budget and never twice."""

import math
import re
from collections import Counter

import pytest
import torch
from known import Known, Raced, additive
from spaces import Convolutional, vit
from tiny import tiny
from torch import nn

from tanglenas_engine.data import SampleSubset, TensorSamples, stream
from tanglenas_engine.derivation import candidates as judging
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.pareto import final_front
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime import timer
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.spaces.objective import Objective
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
        assert len(tried.records) == 10
    assert samples.fetched == len(samples) and statistics.fetched == 2 * len(statistics)


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
    for most in (stream.HELD_BYTES, samples.batch(torch.arange(1))[0].nbytes):
        monkeypatch.setattr(stream, "HELD_BYTES", most)
        samples.fetched = 0
        with Candidates(space, samples, samples, batch_size=16, device=torch.device("cpu")) as tried:  # no race
            fetched = samples.fetched
            found.append(tried.judge(tried.fresh(3)))
    assert found[0] == found[1]
    assert samples.fetched - fetched == 3 * len(samples)


class Told(SilentProgress):
    """The texts of progress lines."""

    def __init__(self):
        self.lines = []

    def epoch(self, epoch, epochs, text):
        self.lines.append(text)


def test_progress_has_the_best_loss_so_far_on_the_samples_of_the_rung():
    space, told = Normed(), Told()
    samples = counted(space, 32)
    with Candidates(space, samples, samples, batch_size=4, device=torch.device("cpu"), progress=told) as tried:
        tried.judge(tried.fresh(12))
    rungs = {}
    for line in told.lines:
        loss, some, rung = re.fullmatch(r"best loss ([\d.]+)( on (\d+) samples)?", line).groups()
        rungs.setdefault(int(rung) if some else len(samples), []).append(float(loss))
    assert len(rungs) > 1 and [*rungs] == sorted(rungs) and [*rungs][-1] == 32
    assert all(losses == sorted(losses, reverse=True) for losses in rungs.values())
    assert rungs[32][-1] == pytest.approx(tried.best()[0]["loss"], abs=5e-4)


def test_candidates_that_are_only_compared_have_no_best_one():
    space, told = Normed(), Told()
    samples = counted(space)
    with Candidates(space, samples, samples, device=torch.device("cpu"), tells_best=False, progress=told) as tried:
        tried.judge(tried.fresh(3), on="all samples")
    assert told.lines == ["", "", ""]


def test_what_was_judged_is_not_judged_again():
    space = Normed()
    with candidates(space) as tried:
        drawn = tried.fresh(4)
        rows = tried.judge([*drawn, drawn[0]])[:4]
        before = space.forwards
        assert tried.judge(drawn[::-1]) == rows[::-1]
        assert space.forwards == before and len(tried.records) == 4
    assert [row["generation"] for row in tried.records] == [0] * 4


def test_an_architecture_is_worth_the_same_whatever_was_judged_before():
    space = Normed()
    space.colours.append(nn.Dropout(0.5))
    with candidates(space) as one:
        drawn = one.fresh(6)
        forwards = one.judge(drawn)
    with candidates(space) as other:
        backwards = other.judge(drawn[::-1])[::-1]
    losses = [row["loss"] for row in forwards]
    assert losses == [row["loss"] for row in backwards] and len(set(losses)) == 6
    assert [row["accuracy"] for row in forwards] == [row["accuracy"] for row in backwards]


def test_nothing_is_drawn_twice_or_beyond_the_limit():
    space = vit(depth=(1,), num_heads=(1, 3), mlp_ratio=(1.5, 2))
    assert space.size == 8
    with candidates(space, limit=6) as tried:
        drawn = [*tried.fresh(4), *tried.fresh(4), *tried.fresh(4)]
    assert len(drawn) == len({a.digest for a in drawn}) == 6
    with candidates(space, limit=100) as tried:
        assert len(tried.fresh(100)) == 8 and tried.fresh(1) == []
        assert tried.fresh(3, space.largest) == []


def test_the_best_are_those_of_smallest_loss_and_the_first_of_equals():
    space = vit()
    with Known(space, lambda architecture: float(architecture.choices["depth"])) as tried:
        tried.judge(tried.fresh(5))
        tried.judge(tried.fresh(5))
        losses = [row["loss"] for row in tried.records]
        assert [row["loss"] for row in tried.best(10)] == sorted(losses) and len(set(losses)) < 10
        assert tried.best()[0] is tried.records[losses.index(min(losses))]
        assert all(row["generation"] == 1 for row in tried.best(10, since=1))
        assert len(tried.best(10, since=1)) == 5


def test_a_prior_draws_every_option_as_often_as_the_mixture_says():
    space = vit()
    mixture = space.mixture({count: torch.randn(n, count).softmax(1) for count, n in space.stacks.items()})
    drawn = []
    with candidates(space, prior=mixture) as tried:
        for _ in range(1500):
            drawn += tried.fresh(1)
            tried.drawn.clear()
    for name in ("embed_dim", "depth"):
        expected = dict(zip(space.choices[name].options, mixture[name].tolist(), strict=True))
        for option, probability in expected.items():
            share = sum(a.choices[name] == option for a in drawn) / len(drawn)
            assert share == pytest.approx(probability, abs=0.05)


@pytest.mark.slow
def test_a_prior_counts_the_weights_of_edges():
    space = tiny("darts")
    likely = space.sample(torch.Generator().manual_seed(0))
    kept = [row for row, option in space.assignment_of(likely).items() if space.has_score(row, option)]
    edges = {row: torch.tensor(0.98 if row in kept else 0.01) for row in space.rows}
    mixture = space.mixture({count: torch.full((n, count), 1 / count) for count, n in space.stacks.items()})
    mixture.edges = edges
    with candidates(space, prior=mixture) as tried:
        for architecture in tried.fresh(20):
            drawn = space.assignment_of(architecture)
            assert sum(space.has_score(row, drawn[row]) for row in kept) >= 0.75 * len(kept)


@pytest.mark.slow
def test_a_prior_draws_architectures_only_where_not_every_assignment_is_one():
    space = tiny("darts")
    mixture = space.mixture({count: torch.randn(n, count).softmax(1) for count, n in space.stacks.items()})
    with candidates(space, prior=mixture) as tried:
        drawn = tried.fresh(20)
        assert tried.first(3)[0] == space.most_probable(mixture)
    assert len({a.digest for a in drawn}) == 20
    for architecture in drawn:
        space.assignment_of(architecture)


@pytest.mark.parametrize("cut", [3, 17])
@pytest.mark.slow
def test_an_interrupted_derivation_goes_on_where_it_was(tmp_path, cut):
    torch.manual_seed(0)
    space = Normed()

    space.cost(space.largest())  # forwards of its own

    def run(checkpoints=None, limit=None):
        with candidates(space, checkpoints=checkpoints, batch_size=20, recalibration_batches=2) as tried:
            space.forwards, space.limit = 0, limit
            tried.judge(tried.fresh(5))
            tried.judge(tried.fresh(5))
        return tried.records

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
    monkeypatch.setattr(judging, "SAVE_SECONDS", 0.0)
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        with candidates(vit(), checkpoints=checkpoints) as tried:
            tried.judge(tried.fresh(2))
            kept = checkpoints.load()["scores"]
            assert kept == {f"{row['digest']}/40": [row["loss"], row["accuracy"]] for row in tried.records}


# Budgets


def limited(space, share, **options):
    """Candidates within a share of the largest network's multiply-accumulates, and this limit."""
    low, high = (space.cost(one).flops for one in (space.smallest(), space.largest()))
    limit = int(low + share * (high - low))
    return candidates(space, budget=Budget(space, {"macs": limit}), **options), limit


@pytest.mark.parametrize("name", ["autoformer_nano", "mobilenetv3_nano"])
def test_candidates_fill_the_budget_where_moves_lead_there(name):
    space = tiny(name)
    tried, limit = limited(space, 0.6, fill=0.95)
    with tried:
        drawn = [*tried.fresh(20), *tried.fresh(5, space.smallest)]
    assert len(drawn) == len({one.digest for one in drawn}) == 25
    full = 0
    for one in drawn:
        picks, flops = space.assignment_of(one), space.cost(one).flops
        assert flops <= limit
        near = [space.cost(space.architecture_of({**picks, **move})).flops for move in space.moves(picks)]
        assert flops >= 0.95 * limit or not any(flops < cost <= limit for cost in near)
        full += flops >= 0.95 * limit
    assert full >= 23


@pytest.mark.slow
def test_where_few_fill_the_budget_smaller_candidates_are_drawn_too():
    space = tiny("nb201")  # one convolution of 3 x 3 and five of 1 x 1 are the most that fits
    tried, limit = limited(space, 0.3, fill=0.95)
    with tried:
        drawn = tried.fresh(45)
    assert len(drawn) == len({one.digest for one in drawn}) == 45
    flops = [space.cost(one).flops for one in drawn]
    full = flops.count(max(flops))
    assert 0 < full < 10 and max(flops) <= limit and set(flops[:full]) == {max(flops)}


def test_without_fill_candidates_are_drawn_and_brought_into_the_budget():
    space = tiny("autoformer_nano")
    tried, limit = limited(space, 0.6, fill=0.0, seed=3)
    with tried:
        drawn = tried.fresh(30)
    generator, budget = torch.Generator().manual_seed(3), Budget(space, {"macs": limit})
    expected = dict.fromkeys(budget.shrink(space.sample(generator), generator) for _ in range(30))
    assert drawn[: len(expected)] == list(expected) and len(expected) > 25
    tried, _ = limited(space, 0.6, fill=0.95, seed=3)
    with tried:
        assert tried.fresh(30, fill=False) == drawn


# Races


def test_all_are_judged_on_the_first_rung_and_a_quarter_goes_on():
    space = vit()
    worth = additive(space, 0)
    with Raced(space, worth, samples=160, batch_size=10) as tried:
        drawn = tried.fresh(50)
        records = tried.judge(drawn)
        assert Counter(samples for _, samples in tried.measurements) == {10: 50, 40: 13, 160: 4}
        best = sorted(drawn, key=worth, reverse=True)
        assert [record["architecture"] for record in tried.best(4)] == best[:4]
        assert Counter(record["samples"] for record in records) == {10: 37, 40: 9, 160: 4}
        assert {digest for digest, samples in tried.measurements if samples == 40} == {one.digest for one in best[:13]}
        assert tried.best()[0]["samples"] == 160
        tried.judge(drawn[:10])  # known
        tried.judge(tried.fresh(1))  # a single one runs no race
        assert tried.measurements[67:] == [(tried.records[-1]["digest"], 160)]
        assert [record["architecture"] for record in tried.records[:50]] == drawn
    with Raced(space, worth, samples=160, batch_size=10) as tried:
        tried.judge(drawn, on="all samples")
        assert tried.measurements == [(one.digest, 160) for one in drawn]


def test_a_race_judges_on_a_part_of_the_samples_that_is_the_same_for_all():
    space = Normed()
    with candidates(space, batch_size=10) as tried:
        drawn = tried.fresh(8)
        records = tried.judge(drawn)
        part = SampleSubset(tried._samples, tried._order[:10])
        assert sorted(record["samples"] for record in records) == [10] * 6 + [40] * 2
        for record in records:
            found = tried.measured(record["architecture"], part if record["samples"] == 10 else tried._samples)
            assert (record["loss"], record["accuracy"]) == (found.loss, found.accuracy)
    inputs, targets = part.batch(torch.arange(10))
    whole = tried._samples.batch(tried._order[:10])
    assert inputs.equal(whole[0]) and targets.equal(whole[1]) and part.labels.equal(whole[1])


def test_scores_of_a_race_are_the_same_whatever_was_judged_before():
    space = Normed()
    space.colours.append(nn.Dropout(0.5))
    with candidates(space, batch_size=10) as one:
        drawn = one.fresh(12)
        first = one.judge(drawn[:8])
    with candidates(space, batch_size=10) as other:
        other.judge(drawn[8:])
        second = other.judge(drawn[:8][::-1])[::-1]
    assert [{**record, "generation": 1} for record in first] == second


@pytest.mark.parametrize("name", ["digest", "loss", "accuracy", "samples", "generation", "architecture"])
def test_an_objective_takes_no_name_of_a_column(name):
    space = vit()
    objective = Objective().bind(space)
    objective.name = name
    with pytest.raises(TangleNASError, match=f"an objective is called '{name}', as what a record .* another name"):
        candidates(space, objectives=[objective])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_last_and_in_the_record(loss):
    space = vit()
    worth = additive(space, 0)
    broken = space.smallest()  # the first of any front by its cost
    with Known(space, lambda one: 100 - loss if one == broken else worth(one), samples=40, batch_size=10) as tried:
        drawn = [broken, *tried.fresh(7)]
        records = tried.judge(drawn)
        assert records[0]["loss"] == pytest.approx(loss, nan_ok=True) and records[0]["samples"] == 10
        assert tried.best(8)[-1] is records[0]
        assert broken not in [record["architecture"] for record in final_front(tried)]


def test_what_a_trial_judged_does_not_bring_a_candidate_further_than_its_race_did(monkeypatch):
    """One candidate is the best on 64 samples, which a trial looks at, but its race drops it on 16."""
    spent, late = [0.0], []
    monkeypatch.setattr(timer.time, "process_time", lambda: spent[0])
    space = vit(depth=(1, 2, 3))

    class Late(Raced):
        def measured(self, architecture, samples):
            spent[0] += len(samples) / 256
            late[:] = late or [architecture.digest]  # the first one of the trial
            found = super().measured(architecture, samples)
            return found._replace(loss=1e3 if len(samples) == 16 else 0.0) if architecture.digest in late else found

    def judged(limit, seconds=None):
        with Late(space, additive(space, 0), samples=256, batch_size=16, limit=limit) as tried:
            if seconds is not None:
                tried.limit_by_seconds(
                    timer.Timer(seconds, "processor", torch.device("cpu"), "discretize", "candidates")
                )
            tried.judge(tried.first(tried.limit))
            front = [record["digest"] for record in final_front(tried)]
        return tried.limit, tried.records, front

    found = judged(space.size, 20.0)
    assert {record["samples"] for record in found[1] if record["digest"] in late} == {16}
    assert found == judged(found[0])


@pytest.mark.parametrize("cut, spared", [(17, 16), (18 + 13, 18 + 10)])
@pytest.mark.slow
def test_a_race_that_was_interrupted_goes_on_where_it_was(tmp_path, cut, spared):
    torch.manual_seed(0)
    space = Normed()
    space.cost(space.largest())  # forwards of its own

    def run(checkpoints=None, limit=None):
        with candidates(space, checkpoints=checkpoints, batch_size=5, recalibration_batches=2) as tried:
            space.forwards, space.limit = 0, limit
            tried.judge(tried.fresh(9))
        return tried.records

    whole = run()
    forwards = space.forwards
    assert forwards == 9 * (1 + 1) + 3 * (2 + 8)
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, cut)
        space.limit = None
        assert run(checkpoints) == whole
        assert space.forwards == forwards - spared
