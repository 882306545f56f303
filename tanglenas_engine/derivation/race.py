"""A race of real trainings: candidates that the supernet ranks best are trained, and their own losses decide.

The race is successive halving (Jamieson and Talwalkar, 2016, arXiv:1502.07943; Hyperband, arXiv:1603.06560, has 3 as
the factor between rungs). All entrants train for a third of a complete training, the best third of them go on, until a
few have had a complete one. Each part of a training is a job of its own (`jobs.py`), which goes on from a checkpoint.

All trainings have the schedule of a complete one. The validation loss after 4 of 12 epochs ranks 24 networks of
gpt_nano as their test losses in the end do, with a Spearman correlation of 0.57. After 5 epochs it is 0.75, after 9
0.89, and after 2, within the warm-up, 0.30 (benchmarks/README.md). So the first rung is no shorter than `shortest`, and
a small budget admits fewer networks.

A supernet tells bad candidates from good ones better than it tells good ones from the best, and on some data its order
says nothing. So half of the entrants are of any rank, and when these have trained for the first rung, a regression on
their losses proposes the others (`regression.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.jobs import Jobs, Train, Trained
from tanglenas_engine.derivation.regression import LEAST, features_of, predicted
from tanglenas_engine.errors import TangleNASError, at_least, positive, within
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.timer import Clock, check_clock
from tanglenas_engine.runtime.tracking import Record
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.superposition.mixture import Mixture

ROUNDING = 1e-9
"""The part of a training by which a plan may exceed its budget: sums of fractions are rounded."""


class Rung(NamedTuple):
    """A part of a race: the number of networks that go on, and the epochs of each at its end."""

    networks: int
    epochs: int


@dataclass(frozen=True)
class Raced:
    """The end of a race.

    Attributes:
        architecture: The architecture of the winner.
        records: One record per network that was trained, the winner first: its place, digest, rank and loss by the
            supernet, the validation loss after each number of epochs, the last of these losses with its accuracy in %
            and its epochs, costs, processor seconds, the reason of a failure, and the architecture.
        trainings: The work of the race, in complete trainings.
    """

    architecture: Architecture
    records: list[Record]
    trainings: float


def race(
    candidates: Candidates,
    mixture: Mixture | None,
    train: Train,
    *,
    entrants: int = 12,
    propose: float = 0.5,
    eta: int = 3,
    shortest: float = 1 / 3,
    trainings: float | None = None,
    seconds: float | None = None,
    clock: Clock = "processor",
    workers: int = 1,
    backend: str | None = None,
) -> Raced | None:
    """Judge candidates as `both` does, train the best of them by rungs, and return the end of the race.

    All networks are trained with one seed and judged on the validation split. A network whose training diverges is
    last. Any other error of a training ends the race. Finished trainings are kept, and the same call goes on with the
    others. Where only one candidate was judged, nothing is trained, and the result is None.

    Args:
        train: The function that trains.
        entrants: The largest number of networks that are trained.
        propose: The share of the entrants, from 0 to 1, that a regression proposes after the first rung of the others.
            These are taken at equal steps through the supernet's ranking, and are at least four. Where none is
            proposed, all entrants are the supernet's best.
        eta: The factor between rungs: this part of the networks goes on. As many of them, at most, train to the end.
        shortest: The share of a training after which networks are compared first. It has to be beyond a warm-up.
        trainings: The budget in complete trainings. None or infinity trains all entrants; 12 of them take 5.8 trainings
            at the defaults.
        seconds: The budget in seconds; None or infinity for none. A first training of two epochs tells how long one
            takes, so another machine may plan another race. The seconds of trainings add up, also of those at the same
            time, and of those that fail.
        clock: The clock for `seconds`: "processor" adds up the seconds of all threads; "wall" is the clock for work on
            a GPU.
        workers: The number of processes that train. Each takes an equal part of torch's threads.
        backend: A backend of joblib that runs the jobs, such as "dask"; None takes processes of this machine, or what
            `joblib.parallel_config` says. "dask" takes the cluster at `$DASK_SCHEDULER_ADDRESS`, or makes one of
            `workers` processes here.

    Raises:
        TangleNASError: An option is out of its range, the budget is shorter than one training, every training diverged,
            one ended in another error, or workers are lost time after time.
    """
    check_options(entrants, propose, eta, shortest, trainings, seconds, clock, workers, backend)
    candidates.judge_first(mixture)
    ranked = [Runner(record, rank) for rank, record in enumerate(candidates.best(len(candidates.records)), 1)]
    if len(ranked) < 2:
        candidates.note("no race, as there is one candidate only")
        return None
    jobs = Jobs(candidates, train, workers, backend)
    budget = math.inf if trainings is None else trainings
    if seconds is not None and math.isfinite(seconds):
        among = ranked if _proposals(min(entrants, len(ranked)), propose) else ranked[:entrants]
        dearest = sorted(among, key=lambda runner: -runner.judged["macs"])[:entrants]
        budget = min(budget, jobs.afforded([runner.architecture for runner in dearest], seconds, clock))
    rungs = plan(min(entrants, len(ranked)), train.epochs, eta, budget, shortest)
    planned = work(rungs) / train.epochs
    left = budget - planned
    candidates.note(
        f"a race of {described(rungs)}: {planned:.1f} trainings of {train.epochs} epochs"
        + (f". {left:.1f} trainings of the budget are left: raise race.entrants" if 1 <= left < math.inf else "")
    )
    running = runners = _entered(ranked, rungs[0], propose, jobs)
    for rung in rungs:
        running = _trained(running[: rung.networks], rung.epochs, jobs)
        if not running:
            break
    ranked = sorted(runners, key=Runner.order)
    if failure := ranked[0].last.failure:
        raise TangleNASError(
            f"every training of {rung.epochs} epochs failed. The first one: {failure}. Change the recipe of retrain, "
            "such as its learning rate"
        )
    if not running:
        candidates.note(
            f"every training of {rung.epochs} epochs failed: the race ends with what networks are worth after "
            f"{max(ranked[0].results)}"
        )
    records = [runner.record(place) for place, runner in enumerate(ranked, 1)]
    for sentence in (*map(line, records), reason(records, len(candidates.records))):
        candidates.note(sentence)
    return Raced(ranked[0].architecture, records, jobs.epochs / train.epochs)


def check_options(
    entrants: int,
    propose: float,
    eta: int,
    shortest: float,
    trainings: float | None,
    seconds: float | None,
    clock: Clock,
    workers: int,
    backend: str | None,
) -> None:
    """Check the options of a race, which are those of `race`.

    Raises:
        TangleNASError: An option is out of its range.
    """
    at_least("race.entrants", entrants, 2)
    within("race.propose", propose, 0, 1)
    at_least("race.eta", eta, 2)
    at_least("race.workers", workers, 1)
    if positive("race.shortest", shortest) > 1:
        raise TangleNASError(f"race.shortest is {shortest}, expected a share of a training, at most 1")
    if seconds is not None:
        positive("race.seconds", seconds, infinite=True)
        check_clock("race", clock)
    if trainings is not None and positive("race.trainings", trainings, infinite=True) < 1:
        raise TangleNASError(
            f"race.trainings is {trainings}, expected at least 1: no race is shorter than one training"
        )
    if distributed.world_size() > 1 and (workers > 1 or backend is not None):
        raise TangleNASError(
            f"race.workers is {workers} and race.backend is {backend!r}, but the stage runs in "
            f"{distributed.world_size()} processes, each of which trains: leave race.workers at 1 and race.backend out"
        )


def _proposals(entrants: int, propose: float) -> int:
    """Return how many of the entrants of a race are proposed."""
    return min(int(propose * entrants), max(entrants - LEAST, 0))


def _entered(ranked: Sequence[Runner], rung: Rung, propose: float, jobs: Jobs) -> list[Runner]:
    """Return the entrants of a race. Those that the last proposals rest on have trained for the first rung."""
    count = _proposals(rung.networks, propose)
    if not count:
        return list(ranked[: rung.networks])
    steps = 2 * (rung.networks - count)
    entrants = [ranked[place * len(ranked) // steps] for place in range(1, steps, 2)]  # the middle of each step
    for runner in entrants:
        runner.entered = "any rank"
    features = features_of(
        jobs.candidates.space,
        [runner.architecture for runner in ranked],
        jobs.candidates.early([runner.architecture for runner in ranked]),
    )
    for wave in (count - count // 2, count // 2):
        _trained(entrants, rung.epochs, jobs)
        guesses = predicted(features, {runner.rank - 1: runner.last.loss for runner in entrants})
        left = [runner for runner in ranked if runner not in entrants]
        for runner in sorted(left, key=lambda runner: guesses[runner.rank - 1])[:wave]:
            runner.entered = "proposed"
            entrants.append(runner)
    return entrants


def plan(entrants: int, epochs: int, eta: int = 3, trainings: float = math.inf, shortest: float = 1 / 3) -> list[Rung]:
    """Return the rungs of the largest race within a budget.

    The last rung has complete trainings of up to `eta` networks, so that these are compared by what they are worth.
    Where the budget is shorter than two trainings, the better one of two networks goes on from the first rung, or both
    share the budget.

    Args:
        entrants: The largest number of networks.
        epochs: The number of epochs of a complete training.
        eta: The factor between rungs.
        trainings: The budget in complete trainings; infinity has no limit.
        shortest: The share of a training in the first rung.

    Raises:
        TangleNASError: The budget is shorter than a race of two networks for one epoch each.
    """
    first = max(1, round(shortest * epochs))
    budget = trainings * epochs + ROUNDING
    share = int(min(budget / 2, epochs))
    plans = (
        *(ladder(count, epochs, eta, shortest) for count in range(entrants, 1, -1)),
        [Rung(2, first), Rung(1, epochs)],
        [Rung(2, share)],  # fits any budget
    )
    rungs = next(one for one in plans if work(one) <= budget)
    if rungs[0].epochs < 1:
        raise TangleNASError(
            f"the race has a budget of {trainings:.2f} trainings of {epochs} epochs, and two networks take "
            f"{2 / epochs:.2f} for one epoch each: raise race.trainings or race.seconds"
        )
    return rungs


def ladder(entrants: int, epochs: int, eta: int, shortest: float) -> list[Rung]:
    """Return the rungs of a race that ends with complete trainings. Rungs of equally many epochs are one."""
    counts = [entrants]
    while counts[-1] > eta:
        counts.append(math.ceil(counts[-1] / eta))
    steps = len(counts) - 1
    rungs: dict[int, int] = {}
    for number, count in enumerate(counts):
        share = shortest ** (1 - number / steps) if steps else 1.0
        rungs.setdefault(max(1, round(epochs * share)), count)
    return [Rung(count, length) for length, count in rungs.items()]


def work(rungs: Sequence[Rung]) -> int:
    """Return the number of epochs of all trainings of a race, each of which goes on where it paused."""
    before = [0, *(rung.epochs for rung in rungs)]
    return sum(rung.networks * (rung.epochs - done) for rung, done in zip(rungs, before, strict=False))


def described(rungs: Sequence[Rung]) -> str:
    """Return a plan for a person."""
    first, *later = rungs
    parts = [f"{first.networks} networks for {first.epochs} epoch{'s' * (first.epochs > 1)}"]
    parts += [f"the best {rung.networks} on to {rung.epochs}" for rung in later]
    return ", ".join(parts)


class Runner:
    """A candidate in the race.

    Attributes:
        results: The results of its trainings by the number of epochs.
        entered: Why it entered: "best" by the supernet, of "any rank", or "proposed" by the regression.
    """

    def __init__(self, judged: Record, rank: int):
        self.judged, self.rank, self.entered = judged, rank, "best"
        self.architecture: Architecture = judged["architecture"]
        self.results: dict[int, Trained] = {}

    @property
    def last(self) -> Trained:
        """The result of the longest training."""
        return self.results[max(self.results)]

    def order(self) -> tuple[bool, int, float]:
        """Return a key that is smaller for a better network: failures last, longer trainings first, then losses."""
        loss = math.inf if self.last.failure else self.last.loss
        return bool(self.last.failure), -max(self.results), loss

    def record(self, place: int) -> Record:
        """Return the record of this network."""
        return {
            "place": place,
            "digest": self.architecture.digest,
            "entered": self.entered,
            "supernet_rank": self.rank,
            "supernet_loss": self.judged["loss"],
            **{f"loss_{epochs}_epochs": result.loss for epochs, result in self.results.items()},
            "loss": self.last.loss,
            "accuracy": self.last.accuracy,
            "epochs": max(self.results),
            "params": self.judged["params"],
            "macs": self.judged["macs"],
            "seconds": self.last.seconds,
            "failure": self.last.failure,
            "architecture": str(self.architecture),
        }


def _trained(running: Sequence[Runner], epochs: int, jobs: Jobs) -> list[Runner]:
    """Train networks for so many epochs, unless they have, and return those that did not fail, best first."""
    new = [runner for runner in running if epochs not in runner.results]
    for runner, result in zip(new, jobs.results([one.architecture for one in new], epochs), strict=True):
        runner.results[epochs] = result
        if result.failure:
            jobs.candidates.note(f"{runner.architecture} is out of the race: {result.failure}")
    return sorted((runner for runner in running if not runner.last.failure), key=lambda runner: runner.last.loss)


def line(record: Record) -> str:
    """Return the record of a network as a line for a person."""
    losses = ", ".join(
        f"{loss:.4f} after {name.split('_')[1]}" for name, loss in record.items() if name.startswith("loss_")
    )
    return (
        f"{record['place']}. validation loss {losses} epochs, {record['seconds']:.0f} s; {record['entered']}, "
        f"supernet rank {record['supernet_rank']}, loss {record['supernet_loss']:.4f}  {record['architecture']}"
    )


def reason(records: Sequence[Record], judged: int) -> str:
    """Return why the first one of the records won."""
    winner, lead = records[0], lead_of(records)
    return (
        f"the race was won by a validation loss of {winner['loss']:.4f} after {winner['epochs']} epochs"
        + (f", {lead:.4f} less than the next" if lead is not None else "")
        + f"; the supernet ranked this network {winner['supernet_rank']} of {judged}"
    )


def lead_of(records: Sequence[Record]) -> float | None:
    """Return by how much the winner's loss is below the next; None if none other was trained as long."""
    winner, *others = records
    losses = [one["loss"] for one in others if one["epochs"] == winner["epochs"] and not one["failure"]]
    return min(losses) - winner["loss"] if losses else None
