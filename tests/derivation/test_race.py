"""The race: its plan within a budget, who goes on, and that neither workers nor interruptions change how it ends."""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import pickle
import signal
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import SimpleNamespace

import joblib
import pytest
import torch
from joblib._parallel_backends import ThreadingBackend
from known import Known, Raced, additive
from spaces import vit
from trainer import Noted, loss_of

from tanglenas_engine.derivation import jobs
from tanglenas_engine.derivation.race import Rung, ladder, plan, race, work
from tanglenas_engine.errors import DivergedError, TangleNASError
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import SilentProgress
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.stages import retrain as retrain_stage
from tanglenas_engine.stages.discretize import METHODS, discretize
from tanglenas_engine.stages.retrain import Recipe, retrain
from tanglenas_engine.testing import random_data


class Notes(SilentProgress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture
def train(tmp_path):
    (tmp_path / "calls").mkdir()
    return Noted(tmp_path / "calls")


BEST = {"propose": 0.0}


def raced(train, checkpoints=None, limit=20, worth=None, entrants=8, **options):
    """The end of a race of 8 of 20 candidates, and what it said. With `BEST`, these are the best by the supernet."""
    space, notes = vit(depth=(1, 2, 3)), Notes()
    worth = worth or additive(space, 0)
    with Known(space, worth, limit=limit, checkpoints=checkpoints, progress=notes) as candidates:
        return race(candidates, None, train, entrants=entrants, **options), notes.lines


@pytest.fixture(scope="module")
def leaders():
    """The digests of the candidates, the best by the supernet first."""
    space = vit(depth=(1, 2, 3))
    with Known(space, additive(space, 0), limit=20) as candidates:
        candidates.judge(candidates.first(20))
        return [record["digest"] for record in candidates.best(20)]


def told(raced):
    """What may not differ between two runs of a race."""
    return raced.architecture, [{**record, "seconds": 0} for record in raced.records], raced.trainings


# The plan


@pytest.mark.parametrize(
    "entrants, epochs, eta, rungs",
    [
        (8, 9, 3, [(8, 3), (3, 9)]),
        (8, 50, 3, [(8, 17), (3, 50)]),
        (8, 8, 2, [(8, 3), (4, 5), (2, 8)]),
        (27, 9, 3, [(27, 3), (9, 5), (3, 9)]),
        (3, 9, 3, [(3, 9)]),
        (2, 9, 3, [(2, 9)]),
        (5, 9, 2, [(5, 3), (3, 5), (2, 9)]),
        (8, 2, 2, [(8, 1), (2, 2)]),  # two rungs of one epoch are one
        (8, 1, 3, [(8, 1)]),
    ],
)
def test_rungs_grow_by_a_factor_and_end_with_complete_trainings(entrants, epochs, eta, rungs):
    assert ladder(entrants, epochs, eta, 1 / 3) == plan(entrants, epochs, eta) == [Rung(*rung) for rung in rungs]


def test_the_first_rung_is_as_short_as_asked():
    assert plan(8, 50, shortest=0.1) == [Rung(8, 5), Rung(3, 50)]
    assert plan(8, 50, shortest=1.0) == [Rung(8, 50)]
    assert plan(27, 100, shortest=0.01) == [Rung(27, 1), Rung(9, 10), Rung(3, 100)]


@pytest.mark.parametrize("eta", [2, 3, 4])
@pytest.mark.parametrize("epochs", [1, 2, 7, 9, 50])
@pytest.mark.parametrize("trainings", [1, 1.5, 2, 3, 4.5, 7, 12])
def test_a_plan_keeps_its_budget(trainings, epochs, eta):
    if trainings * epochs < 2:
        with pytest.raises(TangleNASError, match=r"two networks take .* for one epoch each"):
            plan(12, epochs, eta, trainings)
        return
    rungs = plan(12, epochs, eta, trainings)
    assert work(rungs) <= trainings * epochs + 1e-6
    assert rungs[0].networks >= 2
    first = max(1, round(epochs / 3))
    if trainings < 2:  # the better one of two goes on, if the time is enough
        enough = 2 * first + epochs - first <= trainings * epochs
        assert rungs[-1].epochs == (epochs if enough else int(trainings * epochs / 2))
        assert rungs[-1].networks == (1 if enough and first < epochs else 2)
    else:
        assert rungs[-1].epochs == epochs and 2 <= rungs[-1].networks
    larger = [ladder(count, epochs, eta, 1 / 3) for count in range(rungs[0].networks + 1, 13)]
    assert all(work(other) > trainings * epochs for other in larger)


@pytest.mark.parametrize("entrants, epochs", [(4, 11), (8, 25), (12, 43), (9, 9)])
def test_a_budget_of_exactly_a_race_admits_it(entrants, epochs):
    """Though the trainings times the epochs may be a little less, by the rounding of a fraction."""
    rungs = ladder(entrants, epochs, 3, 1 / 3)
    assert plan(12, epochs, trainings=work(rungs) / epochs) == rungs


@pytest.mark.parametrize("rungs, epochs", [([(8, 4), (3, 12)], 8 * 4 + 3 * 8), ([(2, 6)], 12), ([(9, 3), (3, 5)], 33)])
def test_the_work_of_a_race_is_that_of_trainings_which_go_on(rungs, epochs):
    assert work([Rung(*rung) for rung in rungs]) == epochs


# The race


def test_the_best_of_the_supernet_are_trained_and_the_better_part_goes_on(train, leaders):
    result, notes = raced(train, **BEST)
    entrants = leaders[:8]
    first = sorted(entrants, key=lambda digest: loss_of(digest, 3))
    assert train.calls() == sorted([*((one, 3) for one in entrants), *((one, 9) for one in first[:3])])
    assert [record["digest"] for record in result.records] == first
    assert [record["place"] for record in result.records] == [*range(1, 9)]
    assert result.architecture.digest == first[0]
    assert result.trainings == (8 * 3 + 3 * 6) / 9
    winner, last = result.records[0], result.records[-1]
    assert winner["supernet_rank"] == leaders.index(first[0]) + 1
    assert (winner["loss_3_epochs"], winner["loss"]) == (loss_of(first[0], 3), loss_of(first[0], 9))
    assert (winner["epochs"], winner["seconds"]) == (9, 9)
    assert "loss_9_epochs" not in last and (last["epochs"], last["seconds"]) == (3, 3)
    assert "discretize: a race of 8 networks for 3 epochs, the best 3 on to 9: 4.7 trainings of 9 epochs" in notes
    loss = loss_of(first[2], 9)
    (said,) = (line for line in notes if line.startswith("discretize: 3 of 3 trained for 9 epochs"))
    assert f"validation loss {loss:.4f}, 9 s  {result.records[2]['architecture']}" in said
    lead = loss_of(first[1], 9) - loss_of(first[0], 9)
    assert notes[-1] == (
        f"discretize: the race was won by a validation loss of {winner['loss']:.4f} after 9 epochs, {lead:.4f} less "
        f"than the next; the supernet ranked this network {winner['supernet_rank']} of 20"
    )
    assert any(line.startswith("discretize: 1. validation loss") and str(result.architecture) in line for line in notes)


def entered(result):
    """The ranks of the entrants by the supernet, by how they entered."""
    return {
        how: sorted(record["supernet_rank"] for record in result.records if record["entered"] == how)
        for how in ("best", "any rank", "proposed")
    }


@pytest.mark.parametrize(
    "options, ranks, proposed",
    [
        ({}, [3, 8, 13, 18], 4),  # the middle of each fourth of 20
        ({"entrants": 12}, [2, 6, 9, 12, 16, 19], 6),
        ({"entrants": 12, "limit": 12}, [2, 4, 6, 8, 10, 12], 6),
        ({"propose": 0.3}, [2, 6, 9, 12, 16, 19], 2),
        ({"trainings": 4}, [3, 8, 13, 18], 2),
    ],
)
def test_the_first_entrants_are_of_any_rank(train, options, ranks, proposed):
    found = entered(raced(train, **options)[0])
    assert (found["any rank"], len(found["proposed"]), found["best"]) == (ranks, proposed, [])


@pytest.mark.parametrize(
    "options, count", [(BEST, 8), ({"trainings": 2}, 2), ({"limit": 4}, 4), ({"entrants": 4, "propose": 1.0}, 4)]
)
def test_without_proposals_the_best_by_the_supernet_enter(train, options, count):
    found = entered(raced(train, **options)[0])
    assert found == {"best": [*range(1, count + 1)], "any rank": [], "proposed": []}


@pytest.mark.parametrize(
    "entrants, propose, counts", [(8, 0.5, 4), (8, 1.0, 4), (8, 0.2, 1), (12, 0.5, 6), (5, 0.5, 1), (4, 0.5, 0)]
)
def test_no_fewer_than_four_losses_are_behind_a_proposal(train, entrants, propose, counts):
    result, _ = raced(train, entrants=entrants, propose=propose)
    assert len(result.records) == entrants and len(entered(result)["proposed"]) == counts


def _small_is_good(architecture):
    """The sum of the places of the options in use, from 0 to 1."""
    space = vit(depth=(1, 2, 3))
    places = [
        pick / (len(row.options) - 1) for row, pick in space.assignment_of(architecture).items() if len(row.options) > 1
    ]
    return sum(places) / len(places)


@pytest.mark.parametrize("sign", [1, -1])
def test_proposals_are_better_than_what_they_rest_on_though_the_supernet_is_wrong(sign):
    """The supernet ranks the candidates in the reverse order of what they are worth."""

    def train(architecture, epochs):
        return jobs.Trained(10 + sign * _small_is_good(architecture) - epochs / 10, 50.0, epochs)

    train.epochs, train.identity = 9, "recipe"
    space = vit(depth=(1, 2, 3))
    result, _ = raced(train, limit=60, worth=lambda one: 50 + 10 * sign * _small_is_good(one))
    first = [record["loss_3_epochs"] for record in result.records if record["entered"] != "proposed"]
    proposed = [record["loss_3_epochs"] for record in result.records if record["entered"] == "proposed"]
    assert result.records[0]["entered"] == "proposed" and sum(proposed) / 4 < min(first)
    trusting, _ = raced(train, limit=60, worth=lambda one: 50 + 10 * sign * _small_is_good(one), **BEST)
    assert result.records[0]["loss"] < trusting.records[0]["loss"] and space.size > 60


def test_proposals_follow_the_supernet_where_it_is_right(train):
    """Losses that no option explains: only the supernet's tell candidates apart."""

    def train(architecture, epochs):
        return jobs.Trained(known(architecture) - epochs, 50.0, epochs)

    def known(architecture):
        return int(architecture.digest[:8], 16) / 2**32

    train.epochs, train.identity = 9, "recipe"
    result, _ = raced(train, limit=60, worth=lambda one: 100 - known(one))
    assert entered(result)["proposed"][0] == 1 and sum(entered(result)["proposed"]) / 4 < 15  # of all, the mean is 30


def test_proposals_go_by_the_supernet_s_losses_on_equal_samples():
    """All samples are harder than a part of them, so that the losses of those that came far are larger."""

    def train(architecture, epochs):
        return jobs.Trained(known(architecture) - epochs, 50.0, epochs)

    def known(architecture):
        return int(architecture.digest[:8], 16) / 2**32

    train.epochs, train.identity = 9, "recipe"
    space = vit(depth=(1, 2, 3))
    options = {"samples": 64, "batch_size": 4, "ease": 0.5, "limit": 60}
    with Raced(space, lambda one: 100 - known(one), **options) as candidates:
        result = race(candidates, None, train, entrants=8)
    assert len({record["samples"] for record in candidates.records}) > 2
    assert entered(result)["proposed"][0] == 1 and sum(entered(result)["proposed"]) / 4 < 15  # of all, the mean is 30


def test_proposals_are_unlike_networks_that_failed():
    """The supernet takes what fails for the best, and the others are alike."""
    space = vit(depth=(1, 2, 3))

    def train(architecture, epochs):
        failed = architecture.choices["depth"] == 3
        return jobs.Trained(math.nan if failed else 1.0, 50.0, epochs)

    train.epochs, train.identity = 9, "recipe"
    worth = {1: 50.0, 2: 60.0, 3: 70.0}
    with Known(space, lambda one: worth[one.choices["depth"]], limit=60) as candidates:
        result = race(candidates, None, train, entrants=12)
        depths = {one["digest"]: one["architecture"].choices["depth"] for one in candidates.records}
    first, proposed = (
        [one for one in result.records if (one["entered"] == "proposed") == is_] for is_ in (False, True)
    )
    assert any(depths[one["digest"]] == 3 for one in first) and len(proposed) == 6
    assert all(depths[one["digest"]] < 3 and not one["failure"] for one in proposed)


def test_a_longer_training_is_before_a_shorter_one_though_its_loss_rose(leaders):
    def train(architecture, epochs):
        return jobs.Trained(loss_of(architecture.digest, 9) + epochs, 50.0, epochs)

    train.epochs, train.identity = 9, "recipe"
    result, _ = raced(train, **BEST)
    assert [record["epochs"] for record in result.records] == [9] * 3 + [3] * 5
    first = sorted(leaders[:8], key=lambda digest: loss_of(digest, 9))
    assert [record["digest"] for record in result.records] == first


def test_a_winner_whose_rivals_all_failed_has_no_lead(train, leaders):
    final = sorted(leaders[:8], key=lambda digest: loss_of(digest, 3))[:3]
    result, notes = raced(dataclasses.replace(train, bad=tuple((digest, "late") for digest in final[1:])), **BEST)
    assert result.architecture.digest == final[0]
    assert notes[-1].startswith("discretize: the race was won by") and "less than the next" not in notes[-1]


def test_without_a_loss_the_supernet_s_next_ones_are_trained(train, leaders):
    failing = [leaders[rank - 1] for rank in (3, 8, 13, 18)]  # the first ones
    result, notes = raced(dataclasses.replace(train, bad=tuple((digest, "raise") for digest in failing)))
    assert entered(result)["proposed"][:2] == [1, 2]
    assert sum("is out of the race" in line for line in notes) == 4


def test_fewer_candidates_than_entrants_all_take_part(train):
    result, _ = raced(train, limit=2)
    assert len(result.records) == 2 and {epochs for _, epochs in train.calls()} == {9}


def test_one_candidate_has_no_race(train):
    result, notes = raced(train, limit=1)
    assert result is None and train.calls() == [] and any("no race" in line for line in notes)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "raise"])
