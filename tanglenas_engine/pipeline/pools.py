"""Pools: random architectures of equal cost, each trained by itself as the retrain stage trains.

A pool says what a search is worth: which share of the random networks of its cost is worse than the one that it found,
and whether its supernet ranks them as their own trainings do. Each training is a job of its own, run by joblib. Its
result is written as soon as it is there, so a pool that is cut off goes on, and no training runs twice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gin
import joblib
import torch

from tanglenas_engine.data import Dataset, Splits
from tanglenas_engine.derivation.band import Band
from tanglenas_engine.derivation.budget import Budget, whole
from tanglenas_engine.derivation.jobs import as_they_come, despite_losses, running_on
from tanglenas_engine.errors import DivergedError, TangleNASError, at_least
from tanglenas_engine.pipeline.config.configurables import (
    bound_limits,
    create,
    evaluate,
    make_splits,
    objectives,
)
from tanglenas_engine.pipeline.config.params import stage_arguments
from tanglenas_engine.pipeline.config.reader import configured, material_config
from tanglenas_engine.pipeline.files import SPLITS
from tanglenas_engine.pipeline.trainings import Recipe, code_behind, project_arguments
from tanglenas_engine.runtime import strict_json
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.runtime.fingerprint import fingerprint
from tanglenas_engine.runtime.progress import Progress
from tanglenas_engine.spaces.cost import Cost
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.tables import Table, rank_correlations

COLUMNS = ("test_loss", "test_acc", "validation_loss", "validation_acc", "params", "macs", "seconds")
"""The columns of a pool: mean cross-entropies, accuracies in %, costs, and the processor seconds of a training.

