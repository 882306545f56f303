"""One MLflow run for each stage, nested in one for the pipeline: parameters, metrics, artifacts, and tags.

    with MlflowTracker.open(stage="search", pipeline_id=pipeline_id) as tracker:
        tracker.log_params(config)
        search(..., tracker=tracker)

The store is `$MLFLOW_TRACKING_URI`, else `<root>/mlflow.db` with its artifacts in `<root>/mlartifacts`, from
whatever folder the stage runs. `TANGLENAS_TRACKING=off` turns all of it off. Everything goes through MLflow's
client: the active run of the process is neither read nor changed.

A store in trouble costs a training one warning, and at most seconds for each call. Records that it does not take are
kept (see spool.py), and sent once it answers again, or later by `upload_spool`.
"""

import functools
import os
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.project import project_root
from tanglenas_engine.pipeline.tracking.redaction import reason
from tanglenas_engine.pipeline.tracking.spool import (
    UNSENT,
    Spool,
    mark_killed,
    open_run,
    send_all,
    spooled_runs,
    stale_runs,
    upload_spool,
)
from tanglenas_engine.pipeline.tracking.store import KEY, Event, Refused, Run, Store, allowed, experiment_name, flat
from tanglenas_engine.runtime.files import exclusive
from tanglenas_engine.runtime.fingerprint import fingerprint
from tanglenas_engine.runtime.tracking import NullTracker, Tracker

__all__ = [
    "PIPELINE",
    "MlflowTracker",
    "lineage",
    "mark_killed",
    "spooled_runs",
    "stale_runs",
    "upload_spool",
]

P = ParamSpec("P")
Clock = Callable[[], Mapping[str, float]]

AFTER = "tanglenas.after."
"""The start of the tags of a run with the runs of the stages before it, by name."""
DATA, TABLE = "dataset.fingerprint", "benchmark.fingerprint"
OBJECTIVES, WEIGHTS = "create_objective.fingerprint", "weights.fingerprint"
"""The parameters of a run with the fingerprints of its data, its benchmark table, the files of its objectives, and the
weights that it started from."""
PIPELINE = "pipeline"
"""The tag `tanglenas.stage` of a pipeline's run."""
RETRY_SECONDS = 60.0
"""Seconds in which nothing is sent after a failure. Every further failure doubles them."""
DRAIN_SECONDS = 30.0
"""The most seconds that a stage spends on waiting records, when the store answers again or the stage ends."""


def lineage(stage: str, pipeline_id: str = "") -> dict[str, str]:
    """Return the tags that tie a run to its pipeline, its commit and its DVC experiment. Unknown ones are left out.

    Args:
        stage: "search", "discretize", "retrain" or "evaluate".
        pipeline_id: A hash of the parameters of the search, equal in all stages of one pipeline.
    """
    tags = {
        "tanglenas.stage": stage,
        "tanglenas.pipeline_id": pipeline_id,
        "dvc.stage": os.environ.get("DVC_STAGE", ""),
        "dvc.exp_name": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
        **_git_state(),
    }
    return {name: value for name, value in tags.items() if value}