def test_a_training_that_fails_is_last_and_named(train, leaders, bad):
    healthy, _ = raced(train, **BEST)
    loser = healthy.records[0]["digest"]
    result, notes = raced(dataclasses.replace(train, bad=((loser, bad),)), **BEST)
    assert result.architecture.digest == healthy.records[1]["digest"]
    last = result.records[-1]
    assert last["digest"] == loser and not math.isfinite(last["loss"])
    said = "training diverged" if bad == "raise" else f"the validation loss is {bad}, which is no finite number"
    assert last["failure"] == said
    assert f"discretize: {last['architecture']} is out of the race: {last['failure']}" in notes


def test_infinite_losses_win_no_race(train, leaders):
    with pytest.raises(TangleNASError, match=r"every training of 3 epochs failed. The first one: the validation loss"):
        raced(dataclasses.replace(train, bad=tuple((digest, "inf") for digest in leaders)))


def test_trainings_that_all_fail_end_the_race(train, leaders):
    broken = dataclasses.replace(train, bad=tuple((digest, "raise") for digest in leaders))
    with pytest.raises(
        TangleNASError, match=r"every training of 3 epochs failed. The first one: training diverged. Change the recipe"
    ):
        raced(broken)


def test_where_all_that_go_on_fail_those_that_paused_are_ranked(train, leaders):
    healthy, _ = raced(train)
    final = [record["digest"] for record in healthy.records if record["epochs"] == 9]
    result, notes = raced(dataclasses.replace(train, bad=tuple((digest, "late") for digest in final)))
    assert result.architecture.digest == next(one["digest"] for one in healthy.records if one["digest"] not in final)
    assert {one["digest"] for one in result.records if one["failure"]} == {*final}
    assert {*final} == {one["digest"] for one in result.records[-len(final) :]}
    assert any(line.endswith("failed: the race ends with what networks are worth after 3") for line in notes)


