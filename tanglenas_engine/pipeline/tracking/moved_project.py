"""Repairs of the addresses of artifacts in the store of a project that was moved or copied.

MLflow keeps the absolute place of artifacts with each experiment and run, and has no call that changes it. Without a
change, a project goes on to write into the folder where it once was, or into that of the project it was copied from.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from tanglenas_engine.errors import TangleNASError, shown

ARTIFACTS = "mlartifacts"
TABLES = {"runs": ("run_uuid", "artifact_uri"), "logged_models": ("model_id", "artifact_location")}
"""The tables with places of artifacts below those of the experiments: the columns of their keys and of the places."""


class MovedError(TangleNASError):
    """The error for artifacts that would go to the place where the project once was."""


def old_place(location: str, root: Path) -> Path | None:
    """Return the artifact folder of another project to which a location leads, or None for any other location."""
    address = urlparse(location)
    if address.scheme not in ("", "file"):
        return None
    path = Path(url2pathname(address.path)) if address.scheme else Path(location)
    own = (root / ARTIFACTS).resolve()
    folder = next((place for place in (path, *path.parents) if place.name == ARTIFACTS), None)
    return None if folder is None or folder.resolve() == own or path.resolve().is_relative_to(own) else folder


def check_place(location: str, root: Path) -> None:
    """Check that artifacts of the project's own store go into the project.

    Raises:
        MovedError: They would go to the place where the project once was.
    """
    if old := old_place(location, root):
        raise MovedError(
            f"it would write artifacts to {shown(old)}, where this project, or the one that it was copied from, once "
            "was: run `tanglenas doctor --fix`"
        )


def moved_experiments(root: Path) -> list[tuple[str, Path]]:
    """Return the experiments of a project's own store whose artifacts go to another place: their names, and the places.

    Raises:
        TangleNASError: The store cannot be read.
    """
    if not (root / "mlflow.db").is_file():
        return []
    with _database(root) as database:
        rows = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
    return [(shown(name, 80), old) for name, location in rows if (old := old_place(str(location), root))]


def mend(root: Path) -> int:
    """Let a project's own store put artifacts into the project, and find those that came with it.

    A run whose files are only in the old place keeps its address.

    Returns:
        The number of runs that have a new address.

    Raises:
        TangleNASError: The store cannot be read or written.
    """
    own, mended = (root / ARTIFACTS).as_uri(), 0
    with _database(root) as database:
        for key, location in database.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall():
            if old_place(str(location), root):
                database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (own, key))
        known = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table in TABLES.keys() & known:
            key_column, column = TABLES[table]
            for key, location in database.execute(f"SELECT {key_column}, {column} FROM {table}").fetchall():
                old = old_place(str(location), root)
                below = str(location).rpartition(f"/{ARTIFACTS}/")[2]
                # A run without artifacts has no folder anywhere.
                if old and ((root / ARTIFACTS / url2pathname(below)).exists() or not (old / below).exists()):
                    values = (f"{own}/{below}", key)
                    database.execute(f"UPDATE {table} SET {column} = ? WHERE {key_column} = ?", values)
                    mended += table == "runs"
    return mended


@contextlib.contextmanager
def _database(root: Path) -> Iterator[sqlite3.Connection]:
    path = root / "mlflow.db"
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=15)) as database, database:
            yield database
    except sqlite3.Error as error:
        raise TangleNASError(f"{path} cannot be read or changed ({shown(error)})") from error
