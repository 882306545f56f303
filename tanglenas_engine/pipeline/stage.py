"""A run of a stage, from the command line to its last file.

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
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gin
import torch

import tanglenas_engine
from tanglenas_engine.data import Dataset, DataView, Splits, open_splits
from tanglenas_engine.errors import TangleNASError, print_anything, readable
from tanglenas_engine.optimizers.optimizer import Optimizer
from tanglenas_engine.pipeline.config.configurables import create, packages, pretrained, tables
from tanglenas_engine.pipeline.config.reader import bound_parameters, configure, operative_config, without_call_stack
from tanglenas_engine.pipeline.config.values import macro_value
from tanglenas_engine.pipeline.files import METRICS, OUT, STAGES, SUPERNET, read_json_or_empty, read_splits
from tanglenas_engine.pipeline.inputs.own_code import own_code
from tanglenas_engine.pipeline.inputs.same_inputs import check_same_inputs
from tanglenas_engine.pipeline.meter import Meter
from tanglenas_engine.pipeline.pipeline_metrics import pipeline_metrics
from tanglenas_engine.pipeline.project import project_root
from tanglenas_engine.pipeline.tracking.tracker import AFTER, DATA, OBJECTIVES, TABLE, WEIGHTS, MlflowTracker
from tanglenas_engine.runtime import distributed, strict_json
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.files import exclusive, sweep, write_atomic
from tanglenas_engine.runtime.fingerprint import code_version, file_digest, fingerprint
from tanglenas_engine.runtime.progress import ConsoleProgress, Progress, SilentProgress
from tanglenas_engine.runtime.tracking import NullTracker, Tracker
from tanglenas_engine.runtime.weights import weights_metadata
from tanglenas_engine.spaces.architecture import Architecture
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.training.execution import batch_norms_named

SHARED = ("OPTIMIZER", "SPACE", "DATASET", "SEED")
"""The parameters that all stages of a pipeline have in common."""
MADE_BY = "made-by.json"
"""A file beside a checkpoint, with the versions of the code that can go on with it."""


@dataclass
class Stage:
    """A run of a stage: its space and dataset, and the places where it reports and writes.

    Only the first of several processes reports and writes. The others have neither tracker nor checkpoints.

    Attributes:
        weights: The SHA-256 of the weights that a search starts from, or "" for newly initialised ones.
        times: Seconds of parts of the stage, by name. They are recorded beside the outputs.
    """

    name: str
    seed: int
    dataset: Dataset
    space: SearchSpace
    pipeline_id: str
    tracker: Tracker
    checkpoints: CheckpointFolder | None
    weights: str = ""
    progress: Progress = field(default_factory=ConsoleProgress)
    meter: Meter = field(default_factory=Meter)
    times: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the stage's outputs."""
        return OUT / self.name

    @property
    def device(self) -> str | None:
        """The device that `TANGLENAS_DEVICE` names, or None for CUDA where there is one. No result depends on it."""
        return os.environ.get("TANGLENAS_DEVICE") or None

    def open(self, *names: str, splits: Splits | None = None, augment: bool = True) -> DataView:
        """Open splits of the dataset, as search made them or as given; see `data.open_splits`."""
        return open_splits(self.dataset, splits or read_splits(), names, augment=augment)

    def announce(self, optimizer: Optimizer, splits: Splits) -> None:
        """Say what is searched, how, and on which data."""
        size = self.space.size
        architectures = f"{size:,}" if size < 10**9 else f"about 10^{len(str(size)) - 1}"
        samples = ", ".join(f"{count:,} {split}" for split, count in splits.sizes().items())
        self.progress.note(
            f"{self.name}: {optimizer.name} on {self.space.name} ({architectures} architectures), "
            f"{self.dataset.name} ({samples} samples)"
        )
        if description := self.dataset.describe():
            self.progress.note(description)

    def alone(self) -> None:
        """End every process but the first, which alone goes on, as the stage has its result."""
        self.meter.end()
        if distributed.rank() > 0:
            raise SystemExit

    def write(self, name: str, content: str) -> None:
        """Write a text file into the stage's folder."""
        write_atomic(self.folder / name, content)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as CSV, without nested values."""
        flat = [{k: v for k, v in row.items() if not isinstance(v, dict | list | tuple)} for row in rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        self.write(name, text.getvalue())

    def finish(self, metrics: Mapping[str, Any], architecture: Architecture | None = None) -> None:
        """Write the metrics and the operative config, and log all that the stage wrote.

        Raises:
            TangleNASError: A metric is not finite.
        """
        write_atomic(METRICS / f"{self.name}.json", strict_json.dumps(metrics))
        self.write("operative.gin", operative_config())
        self.tracker.log_metrics({f"final/{k}": v for k, v in metrics.items() if isinstance(v, int | float)}, step=0)
        digest = {} if architecture is None else {"architecture.digest": architecture.digest}
        self.tracker.set_tags(digest)
        self.tracker.log_artifact(self.folder)
        record: dict[str, Any] = {"mlflow_run_id": self.tracker.run_id, **({"times": self.times} if self.times else {})}
        if isinstance(self.tracker, MlflowTracker):
            record["used"] = used = self.meter.read()
            self.tracker.log_metrics({f"stage/{name}": value for name, value in {**used, **self.times}.items()}, step=0)
        # These differ from run to run, so they stand apart from the outputs, and no output depends on them.
        write_atomic(OUT / f"{self.name}.run.json", json.dumps(record) + "\n")
        if isinstance(self.tracker, MlflowTracker):
            self.tracker.log_pipeline(pipeline_metrics(self.name), tags=digest)


@contextmanager
def open_stage(name: str, arguments: Sequence[str], inputs: Sequence[Path] = ()) -> Iterator[Stage]:
    """Configure gin, create dataset and space, and hold the stage's tracker and checkpoints until the block ends.

    A TangleNASError or an interruption ends the process with one sentence and a status other than 0. With
    TANGLENAS_NPROC the stage runs in that many processes.

    Args:
        inputs: Files of earlier stages that this one starts from. The supernet's metadata has the id of the pipeline,
            which the search derives from its config.
    """
    print_anything()
    meter = Meter()
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        raise SystemExit
    with one_sentence(name), ExitStack() as stack:
        stack.enter_context(_termination_as_interrupt())
        distributed.relaunch(f"pipelines.{name}", arguments)
        stack.enter_context(distributed.process_group())
        root = project_root()
        with distributed.first_rank_first():  # one process downloads the data
            configure(arguments)
            for path in inputs:
                if not path.exists():
                    raise TangleNASError(f"{path} is missing: run the stage before {name!r} first, or `dvc repro`")
            # Only one process may write the output folder. DVC's own lock dies with DVC, but the stage may live on.
            place = hashlib.sha256(os.fsencode(Path(OUT, name).resolve())).hexdigest()[:12]
            if distributed.rank() == 0:
                stack.enter_context(exclusive(root / ".tanglenas" / "locks" / f"{name}-{place}"))
            seed, space, dataset = create()
            if name == "search" and distributed.rank() == 0:
                dataset.verify(ConsoleProgress(), root / ".tanglenas")
            check_same_inputs(name, dataset, inputs, ConsoleProgress())
            weights = pretrained(space, dataset) if name == "search" else ""
        config = gin.config_str()
        code = {package.__name__: code_version(package) for package in {tanglenas_engine, *packages()}} | own_code()
        identity = _identity(name, config, dataset, inputs, code, weights)
        lineage = weights_metadata(SUPERNET) if SUPERNET in inputs else {"pipeline_id": identity}
        pipeline_id = lineage.get("pipeline_id", "")
        # People compare runs of later stages by the optimizer of their search.
        optimizer = lineage.get("optimizer") or macro_value("OPTIMIZER") or ""
        if distributed.rank() > 0:
            meter.begin()
            yield Stage(name, seed, dataset, space, pipeline_id, NullTracker(), None, weights, SilentProgress(), meter)
            return
        resume = root / ".tanglenas" / "resume" / f"{name}-{identity}"
        checkpoints = stack.enter_context(_Checkpoints(resume, identity, code, meter))
        record = resume / "run"  # has the id of the MLflow run that a resumed stage goes on with
        with MlflowTracker.open(
            stage=name,
            root=root,
            run_id=record.read_text("utf-8", errors="replace") if record.exists() else None,
            pipeline_id=pipeline_id,
            pipeline=f"{optimizer} {space.name} s{seed}".strip(),
            tags={
                "params.hash": fingerprint(config=config),
                "space": space.name,
                "dataset": dataset.name,
                "optimizer": optimizer,
                **({"weights.sha256": weights} if weights else {}),
                **_after(name),
            },
            clock=lambda: {f"{name}/{key}": meter.read()[key] for key in ("seconds", "processor_seconds")},
        ) as tracker:
            if tracker.run_id:
                write_atomic(record, tracker.run_id)
            params = {"OPTIMIZER": optimizer, **_recipe(arguments), **bound_parameters(), **_contents(dataset, weights)}
            tracker.log_params(params)
            if isinstance(tracker, MlflowTracker):
                # The search's config is the same in all stages of a pipeline. Another stage may run again with others.
                shared = params if name == "search" else {key: params[key] for key in SHARED if key in params}
                tracker.log_pipeline(params=shared)
            shutil.rmtree(OUT / name, ignore_errors=True)
            for folder in (OUT / name, METRICS):
                folder.mkdir(parents=True, exist_ok=True)
            sweep(METRICS, f"{name}.json")
            sweep(OUT, f"{name}.run.json")
            meter.begin()
            yield Stage(name, seed, dataset, space, pipeline_id, tracker, checkpoints, weights, meter=meter)
        # This comes last: a stage that is cut off before it goes on from its last checkpoint.
        checkpoints.discard()
        record.unlink(missing_ok=True)


def _after(name: str) -> dict[str, str]:
    """Return tags with the runs of the stages before this one. DVC may have skipped them, or fetched their files."""
    before = itertools.takewhile(lambda stage: stage != name, STAGES)
    runs = {stage: read_json_or_empty(OUT / f"{stage}.run.json").get("mlflow_run_id") for stage in before}
    return {f"{AFTER}{stage}": run for stage, run in runs.items() if isinstance(run, str) and run}


def _recipe(arguments: Sequence[str]) -> dict[str, str]:
    """Return the folder of gin/ that holds the recipe, as a parameter by which people compare runs; {} without one."""
    files = [Path(argument) for argument in arguments if argument.endswith(".gin") and "=" not in argument]
    recipes = [file.parent.relative_to("gin").as_posix() for file in files[1:2] if file.is_relative_to("gin")]
    return {"RECIPE": recipes[0]} if recipes else {}


def _contents(dataset: Dataset, weights: str) -> dict[str, str]:
    """Return parameters that tell apart runs whose files had another content under the same name."""
    objectives = sorted(tables("create_objective").values())
    contents = {
        DATA: dataset.fingerprint,
        TABLE: tables("benchmark").get(gin.get_bindings("benchmark").get("path"), ""),
        OBJECTIVES: fingerprint(files=objectives) if objectives else "",
        WEIGHTS: weights,
    }
    return {name: digest[:12] for name, digest in contents.items() if digest}


def _identity(
    name: str, config: str, dataset: Dataset, inputs: Sequence[Path], code: Mapping[str, str], weights: str
) -> str:
    """Return a fingerprint of all that a stage's result depends on. Its checkpoints are of this identity."""
    return fingerprint(
        stage=name,
        config=config,
        data=dataset.fingerprint,
        inputs=[file_digest(path) for path in inputs],
        code=code,
        torch=torch.__version__,
        tables=tables(),
        **({"weights": weights} if weights else {}),
    )


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """End the process with one sentence where a stage fails for a reason that a person can mend, or is stopped."""
    try:
        with batch_norms_named():
            yield
    except (distributed.LostError, KeyboardInterrupt) as problem:
        stopped = isinstance(problem, KeyboardInterrupt)
        if os.environ.get("RANK", "0") == "0":  # only the first of several processes speaks
            advice = f"{name} stopped. Run the same command again to continue"
            print((str(problem) or advice) if stopped else f"{name}: {problem}", file=sys.stderr)
        raise SystemExit(130 if stopped else 2) from None
    except TangleNASError as problem:
        sentence = readable(without_call_stack(problem))
        print(
            f"{name}: {sentence.removeprefix(f'{name}: ')}", file=sys.stderr
        )  # the training loop may have named the stage
        raise SystemExit(2) from None
    except OSError as problem:
        place = problem.filename or "a file"  # the engine's writers name the file
        print(
            f"{name}: {place}: {problem.strerror or problem}. What was saved stays; put it right, and run the same "
            "command again to continue",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


class _Checkpoints(CheckpointFolder):
    """Checkpoints that also hold gin's calls so far, the versions of the code, and what the stage has cost so far.

    A stage that goes on with few steps left calls fewer functions than one that took all steps, so its operative
    config would lack some. The versions tell `tanglenas doctor` which checkpoints no stage can go on with.
    """

    def __init__(self, folder: Path, identity: str, code: Mapping[str, str], meter: Meter):
        super().__init__(folder, identity)
        self._meter = meter
        self._made_by = folder / MADE_BY
        self._code = {"code": code, "torch": torch.__version__}

    def save(self, state: Mapping[str, Any]) -> None:
        called = {
            key: {name: repr(value) for name, value in values.items() if gin.config._is_literally_representable(value)}
            for key, values in gin.config._OPERATIVE_CONFIG.items()
        }
        super().save({**state, "called": called, "used": self._meter.read()})
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
                self._meter.go_on(state.pop("used"))
            except Exception as error:
                raise TangleNASError(
                    f"the checkpoint in {self.folder} is not of this stage ({type(error).__name__}: {error}). "
                    "Delete the folder to start afresh"
                ) from error
        return state


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end a stage as Ctrl-C does: training saves its state, and the MLflow run is closed."""
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