# Budgets


def test_a_small_budget_admits_fewer_networks(train, leaders):
    result, _ = raced(train, trainings=4)
    assert len(result.records) == 6 and result.trainings == (6 * 3 + 2 * 6) / 9


def test_in_less_than_two_trainings_the_better_one_of_two_goes_on(train):
    result, _ = raced(train, trainings=1.4)
    assert [record["epochs"] for record in result.records] == [9, 3] and result.trainings == (2 * 3 + 6) / 9


def test_a_budget_that_is_not_used_up_is_told(train):
    _, notes = raced(train, trainings=8)
    assert any("3.3 trainings of the budget are left: raise race.entrants" in line for line in notes)
    for trainings, told in ((5.5, False), (5.8, True)):  # the race has 4.7
        _, notes = raced(train, trainings=trainings)
        assert any("of the budget are left" in line for line in notes) == told


def test_seconds_are_a_budget_by_a_training_of_two_epochs(train):
    result, notes = raced(train, seconds=37, **BEST)  # an epoch takes a second, and a training 9
    assert len(result.records) == 6 and result.trainings == (6 * 3 + 2 * 6) / 9  # the two epochs are an entrant's
    assert "discretize: a training takes about 9.0 processor seconds; race.seconds is 37" in notes
    assert sorted(epochs for _, epochs in train.calls()) == [1, 2, *[3] * 6, 9, 9]


