"""Discretization: what each method derives, the budget it keeps to, and what it leaves of the supernet."""

import itertools
import math
import random
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from spaces import SPACES, Convolutional, vit
from tiny import tiny
from torch import nn

from tanglenas_engine import SearchSpace, create_objective
from tanglenas_engine.data import DataView, TensorSamples
from tanglenas_engine.derivation.band import _Counter
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.pareto import nsga2, undominated
from tanglenas_engine.derivation.proposals import MIXTURE_DRAWS, Proposals
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import methods
from tanglenas_engine.runtime import distributed, timer
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.progress import ConsoleProgress
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.stages.discretize import METHODS, discretize
from tanglenas_engine.superposition.size import combinations
from tanglenas_engine.testing import random_data, same
from tanglenas_engine.training.measure import measure, random_inputs, recalibrate

SPLITS = ("weights", "architecture", "validation")
CPU = torch.device("cpu")
JUDGING = [method for method in METHODS if method != "argmax"]


def random_mixture(space: SearchSpace, scale: float = 1.0):
    return space.mixture({count: (scale * torch.randn(n, count)).softmax(1) for count, n in space.stacks.items()})


def derive(space: SearchSpace, mixture=None, **options):
    """Derive with one batch for statistics unless told otherwise: most of the time goes there."""
    data = random_data(space, SPLITS, samples=40)
    return discretize(space, data, mixture, **{"recalibration_batches": 1, **options})


def costs(space: SearchSpace):
    """All architectures, as assignments with their costs."""
    return [(picks, space.cost(space.architecture_of(picks))) for picks in combinations(space.rows)]


# Methods


@pytest.mark.parametrize("name", ["convolutional", "vit"])
def test_argmax_takes_the_most_probable_option_of_every_row(name):
    space = SPACES[name]()
    chosen = space.sample()
    mixture = {name: 0.6 * weights + 0.4 / weights.shape[-1] for name, weights in space.one_hot(chosen).items()}
    result = derive(space, mixture, method="argmax")
    assert result.architecture == chosen and result.cost == space.cost(chosen)
    (row,) = result.candidates
    assert row["digest"] == chosen.digest and row["architecture"] == str(chosen)
    assert (row["params"], row["macs"]) == (result.cost.params, result.cost.flops)


def test_former_names_of_multiply_accumulates_are_accepted():
    space = vit()
    limit = (space.cost(space.smallest()).macs + space.cost(space.largest()).macs) // 2
    assert space.cost(space.smallest()).flops == space.cost(space.smallest()).macs
    assert space.terms("flops") is space.terms("macs")
    options = dict(method="random", candidates=4, cost="flops")
    results = [derive(space, **options, **given) for given in (
        {"max_macs": limit}, {"max_flops": limit}, {"limits": {"macs": limit}}, {"limits": {"flops": limit}}
    )]  # fmt: skip
    for result in results:
        assert result.candidates == results[0].candidates and result.front_cost == "macs"
        assert all(row["macs"] <= limit and "flops" not in row for row in result.candidates)
    with pytest.raises(
        TangleNASError, match=r"max_macs is 5, and discretize.max_flops, its former name, is 6: leave one"
    ):
        derive(space, max_macs=5, max_flops=6)
    with pytest.raises(
        TangleNASError, match=r"discretize.limits\['flops'\] is 6, and discretize.max_macs is 5: leave one"
    ):
        derive(space, max_macs=5, limits={"flops": 6})
    with pytest.raises(TangleNASError, match=r"is 6, and discretize.limits\['flops'\] is 5: leave one"):
        derive(space, limits={"flops": 5, "macs": 6})
    assert create_objective("flops").name == "macs"


def test_a_limit_of_a_count_may_be_written_as_a_float():
    space = vit()
    limit = (space.cost(space.smallest()).params + space.cost(space.largest()).params) // 2
    options = dict(method="random", candidates=4)
    assert (
        derive(space, limits={"params": limit + 0.5}, **options).candidates
        == derive(space, max_params=limit, **options).candidates
    )