def _parent(name: str, tags: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the record of the run in which the stages of a pipeline are nested, or None if it has no name or id.

    Stages find it by a key: the id of the pipeline, and the experiment of DVC if there is one. Experiments may share a
    search, and differ in what follows.
    """
    pipeline_id = tags.get("tanglenas.pipeline_id")
    if not (name and pipeline_id):
        return None
    own = ("tanglenas.stage", "dvc.stage", "architecture.digest", "params.hash")  # these are of the stage
    shared = {tag: value for tag, value in tags.items() if tag not in own and not tag.startswith(AFTER)}
    key = fingerprint(pipeline=pipeline_id, experiment=tags.get("dvc.exp_name", ""))
    return {"name": name, "tags": {**shared, "tanglenas.stage": PIPELINE, KEY: key}}


def _git_state() -> dict[str, str]:
    """Return tags with the commit of the code, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        # `dvc repro` rewrites these files. They are no code.
        written = [f":(top,exclude,glob)**/{name}" for name in ("dvc.lock", "environment.json", "metrics/*.json")]
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *written)
        return {"git.sha": git("rev-parse", "HEAD"), "git.dirty": str(bool(changes)).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _guarded(
    method: Callable[Concatenate["MlflowTracker", P], None],
) -> Callable[Concatenate["MlflowTracker", P], None]:
    """Turn whatever a method raises into a warning: tracking never ends a training, even on a full disk."""

    @functools.wraps(method)
    def call(tracker: "MlflowTracker", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(tracker, *args, **kwargs)
        except Exception as error:
            tracker._warn(f"{method.__name__.lstrip('_')} is not tracked ({reason(error)}). The stage goes on.")

    return call


class MlflowTracker:
    """The MLflow run of one stage. `open` makes it.

    Attributes:
        folder: The folder that the run holds as long as this process lives, and where its records wait.
    """

    def __init__(self, store: Store, start: Event, run_id: str | None, hold: ExitStack) -> None:
        self._store = store
        self._run: Run | None = None
        self._warned = False
        self._wait, self._retry_at = RETRY_SECONDS, 0.0
        self._clock: Clock | None = None
        if run_id and not re.fullmatch(r"[\w-]+", run_id):  # the id names a folder
            run_id = None
        waiting = Spool(store.runs / run_id).start if run_id else {}
        known = waiting.get("run_id") or (run_id if run_id and not run_id.startswith(UNSENT) else None)
        key = waiting.get("tags", {}).get(KEY) or os.urandom(16).hex()
        start = {**start, "run_id": known, "tags": {**start["tags"], KEY: key}, "tried": bool(waiting)}
        trouble = self._connect(start)
        name = self._run.run_id if self._run else run_id or f"{UNSENT}{os.urandom(8).hex()}"
        self.folder = store.runs / (run_id if waiting and run_id else name)
        hold.enter_context(exclusive(self.folder))
        self._spool = Spool(self.folder, {**start, "run_id": self._run.run_id if self._run else known, "tried": True})
        if trouble or waiting:
            self._spool.save()
        if trouble:
            self._warn(
                f"the MLflow store {store.name} cannot be used ({trouble}). The stage goes on, and what it would "
                f"have logged is kept in {self.folder}, to be sent once the store answers. Correct "
                "MLFLOW_TRACKING_URI or start its server, or set TANGLENAS_TRACKING=off."
            )
            self._put_off()

    @property
    def run_id(self) -> str:
        """The id of the run in the store, or its folder's name until it has one. `open` takes either."""
        return self._run.run_id if self._run else self.folder.name

    @classmethod
    @contextmanager
    def open(
        cls,
        *,
        stage: str,
        root: str | Path | None = None,
        run_id: str | None = None,
        pipeline_id: str = "",
        pipeline: str = "",
        tags: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> Iterator[Tracker]:
        """Open a run. It is RUNNING inside the block, and then FINISHED, FAILED (an exception) or KILLED (Ctrl-C).

        A store that cannot be reached, now or later, costs one warning.

        Args:
            stage: The name of the run. The first digits of the architecture's digest follow where it is known.
            root: The folder of the store, unless `$MLFLOW_TRACKING_URI` is set; by default `project_root()`.
            run_id: The `tracker.run_id` of a run that was cut off and now goes on.
            pipeline_id: See `lineage`.
            pipeline: The name of the run in which all stages with this `pipeline_id` are nested, or "" for none.
            tags: Further tags.
            clock: A function that returns the time used so far, as metrics that are logged with those of every step
                above 0.
        """
        if _switched_off():
            yield NullTracker()
            return
        known = {**lineage(stage, pipeline_id), **(tags or {})}
        start = {
            "what": "start",
            "experiment": experiment_name(),
            "name": " ".join(filter(None, (stage, known.get("optimizer"), known.get("architecture.digest", "")[:8]))),
            "tags": known,
            "parent": _parent(pipeline, known),
            "time": _now(),
        }
        store = Store.of(Path(root).resolve() if root is not None else project_root())
        with ExitStack() as hold:
            try:
                tracker = cls(store, start, run_id, hold)
            except Exception as error:  # not even the folder can be made
                warnings.warn(f"this run is not tracked ({reason(error)}).", stacklevel=3)
                tracker = None
            if tracker is None:
                yield NullTracker()
                return
            tracker._clock = clock
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

    @_guarded
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters that the run lacks, as strings, which MLflow cuts at 6,000 characters.

        Their hash becomes the tag `params.hash`, unless the stage set that tag.
        """
        self._record("params", params={allowed(name): str(value) for name, value in flat(params)})

    @_guarded
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step, an infinite one as NaN.

        Steps go up. Steps that the run has are skipped: a stage that goes on from a checkpoint repeats a few.
        """
        used = self._clock() if self._clock and step > 0 else {}
        known = {**metrics, **used}
        self._record("metrics", metrics={allowed(name): float(value) for name, value in known.items()}, step=step)

    @_guarded
    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        self._record("artifact", path=os.path.abspath(path), folder=folder)

    @_guarded
    def log_text(self, text: str, name: str) -> None:
        self._record("text", text=text, name=name)

    @_guarded
    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._record("tags", tags={name: str(value) for name, value in tags.items()})

    @_guarded
    def log_pipeline(
        self,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log what compares pipelines to the run in which this one is nested. The latest number of a name counts."""
        self._record(
            "pipeline",
            metrics={allowed(name): float(value) for name, value in (metrics or {}).items()},
            params={allowed(name): str(value) for name, value in flat(params or {})},
            tags={name: str(value) for name, value in (tags or {}).items()},
        )

    @_guarded
    def _end(self, status: str) -> None:
        self._retry_at = 0.0  # try once more at the end, whatever the wait
        self._record("end", status=status)
        if not self._spool.events:
            self._spool.discard()

    def _record(self, what: str, **content: Any) -> None:
        """Send a record, or keep it. Once one waits, those after it wait too, in their order."""
        event = {"what": what, "time": _now(), **content}
        if self._run and not self._spool.events:
            try:
                self._send(event)
                return
            except Exception as error:
                self._warn(
                    f"the MLflow store did not take {what} ({reason(error)}). The stage goes on; what is not taken "
                    f"is kept in {self.folder} and sent once the store answers."
                )
                self._spool.append(event)
                self._put_off()
        else:
            self._spool.append(event)
        if time.monotonic() >= self._retry_at:
            self._drain()

    def _send(self, event: Event) -> None:
        assert self._run is not None
        try:
            self._run.send(event, self.folder)
        except Refused as refusal:
            self._warn(f"the MLflow store did not take {event['what']} ({refusal}). The stage goes on without.")

    def _connect(self, start: Event) -> str:
        """Find or make the run, and return what is in the way, or ""."""
        try:
            self._run = open_run(self._store, start)
        except KeyError as error:
            self._warn(f"run {start['run_id']} cannot go on ({error.args[0]}): a new run is started.")
            return self._connect({**start, "run_id": None})
        except Exception as error:
            return reason(error)
        return ""

    def _put_off(self) -> None:
        self._retry_at = time.monotonic() + self._wait
        self._wait *= 2

    def _drain(self) -> None:
        """Send the waiting records, as long as the store takes them in time."""
        try:
            self._run = send_all(self._store, self._spool, time.monotonic() + DRAIN_SECONDS, self._send_waiting)
            self._wait = RETRY_SECONDS
        except Exception:
            self._put_off()

    def _send_waiting(self, run: Run, event: Event) -> None:
        self._run = run
        self._send(event)

    def _warn(self, message: str) -> None:
        """Warn once: a store in trouble is in trouble with every call."""
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)


def _now() -> int:
    """Return the time in milliseconds, as MLflow counts it."""
    return time.time_ns() // 1_000_000


def _switched_off() -> bool:
    setting = os.environ.get("TANGLENAS_TRACKING", "").lower()
    if setting not in {"", "on", "off"}:
        raise TangleNASError(
            f"TANGLENAS_TRACKING={setting!r} is neither 'on' nor 'off'. Set it to one of them or unset it."
        )
    return setting == "off"
