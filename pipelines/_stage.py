"""What the four stages share: gin in, files and an MLflow run out.

A stage is run as `python -m pipelines.<stage> FILE.gin ... 'binding = value' ...` from the root of the project. The
files of the space, optimizer and dataset that the bindings name (`gin/spaces/NAME.gin`, ...) are read too, if they
exist; bindings come last and win.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import gin
import torch

import tanglenas_engine
from pipelines._tracking import MlflowTracker, project_root
from tanglenas_engine import Architecture, Dataset, SearchSpace, create_dataset, create_optimizer, create_space
from tanglenas_engine.checkpoint import (
    CheckpointFolder,
    code_version,
    exclusive,
    fingerprint,
    weights_metadata,
    write_atomic,
)
from tanglenas_engine.data import make_splits
from tanglenas_engine.errors import TangleNASError, closest
from tanglenas_engine.progress import ConsoleProgress
from tanglenas_engine.tracking import Tracker
from tanglenas_engine.training import Interrupted

OUT = Path("out")
METRICS = Path("metrics")
SUPERNET = OUT / "search" / "supernet.safetensors"
MIXTURE = OUT / "search" / "mixture.safetensors"
SPLITS = OUT / "search" / "splits.json"
ARCHITECTURE = OUT / "discretize" / "architecture.json"
WEIGHTS = OUT / "retrain" / "model" / "model.safetensors"
FAMILIES = {"SPACE": "spaces", "OPTIMIZER": "optimizers", "DATASET": "datasets"}
"""Macros that name a plugin, and the folders of gin files that go with it."""

configurable: dict[str, Callable[..., Any]] = {}
"""What gin files can bind, by the name they use."""


def register(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of the engine configurable under its own name; call what this returns."""
    configurable[function.__name__] = function
    return gin.external_configurable(function, function.__name__)


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
        self.write("operative.gin", gin.operative_config_str())
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
    try:
        with ExitStack() as stack:
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
                code=code_version(tanglenas_engine, *_packages(space, dataset)),
            )
            pipeline_id = weights_metadata(SUPERNET)["pipeline_id"] if SUPERNET in inputs else identity
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
    except (TangleNASError, Interrupted) as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        raise SystemExit(130 if isinstance(problem, Interrupted) else 2) from None


def configure(arguments: Sequence[str]) -> None:
    """Read gin files and bindings.

    Raises:
        TangleNASError: A file is missing, or a binding names something that does not exist.
    """
    check_params()
    gin.clear_config()
    files = [argument for argument in arguments if argument.endswith(".gin") and "=" not in argument]
    bindings = [argument for argument in arguments if argument not in files]
    _register_references("\n".join(bindings))
    _parse(gin.parse_config, bindings)
    for macro, folder in FAMILIES.items():
        name = _macro(macro)
        path = Path("gin", folder, f"{name}.gin")
        if name is not None and re.fullmatch(r"[\w.-]+", name) and path.exists():
            files.append(str(path))
    for file in files:
        if not Path(file).is_file():
            raise TangleNASError(f"there is no configuration file {file!r}: run stages from the root of the project")
    for file in files:
        _register_references(Path(file).read_text())
        _parse(gin.parse_config_file, file)
    _parse(gin.parse_config, bindings)
    _parse(gin.finalize)


def _register_references(text: str) -> None:
    """Register what a config refers to by its full name, such as `@torch.optim.AdamW`, so that it can be bound.

    gin's own way to do this without touching the classes, dynamic registration, would ask every file to import
    the stage's function as well.
    """
    for path in dict.fromkeys(re.findall(r"@(?:\w+/)*((?:\w+\.)+\w+)", re.sub(r"#.*", "", text))):
        module, _, attribute = path.rpartition(".")
        try:
            target = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise TangleNASError(f"configuration: @{path} cannot be imported: {error}") from None
        if path not in configurable:
            configurable[path] = target
            gin.external_configurable(target, attribute, module=module)