def test_random_gives_distinct_architectures_best_first():
    space = vit()
    result = derive(space, method="random", candidates=12)
    losses = [row["loss"] for row in result.candidates]
    assert losses == sorted(losses) and len(set(losses)) > 1
    assert len({row["digest"] for row in result.candidates}) == 12
    assert result.architecture.digest == result.candidates[0]["digest"]
    data = random_data(space, SPLITS, samples=40)
    space.eval().select(result.architecture)
    judged, validated = measure(space, data.architecture), measure(space, data.validation)
    assert (losses[0], result.candidates[0]["accuracy"]) == (judged.loss, judged.accuracy)
    assert (result.validation_loss, result.validation_accuracy) == (validated.loss, validated.accuracy)


def test_candidates_are_judged_without_augmentation():
    space = vit()
    plain = random_data(space, SPLITS, samples=40)
    augmented = random_data(space, SPLITS, samples=40, seed=1)  # as if every image had been shifted
    names = ("weights", "architecture")
    view = DataView({name: getattr(augmented if name in names else plain, name) for name in SPLITS},
                    {name: getattr(plain, name) for name in names})  # fmt: skip
    results = [discretize(space, data, None, method="random", candidates=6, seed=0) for data in (plain, view)]
    assert results[0].candidates == results[1].candidates


def test_random_tries_no_more_than_there_are(capsys):
    space = vit(depth=(1,), num_heads=(1, 3), mlp_ratio=(2,))
    assert space.size == 4
    result = derive(space, method="random", candidates=50, progress=ConsoleProgress(every=0))
    assert len(result.candidates) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"] and "best" in lines[-1]


def test_random_reaches_every_architecture():
    space = vit(depth=(1, 2), num_heads=(1, 3), mlp_ratio=(2,))
    assert len(derive(space, method="random", candidates=space.size).candidates) == space.size == 2 * (2 + 4)


@pytest.mark.parametrize("method", JUDGING)
def test_every_method_that_judges_takes_the_best_of_as_many_as_it_may(method):
    space = Convolutional()
    result = derive(space, method=method, candidates=45)
    losses = [row["loss"] for row in result.candidates]
    assert len(losses) == 45 == len({row["digest"] for row in result.candidates})
    assert losses == sorted(losses)
    assert result.architecture.digest == result.candidates[0]["digest"]
    generations = sorted(row["generation"] for row in result.candidates)
    expected = {"random": [0] * 45, "both": [0] * 45, "surrogate": [0] * 35 + [*range(1, 11)], "front": [0] * 45}
    assert generations == expected.get(method, [0] * 20 + [1] * 20 + [2] * 5)


@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.part(4)
def test_the_front_is_what_no_other_candidate_dominates(method, cost):
    space = Convolutional()
    result = derive(space, random_mixture(space), method=method, candidates=45, cost=cost)
    rows = {row["digest"]: row for row in result.candidates}
    chosen = [rows[architecture.digest] for architecture in result.front]
    assert chosen == undominated(result.candidates, cost) and result.front_cost == cost
    assert chosen[-1]["loss"] == result.candidates[0]["loss"]
    for row in result.candidates:
        beaten = [c for c in chosen if c["loss"] <= row["loss"] and c[cost] <= row[cost]]
        assert beaten, "neither on the front nor dominated by it"
    assert all(space.cost(a) == space.cost(space.architecture(**a.choices)) for a in result.front)