def test_the_dearest_that_may_enter_tells_how_long_a_training_takes(train, leaders):
    """Any candidate may be proposed, but where too few enter for proposals, only the best can."""
    space = vit(depth=(1, 2, 3))
    with Known(space, additive(space, 0), limit=20) as candidates:
        candidates.judge(candidates.first(20))
        macs = {record["digest"]: record["macs"] for record in candidates.best(20)}
    for options, among in (({}, leaders), (BEST, leaders[:8]), ({"entrants": 4}, leaders[:4])):
        for path in train.folder.iterdir():
            path.unlink()
        raced(train, seconds=90, **options)
        (probed,) = (digest for digest, epochs in train.calls() if epochs == 1)
        assert macs[probed] == max(macs[digest] for digest in among)


def test_a_recipe_that_diverges_is_found_out_by_as_many_trainings_as_may_enter(train, leaders):
    broken = dataclasses.replace(train, bad=tuple((digest, "raise") for digest in leaders))
    with pytest.raises(TangleNASError, match=r"every training of the race failed. The last one: training diverged"):
        raced(broken, seconds=90)
    assert len(train.calls()) == 8


def test_the_second_epoch_of_the_training_that_tells_the_time_is_work_though_it_goes_no_further(train):
    def last_is_best(architecture, epochs):
        trained = train(architecture, epochs)
        return trained._replace(loss=-trained.loss)

    last_is_best.epochs, last_is_best.identity = 3, "recipe"
    result, _ = raced(last_is_best, seconds=1000, **BEST)
    (probed,) = (digest for digest, epochs in train.calls() if epochs == 2)
    assert {one["digest"]: one["epochs"] for one in result.records}[probed] == 1
    assert result.trainings == (8 * 1 + 3 * 2 + 1) / 3


@pytest.mark.parametrize("clock", ["processor", "wall"])
def test_trainings_that_failed_to_tell_the_time_are_part_of_it_and_are_not_trained_again(train, leaders, clock):
    space = vit(depth=(1, 2, 3))
    with Known(space, additive(space, 0), limit=20) as candidates:
        candidates.judge(candidates.first(20))
        failing = [one["digest"] for one in sorted(candidates.best(20), key=lambda one: -one["macs"])[:7]]
    seconds = {"processor": 80, "wall": 40}[clock]  # an epoch takes one of the processor and a half on the wall

    def failing_late(architecture, epochs):
        trained = train(architecture, epochs)
        if architecture.digest in failing:
            return trained._replace(loss=math.nan, seconds=5.0, wall=2.5, failure="diverged")
        return trained

    failing_late.epochs, failing_late.identity = 9, "recipe"
    result, _ = raced(failing_late, seconds=seconds, clock=clock)
    calls = train.calls()
    spent = 5 * len(failing) + sum(dict(sorted(one for one in calls if one[0] not in failing)).values())
    assert spent <= 80
    assert [epochs for digest, epochs in calls if digest in failing] == [1] * 7
    known = [one for one in result.records if one["digest"] in failing]
    assert known and all(one["failure"] == "diverged" and one["epochs"] > 1 for one in known)
    assert result.trainings > 3  # the time that is left admits 4


