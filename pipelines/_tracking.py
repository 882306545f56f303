"""One MLflow run for each stage: parameters, metrics, artifacts, and the tags that tie the stages together.

    with MlflowTracker.open(stage="search", pipeline_id=pipeline_id) as tracker:
        tracker.log_params(config)
        search(..., tracker=tracker)

The store is `$MLFLOW_TRACKING_URI`, else `<root>/mlflow.db` with its artifacts in `<root>/mlartifacts`, from
whatever folder the stage runs. `TANGLENAS_TRACKING=off` turns all of it off. Everything goes through MLflow's
client: the active run of the process is neither read nor changed.
"""

import functools
import logging
import math
import os
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import filelock

from tanglenas_engine.checkpoint import fingerprint
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.tracking import NullTracker, Tracker

if TYPE_CHECKING:  # importing mlflow takes 2 seconds, so the functions do it that need it
    from mlflow import MlflowClient

P = ParamSpec("P")
T = TypeVar("T")

PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000  # MLflow's limits
PATIENCE = 3  # failures in a row after which a dead server is left alone


def project_root() -> Path:
    """Where state that outlives a run belongs: the DVC project or git repository, else the current folder.

    `dvc exp run --queue` runs stages in a copy that it deletes; `$DVC_ROOT` is the original all the same.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    here = Path.cwd()
    return next((f for f in (here, *here.parents) if (f / ".dvc").is_dir() or (f / ".git").exists()), here)


def lineage(stage: str, pipeline_id: str = "", architecture: str = "") -> dict[str, str]:
    """The tags that say what a run is part of and what it was made from; what is not known is left out.

    Args:
        stage: "search", "discretize", "retrain" or "evaluate".
        pipeline_id: equal in all stages of one pipeline, and a function of its parameters.
        architecture: digest of the architecture that the stage works on.
    """
    tags = {
        "tanglenas.stage": stage,
        "tanglenas.pipeline_id": pipeline_id,
        "architecture.digest": architecture,
        "dvc.stage": os.environ.get("DVC_STAGE", ""),
        "dvc.exp_name": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        **_git_state(),
    }
    return {name: value for name, value in tags.items() if value}


def _git_state() -> dict[str, str]:
    """The commit of the code that runs, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        # `dvc repro` rewrites dvc.lock and the metrics after each stage: that alone makes no other code.
        written = [f":(top,exclude,glob)**/{name}" for name in ("dvc.lock", "metrics/*.json")]
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *written)
        return {"git.sha": git("rev-parse", "HEAD"), "git.dirty": str(bool(changes)).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _guarded(
    method: Callable[Concatenate["MlflowTracker", P], None],
) -> Callable[Concatenate["MlflowTracker", P], None]:
    """Tracking never ends a training: what the store does not take is dropped, with one warning for all."""

    @functools.wraps(method)
    def call(tracker: "MlflowTracker", /, *args: P.args, **kwargs: P.kwargs) -> None:
        if tracker._failures >= PATIENCE:
            return
        try:
            method(tracker, *args, **kwargs)
            tracker._failures = 0
        except Exception as error:
            tracker._failures += 1
            if not tracker._warned:
                tracker._warned = True
                warnings.warn(
                    f"the MLflow store did not take {method.__name__.lstrip('_')} ({_reason(error)}). "
                    f"The stage goes on; run {tracker.run_id} lacks what is dropped, and after {PATIENCE} "
                    "failures in a row nothing more is sent.",
                    stacklevel=2,
                )

    return call


class MlflowTracker:
    """The MLflow run of one stage. Made by `open`."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._failures = 0
        self._warned = False
        run = client.get_run(run_id).data  # holds something when a run that was cut off goes on
        self._known_params = set(run.params)
        self._hashed = "params.hash" in run.tags
        self._last_steps = {
            name: max(metric.step for metric in client.get_metric_history(run_id, name)) for name in run.metrics
        }

    @classmethod
    @contextmanager
    def open(
        cls,
        *,
        stage: str,
        experiment: str = "tanglenas",
        root: str | Path | None = None,
        run_id: str | None = None,
        pipeline_id: str = "",
        architecture: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[Tracker]:
        """A run that is RUNNING inside the block, then FINISHED, FAILED (an exception) or KILLED (Ctrl-C).

        A store that cannot be reached costs one warning; a tracker that does nothing takes the run's place.

        Args:
            stage: names the run, with the first digits of the architecture's digest where it is known.
            experiment: `$MLFLOW_EXPERIMENT_NAME` goes before it.
            root: where the store lies unless `$MLFLOW_TRACKING_URI` is set; default `project_root()`.
            run_id: `tracker.run_id` of a run that was cut off and now goes on.
            pipeline_id, architecture: see `lineage`.
            tags: further ones.
        """
        tracker = None
        if not _switched_off():
            known = {**lineage(stage, pipeline_id, architecture), **(tags or {})}
            tracker = cls._start(stage, experiment, root, run_id, known)
        if tracker is None:
            yield NullTracker()
            return
        status = "FAILED"
        try:
            yield tracker
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except SystemExit as end:
            status = "FAILED" if end.code else "FINISHED"
            raise
        finally:
            tracker._end(status)

    @classmethod
    def _start(
        cls, stage: str, experiment: str, root: str | Path | None, run_id: str | None, tags: dict[str, str]
    ) -> Self | None:
        root = Path(root).resolve() if root is not None else project_root()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root / 'mlflow.db').as_posix()}"
        try:
            client, experiment_id = _open_store(uri, root, experiment)
            if not (run_id and _reopen(client, run_id)):
                name = f"{stage} {tags.get('architecture.digest', '')[:8]}".strip()
                run_id = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
            return cls(client, run_id)
        except Exception as error:
            warnings.warn(
                f"this run is not tracked: the MLflow store {_redacted(uri)} cannot be used "
                f"({_reason(error)}). Correct MLFLOW_TRACKING_URI or start its server, or set "
                "TANGLENAS_TRACKING=off.",
                stacklevel=4,
            )
            return None

    @_guarded
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log what the run does not have yet, as strings that MLflow cuts at 6,000 characters.

        Tags their hash as `params.hash` unless the stage set that tag itself.
        """
        flat = {_allowed(name): str(value) for name, value in _flatten(params)}
        new = [(name, value) for name, value in flat.items() if name not in self._known_params]
        if not new:
            return
        from mlflow.entities import Param

        for batch in _batches(new, PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=[Param(name, value) for name, value in batch])
        self._known_params.update(flat)
        if not self._hashed:
            self._client.set_tag(self.run_id, "params.hash", fingerprint(params=flat))
            self._hashed = True

    @_guarded
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers; an infinite one as NaN, because MLflow would store 1.8e308 and ruin the axis.

        Steps that the run already has are skipped: a stage that goes on from a checkpoint repeats a few.
        """
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000  # milliseconds
        entries = [
            Metric(_allowed(name), value if math.isfinite(value) else math.nan, now, step)
            for name, value in ((name, float(value)) for name, value in metrics.items())
            if step > self._last_steps.get(_allowed(name), step - 1)
        ]
        for batch in _batches(entries, METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=batch)

    @_guarded
    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        if os.path.isdir(path):
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    @_guarded
    def log_text(self, text: str, name: str) -> None:
        self._client.log_text(self.run_id, text, name)

    @_guarded
    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(name, str(value)) for name, value in tags.items()], PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, tags=batch)

    def _end(self, status: str) -> None:
        self._failures = 0  # the end is worth another try
        self._set_status(status)

    @_guarded
    def _set_status(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status)


def _switched_off() -> bool:
    setting = os.environ.get("TANGLENAS_TRACKING", "").lower()
    if setting not in {"", "on", "off"}:
        raise TangleNASError(
            f"TANGLENAS_TRACKING={setting!r} is neither 'on' nor 'off'. Set it to one of them or unset it."
        )
    return setting == "off"


def _open_store(uri: str, root: Path, experiment: str) -> tuple["MlflowClient", str]:
    """A client, and the id of the experiment; store and experiment are made where they do not exist yet."""
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment
    # A server that does not answer may cost seconds, not MLflow's minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    if "DO_NOT_TRACK" not in os.environ:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # announces each migration
    logging.getLogger("alembic").setLevel(logging.WARNING)

    served = uri.startswith(("http:", "https:", "databricks"))
    lock: Any = nullcontext()
    if uri.startswith("sqlite:///"):  # processes that create one database at once break each other's migration
        database = Path(uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{database}.lock", timeout=120)
    with lock:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id
        # Without a location the artifacts would go to the current folder, for good.
        location = None if served else (root / "mlartifacts").as_uri()
        try:
            return client, client.create_experiment(experiment, artifact_location=location)
        except Exception:
            if found := client.get_experiment_by_name(experiment):  # another process was faster
                return client, found.experiment_id
            raise


def _reopen(client: "MlflowClient", run_id: str) -> bool:
    """Set a run that was cut off to RUNNING; False, with a warning, when the store does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"}:
            raise
        warnings.warn(f"run {run_id} cannot go on ({_reason(error)}): a new run is started.", stacklevel=4)
        return False
    return True


def _flatten(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _allowed(name: str) -> str:
    return re.sub(r"[^\w./ -]", "_", name)


def _reason(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "")
    return _redacted(f"{type(error).__name__}: {line[:300]}")


def _redacted(text: str) -> str:
    """Without the password that a URL may hold."""
    return re.sub(r"(?<=//)[^/@\s]+@", "***@", text)