@pytest.mark.parametrize("method", JUDGING)
@pytest.mark.part(3)
def test_a_prior_begins_with_what_argmax_takes(method):
    space = vit()
    largest = space.cost(space.largest())
    for limit in (None, (space.cost(space.smallest()).params + largest.params) // 2):
        mixture = random_mixture(space)
        likely = derive(space, mixture, method="argmax", max_params=limit)
        result = derive(space, mixture, method=method, candidates=20, prior="mixture", max_params=limit)
        assert likely.architecture.digest in {row["digest"] for row in result.candidates if row["generation"] == 0}
        assert result.candidates[0]["loss"] <= likely.candidates[0]["loss"]


def trusting(space: SearchSpace, architecture, trust: float):
    """A mixture with this weight, and its share of the rest, on an architecture's options."""
    corner = space.one_hot(architecture)
    return {name: trust * one + (1 - trust) / one.shape[-1] for name, one in corner.items()}


@pytest.mark.parametrize("share", [None, 0.6])
@pytest.mark.parametrize("trust", [1.0, 0.8, 0.01, None])
def test_both_judges_what_argmax_takes_and_others(trust, share, capsys):
    space = tiny("autoformer_nano")
    limit = share and int(share * space.cost(space.largest()).macs)
    mixture = None if trust is None else trusting(space, space.sample(torch.Generator().manual_seed(3)), trust)
    options = dict(candidates=40, max_macs=limit)
    result = derive(space, mixture, method="both", progress=ConsoleProgress(every=0), **options)
    said, judged = capsys.readouterr().out, {row["digest"]: row for row in result.candidates}
    assert len(judged) == 40
    if mixture is None:
        assert "there is no alpha: random candidates are judged" in said
        assert result.candidates == derive(space, None, method="random", **options).candidates
    else:
        assert f"entropy of {space.mixture(mixture).entropy():.2f} of 1: what argmax takes is judged" in said
        judged.pop(derive(space, mixture, method="argmax", max_macs=limit).architecture.digest)
    assert not limit or all(0.95 * limit <= row["macs"] <= limit for row in judged.values())


@pytest.mark.parametrize("share", [None, 0.6])
def test_half_of_what_both_judges_has_what_alpha_decided_and_is_random_in_the_rest(share):
    space = vit(depth=(6, 7, 8), mlp_ratio=(1, 1.5, 2))
    largest = space.cost(space.largest()).macs
    mixture = space.mixture(trusting(space, space.largest(), 0.0) | {"depth": torch.tensor([0.0, 1.0, 0.0])})
    assert mixture.entropy() > 0.9
    budget = Budget(space, {"macs": share and share * largest})
    drawn = Proposals(space, budget=budget, fill=0.95, limit=200).first(200, mixture=mixture)
    first, others = drawn[:100], drawn[100:]
    assert len({*drawn}) == 200
    assert {one.choices["depth"] for one in first} == {7} and {one.choices["depth"] for one in others} == {6, 7, 8}
    for name in ("num_heads", "mlp_ratio"):
        options = Counter(one.choices[name][0] for one in first)
        assert {*options} == {*space.choices[name].options} and max(options.values()) < 80


def test_a_decided_mixture_just_below_the_band_does_not_draw_for_ever(monkeypatch):
    space, draws, draw = tiny("autoformer_nano"), Counter(), _Counter.draw

    def counted(self, generator):
        draws["all"] += 1
        return draw(self, generator)

    monkeypatch.setattr(_Counter, "draw", counted)
    chosen = space.sample(torch.Generator().manual_seed(3))
    budget = Budget(space, {"macs": space.cost(chosen).macs / 0.9499})
    mixture = space.mixture(trusting(space, chosen, 0.999))
    assert len(Proposals(space, budget=budget, fill=0.95, limit=40).first(40, mixture=mixture)) == 40
    assert draws["all"] < 40 * (MIXTURE_DRAWS + 2)


def test_a_method_that_returns_a_projection_is_refused():
    def method(candidates, mixture):
        candidates.judge(candidates.first(1, mixture=mixture))
        return candidates.projection

    space = vit()
    with pytest.raises(TangleNASError, match="method 'own' returned a Projection, expected None"):
        derive(space, space.one_hot(space.smallest()), method="own", methods={"own": method})


def test_both_judges_all_of_a_small_space():
    space = vit(depth=(1,), num_heads=(1, 3), mlp_ratio=(1.5, 2))
    mixture = trusting(space, space.smallest(), 0.9)
    assert len(derive(space, mixture, method="both").candidates) == space.size == 8


def test_a_prior_of_one_architecture_keeps_to_it():
    space = vit()
    chosen = space.sample()
    mixture = {name: 0.999 * weights + 0.001 / weights.shape[-1] for name, weights in space.one_hot(chosen).items()}
    result = derive(space, mixture, method="random", candidates=1, prior="mixture")
    assert result.architecture == chosen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.part(3)
def test_the_test_split_is_never_read(method):
    class Forbidden(TensorSamples):
        def batch(self, indices):
            raise AssertionError("the test split was read")

    space = Convolutional()
    data = random_data(space, SPLITS, samples=40)
    splits = {name: getattr(data, name) for name in SPLITS}
    view = DataView({**splits, "test": Forbidden(torch.ones(3), torch.ones(3))})
    result = discretize(space, view, random_mixture(space), method=method, candidates=25, prior="mixture")
    assert result.validation_accuracy >= 0


class Stopping(Convolutional):
    """Is stopped, as by a signal, in a certain forward."""

    forwards, stop = 0, None

    def forward(self, x):
        self.forwards += 1
        if self.forwards == self.stop:
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("method", JUDGING)
def test_an_interrupted_derivation_ends_as_if_it_had_not_been(method, tmp_path):
    torch.manual_seed(0)
    space = Stopping()
    whole = derive(space, method=method, candidates=30)
    forwards, space.forwards = space.forwards, 0
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        space.stop = 2 * forwards // 3
        with pytest.raises(KeyboardInterrupt):
            derive(space, method=method, candidates=30, checkpoints=checkpoints)
        space.forwards, space.stop = 0, None
        assert derive(space, method=method, candidates=30, checkpoints=checkpoints) == whole
        assert space.forwards < 0.6 * forwards


@pytest.mark.parametrize("kept", [20, 40])
def test_how_many_samples_of_an_augmented_split_candidates_are_judged_on_is_told(kept, capsys):
    space = vit()
    data = random_data(space, SPLITS, samples=40)
    few = random_data(space, ["architecture"], samples=kept).architecture
    data = DataView({name: getattr(data, name) for name in SPLITS}, {"architecture": few})
    result = discretize(space, data, None, method="random", candidates=3, progress=ConsoleProgress())
    assert {record["samples"] for record in result.candidates} == {kept}
    assert ("are judged on 20 of the 40 samples" in capsys.readouterr().out) == (kept == 20)


# Seconds


@pytest.mark.parametrize("method", [method for method in JUDGING if method != "nsga2"])
@pytest.mark.exhaustive
def test_a_derivation_by_seconds_is_that_of_as_many_candidates(method, tmp_path, monkeypatch, capsys):
    ticks = itertools.count()
    monkeypatch.setattr(timer.time, "process_time", lambda: float(next(ticks)))
    torch.manual_seed(0)
    space = Stopping()
    with CheckpointFolder(tmp_path / "resume", "x") as checkpoints:
        # Each reading takes a second: drawing 8 takes one, judging 8 takes one.
        found = derive(space, method=method, seconds=10.0, checkpoints=checkpoints, progress=ConsoleProgress())
        fitted = int(re.search(r"10 processor seconds are (\d+) candidates", capsys.readouterr().out)[1])
        assert (7 if method == "surrogate" else 8) <= fitted <= 40  # proposals of a surrogate take a reading
        monkeypatch.setattr(timer.time, "process_time", lambda: 0.0)  # another speed plans nothing anew
        assert derive(space, method=method, seconds=10.0, checkpoints=checkpoints) == found
    assert derive(space, method=method, candidates=fitted) == found


@pytest.mark.parametrize(
    "alike, other",
    [("nsga2", partial(nsga2, population=20)), ("nsga2", methods["nsga2"]), ("argmax", methods["argmax"])],
)
def test_what_fits_into_seconds_follows_from_the_method_not_from_its_name(alike, other, monkeypatch, capsys):
    torch.manual_seed(0)
    space = Stopping()
    mixture = random_mixture(space)
    found = []
    for method, function in ((alike, METHODS[alike]), ("mine", other)):
        ticks = itertools.count()
        monkeypatch.setattr(timer.time, "process_time", lambda ticks=ticks: float(next(ticks)))
        result = derive(
            space, mixture, method=method, seconds=9.0, methods={method: function}, batch_size=10,
            progress=ConsoleProgress(),
        )  # fmt: skip
        found.append((len(result.candidates), "processor seconds are" in capsys.readouterr().out))
    assert found[0] == found[1] and found[0][1] == (alike != "argmax")


def test_the_tables_of_costs_are_no_cost_of_each_candidate(monkeypatch):
    now = itertools.count().__next__
    spent = [0.0]
    monkeypatch.setattr(timer.time, "process_time", lambda: float(now()) + spent[0])

    class Building(Stopping):
        def cost(self, architecture):
            spent[0] = 80.0
            return super().cost(architecture)

    assert len(derive(Building(), method="random", seconds=90.0).candidates) >= 8


def test_what_a_trial_judged_is_not_judged_again(monkeypatch):
    judged, measured = [], Candidates.measured
    ticks = itertools.count()
    monkeypatch.setattr(timer.time, "process_time", lambda: float(next(ticks)))

    def noted(self, architecture, samples):
        if samples is self._samples:  # and not the validation split, on which the result is measured
            judged.append(architecture.digest)
        return measured(self, architecture, samples)

    monkeypatch.setattr(Candidates, "measured", noted)
    derive(vit(), method="random", seconds=40.0)
    first = judged[0]
    assert {one for one in judged if judged.count(one) > 1} <= {first}  # the first one is judged before the clock runs


@pytest.mark.parametrize("first, second", [(1, 4), (4, 1)])
def test_seconds_are_the_same_number_of_candidates_after_a_cut(first, second, tmp_path, monkeypatch):
    """Each judging takes a second of each rank that runs the trial; the candidates after it fit into what it leaves."""
    space, data, now = vit(), random_data(vit(), SPLITS, samples=40), itertools.count(1)
    clock, measured = [0.0], Candidates.measured

    def timed(*given):
        clock[0] = float(next(now))
        return measured(*given)

    monkeypatch.setattr(timer.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(Candidates, "measured", timed)
    for ranks in (first, second):
        monkeypatch.setattr(distributed, "world_size", lambda ranks=ranks: ranks)
        monkeypatch.setattr(distributed, "gather", lambda value, ranks=ranks: [value] * ranks)
        with (
            CheckpointFolder(tmp_path / "checkpoints", "discretize") as checkpoints,
            Candidates(
                space, data.weights, data.architecture, recalibration_batches=1, checkpoints=checkpoints
            ) as found,
        ):
            given = timer.Timer(100.0, "processor", torch.device("cpu"), "discretize", "")
            found.limit_by_seconds(given, race=False)
            # A trial judges nine times, and eight of the candidates are known then. The result is measured, too.
            assert found.limit == 100 - 9 * first + 8 - 1


def test_seconds_in_which_no_two_candidates_are_judged_are_refused(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timer.time, "process_time", lambda: float(next(ticks)))
    with pytest.raises(
        TangleNASError, match=r"discretize.seconds is 3, but a trial and two candidates need \d+\.\d proc"
    ):
        derive(vit(), method="random", seconds=3)


class Noisy(Convolutional):
    """Batch norms behind a dropout."""

    def __init__(self):
        super().__init__()
        self.colours.append(nn.Dropout(0.3))


@pytest.mark.parametrize("make", [Noisy, vit])
def test_equal_seeds_derive_the_same_and_leave_global_generators_alone(make):
    torch.manual_seed(0)
    space = make()
    results = []
    for seed in (1, 1, 2):
        torch.rand(1), random.random()
        before = torch.get_rng_state()
        results.append(derive(space, method="random", candidates=5, seed=seed))
        assert before.equal(torch.get_rng_state())
    assert results[0] == results[1] != results[2]


# Budgets


def within(cost, budget):
    return all(limit is None or getattr(cost, metric) <= limit for metric, limit in budget.items())


@pytest.mark.parametrize("name", ["convolutional", "vit"])
def test_projection_meets_any_budget_and_is_about_the_most_probable_within_it(name):
    torch.manual_seed(0)
    space = SPACES[name]() if name == "convolutional" else vit(depth=(1, 2, 3))
    everything = costs(space)
    exact, gaps = 0, []
    for trial in range(24):
        mixture = random_mixture(space, scale=(0.5, 2)[trial % 2])
        logs = {count: stack.log().tolist() for count, stack in mixture.stacks.items()}

        def regret(picks, logs=logs):
            """How much less probable than the argmax, over the rows in use."""
            rows = [(logs[len(row.options)][row.slot], pick) for row, pick in picks.items() if row.active(picks)]
            return sum(max(row) - row[pick] for row, pick in rows)

        budget = {"params": None, "macs": None}
        for metric in (("params",), ("macs",), ("params", "macs"))[trial % 3]:
            values = [getattr(cost, metric) for _, cost in everything]
            budget[metric] = int(min(values) + float(torch.rand(())) ** 2 * (max(values) - min(values)))
        found = Budget(space, budget).project(mixture).architecture
        assert within(space.cost(found), budget), budget
        best = min(regret(picks) for picks, cost in everything if within(cost, budget))
        gaps.append(regret(space.assignment_of(found)) - best)
    assert all(gap > -1e-4 for gap in gaps)
    exact = sum(gap < 1e-4 for gap in gaps)
    assert exact >= 22 and max(gaps) < 1.5, gaps


@pytest.mark.parametrize("name", SPACES)
def test_projection_meets_the_tightest_budgets_there_are(name):
    space = SPACES[name]()
    smallest = space.cost(space.smallest())
    tight = {"params": smallest.params, "macs": smallest.flops}
    assert space.cost(Budget(space, tight).project(space.one_hot(space.largest())).architecture) == smallest
    for metric, limit in tight.items():
        cost = space.cost(Budget(space, {metric: limit}).project(random_mixture(space)).architecture)
        assert getattr(cost, metric) == limit


def test_a_budget_that_binds_nothing_changes_nothing():
    space = vit()
    mixture = random_mixture(space)
    largest = space.cost(space.largest())
    free = Budget(space, {"params": None, "macs": None}).project(mixture)
    assert Budget(space, {"params": largest.params, "macs": largest.flops}).project(mixture) == free


@pytest.mark.parametrize(
    "method, prior, name",
    [
        *itertools.product(METHODS, ["uniform", "mixture"], ["convolutional", "nb201"]),
        ("evolution", "mixture", "darts"),
        ("nsga2", "uniform", "darts"),
    ],
)
@pytest.mark.part(2)
def test_no_method_judges_an_architecture_beyond_the_budget(method, prior, name):
    space = tiny(name)
    low, high = space.cost(space.smallest()), space.cost(space.largest())
    budget = {f"max_{m}": int(0.7 * getattr(low, m) + 0.3 * getattr(high, m)) for m in ("params", "macs")}
    result = derive(space, random_mixture(space), method=method, prior=prior, candidates=25, **budget)
    assert len(result.candidates) == (1 if method == "argmax" else 25)
    for row in result.candidates:
        assert row["params"] <= budget["max_params"] and row["macs"] <= budget["max_macs"]
    assert result.cost.params <= budget["max_params"] and result.cost.flops <= budget["max_macs"]


class Heads(Objective):
    """The number of heads in all layers."""

    name, unit = "heads", "heads"

    def measure(self, architecture):
        return float(sum(architecture.choices["num_heads"]))


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_can_be_in_an_objective(method):
    space = vit()
    result = derive(
        space, space.one_hot(space.largest()), method=method, candidates=30, cost="heads",
        objectives=[Heads().bind(space)], limits={"heads": 4},
    )  # fmt: skip
    heads = [row["heads"] for row in result.candidates]
    assert max(heads) <= 4 and sum(result.architecture.choices["num_heads"]) == heads[0]
    assert result.front_cost == "heads"
    assert (result.costs, result.limits, result.units) == ({"heads": heads[0]}, {"heads": 4}, {"heads": "heads"})


@pytest.mark.parametrize("method", ["random", "evolution", "nsga2"])
def test_candidates_fill_the_budget_but_for_a_front(method):
    space = tiny("autoformer_nano")
    limit = int(0.6 * space.cost(space.largest()).flops)
    filled, drawn = (
        [row["macs"] / limit for row in derive(space, method=method, candidates=30, max_macs=limit, **fill).candidates]
        for fill in ({}, {"fill": 0})
    )
    assert max(*filled, *drawn) <= 1 and min(drawn) < 0.9
    if method == "nsga2":
        assert filled == drawn
    else:  # but for those from which no move leads on
        assert sum(share >= 0.95 for share in filled) >= 28 > sum(share >= 0.95 for share in drawn)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_random_candidates_keep_to_the_budget(share):
    space = Convolutional()
    low, high = space.cost(space.smallest()), space.cost(space.largest())
    params = int(low.params + share * (high.params - low.params))
    flops = int(low.flops + (share + 0.1) * (high.flops - low.flops))
    result = derive(space, method="random", candidates=10, max_params=params, max_macs=flops)
    assert all(row["params"] <= params and row["macs"] <= flops for row in result.candidates)
    assert len({row["digest"] for row in result.candidates}) == len(result.candidates)
    possible = sum(cost.params <= params and cost.flops <= flops for _, cost in costs(space))
    assert len(result.candidates) == 10 if possible > 40 else len(result.candidates) <= possible


def test_argmax_keeps_to_the_budget():
    space = vit()
    limit = (space.cost(space.smallest()).params + space.cost(space.largest()).params) // 2
    mixture = space.one_hot(space.largest())
    assert derive(space, mixture, method="argmax").cost.params > limit
    assert derive(space, mixture, method="argmax", max_params=limit).cost.params <= limit


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_argmax_says_where_the_budget_decides_instead_of_the_mixture(share, capsys):
    space = vit()
    mixture = space.one_hot(space.largest())
    most = int(share * space.cost(space.largest()).params)
    derive(space, mixture, method="argmax", max_params=most, progress=ConsoleProgress(every=0))
    assert ("most probable architecture is beyond the budget" in capsys.readouterr().out) == (share < 1)


@pytest.mark.parametrize("metric", ["params", "macs"])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_nothing_meets_is_refused(method, metric):
    space = vit()
    space.name = "thumbnail"
    least = getattr(space.cost(space.smallest()), metric)
    with pytest.raises(TangleNASError) as caught:
        derive(space, random_mixture(space), method=method, **{f"max_{metric}": least - 1})
    assert f"no architecture of 'thumbnail' has at most {least - 1:,} {metric.replace('macs', 'MACs')}" in str(
        caught.value
    )
    assert f"the smallest has {least:,}. Raise the limit of {metric}" in str(caught.value)
    Budget(space, {metric: least}).check()


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "argmin"}, "unknown discretize.method 'argmin'. Did you mean 'argmax'? Choose one of: argmax, "),
        ({"derivation": "evolve"}, "unknown discretize.method 'evolve'"),
        ({"candidates": 0}, "discretize.candidates is 0, expected a whole number of at least 1"),
        ({"recalibration_batches": -1}, "discretize.recalibration_batches is -1, expected a whole number"),
        ({"max_params": 0}, "discretize.max_params is 0, expected a whole number of at least 1"),
        ({"max_macs": 1e9}, "discretize.max_macs is 1000000000.0, expected a whole number"),
        ({"max_flops": -1}, "discretize.max_flops is -1, expected a whole number"),
        ({"limits": {"params": 0}}, "discretize.limits['params'] is 0, expected a positive number"),
        ({"limits": {"flops": "3"}}, "discretize.limits['flops'] is '3', expected a positive number"),
        ({"targets": {"latency": 2.5}}, "unknown cost in a budget 'latency'. Choose one of: macs, params. For another"),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number of at least 1"),
        ({"device": "tpu"}, "device 'tpu' cannot be used"),
        ({"method": "argmax"}, "'argmax' needs the mixture of a gradient search, and the search has none: use method"),
        ({"method": "argmax", "mixture": {}}, "'argmax' needs the mixture of a gradient search"),
        ({"method": "random", "prior": "mixture"}, "discretize.prior 'mixture' needs the mixture of a gradient search"),
        ({"method": "random", "prior": "alphas"}, "discretize.prior is 'alphas', expected 'uniform' or 'mixture'"),
        ({"fill": -0.1}, "discretize.fill is -0.1, expected a share from 0 to 1"),
        ({"fill": 95}, "discretize.fill is 95, expected a share from 0 to 1"),
        ({"fill": True}, "discretize.fill is True, expected a share from 0 to 1"),
        ({"fill": math.nan}, "discretize.fill is nan, expected a share from 0 to 1"),
        ({"fill": None}, "discretize.fill is None, expected a share from 0 to 1"),
        ({"method": "random", "cost": "param"}, "unknown discretize.cost 'param'. Did you mean 'params'?"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options, message):
    with pytest.raises(TangleNASError) as caught:
        derive(vit(), **options)
    assert message in str(caught.value)


