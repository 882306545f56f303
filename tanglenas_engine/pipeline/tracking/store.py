"""Calls to an MLflow store. Every call ends within seconds, and may be repeated without harm."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import filelock

from tanglenas_engine.errors import shown
from tanglenas_engine.pipeline.tracking.moved_project import check_place
from tanglenas_engine.pipeline.tracking.redaction import address, reason
from tanglenas_engine.runtime.fingerprint import fingerprint

if TYPE_CHECKING:  # importing mlflow takes 2 seconds, so only the functions that need it do
    from mlflow import MlflowClient

P = ParamSpec("P")
T = TypeVar("T")
Event = dict[str, Any]

PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000  # MLflow's limits
KEY = "tanglenas.key"
"""The tag by which a run is found again: one whose id was lost on the way, or that of a pipeline."""
PARENT = "mlflow.parentRunId"
"""MLflow's tag for the run in which another one is nested."""
ANSWER_SECONDS = 5.0
"""The most seconds that a call to the store may cost a training."""
UPLOAD_SECONDS = 300.0
"""The most seconds for a file or folder. A stage logs one, at its end."""
OPENING = {True: 15.0, False: 150.0}
"""The most seconds for opening a store that a server has, or a database: a new one takes long to make."""


_COLUMNS = [f"metrics.`{name}`" for name in ("test_accuracy", "macs", "params", "seconds")]
VIEW = {
    # MLflow's page reads a view of a list of runs from this tag, and names it `viewStateShareKey` in its address.
    "mlflow.sharedViewState.tanglenas": json.dumps(
        {
            "selectedColumns": _COLUMNS,
            "columnOrder": ["attributes.`Run Name`", "attributes.`Created`", *_COLUMNS, "attributes.`Duration`"],
            "columnWidths": {"attributes.`Run Name`": 260},
        }
    ),
    # Otherwise the page opens with menus for language models.
    "mlflow.experimentKind": "custom_model_development",
}
"""The tags of an experiment with which its page opens on columns that compare pipelines."""


class Refused(Exception):
    """The store refused a record for good."""


