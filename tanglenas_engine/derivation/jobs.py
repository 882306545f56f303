"""Trainings as jobs: run by joblib in this process, in others, or on a cluster; each result is kept, none counts twice.

A result depends on the architecture, the recipe, the seed and the number of epochs. It depends neither on the order of
the jobs nor on the worker, but for the rounding of sums where workers have other numbers of threads or other machines.
A job that finds no checkpoint of the part before it begins anew, and ends alike.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import joblib
import torch

from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.errors import DivergedError, TangleNASError
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.seeding import seeded
from tanglenas_engine.runtime.timer import Clock
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.training.loop import Interrupted

S = TypeVar("S")
T = TypeVar("T")

LOST = 3
"""Losses of workers in a row, without a finished training between them, after which no more are started."""

_one_at_a_time = threading.Lock()
"""A lock for the global random generators and gin's config, as workers of a cluster may be threads."""


class Trained(NamedTuple):
    """The result of one training.

    Attributes:
        loss: The network's mean cross-entropy on the validation split; NaN for a training that diverged. A training
            whose loss is not finite failed.
        accuracy: Its accuracy there, in %.
        seconds: The processor seconds of the training from its first epoch on, also of those that an earlier call took.
        failure: The reason why the training gave no loss, which belongs to the network, or an empty string.
        wall: Its seconds on the wall, counted likewise; NaN lets the jobs measure the calls and add them up.
    """

    loss: float
    accuracy: float
    seconds: float
    failure: str = ""
    wall: float = math.nan


NOTHING = Trained(math.nan, math.nan, 0.0, wall=0.0)
"""The result of a training that has not begun."""


class Train(Protocol):
    """A function that trains the network of an architecture. Workers get a pickled copy of it."""

    @property
    def epochs(self) -> int:
        """The number of epochs of a complete training."""

    @property
    def identity(self) -> str:
        """A digest of all that a result depends on, beside the architecture and the number of epochs."""

    def __call__(self, architecture: Architecture, epochs: int) -> Trained:
        """Train on the training data until so many epochs of a complete training, and measure on the validation split.

        A training that was called for fewer epochs before goes on where it paused, if it can. A race counts its work
        as if it could.

        Raises:
            DivergedError: The training diverged. This is a result: the network is out of the race.
            TangleNASError: Another error, such as a full disk. It ends the race, and is kept nowhere.
        """