def test_probes_that_took_all_the_time_leave_no_race(train, leaders):
    def slow_to_fail(architecture, epochs):
        trained = train(architecture, epochs)
        return trained if len(train.calls()) > 6 else trained._replace(loss=math.nan, seconds=5.0, failure="diverged")

    slow_to_fail.epochs, slow_to_fail.identity = 9, "recipe"
    with pytest.raises(TangleNASError, match=r"the race has a budget of 0.00 trainings of 9 epochs"):
        raced(slow_to_fail, seconds=20)


def test_the_time_of_a_training_counts_that_of_its_second_epoch_though_it_fails_there(train):
    def failing(architecture, epochs):
        trained = train(architecture, epochs)
        return trained._replace(loss=math.nan, failure="diverged") if epochs == 2 else trained

    failing.epochs, failing.identity = 9, "recipe"
    space = vit()
    candidates = SimpleNamespace(kept={}, save=lambda: None, note=lambda text: None, space=space)
    assert jobs.Jobs(candidates, failing, 1, None).afforded([space.largest()], 20, "processor") == (20 - 2) / 9


def test_a_slow_first_epoch_does_not_stand_for_the_others(train):
    def slow(architecture, epochs):
        trained = train(architecture, epochs)
        return trained._replace(seconds=trained.seconds + 4)

    slow.epochs, slow.identity = train.epochs, train.identity
    result, notes = raced(slow, seconds=55, **BEST)
    assert "discretize: a training takes about 13.0 processor seconds; race.seconds is 55" in notes
    assert result.trainings == (6 * 3 + 2 * 6) / 9


def test_seconds_on_the_wall_are_a_budget_too(train):
    result, notes = raced(train, seconds=18.5, clock="wall", **BEST)  # an epoch takes half a second, and a training 4.5
    assert len(result.records) == 6 and result.trainings == (6 * 3 + 2 * 6) / 9
    assert "discretize: a training takes about 4.5 wall seconds; race.seconds is 18.5" in notes


def test_a_job_measures_the_wall_where_a_training_does_not(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(jobs.time, "monotonic", lambda: float(next(now)))
    space = vit()
    for given, expected in ((math.nan, 1.0), (7.0, 7.0)):
        _, found = jobs.run(lambda one, epochs, wall=given: jobs.Trained(0.5, 50, 3, wall=wall), space.largest(), 1)
        assert jobs.Trained(*found).wall == expected


def test_seconds_on_the_wall_that_jobs_measure_add_up_over_calls():
    took = []

    class Train:
        epochs, identity = 20, "recipe"

        def __call__(self, architecture, epochs):
            start = time.monotonic()
            time.sleep(0.05)
            took.append(time.monotonic() - start)
            return jobs.Trained(0.5, 50.0, 0.0)

    space = vit()
    candidates = SimpleNamespace(kept={}, save=lambda: None, note=lambda text: None, space=space)
    afforded = jobs.Jobs(candidates, Train(), 1, None).afforded([space.largest()], 100, "wall")
    first, second = took
    assert afforded == pytest.approx((100 - first - second) / (first + 19 * second), rel=0.2)


def test_the_seconds_of_a_training_that_diverges_late_are_those_from_its_first_epoch_on(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(jobs.time, "process_time", lambda: now[0])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    each = {2: 2.0, 5: 4.0, 9: 1.0}  # seconds of the parts

    class Train:
        epochs, identity = 9, "recipe"

        def __call__(self, architecture, epochs):
            now[0] += each[epochs]
            if epochs == 9:
                raise DivergedError("training diverged")
            return jobs.Trained(0.5, 50.0, {2: 2.0, 5: 6.0}[epochs])

    space = vit()
    candidates = SimpleNamespace(kept={}, save=lambda: None, note=lambda text: None, space=space)
    training = jobs.Jobs(candidates, Train(), 1, None)
    for epochs, seconds in ((2, 2.0), (5, 6.0), (9, 7.0)):
        (found,) = training.results([space.largest()], epochs)
        assert (found.seconds, found.wall) == (seconds, seconds)
    assert found.failure == "training diverged"


@pytest.mark.parametrize("options", [{"trainings": math.inf}, {"seconds": math.inf, "clock": "wall"}])
def test_infinity_is_no_budget(train, options):
    assert plan(8, 50, trainings=math.inf) == plan(8, 50)
    free, said = raced(train, **BEST)
    assert raced(train, **options, **BEST) == (free, said)
    both = {"trainings": 2, "seconds": 1000, **options}
    assert len(raced(train, **both)[0].records) == (8 if "trainings" in options else 2)


def test_the_smaller_of_two_budgets_counts(train):
    assert len(raced(train, seconds=1000, trainings=2)[0].records) == 2
    assert len(raced(train, seconds=20, trainings=9)[0].records) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trainings": 0.5}, "race.trainings is 0.5, expected at least 1: no race is shorter than one training"),
        ({"trainings": -1}, "race.trainings is -1, expected a positive number"),
        ({"seconds": 0}, "race.seconds is 0, expected a positive number"),
        (
            {"seconds": 8.5},
            r"race.seconds is 8.5, but one training of 9 epochs takes about 9.0 processor seconds: give more seconds",
        ),
        ({"seconds": 9, "clock": "cpu"}, "race.clock is 'cpu', expected 'processor' or 'wall'"),
        ({"entrants": 1}, "race.entrants is 1, expected a whole number of at least 2"),
        ({"shortest": 0.0}, "race.shortest is 0.0, expected a positive number"),
        ({"shortest": 1.5}, "race.shortest is 1.5, expected a share of a training, at most 1"),
        ({"propose": -0.5}, "race.propose is -0.5, expected a share from 0 to 1"),
        ({"eta": 1}, "race.eta is 1, expected a whole number of at least 2"),
        ({"workers": 0}, "race.workers is 0, expected a whole number of at least 1"),
        ({"backend": "slurm"}, "race.backend is 'slurm', expected a backend of joblib such as 'loky', 'dask' or 'ray'"),
    ],
)
def test_options_that_make_no_race_are_refused(train, options, message):
    with pytest.raises(TangleNASError, match=message):
        raced(train, **options)


