"""What the four stages share: gin in, files and an MLflow run out.

A stage is run from the root of the project as

    python -m pipelines.STAGE FILE.gin ... 'binding = value' ...

The files of the space, optimizer and dataset that the bindings name (`gin/spaces/NAME.gin`, ...) are read after the
first file, if they exist. What comes later wins; bindings come last. `dvc repro` runs all four stages with the values
of params.yaml.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import gin
import torch
from torch import nn

import tanglenas_engine
from pipelines._config import (
    KINDS,
    bindings_of,
    bound_parameters,
    check_types,
    configure,
    macro_value,
    operative_config,
    referred,
    register,
    required,
)
from pipelines._tracking import MlflowTracker, project_root
from tanglenas_engine import (
    Architecture,
    Dataset,
    SearchSpace,
    create_dataset,
    create_objective,
    create_optimizer,
    create_space,
)
from tanglenas_engine.data import make_splits
from tanglenas_engine.derivation.targets import Target
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import manager
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.files import exclusive, sweep, write_atomic
from tanglenas_engine.runtime.fingerprint import code_version, fingerprint
from tanglenas_engine.runtime.progress import ConsoleProgress, Progress, SilentProgress
from tanglenas_engine.runtime.tracking import NullTracker, Tracker
from tanglenas_engine.runtime.weights import load_weights, weights_metadata
from tanglenas_engine.spaces.cost import METRICS as COSTS
from tanglenas_engine.spaces.objective import Objective
from tanglenas_engine.stages.discretize import METHODS, discretize
from tanglenas_engine.stages.evaluate import evaluate
from tanglenas_engine.stages.retrain import retrain
from tanglenas_engine.stages.search import search

OUT = Path("out")
METRICS = Path("metrics")
SUPERNET = OUT / "search" / "supernet.safetensors"
MIXTURE = OUT / "search" / "mixture.safetensors"
SPLITS = OUT / "search" / "splits.json"
ARCHITECTURE = OUT / "discretize" / "architecture.json"
FRONT = OUT / "discretize" / "pareto"
WEIGHTS = OUT / "retrain" / "model" / "model.safetensors"
MADE_BY = "made-by.json"
"""Beside a checkpoint: versions of the code that can go on with it."""


def benchmark(
    space: SearchSpace, path: str | None = None, metric: str = "test_acc"
) -> Callable[[Architecture], dict[str, float]] | None:
    """What a benchmark table says of architectures: value, rank and regret in `metric`. None without a table.

    Bind `benchmark.path` to a file (see `tanglenas tables`) to have them in the history of a search and in the
    metrics of evaluate. No result depends on them.
    """
    if path is None:
        return None
    from tanglenas_engine.tables import load_table

    table = load_table(path, space)
    table.row(table.best(metric), metric)  # an unknown metric is told before the search, not after its first epoch
    return lambda architecture: table.row(architecture, metric)


benchmark_ = register(benchmark)
create_space_, create_optimizer_, create_dataset_, create_objective_, make_splits_ = map(
    register, (create_space, create_optimizer, create_dataset, create_objective, make_splits)
)


def target(
    objective: str = "flops",
    value: float | None = None,
    share: float | None = None,
    weight: float = 1.0,
    penalty: Literal["hinge", "log"] = "hinge",
) -> Target:
    """A cost that a search is drawn to, for `search.targets`: see `targets.Target`. Options of an objective of a
    plugin's are bound as `create_objective.OPTION`.
    """
    return Target(_objective(objective), value, share, weight, penalty)


target_ = register(target)
# Every stage knows all four, so that its gin file can include another's: what they share is written once.
search_, discretize_, retrain_, evaluate_ = map(register, (search, discretize, retrain, evaluate))
# Their options are bound by the names of the methods: `evolution.population = 50`.
methods = {name: register(method) for name, method in METHODS.items()}


def objectives(space: SearchSpace) -> list[Objective]:
    """The plugins' objectives that `discretize.limits` and `discretize.cost` name, bound to the space."""
    return [_objective(name).bind(space) for name in sorted(_costs())]


