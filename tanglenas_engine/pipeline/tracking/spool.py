"""Records that an MLflow store did not take: they are kept on disk, and sent later.

Every tracked run holds a folder of its own, `.tanglenas/runs/<run id>`, as long as its process lives. A run that the
store believes to be RUNNING while nothing holds its folder was killed. Records that the store does not take go to
`spool.jsonl` in that folder, one a line, and are sent in the same order later. A run that could not be started in the
store is called `unsent-...` until it is.

MLflow's own asynchronous logging cannot stand in for this: its queue is in memory, so that a killed process loses it,
and a batch that the server refuses is dropped.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.project import project_root
from tanglenas_engine.pipeline.tracking.redaction import reason
from tanglenas_engine.pipeline.tracking.store import KEY, PARENT, Event, Refused, Run, Store, call_with_timeout
from tanglenas_engine.runtime.files import exclusive, holder, read_note, write_atomic

if TYPE_CHECKING:
    from mlflow import MlflowClient

UNSENT = "unsent-"
FIELDS: dict[str, dict[str, Any]] = {
    "start": {"time": int, "experiment": str, "name": str, "tags": dict, "run_id": str | None},
    "params": {"time": int, "params": dict},
    "metrics": {"time": int, "metrics": dict, "step": int},
    "tags": {"time": int, "tags": dict},
    "artifact": {"time": int, "path": str, "folder": str | None},
    "text": {"time": int, "text": str, "name": str},
    "pipeline": {"time": int, "params": dict, "metrics": dict, "tags": dict},
    "end": {"time": int, "status": str},
}
"""The fields of each kind of record, with their types."""
LATEST = 32_503_680_000_000
"""A time in milliseconds, the year 3000, up to which Python has dates on every platform."""


class Spool:
    """The waiting records of one run, in a file of the run's folder. The one process that writes them holds the folder.

    Attributes:
        start: The record that starts the run, with the `run_id` that the store gave it, if it did.
        events: The waiting records, in order.
    """

    def __init__(self, folder: Path, start: Event | None = None) -> None:
        self.folder = folder
        self._file = folder / "spool.jsonl"
        self.start, self.events = start or {}, []
        records = list(_read(self._file))
        if records and records[0].get("what") == "start":
            self.start, *self.events = records
        if start and start.get("run_id"):
            self.start["run_id"] = start["run_id"]
        if start and start.get("parent"):  # a run that goes on may do so in another experiment of DVC
            self.start["parent"] = start["parent"]

    def append(self, event: Event) -> None:
        if event["what"] == "artifact":
            event = {**event, "path": self._keep(Path(event["path"]))}
        if not self._file.exists():
            self.save()
        self.events.append(event)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def save(self) -> None:
        """Write the file anew."""
        write_atomic(self._file, "".join(f"{json.dumps(record)}\n" for record in (self.start, *self.events)))

    def _keep(self, path: Path) -> str:
        """Keep a file or folder as it is now, by hard links where the file system has them."""
        kept = self.folder / "artifacts" / secrets.token_hex(4) / path.name
        kept.parent.mkdir(parents=True)
        if path.is_dir():
            shutil.copytree(path, kept, copy_function=_link)
        else:
            _link(str(path), str(kept))
        return kept.relative_to(self.folder).as_posix()

    def discard(self) -> None:
        self._file.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "artifacts", ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def _read(file: Path) -> Iterator[Event]:
    """Read the records of a spool, but for damaged ones, such as a line that a kill cut off."""
    if file.is_symlink() or not file.is_file():
        return
    with suppress(OSError):
        for line in file.read_bytes().splitlines():
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and _is_sound(file.parent, record):
                    yield record


def _is_sound(folder: Path, record: Event) -> bool:
    """Return whether a record is one that `MlflowTracker` writes, and names no file outside the folder."""
    kind = record.get("what")
    fields = FIELDS.get(kind) if isinstance(kind, str) else None
    if fields is None or not fields.keys() - {"run_id"} <= record.keys():
        return False
    if not all(isinstance(record.get(name), types) for name, types in fields.items()):
        return False
    if not 0 <= record["time"] < LATEST or not -(2**63) <= record.get("step", 0) < 2**63:
        return False
    kinds = {"tags": str, "params": str, "metrics": int | float}
    if any(not isinstance(value, kinds[name]) for name in fields.keys() & kinds for value in record[name].values()):
        return False
    if kind == "start":
        run_id = record.get("run_id")
        return (run_id is None or re.fullmatch(r"[\w-]+", run_id) is not None) and _is_parent(record.get("parent"))
    if kind == "end":
        return record["status"] in ("FINISHED", "FAILED", "KILLED")
    place = record.get("path", "")
    return (
        "\0" not in place and not os.path.isabs(place) and (folder / place).resolve().is_relative_to(folder.resolve())
    )


def _is_parent(parent: Any) -> bool:
    """Return whether a value may be the `parent` of a start record, which older ones lack."""
    if parent is None:
        return True
    if not isinstance(parent, dict) or not isinstance(parent.get("name"), str):
        return False
    tags = parent.get("tags")
    return isinstance(tags, dict) and KEY in tags and all(isinstance(value, str) for value in tags.values())


def send_all(store: Store, spool: Spool, until: float, send: Callable[[Run, Event], None]) -> Run:
    """Send the records of a spool. Those that were sent leave it, even when a later one fails.

    Raises:
        TimeoutError: The clock `time.monotonic` has passed `until`.
        Exception: The store fails.
    """
    try:
        run = open_run(store, spool.start)  # read the run again: a call that timed out may have arrived
    except KeyError:  # the store is another one, or the run was deleted
        run = open_run(store, {**spool.start, "run_id": None})
    if spool.start.get("run_id") != run.run_id:
        spool.start["run_id"] = run.run_id
        spool.save()  # first, so that the run is made only once
    try:
        while spool.events:
            if time.monotonic() > until:
                raise TimeoutError("the store is slow")
            send(run, spool.events[0])
            del spool.events[0]
    except BaseException:
        spool.save()
        raise
    spool.discard()
    return run


def open_run(store: Store, start: Event) -> Run:
    """Return the run that a start record has in the store, and make it if the record has no id yet.

    Raises:
        KeyError: The store has no run of that id.
        Exception: The store fails.
    """
    client = store.connect()
    return call_with_timeout(15.0, Run, store, client, start, start.get("run_id"))


# --- runs that ended with records waiting, or without an end --------------------------------------------------


@dataclass(frozen=True)
class SpooledRun:
    """A run with records that wait to be sent.

    `run_id` is None where the store does not have the run yet. A run is `busy` while its process lives, which sends the
    records itself.
    """

    folder: Path
    run_id: str | None
    stage: str
    records: int
    since: datetime
    busy: bool


@dataclass(frozen=True)
class Upload:
    """The outcome of uploading a spooled run: its id in the store, or the problem in words."""

    spooled: SpooledRun
    run_id: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class StaleRun:
    """A run that the store believes to be RUNNING, although its process was killed.

    A `resumable` run goes on when the same command is run again.
    """

    run_id: str
    name: str
    since: datetime
    resumable: bool


def spooled_runs(root: str | Path | None = None) -> list[SpooledRun]:
    """Return the runs of a project that have records which the store lacks."""
    found = []
    for folder in _folders(root):
        if not (start := (spool := Spool(folder)).start):
            continue
        run_id = start.get("run_id")
        if spool.events or run_id is None:
            since = datetime.fromtimestamp(start["time"] / 1000, UTC)
            found.append(
                SpooledRun(folder, run_id, start["name"], len(spool.events), since, holder(folder) is not None)
            )
    return found


def upload_spool(root: str | Path | None = None) -> list[Upload]:
    """Send the waiting records of all runs but those of living processes. A store in trouble raises nothing."""
    store, uploads = Store.of(_root(root)), []
    for spooled in spooled_runs(root):
        refused: list[str] = []

        def send(run: Run, event: Event, folder: Path = spooled.folder, refused: list[str] = refused) -> None:
            try:
                run.send(event, folder)
            except Refused as refusal:
                refused.append(f"{event['what']}: {refusal}")

        try:
            with exclusive(spooled.folder):
                spool = Spool(spooled.folder)
                ended = any(event["what"] == "end" for event in spool.events)
                run = send_all(store, spool, time.monotonic() + 3600, send)
                if not ended:  # it was killed: it may go on yet, and `stale_runs` finds it by this file
                    spool.save()
            uploads.append(Upload(spooled, run.run_id, "; ".join(refused)))
        except Exception as error:
            problem = str(error) if isinstance(error, TangleNASError) else f"{store.name}: {reason(error)}"
            uploads.append(Upload(spooled, spooled.run_id, problem))
    return uploads


def stale_runs(root: str | Path | None = None) -> list[StaleRun]:
    """Return the runs that the store believes to be RUNNING although their process is gone.

    Only runs that this project started count, as others may use the same store.

    Raises:
        TangleNASError: The store does not answer.
    """
    return _looked(root)[0]


def mark_killed(run_ids: Iterable[str], root: str | Path | None = None) -> list[str]:
    """End runs that `stale_runs` found, with the status KILLED, and return the ids of those that are still stale.

    The others have a process again. A run that goes on later is RUNNING again.

    Raises:
        TangleNASError: The store does not answer.
    """
    store = Store.of(_root(root))
    stale, alive = _looked(root)
    ended = [run_id for run_id in run_ids if run_id in {run.run_id for run in stale}]
    folders = {_run_id(folder): folder for folder in _folders(root)}
    for run_id in ended:
        try:
            client = store.connect()
            call_with_timeout(15.0, _kill, client, run_id, alive)
        except Exception as error:
            raise TangleNASError(f"the MLflow store {store.name} did not end run {run_id} ({reason(error)})") from error
        if (folder := folders.get(run_id)) and not Spool(folder).events:
            with suppress(TangleNASError), exclusive(folder):
                Spool(folder).discard()
    return ended


def _looked(root: str | Path | None) -> tuple[list[StaleRun], set[str | None]]:
    """Return the runs whose process is gone, and the pipelines in which a run of a living process is nested."""
    store = Store.of(_root(root))
    known = {_run_id(folder) for folder in _folders(root)}
    own = store.own
    if not known and (not own or not (store.root / "mlflow.db").exists()):
        return [], set()
    resumable = set()
    for path in (store.root / ".tanglenas" / "resume").glob("*/run"):
        with suppress(OSError):
            resumable.add(read_note(path).decode(errors="replace"))
    found, running = [], _running(store, known)
    # The query takes seconds, in which stages begin: their folders are there only now.
    folders = {_run_id(folder): folder for folder in _folders(root)}
    busy = {run.data.tags.get(PARENT) for run in running}
    alive = set()
    for run in running:
        folder = folders.get(run.info.run_id)
        if (folder is None and not own) or (folder is not None and holder(folder)):
            alive.add(run.data.tags.get(PARENT))
            continue
        if run.info.run_id in busy:  # a pipeline's run has no process of its own: it ends with its stages
            continue
        since = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
        names = {run.info.run_id, folder.name if folder else ""}
        found.append(StaleRun(run.info.run_id, run.info.run_name, since, bool(names & resumable)))
    return found, alive


def _kill(client: MlflowClient, run_id: str, alive: Collection[str | None]) -> None:
    """End a run in the store, and the pipeline's run in which it is nested, unless that one is `alive`."""
    parent = client.get_run(run_id).data.tags.get(PARENT)
    for ended in (run_id, parent):
        if ended and ended not in alive:
            client.set_terminated(ended, "KILLED")


def _running(store: Store, known: Iterable[str | None]) -> list[Any]:
    """Return the runs of this project's stages that the store believes to be RUNNING."""

    def search(client: Any) -> list[Any]:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        query, page, runs = "attributes.status = 'RUNNING'", None, []
        while True:
            runs += (found := client.search_runs(experiments, query, page_token=page))
            if not (page := found.token):
                return [run for run in runs if "tanglenas.stage" in run.data.tags or run.info.run_id in known]

    try:
        return call_with_timeout(60.0, search, store.connect())
    except Exception as error:
        raise TangleNASError(
            f"the MLflow store {store.name} cannot be used ({reason(error)}). Start its server, or correct "
            "MLFLOW_TRACKING_URI"
        ) from error


def _root(root: str | Path | None) -> Path:
    return Path(root).resolve() if root is not None else project_root()


def _folders(root: str | Path | None) -> list[Path]:
    return sorted(path for path in Store.of(_root(root)).runs.glob("*") if path.is_dir() and not path.is_symlink())


def _run_id(folder: Path) -> str | None:
    name = None if folder.name.startswith(UNSENT) else folder.name
    return Spool(folder).start.get("run_id") or name