def test_a_mixture_of_another_space():
    with pytest.raises(TangleNASError, match="the mixture's 'embed_dim' has shape None, expected"):
        derive(vit(), {"depth": torch.ones(3) / 3})
    with pytest.raises(TangleNASError, match="unknown choice"):
        derive(vit(), {"width": torch.ones(1)})


# Batch norms


def test_every_candidate_is_judged_with_statistics_of_its_own(monkeypatch):
    for module in ("derivation.candidates", "training.measure"):
        monkeypatch.setattr(f"tanglenas_engine.{module}.STATISTICS_BATCH", 16)
    torch.manual_seed(0)
    space = Convolutional()
    for buffer in space.buffers():
        buffer.add_(3)  # a supernet whose statistics fit no path
    data = random_data(space, SPLITS, samples=64)
    result = discretize(
        space, data, None, method="random", candidates=8, batch_size=16, recalibration_batches=3, seed=5
    )
    statistics = random_inputs(data.weights, 16, 3, seed=5, device=CPU)
    by_text = {str(a): a for a in (space.architecture_of(picks) for picks, _ in costs(space))}
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    part = TensorSamples(*data.architecture.batch(order[:16]))
    losses = set()
    for row in result.candidates:
        network = space.extract(by_text[row["architecture"]])
        recalibrate(network, statistics if row["samples"] == 64 else statistics[:1])  # as many batches as are judged
        found = measure(network, {16: part, 64: data.architecture}[row["samples"]], 16)
        assert found.accuracy == row["accuracy"] and found.loss == pytest.approx(row["loss"], rel=1e-6)
        losses.add(row["loss"])
    assert len(losses) == 8
    network = space.extract(result.architecture)
    recalibrate(network, statistics)
    assert measure(network, data.validation, 16).accuracy == result.validation_accuracy


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_supernet_is_left_as_it_was(method, training):
    torch.manual_seed(0)
    space = Convolutional()
    space(space.example_input(8))  # statistics that are not the initial ones
    space.train(training)
    before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    first = derive(space, random_mixture(space), method=method, candidates=3)
    same({**space.state_dict()}, before, "the supernet")
    assert space.training == training and space.superposition.assignment is None
    if method == "random":
        assert derive(space, method=method, candidates=3) == replace(first, most_probable=None)  # without a mixture


def test_the_supernet_is_left_as_it_was_even_by_an_error():
    class Broken(TensorSamples):
        def batch(self, indices):
            raise RuntimeError("the disk is gone")

    space = Convolutional()
    data = random_data(space, SPLITS)
    before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    view = DataView(
        {"weights": data.weights, "validation": data.validation, "architecture": Broken(torch.ones(3), torch.ones(3))}
    )
    with pytest.raises(RuntimeError, match="the disk is gone"):
        discretize(space, view, None, method="random", candidates=1)
    same({**space.state_dict()}, before, "the supernet")
    assert space.superposition.assignment is None


def test_recalibration_can_be_off():
    torch.manual_seed(0)
    space = Convolutional()
    for _ in range(20):
        space(space.example_input(8))
    result = derive(space, random_mixture(space), method="argmax", recalibration_batches=0)
    data = random_data(space, SPLITS, samples=40)
    assert result.validation_accuracy == measure(space.extract(result.architecture), data.validation).accuracy