def _objective(name: str) -> Objective:
    check_types("create_objective", manager().resolve("objective", name).load(), gin.get_bindings("create_objective"))
    objective: Objective = create_objective_(name=name)
    return objective


def _costs() -> set[str]:
    """What `discretize.limits` and `discretize.cost` name beside the costs that every space counts."""
    bound = gin.get_bindings("discretize")
    limits = bound.get("limits")
    return {bound.get("cost", "params"), *(limits if isinstance(limits, Mapping) else ())} - {*COSTS}


@dataclass
class Stage:
    """One run of a stage: what it works on, and where it reports and writes.

    Of several processes the first reports and writes; the others have neither tracker nor checkpoints.
    """

    name: str
    seed: int
    dataset: Dataset
    space: SearchSpace
    pipeline_id: str
    tracker: Tracker
    checkpoints: CheckpointFolder | None
    progress: Progress = field(default_factory=ConsoleProgress)

    @property
    def folder(self) -> Path:
        """Where the stage's outputs go."""
        return OUT / self.name

    def alone(self) -> None:
        """What follows is for the first process only: the others are done, and end."""
        if distributed.rank() > 0:
            raise SystemExit

    def write(self, name: str, content: str) -> None:
        """Write a text file into the stage's folder."""
        write_atomic(self.folder / name, content)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as CSV; nested values are left out."""
        flat = [{k: v for k, v in row.items() if not isinstance(v, dict | list | tuple)} for row in rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        self.write(name, text.getvalue())

    def finish(self, metrics: Mapping[str, Any], architecture: Architecture | None = None) -> None:
        """Write the metrics and the operative config, and give the tracker what the stage wrote."""
        write_atomic(METRICS / f"{self.name}.json", json.dumps(metrics, indent=2) + "\n")
        self.write("operative.gin", operative_config())
        self.tracker.log_metrics({f"final/{k}": v for k, v in metrics.items() if isinstance(v, int | float)}, step=0)
        if architecture is not None:
            self.tracker.set_tags({"architecture.digest": architecture.digest})
        self.tracker.log_artifact(self.folder)
        # The run's id differs from run to run: it stands apart from the outputs, and nothing depends on it.
        write_atomic(OUT / f"{self.name}.run.json", json.dumps({"mlflow_run_id": self.tracker.run_id}) + "\n")


@contextmanager
def stage(name: str, arguments: Sequence[str], inputs: Sequence[Path] = ()) -> Iterator[Stage]:
    """Configure gin, create dataset and space, and hold the stage's tracker and checkpoints for the body.

    `inputs` are outputs of earlier stages that this one starts from; the supernet's file carries the id of the
    lineage, which the search founds by its config. A TangleNASError or an interruption ends the process with one
    sentence and a status other than 0. With TANGLENAS_NPROC the stage runs in that many processes.
    """
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        raise SystemExit
    try:
        with ExitStack() as stack:
            stack.enter_context(_termination_as_interrupt())
            distributed.relaunch(f"pipelines.{name}", arguments)
            stack.enter_context(distributed.joined())
            root = project_root()
            with distributed.first():  # what is downloaded is downloaded once
                configure(arguments)
                for path in inputs:
                    if not path.exists():
                        raise TangleNASError(f"{path} is missing: run the stage before {name!r} first, or `dvc repro`")
                # One writer per output folder, whatever its config: DVC's own lock dies with DVC, a stage may live on.
                place = hashlib.sha256(str(Path(OUT, name).resolve()).encode()).hexdigest()[:12]
                if distributed.rank() == 0:
                    stack.enter_context(exclusive(root / ".tanglenas" / "locks" / f"{name}-{place}"))
                seed, space, dataset = _create()
            config = gin.config_str()
            code = {package.__name__: code_version(package) for package in {tanglenas_engine, *_packages()}}
            identity = fingerprint(
                stage=name,
                config=config,
                data=dataset.fingerprint,
                inputs=[hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs],
                code=code,
                torch=torch.__version__,
                tables=_tables(),
            )
            lineage = weights_metadata(SUPERNET) if SUPERNET in inputs else {"pipeline_id": identity}
            pipeline_id = lineage.get("pipeline_id", "")
            # Which method a result goes back to is what people compare runs of later stages by.
            optimizer = lineage.get("optimizer") or macro_value("OPTIMIZER") or ""
            if distributed.rank() > 0:
                yield Stage(name, seed, dataset, space, pipeline_id, NullTracker(), None, SilentProgress())
                return
            resume = root / ".tanglenas" / "resume" / f"{name}-{identity}"
            checkpoints = stack.enter_context(_Checkpoints(resume, identity, code))
            record = resume / "run"  # the MLflow run that a resumed stage goes on with
            with MlflowTracker.open(
                stage=name,
                root=root,
                run_id=record.read_text(errors="replace") if record.exists() else None,
                pipeline_id=pipeline_id,
                tags={
                    "params.hash": fingerprint(config=config),
                    "space": space.name,
                    "dataset": dataset.name,
                    "optimizer": optimizer,
                },
            ) as tracker:
                if tracker.run_id:
                    write_atomic(record, tracker.run_id)
                tracker.log_params({"OPTIMIZER": optimizer, **bound_parameters()})
                shutil.rmtree(OUT / name, ignore_errors=True)
                for folder in (OUT / name, METRICS):
                    folder.mkdir(parents=True, exist_ok=True)
                sweep(METRICS, f"{name}.json")
                sweep(OUT, f"{name}.run.json")
                yield Stage(name, seed, dataset, space, pipeline_id, tracker, checkpoints)
            # Last of all: what is cut off before this goes on from its last checkpoint.
            checkpoints.discard()
            record.unlink(missing_ok=True)
    except (distributed.LostError, KeyboardInterrupt) as problem:
        stopped = isinstance(problem, KeyboardInterrupt)
        if os.environ.get("RANK", "0") == "0":  # of several processes the first says it
            advice = f"{name} stopped. Run the same command again to continue"
            print((str(problem) or advice) if stopped else f"{name}: {problem}", file=sys.stderr)
        raise SystemExit(130 if stopped else 2) from None
    except TangleNASError as problem:
        sentence = str(problem).split("\n  In call to configurable")[0]  # gin adds where it passed by
        print(f"{name}: {sentence.removeprefix(f'{name}: ')}", file=sys.stderr)  # the engine's loop says where it is
        raise SystemExit(2) from None
    except OSError as problem:
        place = problem.filename or "a file"  # the engine's own writers name theirs
        print(
            f"{name}: {place}: {problem.strerror or problem}. What was saved stays; put it right, and run the same "
            "command again to continue",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


class _Checkpoints(CheckpointFolder):
    """Keeps, beside the state, what gin has called with which values, and of which code it is.

    A stage that goes on with few steps left, or none, calls less than one that took them all: its operative config
    would say less. The code is for `tanglenas doctor`, which finds what no command goes on with.
    """

    def __init__(self, folder: Path, identity: str, code: Mapping[str, str]):
        super().__init__(folder, identity)
        self._made_by = folder / MADE_BY
        self._code = {"code": code, "torch": torch.__version__}

    def save(self, state: Mapping[str, Any]) -> None:
        called = {
            key: {name: repr(value) for name, value in values.items() if gin.config._is_literally_representable(value)}
            for key, values in gin.config._OPERATIVE_CONFIG.items()
        }
        super().save({**state, "called": called})
        if not self._made_by.exists():
            write_atomic(self._made_by, json.dumps(self._code, indent=2) + "\n")

    def discard(self) -> None:
        super().discard()
        self._made_by.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        state = super().load()
        if state is not None:
            try:
                for key, values in state.pop("called").items():
                    known = gin.config._OPERATIVE_CONFIG.setdefault(key, {})
                    known.update({k: gin.config.parse_value(v) for k, v in values.items() if k not in known})
            except Exception as error:
                raise TangleNASError(
                    f"the checkpoint in {self.folder} is not of this stage ({type(error).__name__}: {error}). "
                    "Delete the folder to start afresh"
                ) from error
        return state


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a stage as Ctrl-C does, so that its MLflow run is closed; training saves its state as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@register
def read_architecture(space: SearchSpace, pick: str = "best") -> Architecture:
    """The architecture that discretize wrote, or a person: checked to be one of the space.

    Bind `read_architecture.pick` to the digest of one in `out/discretize/pareto.csv`, or to its first digits, to go on
    with that one.

    Raises:
        TangleNASError: It is not, or there is none like this.
    """
    path = ARCHITECTURE
    if pick != "best":
        points = sorted(FRONT.glob("*.json"))
        found = [point for point in points if pick and point.stem.startswith(pick)]
        if len(found) != 1:
            listed = ", ".join(point.stem for point in found or points) or "it has none, since only one was judged"
            raise TangleNASError(
                f"read_architecture.pick is {pick!r}, expected 'best' or the digest of one architecture in {FRONT}: "
                f"{listed}"
            )
        (path,) = found
    return space.architecture_of(space.assignment_of(Architecture.from_json(path.read_text("utf-8", errors="replace"))))


def load_into(
    network: nn.Module, path: Path, advice: str = "Run the stage that writes it again, or `dvc repro`"
) -> None:
    """Load the weights that an earlier stage wrote.

    Raises:
        TangleNASError: They are those of another network.
    """
    try:
        network.load_state_dict(load_weights(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[-1].split())
        raise TangleNASError(
            f"{path} holds the weights of another network than the config and {ARCHITECTURE.name} say ({reason}). "
            f"{advice}"
        ) from None


def device() -> str | None:
    """`TANGLENAS_DEVICE`, or None to take CUDA where there is one: the environment, since no result depends on it."""
    return os.environ.get("TANGLENAS_DEVICE") or None


def _create() -> tuple[int, SearchSpace, Dataset]:
    """The seed, and the space and dataset that the config names: the space fits the data unless gin says otherwise."""
    seed = required("SEED", int)
    if not 0 <= seed < 2**63:
        raise TangleNASError(f"SEED is {seed}, expected a whole number from 0 to 2**63 - 1")
    names = {kind: required(macro, str) for macro, kind in KINDS.items() if macro_value(macro) is not None}
    for kind, name in names.items():
        check_types(f"create_{kind}", manager().resolve(kind, name).load(), gin.get_bindings(f"create_{kind}"))
    dataset: Dataset = create_dataset_(name=required("DATASET", str))
    bound = gin.get_bindings("create_space")
    fitted = {option: value for option, value in dataset.space_options().items() if option not in bound}
    torch.manual_seed(seed)
    try:
        space = create_space_(name=required("SPACE", str), **fitted)
    except TangleNASError as error:
        if any(f"takes no option {option!r}" in str(error) for option in fitted):
            raise TangleNASError(
                f"the space {names['space']!r} is not for data such as {dataset.name!r}, which need a space with "
                f"{', '.join(dataset.space_options())}: choose another space or dataset"
            ) from None
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # numbers that make no network
        options = ", ".join(f"{option}={value!r}" for option, value in {**fitted, **bound}.items())
        raise TangleNASError(
            f"the space {names['space']!r} cannot be made with {options}: {str(error).splitlines()[0]}. Correct what "
            "gin binds of create_space"
        ) from error
    return seed, space, dataset


def _packages() -> set[ModuleType]:
    """The top-level packages of what the config names: plugins, and whatever an @ refers to by its full name."""
    named = {(kind, name) for macro, kind in KINDS.items() if (name := macro_value(macro))}
    named |= {("objective", name) for name in _costs()}
    named |= {("objective", values.get("objective", "flops")) for values in bindings_of("target")}
    modules = {manager().resolve(kind, name).load().__module__ for kind, name in named} | referred()
    packages = {sys.modules[module.split(".")[0]] for module in modules}
    # torch is large, and has a version; what is written in C has no file.
    return {package for package in packages - {torch} if hasattr(package, "__file__") or hasattr(package, "__path__")}


def _tables() -> dict[str, str]:
    """Digests of the files that objectives and benchmarks are read from."""
    values = [value for name in ("create_objective", "benchmark") for it in bindings_of(name) for value in it.values()]
    paths = [value for value in values if isinstance(value, str) and Path(value).is_file()]
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