def bound_parameters() -> dict[str, Any]:
    """All bindings as flat scalars, for people to compare runs by."""
    parameters = {}
    for (scope, selector), values in gin.config._CONFIG.items():
        for name, value in values.items():
            key = f"{scope or selector.split('.')[-1]}.{name}"
            parameters[scope if selector == "gin.macro" else key] = value
    return {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in sorted(parameters.items())}


def required(macro: str) -> Any:
    """The value of a macro that every run must set."""
    value = _macro(macro)
    if value is None:
        raise TangleNASError(f"{macro} is not set: add the binding '{macro} = ...', as dvc.yaml does from params.yaml")
    return value


def device() -> str | None:
    """`TANGLENAS_DEVICE`, or None to take CUDA where there is one: the environment, since no result depends on it."""
    return os.environ.get("TANGLENAS_DEVICE") or None


def _create() -> tuple[int, SearchSpace, Dataset]:
    """The seed, and the space and dataset that the config names: the space fits the data unless gin says otherwise."""
    seed = required("SEED")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise TangleNASError(f"SEED is {seed!r}, expected a whole number of at least 0")
    dataset: Dataset = create_dataset_(name=required("DATASET"))
    fitted = {"num_classes": dataset.num_classes, "image_size": dataset.image_size, "in_channels": dataset.in_channels}
    bound = gin.get_bindings("create_space")
    torch.manual_seed(seed)
    space = create_space_(name=required("SPACE"), **{k: v for k, v in fitted.items() if k not in bound})
    return seed, space, dataset


def _packages(*objects: object) -> set[ModuleType]:
    """The top-level packages that define the objects' classes, where they are packages of plugins."""
    names = {type(thing).__module__.split(".")[0] for thing in objects} - {"tanglenas_engine"}
    return {sys.modules[name] for name in sorted(names)}


def check_params(params: Path = Path("params.yaml"), pipeline: Path = Path("dvc.yaml")) -> None:
    """Check that dvc.yaml uses every key of params.yaml: DVC itself ignores a misspelt one.

    Raises:
        TangleNASError: It does not; the message names the closest key.
    """
    if not (params.exists() and pipeline.exists()):
        return
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe").load(params.read_text()) or {}
    except YAMLError as error:
        raise TangleNASError(f"params.yaml cannot be read: {error}") from None
    used = set(re.findall(r"\$\{([\w.]+)\}", pipeline.read_text()))
    known = {".".join(key.split(".")[:depth]) for key in used for depth in range(1, key.count(".") + 2)}
    for key in _keys(content):
        if key not in known:
            raise TangleNASError(
                f"params.yaml: nothing in dvc.yaml uses the key {key!r}.{closest(key, used)} "
                "Correct it, or use it as ${" + key + "} in a stage's cmd"
            )


def _keys(content: Any, prefix: str = "") -> Iterator[str]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


def _macro(name: str) -> Any:
    try:
        return gin.query_parameter(f"%{name}")
    except ValueError:
        return None


def _parse(action: Callable[..., Any], *arguments: Any) -> None:
    """Run a step of gin's; what it finds wrong becomes a sentence with the closest name."""
    try:
        action(*arguments)
    except (ValueError, SyntaxError, TypeError, NameError, ImportError, OSError) as error:
        text = str(error).strip()
        hint = ""
        if match := re.search(r"Failed to parse token '(.*?)'", text):
            text = f"the value {match[1]!r} cannot be read"
            hint = ": expected a number, True, False, None, a quoted string, a list or tuple of those, or an @reference"
        elif match := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text):
            function = configurable.get(match[1].split(".")[-1])
            hint = closest(match[2], inspect.signature(function).parameters) if function else ""
        elif match := re.search(r"No configurable matching '([\w.]+)'", text):
            hint = closest(match[1], configurable)
        raise TangleNASError(f"configuration: {' '.join(text.split())}{hint}") from None