def call_with_timeout(seconds: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread, and return or raise what it does.

    Raises:
        TimeoutError: The call took longer. Its thread goes on by itself.
    """
    outcome: Future[T] = Future()

    def call() -> None:
        try:
            outcome.set_result(function(*args, **kwargs))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=call, name="MLflow", daemon=True).start()
    try:
        return outcome.result(timeout=seconds)
    except TimeoutError as error:
        raise error if error.args else TimeoutError(f"no answer within {seconds:g} seconds") from None


def experiment_name() -> str:
    """Return the name of the experiment that stages write to."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "tanglenas"


@dataclass(frozen=True)
class Store:
    """The MLflow store that a project's stages report to."""

    uri: str
    root: Path

    @classmethod
    def of(cls, root: Path) -> Store:
        """Return the store of `$MLFLOW_TRACKING_URI`, or else the database of the project."""
        return cls(os.environ.get("MLFLOW_TRACKING_URI") or cls.default(root), root)

    @staticmethod
    def default(root: Path) -> str:
        return f"sqlite:///{(root / 'mlflow.db').as_posix()}"

    @property
    def name(self) -> str:
        """The address, without a password."""
        return shown(address(self.uri))

    @property
    def own(self) -> bool:
        """True for the database of the project."""
        return self.uri == self.default(self.root)

    @property
    def runs(self) -> Path:
        """The folder that has a folder for each run; see spool.py."""
        return self.root / ".tanglenas" / "runs"

    @property
    def served(self) -> bool:
        return self.uri.startswith(("http:", "https:", "databricks"))

    def connect(self) -> MlflowClient:
        """Return a client that gives up after seconds when a server does not answer. MLflow's default is minutes."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        if "DO_NOT_TRACK" not in os.environ:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it announces each migration
        logging.getLogger("alembic").setLevel(logging.WARNING)
        return call_with_timeout(OPENING[self.served], self._open, MlflowClient)

    def _open(self, make: type[MlflowClient]) -> MlflowClient:
        lock: Any = nullcontext()
        if self.uri.startswith("sqlite:///"):  # two processes that make one database break each other's migration
            database = Path(self.uri.removeprefix("sqlite:///"))
            database.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{database}.lock", timeout=120)
        with lock:
            client = make(tracking_uri=self.uri)
            client.get_experiment_by_name("Default")  # makes the tables of a new database
            return client

    def experiment(self, client: MlflowClient, name: str) -> str:
        """Return the id of an experiment, and make it if need be."""
        if found := client.get_experiment_by_name(name):
            if self.own:
                check_place(found.artifact_location, self.root)
            if found.lifecycle_stage == "deleted":  # it takes no run, and no other experiment can have its name
                client.restore_experiment(found.experiment_id)
            for tag in VIEW.keys() - found.tags.keys():
                with suppress(Exception):  # a server may let nobody change an experiment
                    client.set_experiment_tag(found.experiment_id, tag, VIEW[tag])
            return str(found.experiment_id)
        # Without a location, the artifacts would go to the current folder for all later runs.
        location = None if self.served else (self.root / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=VIEW))
        except Exception:
            if found := client.get_experiment_by_name(name):  # another process was faster
                return str(found.experiment_id)
            raise


class Run:
    """A run in the store. It ignores a record that it has already.

    Args:
        start: The record by which a new run is made. With "tried", a call before may have made it. A "parent" in it
            is the run of the pipeline, in which this run is nested; it is made where the store lacks it.
        run_id: The id of an existing run that goes on.

    Raises:
        KeyError: The store has no such run.

    Attributes:
        parent: The id of the pipeline's run, or None.
    """

    def __init__(self, store: Store, client: MlflowClient, start: Event, run_id: str | None = None) -> None:
        self._client = client
        self.parent: str | None = None
        if run_id is None:
            experiment = store.experiment(client, start["experiment"])
            run_id = _made_before(client, experiment, start["tags"].get(KEY)) if start.get("tried") else None
            if run_id is None:
                self.parent = _pipeline_run(client, experiment, start)
                tags = {**start["tags"], **({PARENT: self.parent} if self.parent else {})}
                made = client.create_run(experiment, start["time"], tags=tags, run_name=start["name"])
                run_id = made.info.run_id
            else:
                _reopen(client, run_id)
        else:
            _reopen(client, run_id)
        self.run_id = str(run_id)
        found = client.get_run(run_id)
        if self.parent is None:
            nested_in = found.data.tags.get(PARENT)
            self.parent = _pipeline_run(client, found.info.experiment_id, start, nested_in)
            if self.parent not in (None, nested_in):
                client.set_tag(run_id, PARENT, self.parent)
        if self.parent:
            client.update_run(self.parent, status="RUNNING")
        if store.own:
            check_place(found.info.artifact_uri or "", store.root)
        run = found.data  # not empty when a run that was cut off goes on
        self._known_params = set(run.params)
        self._hashed = "params.hash" in run.tags
        self._last_steps = {
            name: max(metric.step for metric in client.get_metric_history(run_id, name)) for name in run.metrics
        }

    def send(self, event: Event, folder: Path) -> None:
        """Send a record. The paths of files in it are relative to `folder`.

        Raises:
            Refused: The store will not take it later either.
            TimeoutError: The store takes too long.
        """
        from mlflow.exceptions import MlflowException

        limit = UPLOAD_SECONDS if event["what"] == "artifact" else ANSWER_SECONDS
        try:
            call_with_timeout(limit, getattr(self, f"_{event['what']}"), event, folder)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise Refused(reason(error)) from error
            raise

    def _params(self, event: Event, folder: Path) -> None:
        """Log parameters that the run lacks, and a hash of all as the tag `params.hash` unless it is set."""
        from mlflow.entities import Param

        flat = event["params"]
        new = [(name, value) for name, value in flat.items() if name not in self._known_params]
        for batch in _batches(new, PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=[Param(name, value) for name, value in batch])
        self._known_params.update(flat)
        if new and not self._hashed:
            self._client.set_tag(self.run_id, "params.hash", fingerprint(params=flat))
            self._hashed = True

    def _metrics(self, event: Event, folder: Path) -> None:
        """Log numbers of steps that the run has not reached yet: a stage that goes on repeats a few steps.

        An infinite number becomes NaN, because MLflow would store 1.8e308 and ruin the axis.
        """
        from mlflow.entities import Metric

        step = event["step"]
        entries = [
            Metric(name, value if math.isfinite(value) else math.nan, event["time"], step)
            for name, value in event["metrics"].items()
            if step > self._last_steps.get(name, step - 1)
        ]
        for batch in _batches(entries, METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=batch)
        self._last_steps.update((entry.key, step) for entry in entries)

    def _tags(self, event: Event, folder: Path) -> None:
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(name, value) for name, value in event["tags"].items()], PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, tags=batch)

    def _pipeline(self, event: Event, folder: Path) -> None:
        """Log numbers, parameters that it lacks, and tags to the run of the pipeline. The latest number counts."""
        from mlflow.entities import Metric, Param, RunTag

        if self.parent is None:
            return
        known = self._client.get_run(self.parent).data.params
        new = [Param(name, value) for name, value in event["params"].items() if name not in known]
        for batch in _batches(new, PARAMS_PER_CALL):
            self._client.log_batch(self.parent, params=batch)
        finite = {name: value for name, value in event["metrics"].items() if math.isfinite(value)}
        self._client.log_batch(
            self.parent,
            metrics=[Metric(name, value, event["time"], 0) for name, value in finite.items()],
            tags=[RunTag(name, value) for name, value in event["tags"].items()],
        )

    def _artifact(self, event: Event, folder: Path) -> None:
        path = folder / event["path"]
        if not path.exists():
            raise Refused(f"there is no {shown(path)}")
        if not os.path.isabs(event["path"]):  # it was kept, and others may have changed it since
            _check_kept(path, folder)
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), event["folder"])
        else:
            self._client.log_artifact(self.run_id, str(path), event["folder"])

    def _text(self, event: Event, folder: Path) -> None:
        self._client.log_text(self.run_id, event["text"], event["name"])

    def _end(self, event: Event, folder: Path) -> None:
        for run_id in filter(None, (self.run_id, self.parent)):
            self._client.set_terminated(run_id, event["status"], event["time"])


def _pipeline_run(client: MlflowClient, experiment: str, start: Event, nested_in: str | None = None) -> str | None:
    """Return the run of the pipeline that a start record names, and make it if need be; None if it names none.

    Args:
        nested_in: The pipeline's run in which the run is nested so far. A run that was cut off and goes on as another
            experiment of DVC takes it along: the stages after it find it by the new key.
    """
    if not (wanted := start.get("parent")):
        return None
    if nested_in and (found := _active(client, nested_in)):
        if found.data.tags.get(KEY) != wanted["tags"][KEY]:
            for name, value in wanted["tags"].items():
                client.set_tag(nested_in, name, value)
        return nested_in
    if found_by_key := _made_before(client, experiment, wanted["tags"][KEY]):
        return found_by_key
    made = client.create_run(experiment, start["time"], tags=wanted["tags"], run_name=wanted["name"])
    return str(made.info.run_id)


def _active(client: MlflowClient, run_id: str) -> Any:
    """Return a run, or None if the store has none of this id or someone deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return found if found.info.lifecycle_stage == "active" else None


def _made_before(client: MlflowClient, experiment: str, key: str | None) -> str | None:
    """Return the run that has a key, the first if there are several, or None."""
    if not key or not re.fullmatch(r"\w+", key):
        return None
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1,
                               order_by=["attributes.start_time"])  # fmt: skip
    return str(found[0].info.run_id) if found else None


def _check_kept(path: Path, folder: Path) -> None:
    """Raise Refused if what a run's folder keeps leads out of it. Files are kept as they are, and never as links."""
    walked = (Path(place, name) for place, folders, files in os.walk(path) for name in (*folders, *files))
    between = [parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]
    for entry in (path, *between, *walked):
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            raise Refused(f"{shown(entry)} is a link or no plain file, which may lead to a file of others. Delete it")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise Refused(f"{shown(path)} is not in {shown(folder)}")


def _reopen(client: MlflowClient, run_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"}:
            raise
        raise KeyError(reason(error)) from error


def flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted names."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def allowed(name: str) -> str:
    """Replace the characters of a name that MLflow refuses."""
    return re.sub(r"[^\w./ -]", "_", name)