# Workers and interruptions


@pytest.mark.parametrize("how", ["any rank", "proposed"])
def test_an_interrupted_race_ends_as_if_it_had_not_been(train, tmp_path, how):
    whole, _ = raced(train)
    done = train.calls()
    for path in train.folder.iterdir():
        path.unlink()
    stopped = next(one["digest"] for one in whole.records if one["entered"] == how)
    stopping = dataclasses.replace(train, bad=((stopped, "stop"),))
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        with pytest.raises(KeyboardInterrupt):
            raced(stopping, checkpoints)
    before = len(train.calls()) - 1
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        result, notes = raced(stopping, checkpoints)
    assert result == whole
    assert train.calls() == sorted([*done, (stopped, 3)])
    assert not before or f"discretize: {before} trainings were done before" in notes


@pytest.mark.parametrize("number", [0, 5])
def test_an_error_that_passes_ends_a_race_which_then_goes_on(train, leaders, tmp_path, number):
    whole, _ = raced(train, **BEST)
    done = train.calls()
    for path in train.folder.iterdir():
        path.unlink()
    troubled = dataclasses.replace(train, bad=((leaders[number], "full"),))
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        with pytest.raises(TangleNASError, match=r"training of .*: cannot write state.pt: No space .* again to go on"):
            raced(troubled, checkpoints, **BEST)
        assert len(train.calls()) == number + 1
        assert raced(troubled, checkpoints, **BEST)[0] == whole
    assert train.calls() == sorted([*done, (leaders[number], 3)])


@pytest.mark.slow
def test_results_of_another_recipe_are_not_used(train, tmp_path):
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        raced(train, checkpoints)
        count = len(train.calls())
        raced(dataclasses.replace(train, identity="another"), checkpoints)
    assert len(train.calls()) == 2 * count


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_training_that_is_lost_with_its_worker_runs_again(train, leaders, tmp_path):
    whole, _ = raced(train, **BEST)
    for path in train.folder.iterdir():
        path.unlink()
    killing = dataclasses.replace(train, bad=((leaders[3], "kill"),))
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        result, notes = raced(killing, checkpoints, workers=2, **BEST)
    assert told(result) == told(whole)
    assert train.calls().count((leaders[3], 3)) == 2
    assert any("a worker was lost" in line and line.endswith("its trainings run again") for line in notes)


def test_workers_that_are_lost_time_after_time_end_the_race(train, leaders):
    losing = dataclasses.replace(train, bad=((leaders[2], "lose"),))
    with pytest.raises(
        TangleNASError, match=r"the race lost workers 3 times in a row \(A worker was terminated\). Memory .* lower"
    ):
        raced(losing, **BEST)
    assert train.calls() == sorted([(leaders[0], 3), (leaders[1], 3), *[(leaders[2], 3)] * 3])


def test_workers_that_are_lost_between_finished_trainings_end_no_race(train):
    whole, _ = raced(train, **BEST)
    called = set()

    def losing(architecture, epochs):
        if (architecture.digest, epochs) not in called:
            called.add((architecture.digest, epochs))
            raise BrokenProcessPool("A worker was terminated. Memory?")
        return train(architecture, epochs)

    losing.epochs, losing.identity = train.epochs, train.identity
    result, notes = raced(losing, **BEST)
    assert result == whole and sum("a worker was lost" in line for line in notes) == len(called) == 8 + 3


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_workers_share_the_threads(train, four_threads):
    seen = []

    def counting(architecture, epochs):
        seen.append(torch.get_num_threads())
        return train(architecture, epochs)

    counting.epochs, counting.identity = train.epochs, train.identity
    for workers, threads in ((1, 4), (2, 2), (8, 1)):
        seen.clear()
        with joblib.parallel_config(backend="threading"):
            raced(counting, workers=workers, **BEST)
        assert {*seen} == {threads}