The table has the means over the seeds that all its networks were trained with.
"""
LEAST = 0.95
"""The share of the budget that architectures of a pool use at least, by default."""
SAME = ("SEED = 0", 'read_architecture.pick = "best"')
"""Bindings in place of those that may differ between a pool and a network that is compared with it."""
DRAWS = 100
"""Draws per architecture of a pool after which a band counts as exhausted."""

Row = dict[str, float]


@dataclass(frozen=True)
class Identity:
    """What the networks of a pool have in common.

    A network that is compared with them has the same dataset, test split and recipe. Its seed and its other splits may
    differ.

    Attributes:
        test: A digest of the test split.
        recipe: A digest of the config of the retrain stage, without what no result depends on, and with SAME.
    """

    space: str
    dataset: str
    splits: str
    test: str
    recipe: str
    seed: int
    limits: dict[str, float]

    @classmethod
    def here(
        cls,
        arguments: Sequence[str],
        seed: int,
        space: SearchSpace,
        dataset: Dataset,
        splits: Splits,
        limits: Mapping[str, float],
    ) -> Identity:
        """Return the identity of a pool by a recipe, which is given as arguments of the retrain stage."""
        with configured((*arguments, *SAME)):
            bound = [material_config(), space.name, space.to_string(space.largest()), space.to_string(space.smallest())]
        return cls(
            space.name, dataset.fingerprint, fingerprint(splits=splits.assignment),
            fingerprint(test=splits.test.tolist()), fingerprint(bound=bound), seed, dict(limits),
        )  # fmt: skip

    def difference(self, other: Identity, names: Sequence[str] = ()) -> str:
        """Return the name of a part that differs, or an empty string.

        Args:
            names: The parts to compare; all parts if empty.
        """
        return next((name for name in names or vars(self) if getattr(self, name) != getattr(other, name)), "")


@dataclass(frozen=True)
class Reliability:
    """The agreement between the ranks that trainings with different seeds give the same networks.

    Attributes:
        trainings: The trainings of each network.
        correlation: The mean of Spearman's correlations between the ranks by two seeds.
        ceiling: About the correlation that a perfect ranking would have with the mean over the trainings: the root of
            the mean's reliability, which the formula of Spearman and Brown (1910) gives; 0 where seeds disagree.
    """

    trainings: int
    correlation: float
    ceiling: float

    @classmethod
    def of(cls, columns: Sequence[Sequence[float]]) -> Reliability:
        """Return the reliability of two or more lists of values of the same networks, one list for each seed."""
        pairs = itertools.combinations(columns, 2)
        found = statistics.fmean(rank_correlations(one, other)["spearman"] for one, other in pairs)
        mean = len(columns) * found / (1 + (len(columns) - 1) * found) if found > 0 else 0.0
        return cls(len(columns), found, math.sqrt(mean))


@dataclass
class Record:
    """The file beside a pool's table: what the pool is of, and all results with the reasons of those that failed.

    Attributes:
        rows: The results by architecture, as the space writes it, and by the seed of the training.
        baselines: The architectures that cost most within the budget, by cost. They are no random ones.
        failed: The messages of trainings that ended in an error, by architecture.
        code: Digests of the code that trained the networks, by package or file; none in former records.
    """

    identity: Identity
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)
    baselines: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            TangleNASError: The file is not what `write` writes.
        """
        try:
            content = strict_json.loads(path.read_text("utf-8"))
            identity = Identity(**content.pop("identity"))
            # Records of one training a network had no seeds.
            rows = {key: {str(identity.seed): row} if "seconds" in row else row for key, row in content["rows"].items()}
            if not all({*COLUMNS} <= {*row} for trainings in rows.values() for row in trainings.values()):
                raise ValueError("a training lacks a column")
            return cls(identity, **{**content, "rows": rows})
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise TangleNASError(
                f"{path} is not the record of a pool ({type(error).__name__}: {error}): build the pool in another file"
            ) from None

    @classmethod
    def beside(cls, table: Path) -> Record | None:
        """Read the record beside a table. Return None if the file is missing, or is not a record of a pool.

        Raises:
            TangleNASError: The record is damaged.
        """
        path = record_of(table)
        if not path.exists():
            return None
        with contextlib.suppress(OSError, ValueError):  # such a file may be a record that is damaged
            content = strict_json.loads(path.read_text("utf-8"))
            if not (isinstance(content, dict) and {"identity", "rows"} & {*content}):
                return None
        return cls.read(path)

    def other_code(self, code: Mapping[str, str]) -> str:
        """Return a sentence where the networks were trained with other code than this, or an empty string."""
        changed = sorted(name for name in {*code} | {*self.code} if code.get(name) != self.code.get(name))
        if not self.rows or not changed:
            return ""
        return (
            f"the networks of the pool were trained with other code of {', '.join(changed)}: if that changes how "
            "networks start or train, build the pool anew, in another file"
        )

    def write(self, path: Path, architectures: Sequence[str]) -> None:
        """Write the record, and the table of those of the architectures that were trained."""
        write_atomic(record_of(path), json.dumps({**vars(self), "identity": vars(self.identity)}, indent=1) + "\n")
        trained, seeds = self.complete_networks(architectures)
        columns = {name: [self.mean(key, name, seeds) for key in trained] for name in COLUMNS}
        Table(trained, columns, self.identity.space).write(path)

    def mean(self, architecture: str, column: str, seeds: Sequence[str]) -> float:
        """Return the mean of a column over the trainings of an architecture with some seeds."""
        return statistics.fmean(self.rows[architecture][seed][column] for seed in seeds)

    def complete_networks(self, architectures: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return those of the architectures that were trained without a failure, and the seeds that all of them have.

        A pool that grows has new networks of fewer seeds. The others count by these seeds, too, until it is complete.
        All have the seed of the pool, so that they always share one.
        """
        first = str(self.identity.seed)
        trained = [key for key in architectures if first in self.rows.get(key, {}) and key not in self.failed]
        seeds = set.intersection(*({*self.rows[key]} for key in trained)) if trained else set[str]()
        return trained, sorted(seeds, key=int)

    def by_seed(self, metric: str, architectures: Sequence[str]) -> list[list[float]]:
        """Return a column of the trained ones of the architectures, a list for each seed that all of them have."""
        trained, seeds = self.complete_networks(architectures)
        return [[self.rows[key][seed][metric] for key in trained] for seed in seeds]

    def reliability(self, metric: str, architectures: Sequence[str]) -> Reliability | None:
        """Return how far trainings with other seeds rank architectures alike.

        It is None for fewer than two seeds or three networks, and where a seed ranks all networks alike.

        Args:
            metric: A column.
            architectures: The architectures to rank.
        """
        trainings = self.by_seed(metric, architectures)
        if len(trainings) < 2 or len(trainings[0]) < 3:
            return None
        found = Reliability.of(trainings)
        return found if math.isfinite(found.correlation) else None


@dataclass(frozen=True)
class Job:
    """One training, in this process or another.

    Attributes:
        recipe: The recipe of the retrain stage.
        architecture: The architecture, as the space writes it.
        seed: The seed of the training.
        threads: The threads of torch; None leaves them as they are.
    """

    recipe: Recipe
    architecture: str
    seed: int
    threads: int | None = None

    def run(self) -> tuple[str, int, Row | str]:
        """Train and test the network; return the architecture and the seed with its row, or why its training failed."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with self.recipe.open(self.seed) as bench:
            architecture = bench.space.from_string(self.architecture)
            start = time.process_time()
            try:
                found = bench.train(architecture)
            except DivergedError as error:
                return self.architecture, self.seed, str(error)
            seconds = time.process_time() - start
            tested = evaluate(bench.space, architecture, found.network.eval(), bench.data("test"))
            if not math.isfinite(tested.test_loss):
                return self.architecture, self.seed, f"its test loss is {tested.test_loss}"
        row = {
            "test_loss": tested.test_loss,
            "test_acc": tested.test_accuracy,
            "validation_loss": found.history[-1]["validation_loss"],
            "validation_acc": found.validation_accuracy,
            "params": tested.cost.params,
            "macs": tested.cost.macs,
            "seconds": seconds,
        }
        return self.architecture, self.seed, row


def record_of(path: Path) -> Path:
    """Return the path of the record beside a pool's table."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".csv") + ".json")


def build(
    path: Path,
    *,
    count: int,
    seeds: int = 1,
    share: float | None = None,
    least: float | None = None,
    jobs: int = 1,
    backend: str | None = None,
    bindings: Sequence[str] = (),
    progress: Progress,
) -> Record:
    """Train random architectures of the project's space on its data by its recipe, and write them as a table.

    Args:
        path: The table to write, `NAME.csv` or `NAME.csv.gz`. A record is written beside it, as `NAME.json`.
        count: The number of random architectures.
        seeds: The trainings of each, with the seed of the project and those after it.
        share: The budget as a share of the largest network's MACs; None takes the limits of discretize, if any.
        least: The share of the budget that every architecture uses at least; 0.95 if None.
        jobs: The number of trainings at a time.
        backend: A backend of joblib that runs the trainings, such as "dask"; None takes processes of this machine.
        bindings: gin bindings beyond those of the retrain stage.

    Raises:
        TangleNASError: This is no project, the file holds a pool of something else or no pool, too few architectures
            fit, or workers were lost time after time.
    """
    at_least("--count", count, 2)
    at_least("--seeds", seeds, 1)
    if not jobs:
        raise TangleNASError("--jobs is 0, expected a number of trainings at a time, or -1 for one on each core")
    if path.exists() and not record_of(path).exists():
        raise TangleNASError(
            f"{path} exists, and is no pool that can go on, as {record_of(path).name} is not beside it: name another "
            "file, which is written"
        )
    arguments = project_arguments(*bindings)
    if arguments is None:
        raise TangleNASError(
            "a pool is built in a project, by its recipe: run `tanglenas init` in an empty folder first"
        )
    with configured(arguments):
        seed, space, dataset = create()
        splits = Splits.from_json(SPLITS.read_text("utf-8")) if SPLITS.exists() else make_splits(dataset, seed=seed)
        splits.check(dataset)
        limits, code = _limits(space, share), code_behind()
    if least is not None and not limits:
        raise TangleNASError(f"--least is {least}, a share of the budget, but there is none: give --budget")
    if least is not None and not 0 <= least <= 1:
        raise TangleNASError(f"--least is {least}, expected a share of the budget from 0 to 1")
    identity = Identity.here(arguments, seed, space, dataset, splits, limits)
    record = Record.read(record_of(path)) if record_of(path).exists() else Record(identity)
    if other := identity.difference(record.identity):
        raise TangleNASError(
            f"{path} is a pool of another {other}: give another file, or go back to the {other} that it was built with"
        )
    if told := record.other_code(code):
        progress.note(f"pool: {told}")
    record.code = record.code if record.rows else code
    budget = Budget(space, limits, [])
    keys = list(_drawn(space, budget, LEAST if least is None else least, count, seed))
    if limits:
        record.baselines = {name: space.to_string(budget.dearest(name)) for name in ("params", "macs")}
    # One seed of all networks before the next one: a pool that is cut off is of use.
    networks = dict.fromkeys([*keys, *record.baselines.values()])
    every = [(key, seed + number) for number in range(seeds) for key in networks]
    wanted = [(key, one) for key, one in every if str(one) not in record.rows.get(key, {})]
    for key, _ in wanted:
        record.failed.pop(key, None)
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs != 1 else None
    recipe = Recipe(arguments, str(Path.cwd()), splits.to_json())
    progress.note(f"pool: {len(every)} trainings, {len(wanted)} of them to do, {jobs} at a time")
    done: set[tuple[str, int]] = set()

    def missing() -> list[tuple[str, int]]:
        return [pair for pair in wanted if pair not in done]

    def run(pairs: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, Row | str]]:
        with running_on(backend, jobs, "--backend"):
            yield from as_they_come([joblib.delayed(Job.run)(Job(recipe, *pair, threads)) for pair in pairs], jobs)

    for key, one, result in despite_losses(missing, run, "pool", "--jobs", lambda text: progress.note(f"pool: {text}")):
        done.add((key, one))
        if isinstance(result, str):
            record.failed[key] = result
            progress.note(f"pool: {key} failed with seed {one} and is left out: {result}")
        else:
            record.rows.setdefault(key, {})[str(one)] = result
            told = f"test loss {result['test_loss']:.4f}  {key}  seed {one}"
            progress.note(f"pool: {len(done)} of {len(wanted)}: {told}")
        record.write(path, keys)
    record.write(path, keys)
    for key in record.failed:
        if key in networks and key not in dict(wanted):
            progress.note(f"pool: {key} is left out, as it failed with another seed: {record.failed[key]}")
    return record


def agreement(path: Path, metric: str, architectures: Sequence[str]) -> Reliability | None:
    """Return how far the trainings of a pool agree, or None if there is no record of several trainings a network.

    Args:
        path: The pool's table.
        metric: A column of the table.
        architectures: The architectures to rank.

    Raises:
        TangleNASError: The record is damaged.
    """
    if metric not in COLUMNS or (record := Record.beside(path)) is None:
        return None
    return record.reliability(metric, architectures)


def single_trainings(path: Path, metric: str, architectures: Sequence[str]) -> list[list[float]]:
    """Return a column of a pool, a list for each seed of its trainings; an empty list if there is no record.

    The arguments and errors are those of `agreement`.
    """
    record = Record.beside(path) if metric in COLUMNS else None
    return [] if record is None else record.by_seed(metric, architectures)


def incomparable(path: Path, space: SearchSpace, dataset: Dataset, splits: Splits, cost: Cost) -> str:
    """Return why a network of the project is not compared with a pool, or an empty string.

    A pool without a record beside it is one that a person measured elsewhere. It is taken as it is.

    Args:
        path: The pool's table.
        cost: The cost of the network.

    Raises:
        TangleNASError: The record is damaged.
    """
    arguments = project_arguments()
    if arguments is None or (record := Record.beside(path)) is None:
        return ""
    pool = record.identity
    here = Identity.here(arguments, splits.seed, space, dataset, splits, {})
    if other := here.difference(pool, ("space", "dataset", "test", "recipe")):
        named = "test split, which the seed decides for this dataset" if other == "test" else other
        return f"{path} is a pool of another {named}"
    with configured(stage_arguments("retrain") or ()):
        bound = gin.get_bindings("retrain")
    if (mode := bound.get("mode", "scratch")) != "scratch":
        return f"the networks of {path} were trained from scratch, and retrain.mode is {mode!r}"
    if bound.get("teacher"):
        return f"the networks of {path} had no teacher, and retrain.teacher is {bound['teacher']!r}"
    for name, most in pool.limits.items():
        if (own := getattr(cost, name)) > most:
            return f"the network has {own:,} {name}, and those of {path} at most {most:,}"
    return ""


def other_code(path: Path) -> str:
    """Return a sentence where the networks of a pool were trained with other code than this project's, or "".

    Raises:
        TangleNASError: The record is damaged.
    """
    arguments, record = project_arguments(), Record.beside(path)
    if arguments is None or record is None:
        return ""
    with configured(arguments):
        return record.other_code(code_behind())


def _limits(space: SearchSpace, share: float | None) -> dict[str, float]:
    """Return the limits of a share of the largest network's MACs, or those of the discretize stage."""
    if share is not None:
        if not 0 < share <= 1:
            raise TangleNASError(f"--budget is {share}, expected a share of the largest network's MACs, up to 1")
        return {"macs": whole(share * space.cost(space.largest()).macs)}
    with configured(stage_arguments("discretize") or []):
        if objectives(space):
            raise TangleNASError(
                "discretize.limits has a cost of a plugin, which no table of a pool has: give --budget instead"
            )
        return {name: most for name, most in bound_limits().items() if most is not None and most != math.inf}


def _drawn(space: SearchSpace, budget: Budget, least: float, count: int, seed: int) -> Iterator[str]:
    """Yield random architectures within the band, as the space writes them, each once."""
    source = Band(budget, least) if budget.limits else space
    generator, found = torch.Generator().manual_seed(seed), set[str]()
    for _ in range(DRAWS * count):
        key = space.to_string(source.sample(generator))
        if key not in found:
            found.add(key)
            yield key
        if len(found) == count:
            return
    raise TangleNASError(
        f"the band of {least} to 1 of the budget has {len(found)} architectures of {space.label}, but the pool asks "
        f"for {count}: lower --count or --least, or change the budget"
    )
