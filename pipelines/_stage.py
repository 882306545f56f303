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
from typing import Any

import gin
import torch
from torch import nn

import tanglenas_engine
from pipelines._config import (
    KINDS,
    bound_parameters,
    check_types,
    configure,
    macro_value,
    operative_config,
    register,
    required,
)
from pipelines._tracking import MlflowTracker, project_root
from tanglenas_engine import Architecture, Dataset, SearchSpace, create_dataset, create_optimizer, create_space
from tanglenas_engine.checkpoint import (
    CheckpointFolder,
    code_version,
    exclusive,
    fingerprint,
    load_weights,
    weights_metadata,
    write_atomic,
)
from tanglenas_engine.data import make_splits
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import manager
from tanglenas_engine.progress import ConsoleProgress
from tanglenas_engine.tracking import Tracker

OUT = Path("out")
METRICS = Path("metrics")
SUPERNET = OUT / "search" / "supernet.safetensors"
MIXTURE = OUT / "search" / "mixture.safetensors"
SPLITS = OUT / "search" / "splits.json"
ARCHITECTURE = OUT / "discretize" / "architecture.json"
WEIGHTS = OUT / "retrain" / "model" / "model.safetensors"


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
create_space_, create_optimizer_, create_dataset_, make_splits_ = map(
    register, (create_space, create_optimizer, create_dataset, make_splits)
)


@dataclass
class Stage:
    """One run of a stage: what it works on, and where it reports and writes."""

    name: str
    seed: int
    dataset: Dataset
    space: SearchSpace
    pipeline_id: str
    tracker: Tracker
    checkpoints: CheckpointFolder
    progress: ConsoleProgress = field(default_factory=ConsoleProgress)

    @property
    def folder(self) -> Path:
        """Where the stage's outputs go."""
        return OUT / self.name

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
        self.checkpoints.discard()


@contextmanager
def stage(name: str, arguments: Sequence[str], inputs: Sequence[Path] = ()) -> Iterator[Stage]:
    """Configure gin, create dataset and space, and hold the stage's tracker and checkpoints for the body.

    `inputs` are outputs of earlier stages that this one starts from; the supernet's file carries the id of the
    lineage, which the search founds by its config. A TangleNASError or an interruption ends the process with one
    sentence and a status other than 0.
    """
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        raise SystemExit
    try:
        with ExitStack() as stack:
            stack.enter_context(_termination_as_interrupt())
            configure(arguments)
            root = project_root()
            for path in inputs:
                if not path.exists():
                    raise TangleNASError(f"{path} is missing: run the stage before {name!r} first, or `dvc repro`")
            # One writer per output folder, whatever its config: DVC's own lock dies with DVC, a stage may live on.
            place = hashlib.sha256(str(Path(OUT, name).resolve()).encode()).hexdigest()[:12]
            stack.enter_context(exclusive(root / ".tanglenas" / "locks" / f"{name}-{place}"))
            seed, space, dataset = _create()
            config = gin.config_str()
            identity = fingerprint(
                stage=name,
                config=config,
                data=dataset.fingerprint,
                inputs=[hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs],
                code=code_version(tanglenas_engine, *_packages()),
            )
            pipeline_id = weights_metadata(SUPERNET).get("pipeline_id", "") if SUPERNET in inputs else identity
            resume = root / ".tanglenas" / "resume" / f"{name}-{identity}"
            checkpoints = stack.enter_context(CheckpointFolder(resume, identity))
            record = resume.with_suffix(".run")  # the MLflow run that a resumed stage goes on with
            tracker = stack.enter_context(
                MlflowTracker.open(
                    stage=name,
                    root=root,
                    run_id=record.read_text() if record.exists() else None,
                    pipeline_id=pipeline_id,
                    tags={"params.hash": fingerprint(config=config), "space": space.name, "dataset": dataset.name},
                )
            )
            if tracker.run_id:
                write_atomic(record, tracker.run_id)
            tracker.log_params(bound_parameters())
            shutil.rmtree(OUT / name, ignore_errors=True)
            for folder in (OUT / name, METRICS):
                folder.mkdir(parents=True, exist_ok=True)
            yield Stage(name, seed, dataset, space, pipeline_id, tracker, checkpoints)
            record.unlink(missing_ok=True)
    except TangleNASError as problem:
        sentence = str(problem).split("\n  In call to configurable")[0]  # gin adds where it passed by
        print(f"{name}: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as problem:
        print(str(problem) or f"{name} stopped. Run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None


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


def read_architecture(space: SearchSpace) -> Architecture:
    """The architecture that discretize wrote, or a person: checked to be one of the space.

    Raises:
        TangleNASError: It is not.
    """
    return space.architecture_of(space.assignment_of(Architecture.from_json(ARCHITECTURE.read_text())))


def load_into(network: nn.Module, path: Path) -> None:
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
            "Run the stage that writes it again, or `dvc repro`"
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
    return seed, space, dataset


def _packages() -> set[ModuleType]:
    """The top-level packages of the plugins that the config names."""
    targets = [manager().resolve(kind, name).load() for macro, kind in KINDS.items() if (name := macro_value(macro))]
    return {sys.modules[target.__module__.split(".")[0]] for target in targets}