@pytest.mark.parametrize("bad", [(), ("raise",)])
def test_a_job_leaves_the_number_of_threads_as_it_was(train, four_threads, bad):
    one = vit().smallest()
    jobs.run(dataclasses.replace(train, bad=tuple((one.digest, how) for how in bad)), one, 1, threads=2)
    assert torch.get_num_threads() == 4


def test_a_job_has_the_random_numbers_of_seed_0_whatever_was_drawn_before():
    with seeded(0):
        expected = float(torch.rand(()))
    torch.rand(3)
    for _ in range(2):
        _, found = jobs.run(lambda one, epochs: jobs.Trained(float(torch.rand(())), 50.0, 0.0), vit().smallest(), 1)
        assert jobs.Trained(*found).loss == expected


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is not installed: pip install dask")
@pytest.mark.filterwarnings("ignore")  # of Dask's own
def test_minus_one_is_a_worker_of_a_new_dask_cluster_for_each_core():
    from distributed import get_client

    with jobs.running_on("dask", -1, "--backend"):
        assert len(get_client().scheduler_info()["workers"]) == joblib.cpu_count()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is not installed: pip install dask")
@pytest.mark.filterwarnings("ignore")  # of Dask's own, about the worker that ends
@pytest.mark.exhaustive
def test_a_dask_cluster_of_two_workers_runs_the_race_and_one_may_be_lost(train, leaders):
    whole, _ = raced(train)
    for path in train.folder.iterdir():
        path.unlink()
    result, _ = raced(dataclasses.replace(train, bad=((leaders[3], "kill"),)), workers=2, backend="dask")
    assert told(result) == told(whole)
    assert train.calls().count((leaders[3], 3)) == 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is not installed: pip install dask")
def test_a_scheduler_that_does_not_answer_is_named(train):
    import dask

    gone = {"scheduler-address": "tcp://127.0.0.1:9", "distributed.comm.timeouts.connect": "100ms"}
    with (
        dask.config.set(gone),
        pytest.raises(TangleNASError, match=r"no scheduler answers at tcp://127.0.0.1:9 .*start"),
    ):
        raced(train, workers=2, backend="dask")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is not installed: pip install dask")
@pytest.mark.filterwarnings("ignore")  # of Dask's own, about the end of the cluster
@pytest.mark.exhaustive
def test_a_race_runs_on_the_cluster_of_the_settings(train):
    import dask
    from distributed import LocalCluster

    whole, _ = raced(train)
    for path in train.folder.iterdir():
        path.unlink()
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        dask.config.set({"scheduler-address": cluster.scheduler_address}),
    ):
        result, _ = raced(train, workers=1, backend="dask")
    assert told(result) == told(whole)


# Real trainings


def real(space, folder=None, **options):
    data = random_data(space, ("weights", "architecture", "training", "validation"), samples=24)
    recipe = Recipe(space, data, 3, {"batch_size": 8, "seed": 3}, folder=folder)
    methods = {**METHODS, "race": lambda candidates, mixture: race(candidates, mixture, recipe, **options)}
    return data, discretize(space, data, None, method="race", methods=methods, candidates=6, recalibration_batches=1)


def by_hand(space, data, result):
    """The validation losses of the entrants, each trained with `retrain` for as long as it was in the race."""
    architectures = {record["architecture"]: record["epochs"] for record in result.raced.records}
    found = {}
    generator = torch.Generator().manual_seed(0)
    while len(found) < len(architectures):
        one = space.sample(generator)
        if (epochs := architectures.get(str(one))) and str(one) not in found:
            record = retrain(space, one, data, epochs=3, batch_size=8, seed=3).history[epochs - 1]
            found[str(one)] = record["validation_loss"], record["validation_accuracy"]
    return found


def test_a_backend_that_returns_all_results_at_once_gets_groups_and_keeps_its_workers():
    """Ray is such a backend: each start of its workers imports torch."""
    started = []

    class AtOnce(ThreadingBackend):
        supports_return_generator = False

        def configure(self, *args, **options):
            started.append(self)
            return super().configure(*args, **options)

    joblib.register_parallel_backend("at once", AtOnce)
    done = []
    try:
        with jobs.running_on("at once", 2):
            results = jobs.as_they_come([joblib.delayed(done.append)(number) for number in range(5)], 2)
            assert [next(results), sorted(done)] == [None, [0, 1]]
            assert [*results] == [None] * 4 and sorted(done) == [*range(5)]
    finally:
        joblib.parallel.BACKENDS.pop("at once")
    assert len(started) == 1


