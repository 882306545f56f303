"""Candidates: architectures within a budget, judged with the weights of a trained supernet."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, Self, TypeVar

import torch

from tanglenas_engine.data import Samples, SampleSubset, held
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.derivation.halving import MOST, RUNG, TRIED, TRIED_LONG, Derivation, Trial, promoted, rungs
from tanglenas_engine.derivation.proposals import Proposals
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.devices import device_of
from tanglenas_engine.runtime.progress import Progress, SilentProgress
from tanglenas_engine.runtime.seeding import restore_rng_state, rng_state, seeded
from tanglenas_engine.runtime.timer import Timer
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.superposition.mixture import Mixture
from tanglenas_engine.training.measure import STATISTICS_BATCH, Measured, measure_inherited, statistics_inputs

SAVE_SECONDS = 30.0
"""The time between checkpoints of the scores, in seconds."""

COLUMNS = ("digest", "loss", "accuracy", "samples", "generation", "architecture")
"""The names in a record that are no costs."""

Judging = Literal["race", "all samples", "one candidate"]
"""How a method judges candidates, which says how many fit into some seconds."""
Rungs = Literal["race", "first rung", "all samples"]
"""What a generation is judged on: all rungs, from each of which the best go on, the first one, or the last one."""
AnyMethod = TypeVar("AnyMethod", bound=Callable[..., Any])


def judges(judging: Judging) -> Callable[[AnyMethod], AnyMethod]:
    """Mark a method with how it judges. One without a mark runs a race."""

    def marked(method: AnyMethod) -> AnyMethod:
        vars(method)["judging"] = judging
        return method

    return marked


def judging_of(method: Callable[..., Any]) -> Judging:
    """Return how a method judges, also one whose options are bound by `functools.partial`."""
    while isinstance(method, partial):
        method = method.func
    found: Judging = getattr(method, "judging", "race")
    return found


class Candidates(Proposals):
    """A source of architectures within a budget, and a judge of them with a supernet's weights.

        with Candidates(space, data.weights, data.architecture) as candidates:
            candidates.judge(candidates.fresh(100))
        candidates.records

    Within the block, the supernet belongs to this object. After it, the space is released and has its mode and its
    statistics again. Samples are fetched once, no network is built, and all randomness follows from the seed. A score
    does not depend on other candidates. Several ranks draw the same candidates and share the judging.

    Candidates are ranked by loss, which is finer than accuracy. They run a race by successive halving (`halving.py`).
    The candidates of a generation see the same samples.

    Args:
        space: The supernet with its trained weights.
        statistics: Samples that set the statistics of batch norms for each candidate.
        samples: Samples to judge candidates on.
        budget, fill, limit, prior, seed: What candidates are drawn from, as `Proposals` has it.
        objectives: Further costs in the records, bound to the space.
        cost: The cost of a front: one of `cost.METRICS`, or the name of an objective.
        recalibration_batches: The number of batches of `measure.STATISTICS_BATCH` samples for the statistics; 0 keeps
            the supernet's. A rung of fewer samples takes no more batches than these fill.
        tells_best: Whether progress lines have the smallest loss so far, and the number of its samples. A comparison of
            candidates looks for no best one.
        checkpoints: The folder for scores. Those of an earlier run there are used.

    Raises:
        TangleNASError: An objective has the name of another part of a record.

    Attributes:
        records: One record per candidate, in the order of judging: digest, loss, accuracy in %, the number of samples
            that these are of, costs, generation and architecture.
        kept: What a method wants to keep for a later run, beside the scores: lists of numbers and strings by name.
            `save` commits it.
    """

    def __init__(
        self,
        space: SearchSpace,
        statistics: Samples,
        samples: Samples,
        *,
        budget: Budget | None = None,
        fill: float = 0.0,
        objectives: Sequence[Objective] = (),
        cost: str = "params",
        limit: int = 100,
        prior: Mixture | None = None,
        recalibration_batches: int = 8,
        batch_size: int = 256,
        seed: int = 0,
        device: torch.device | None = None,
        label: str = "discretize",
        tells_best: bool = True,
        checkpoints: CheckpointFolder | None = None,
        progress: Progress | None = None,
    ):
        super().__init__(space, budget=budget, fill=fill, limit=limit, prior=prior, seed=seed)
        self.cost, self.seed, self.objectives = cost, seed, tuple(objectives)
        if taken := [one.name for one in self.objectives if one.name in COLUMNS]:
            raise TangleNASError(
                f"an objective is called {taken[0]!r}, as what a record of a candidate has beside costs "
                f"({', '.join(COLUMNS)}): give it another name"
            )
        self.kept: dict[str, list[Any]] = {}
        self._device = device_of(None) if device is None else device
        self._batch_size = batch_size
        self._samples = held(samples, batch_size, self._device)
        self._order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
        self._statistics = statistics_inputs(space, statistics, recalibration_batches, seed, self._device)
        self._label, self._tells_best = label, tells_best
        self._checkpoints, self._progress = checkpoints, progress or SilentProgress()
        self._judged: dict[str, Record] = {}  # by digest, in the order of judging
        self._losses: dict[int, dict[str, float]] = {}  # of this derivation, by number of samples and digest
        self._best: dict[int, float] = {}  # the smallest loss by number of samples
        self._generation, self._done = 0, 0
        # A cache of losses and accuracies by digest and number of samples. A trial and earlier runs write into it, too,
        # so a score does not say that its candidate came so far in this derivation.
        self._scores: dict[str, tuple[float, float]] = {}
        self._saved = time.monotonic()
        self._stack = ExitStack()
        self._timer: Timer | None = None
        self._costing: Derivation | None = None
        self._announced = True

    def __enter__(self) -> Self:
        state = distributed.broadcast(self._checkpoints.load() if self._checkpoints else None)
        if state is not None:
            self._scores = {key: (loss, accuracy) for key, (loss, accuracy) in state["scores"].items()}
            self.kept = dict(state["kept"])
            known = len({key.partition("/")[0] for key in self._scores})
            self._progress.note(f"{self._label}: {known} candidates were judged before")
        self.space.to(self._device)
        self._stack.enter_context(self.space.release().as_largest())
        self._stack.enter_context(seeded(self.seed))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stack.close()
        if kind is not None and self._scores:
            self.save()

    def limit_by_seconds(self, timer: Timer, race: bool = True) -> None:
        """Set the limit to the number of candidates that can be judged in a timer's seconds.

        The first candidates are judged on two rungs, which tells what a candidate and a sample cost. A derivation that
        goes on, with any number of ranks, keeps what its trial said, and so its number.

        Args:
            race: False for candidates that are all judged on all samples.

        Raises:
            TangleNASError: Two candidates take longer.
        """
        if new := "trial" not in self.kept:
            state, generators = self.generator.get_state(), rng_state()
            self.kept["trial"] = [*self._trial(timer)]
            self.generator.set_state(state)
            restore_rng_state(generators)
            self.drawn.clear()
            self.save()
        self._costing = Derivation(Trial(*self.kept["trial"]), len(self._samples), self._batch_size, race=race)
        self._timer, self._announced = timer, not new
        self.in_generations(None)

    def in_generations(self, size: int | None, single: int = 0) -> None:
        """Recompute the limit for this size of generations, if the limit follows from seconds.

        Args:
            size: The number of candidates of a generation; None for one of all candidates.
            single: The number of candidates that follow one by one, each judged on all samples and by `early`.

        Raises:
            TangleNASError: Two candidates take longer than the seconds.
        """
        if self._costing is None or self._timer is None:
            return
        self._costing = replace(self._costing, generation=size, single=single)
        self.limit = self._costing.affordable(min(self.space.size, MOST))
        if self.limit < 2:
            needed = self._timer.seconds - self._costing.trial.left + self._costing.seconds(2)
            raise TangleNASError(
                f"{self._label}.seconds is {self._timer.seconds:g}, but a trial and two candidates need "
                f"{needed:.1f} {self._timer.clock} seconds: give more seconds or fewer data"
            )

    def _trial(self, timer: Timer) -> Trial:
        """Draw and judge some candidates, and return what that took and what is left of the seconds."""
        for one in self.fresh(1):  # the first one builds the tables of costs, which the others share
            self._costs(one)
        self.drawn.clear()
        start = timer.used()
        tried = self.fresh(TRIED)
        for one in tried:
            self._costs(one)
        drawing = (timer.used() - start) / len(tried)
        few, many = (min(batches * self._batch_size, len(self._samples)) for batches in (1, RUNG))

        def judging(count: int, timed: int) -> float:
            def judge(number: int) -> None:
                one = tried[number % len(tried)]
                found = self.measured(one, self._part(count))
                self._scores[f"{one.digest}/{count}"] = found.loss, found.accuracy

            return timer.measure(judge, 1, timed) / distributed.world_size()  # each rank judged all of them

        short = judging(few, TRIED)
        long = judging(many, TRIED_LONG) if many > few else short
        return Trial(drawing, few, short, many, long, timer.seconds - timer.used())

    @property
    def front_cost(self) -> str | Objective:
        """The cost of a front: a metric's name, or an objective."""
        return next((one for one in self.objectives if one.name == self.cost), self.cost)

    @property
    def records(self) -> list[Record]:
        return [*self._judged.values()]

    def judge_first(self, mixture: Mixture | None) -> None:
        """Judge the result of argmax, architectures drawn from alpha's mixture, and as many random ones or more.

        What alpha has not decided is nearly even in its mixture, and so nearly random in what is drawn from it. Without
        a mixture, all candidates are random.
        """
        if mixture is None:
            self.note("there is no alpha: random candidates are judged")
        else:
            self.note(
                f"alpha has an entropy of {mixture.entropy():.2f} of 1: what argmax takes is judged, with candidates "
                "drawn from alpha's mixture and random ones"
            )
        self.judge(self.first(self.limit, mixture=mixture))

    def judge(
        self, architectures: Sequence[Architecture], total: int | None = None, on: Rungs = "race"
    ) -> list[Record]:
        """Judge architectures, which are one generation, and return their records. Known scores are used again.

        Args:
            total: The number of candidates in all generations, for the progress line.
            on: "race" judges all on the first rung, and the best on the following ones. "first rung" leaves it to
                `promote` who goes on. "all samples" judges all on the last one.
        """
        if self._timer and not self._announced:
            self._announced = True
            self.note(
                f"{self._timer.seconds:g} {self._timer.clock} seconds are {self.limit} candidates. "
                f"{self._label}.candidates = {self.limit} gives the same result again"
            )
        if not self._judged:
            self._total = len(architectures) if total is None else total
            self._line = self._stack.enter_context(self._progress.stage(self._label, self._total, 0))
        new = list({one.digest: one for one in architectures if one.digest not in self._judged}.values())
        self.drawn.update(one.digest for one in new)
        left = new
        for number, count in enumerate(self._rungs(len(new), on)):
            if number:
                left = sorted(left, key=lambda one: _rank(self._judged[one.digest]))[: promoted(len(left))]
            self._measure(left, count)
        self._generation += 1
        return [self._judged[architecture.digest] for architecture in architectures]

    def early(self, architectures: Sequence[Architecture]) -> list[float]:
        """Return losses on the first rung of the races so far, on which architectures can be compared."""
        first = min(self._losses)
        losses = self._losses[first]
        self._measure([one for one in architectures if one.digest not in losses], first, keep=True)
        return [losses[one.digest] for one in architectures]

    def save(self) -> None:
        """Write scores, and what a method keeps, into the folder for them, if there is one."""
        if self._checkpoints:
            scores = {key: list(score) for key, score in self._scores.items()}
            self._checkpoints.save({"scores": scores, "kept": self.kept})
        self._saved = time.monotonic()

    def note(self, sentence: str) -> None:
        """Tell a person a fact about the derivation."""
        self._progress.note(f"{self._label}: {sentence}")

    def promote(self, keep: Callable[[Sequence[Record]], Sequence[Record]]) -> None:
        """Judge more candidates of each rung on the next one, from the first rung to the last.

        Args:
            keep: Returns those that go on, of records with the loss on the samples of one rung.
        """
        for count, following in itertools.pairwise(sorted(self._losses)):
            losses = self._losses[count]
            scored = [{**one, "loss": losses[digest]} for digest, one in self._judged.items() if digest in losses]
            early = [one for one in keep(scored) if self._judged[one["digest"]]["samples"] < following]
            self._measure([record["architecture"] for record in early], following)

    def best(self, count: int = 1, since: int = 0) -> list[Record]:
        """Return the records of smallest loss of generation `since` or later; the first found wins a tie.

        A candidate that came further in its race is before one that did not. A loss that is not finite is last.
        """
        return sorted((record for record in self.records if record["generation"] >= since), key=_rank)[:count]

    def measured(self, architecture: Architecture, samples: Samples) -> Measured:
        """Return loss and accuracy on samples, with the supernet's weights and statistics of this architecture.

        The statistics come from about as many samples as a rung has, as all would take most of a first rung's time.
        """
        statistics = self._statistics
        if isinstance(samples, SampleSubset):
            statistics = statistics[: math.ceil(len(samples) / STATISTICS_BATCH)]
        return measure_inherited(self.space, architecture, samples, statistics, self._batch_size)

    def _rungs(self, candidates: int, on: Rungs) -> list[int]:
        """Return the numbers of samples that a generation is judged on, one after another."""
        if on == "all samples":
            return [len(self._samples)]
        counts = rungs(candidates, len(self._samples), self._batch_size)
        if on == "race":
            return counts
        for count in () if self._losses else counts:  # all generations have the rungs of the first one
            self._losses[count] = {}
        return [min(self._losses)]

    def _part(self, count: int) -> Samples:
        """Return the samples of a rung."""
        return self._samples if count == len(self._samples) else SampleSubset(self._samples, self._order[:count])

    def _measure(self, architectures: Sequence[Architecture], count: int, keep: bool = False) -> None:
        """Write the scores of architectures on `count` samples into their records, or keep those that records have."""
        losses = self._losses.setdefault(count, {})
        scores = distributed.map_over_ranks(partial(self._score, count=count), architectures)
        for architecture, (loss, accuracy) in zip(architectures, scores, strict=True):
            self._scores[f"{architecture.digest}/{count}"] = loss, accuracy
            losses[architecture.digest] = loss
            if keep:
                continue
            if architecture.digest not in self._judged:
                self._judged[architecture.digest] = self._costs(architecture)
            self._judged[architecture.digest].update(loss=loss, accuracy=accuracy, samples=count)

    def _costs(self, architecture: Architecture) -> Record:
        return {
            "digest": architecture.digest,
            "loss": math.nan,
            "accuracy": math.nan,
            "samples": 0,
            **asdict(self.space.cost(architecture)),
            **{objective.name: objective.cost(architecture) for objective in self.objectives},
            "generation": self._generation,
            "architecture": architecture,
        }

    def _score(self, architecture: Architecture, count: int) -> tuple[float, float]:
        key = f"{architecture.digest}/{count}"
        if key not in self._scores:
            found = self.measured(architecture, self._part(count))
            self._scores[key] = found.loss, found.accuracy
            if time.monotonic() - self._saved > SAVE_SECONDS:
                self.save()
        loss, accuracy = self._scores[key]
        self._best[count] = min(self._best.get(count, math.inf), loss)
        if architecture.digest not in self._judged:  # its first rung
            for _ in range(min(distributed.world_size(), self._total - self._done)):  # other ranks are as far
                self._done += 1
                self._line.advance()
        said = f"best loss {self._best[count]:.3f}" if self._tells_best else ""
        if said and count < len(self._samples):
            said += f" on {count:,} samples"
        self._line.epoch(self._done, self._total, said)
        return loss, accuracy


def _rank(record: Record) -> tuple[int, bool, float]:
    return -record["samples"], not math.isfinite(record["loss"]), record["loss"]