class Jobs:
    """The trainings of a race. A result is kept as soon as it is there, and no training runs twice.

    A training that failed does not go on: its failure is its result after any more epochs.

    Attributes:
        epochs: The number of epochs of all trainings that were asked for, each to its longest result.
    """

    def __init__(self, candidates: Candidates, train: Train, workers: int, backend: str | None):
        self.candidates, self.train, self.workers, self.backend = candidates, train, workers, backend
        self._asked: dict[str, int] = {}
        if known := [key for key in candidates.kept if key.startswith(f"{train.identity}/")]:
            candidates.note(f"{len(known)} trainings were done before")

    @property
    def epochs(self) -> int:
        return sum(self._asked.values())

    def results(self, architectures: Sequence[Architecture], epochs: int) -> list[Trained]:
        """Return the results of trainings after equally many epochs, in order. Those that are not known run now.

        Raises:
            TangleNASError: Workers were lost time after time, or a training ended in an error other than divergence.
        """
        keys = [self._key(one.digest, epochs) for one in architectures]
        names = dict(zip(keys, architectures, strict=True))
        for one in architectures:
            self._asked[one.digest] = max(epochs, self._asked.get(one.digest, 0))
        for key, one in names.items():
            if (before := self._before(one.digest, epochs)).failure:
                self.candidates.kept.setdefault(key, list(before))

        def missing() -> list[Architecture]:
            return [one for key, one in names.items() if key not in self.candidates.kept]

        found = despite_losses(
            missing, partial(self._finished, epochs=epochs), "race", "race.workers", self.candidates.note
        )
        for digest, result in found:
            key = self._key(digest, epochs)
            self.candidates.kept[key] = list(result)
            self.candidates.save()
            done = sum(one in self.candidates.kept for one in keys)
            self.candidates.note(
                f"{done} of {len(keys)} trained for {epochs} epoch{'s' * (epochs > 1)}: "
                f"validation loss {result.loss:.4f}, {result.seconds:.0f} s  {names[key]}"
            )
        return [Trained(*self.candidates.kept[key]) for key in keys]

    def afforded(self, architectures: Sequence[Architecture], seconds: float, clock: Clock) -> float:
        """Return how many complete trainings so many seconds of a clock allow, by a training of two epochs.

        The first epoch is slower than the others, as what is made once is made there, so the second one stands for
        these. The seconds of trainings add up, also where several run at the same time. What this takes is subtracted.

        Args:
            architectures: The dearest first, so that no other takes longer. The next one is trained where a training
                diverges.

        Raises:
            TangleNASError: The time is shorter than one training, every training diverged, or one ended in
                another error.
        """

        def taken(result: Trained) -> float:
            return result.seconds if clock == "processor" else result.wall

        spent = 0.0
        for architecture in architectures:
            (first,) = self.results([architecture], 1)
            if not first.failure:
                break
            spent += taken(first)
        else:
            raise TangleNASError(f"every training of the race failed. The last one: {first.failure}")
        (second,) = self.results([architecture], min(2, self.train.epochs))
        spent += taken(second)
        each = taken(first) if second.failure else taken(second) - taken(first)
        full = taken(first) + (self.train.epochs - 1) * each
        if seconds < full:
            raise TangleNASError(
                f"race.seconds is {seconds:g}, but one training of {self.train.epochs} epochs takes about {full:.1f} "
                f"{clock} seconds: give more seconds, or shorten the trainings (retrain.epochs)"
            )
        self.candidates.note(f"a training takes about {full:.1f} {clock} seconds; race.seconds is {seconds:g}")
        return max(0.0, seconds - spent) / full

    def _key(self, digest: str, epochs: int) -> str:
        return f"{self.train.identity}/{digest}/{epochs}"

    def _before(self, digest: str, epochs: int) -> Trained:
        """Return the result of the longest part of a training before so many epochs, or `NOTHING`."""
        parts = (self.candidates.kept.get(self._key(digest, before)) for before in range(epochs - 1, 0, -1))
        return next((Trained(*part) for part in parts if part), NOTHING)

    def _finished(self, architectures: Sequence[Architecture], epochs: int) -> Iterator[tuple[str, Trained]]:
        """Yield digests and results of trainings as they come."""
        earlier = {one.digest: self._before(one.digest, epochs) for one in architectures}
        ranks = distributed.world_size()
        if ranks > 1:  # a training for each rank at a time, so that what is finished is kept
            for start in range(0, len(architectures), ranks):
                wave = architectures[start : start + ranks]
                for digest, result in distributed.map_over_ranks(
                    lambda one: run(self.train, one, epochs, earlier=earlier[one.digest]), wave
                ):
                    yield digest, Trained(*result)
            return
        threads = max(1, torch.get_num_threads() // self.workers)
        tasks = [joblib.delayed(run)(self.train, one, epochs, threads, earlier[one.digest]) for one in architectures]
        with running_on(self.backend, self.workers):
            for digest, result in as_they_come(tasks, self.workers):
                yield digest, Trained(*result)


def run(
    train: Train, architecture: Architecture, epochs: int, threads: int | None = None, earlier: Trained = NOTHING
) -> tuple[str, tuple[float, float, float, str, float]]:
    """Train one network, in this process or another; return the digest and the result, also of one that diverged.

    Args:
        threads: The number of torch's threads; None leaves it.
        earlier: The result of the part of the training before this call.

    Raises:
        TangleNASError: The training ended in an error other than divergence. The message has the architecture.
    """
    with _one_at_a_time, distributed.apart(), seeded(0):
        before, start, began = torch.get_num_threads(), time.process_time(), time.monotonic()
        torch.set_num_threads(threads or before)
        try:
            result = train(architecture, epochs)
        except DivergedError as error:
            result = Trained(math.nan, math.nan, earlier.seconds + time.process_time() - start, str(error))
        except TangleNASError as error:
            raise TangleNASError(
                f"the training of {architecture} ended in an error: {error} Finished trainings are kept: run the same "
                "command again to go on"
            ) from error
        except Interrupted:  # the message of a training is about checkpoints that it does not have here
            raise KeyboardInterrupt from None
        finally:
            torch.set_num_threads(before)
    if math.isnan(result.wall):
        result = result._replace(wall=earlier.wall + time.monotonic() - began)
    if not math.isfinite(result.loss) and not result.failure:
        result = result._replace(failure=f"the validation loss is {result.loss}, which is no finite number")
    return architecture.digest, (result.loss, result.accuracy, result.seconds, result.failure, result.wall)


def despite_losses(
    missing: Callable[[], Sequence[S]],
    run: Callable[[Sequence[S]], Iterator[T]],
    name: str,
    option: str,
    note: Callable[[str], None],
) -> Iterator[T]:
    """Yield the results of jobs as they come. The jobs that are missing after a loss of workers run again.

    Args:
        missing: Returns the jobs without a result. A result that was yielded counts, so the caller keeps it at once.
        run: Runs jobs, and yields their results as they come.
        name: The name of all the jobs together, for messages.
        option: The option that has fewer workers, for messages.
        note: A function that tells a person a sentence.

    Raises:
        TangleNASError: Workers were lost `LOST` times in a row, without a result between.
    """
    lost = 0
    while jobs := missing():
        try:
            for result in run(jobs):
                lost = 0
                yield result
        except BrokenProcessPool as problem:
            lost += 1
            said = str(problem).split(". ")[0].split("\n")[0]
            if lost == LOST:
                raise TangleNASError(
                    f"the {name} lost workers {LOST} times in a row ({said}). Memory may be short: lower {option}. "
                    "Finished trainings are kept: run the same command again to go on"
                ) from None
            note(f"a worker was lost ({said}); its trainings run again")


def as_they_come(tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    """Yield the results of joblib's tasks as they are ready, in any order.

    A backend that returns all results at once, such as Ray's, gets as many tasks at a time as there are workers, so
    that what is finished can be kept.
    """
    backend, _ = joblib.parallel.get_active_backend()
    if backend.supports_return_generator:
        yield from joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)(tasks)
        return
    count = joblib.effective_n_jobs(workers)
    with joblib.Parallel(n_jobs=workers, batch_size=1) as parallel:  # all groups have the same processes
        for start in range(0, len(tasks), count):
            yield from parallel(tasks[start : start + count])


@contextmanager
def running_on(backend: str | None, workers: int, option: str = "race.backend") -> Iterator[None]:
    """Let joblib run jobs by a backend inside the block; None leaves it as it is.

    "dask" takes the cluster of Dask's settings, such as `$DASK_SCHEDULER_ADDRESS`, and "ray" that at `$RAY_ADDRESS`.
    Without an address, both make one of this machine.

    Args:
        workers: The number of processes of a new cluster of Dask, counted as joblib does: -1 is one for each core.
        option: The name of the option for the backend, for messages.

    Raises:
        TangleNASError: joblib has no such backend, its package is not installed, or its cluster does not answer.
    """
    with ExitStack() as stack:
        if backend == "dask":
            stack.enter_context(_dask(workers, option))
        if backend == "ray":
            _register_ray(option)
        if backend is not None:
            try:
                stack.enter_context(joblib.parallel_config(backend=backend))
            except (ValueError, ImportError) as error:
                said = str(error).splitlines()[0]
                raise TangleNASError(
                    f"{option} is {backend!r}, expected a backend of joblib such as 'loky', 'dask' or 'ray' ({said})"
                ) from None
        yield


def _register_ray(option: str) -> None:
    """Make Ray a backend of joblib."""
    try:
        from ray.util.joblib import register_ray
    except ImportError:
        raise TangleNASError(f"{option} 'ray' needs Ray: pip install ray") from None
    register_ray()


@contextmanager
def _dask(workers: int, option: str) -> Iterator[None]:
    """Connect to the cluster of Dask's settings inside the block, or to a new one here, unless the caller has.

    Raises:
        TangleNASError: Dask is not installed, or no scheduler answers at the address of its settings.
    """
    try:
        import dask
        from distributed import Client, get_client
    except ImportError:
        raise TangleNASError(f"{option} 'dask' needs Dask: pip install 'tanglenas[dask]'") from None
    with ExitStack() as stack:
        try:
            get_client()
        except ValueError:
            address = dask.config.get("scheduler-address", None)
            count = joblib.effective_n_jobs(workers)  # -1 is one for each core
            own = {} if address else {"n_workers": count, "threads_per_worker": 1, "dashboard_address": None}
            try:
                client = Client(**own)
            except OSError as error:
                raise TangleNASError(
                    f"{option} is 'dask', but no scheduler answers at {address} ({str(error).splitlines()[0]}): "
                    "start one there, or unset DASK_SCHEDULER_ADDRESS to make a cluster of this machine"
                ) from None
            stack.enter_context(client)
        yield