@pytest.mark.slow
def test_a_race_is_training_by_hand_and_its_winner_is_what_discretize_derives():
    space = vit()
    data, result = real(space, entrants=4)
    records = result.raced.records
    assert [(record["epochs"], len(record["digest"]) > 0) for record in records] == [(3, True)] * 2 + [(1, True)] * 2
    losses = by_hand(space, data, result)
    assert {r["architecture"]: (r["loss"], r["accuracy"]) for r in records} == losses
    assert str(result.architecture) == min((losses[r["architecture"]], r["architecture"]) for r in records[:2])[1]
    assert result.architecture.digest == records[0]["digest"] and len(result.candidates) == 6
    assert all(record["seconds"] > 0 for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_trainings_go_on_from_their_checkpoints_and_end_as_those_that_begin_anew(tmp_path, monkeypatch, own):
    space, epochs, step = vit(), [], retrain_stage.Retraining.end_epoch

    def counted(training, epoch, means):
        epochs.append(epoch)
        return step(training, epoch, means)

    monkeypatch.setattr(retrain_stage.Retraining, "end_epoch", counted)
    with monkeypatch.context() as patch:
        patch.setattr(retrain_stage.Kept, "open", lambda *_: None)
        (_, anew), begun = real(space, entrants=4), len(epochs)
    epochs.clear()
    _, result = real(space, folder=tmp_path if own else None, entrants=4)
    assert told(result.raced) == told(anew.raced)
    assert (begun, sorted(epochs)) == (4 * 1 + 2 * 3, [1, 1, 1, 1, 2, 2, 3, 3])
    assert len(epochs) == 3 * result.raced.trainings


def test_a_recipe_without_a_folder_has_one_of_its_own_which_is_deleted_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    space = vit()
    recipe = Recipe(space, random_data(space, ("training", "validation"), samples=24), 3, {"batch_size": 8})
    again = dataclasses.replace(recipe, epochs=2)
    copy = pickle.loads(pickle.dumps(recipe.__dict__))
    assert copy["_own"] == recipe._own != again._own  # those of workers go on where this one paused
    assert len(list(tmp_path.iterdir())) == 2
    del recipe, again
    assert not list(tmp_path.iterdir())


def test_a_folder_for_trainings_that_cannot_be_written_is_refused(tmp_path):
    space = vit()
    (tmp_path / "file").touch()
    data = random_data(space, ("training", "validation"), samples=24)
    recipe = Recipe(space, data, 3, {"batch_size": 8}, folder=tmp_path / "file")
    with pytest.raises(TangleNASError, match=r"cannot hold the folder .*file"):
        recipe(space.smallest(), 1)


def test_a_stop_in_the_last_step_of_a_training_is_passed_on_to_the_race():
    """The training is complete then, so that only the request itself can end the race."""
    space, steps = vit(), []
    data = random_data(space, ("training", "validation"), samples=24)

    def loss(outputs, targets):
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 2:
                signal.raise_signal(signal.SIGINT)
        return torch.nn.functional.cross_entropy(outputs, targets)

    recipe = Recipe(space, data, 1, {"batch_size": len(data.training) // 2, "loss": loss})
    with pytest.raises(KeyboardInterrupt):
        jobs.run(recipe, space.smallest(), 1)
    assert len(steps) == 2


def test_a_stop_is_passed_on_from_a_training_that_diverges():
    space = vit()
    data = random_data(space, ("training", "validation"), samples=24)

    def loss(outputs, targets):
        if torch.is_grad_enabled():
            signal.raise_signal(signal.SIGINT)
        return torch.nn.functional.cross_entropy(outputs, targets) * torch.nan

    with pytest.raises(KeyboardInterrupt):
        jobs.run(Recipe(space, data, 1, {"batch_size": len(data.training), "loss": loss}), space.smallest(), 1)


def test_a_training_that_diverges_is_a_result_of_its_network():
    space = vit()
    data = random_data(space, ("training", "validation"), samples=24)
    recipe = Recipe(space, data, 3, {"batch_size": 8, "optimizer": partial(torch.optim.SGD, lr=1e30)})
    _, result = jobs.run(recipe, space.smallest(), 1)
    assert "is not finite by step" in jobs.Trained(*result).failure


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["damaged", "held"])
def test_a_training_whose_checkpoints_are_of_no_use_begins_anew(tmp_path, trouble):
    space = vit()
    data = random_data(space, ("training", "validation"), samples=24)
    recipe = Recipe(space, data, 3, {"batch_size": 8, "seed": 3}, folder=tmp_path)
    one = space.largest()
    whole = dataclasses.replace(recipe, folder=None)(one, 3)
    recipe(one, 1)
    held = CheckpointFolder(tmp_path / one.digest, "") if trouble == "held" else contextlib.nullcontext()
    if trouble == "damaged":
        for path in (tmp_path / one.digest).glob("state-*.pt"):
            path.write_bytes(b"damaged")
    with held:
        result = recipe(one, 3)
    assert (result.loss, result.accuracy) == (whole.loss, whole.accuracy)


@pytest.mark.slow
def test_threads_of_one_process_train_one_at_a_time():
    space = vit()
    _, alone = real(space, entrants=3)
    with joblib.parallel_config(backend="threading"):
        _, threads = real(space, entrants=3, workers=3)
    assert told(threads.raced) == told(alone.raced)


def test_random_numbers_of_a_race_are_its_own():
    space = vit()
    before = torch.get_rng_state()
    real(space, entrants=2)
    assert before.equal(torch.get_rng_state())
