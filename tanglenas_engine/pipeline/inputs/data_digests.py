"""Digests of the data that a config names, so that DVC runs stages again when the data change.

The stages know data by `Dataset.fingerprint`. That takes the dataset itself, which may decode thousands of images,
train a tokenizer or download files, and `dvc repro` asks before every run. So the files are digested here as they lie
on the disk. A file of the project remembers the digests, and what did not change is not read again.

Digests depend on the names and the contents of files alone: equal data have equal digests on every machine.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tanglenas_engine.data import data_path
from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.pipeline.config.reader import bindings_of
from tanglenas_engine.pipeline.config.values import macro_value, resolved
from tanglenas_engine.pipeline.files import read_json_or_empty
from tanglenas_engine.plugins import manager
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.runtime.fingerprint import file_digest

MOST_READ = 4 << 30
"""The size in bytes up to which the contents of a folder count. Of a larger folder, names and sizes do."""
SETTLED = 2_000_000_000
"""Nanoseconds after which a change of a file shows in its times. A digest of younger files is not remembered."""


UNREADABLE = "unreadable"
"""What stands for the content of a file or folder that cannot be read."""


class EditionError(TangleNASError):
    """`Dataset.edition` of a plugin failed, which no stage would tell."""


class DataDigests:
    """The digests of files and folders, and a file that remembers them from one run to the next.

    A digest is remembered by the names, sizes and times of all files. Names that start with a dot do not count, nor
    does the folder `apart`, wherever it is reached: outputs that lie there are no data.

    Args:
        memory: The file. It may be deleted at any time.
        apart: The root of the project.
    """

    def __init__(self, memory: Path, apart: Path) -> None:
        self._memory = memory
        self._apart = _identity(apart.stat())
        told = read_json_or_empty(memory)
        self._known = {path: it for path, it in told.items() if isinstance(it, list) and len(it) == 2}
        self._found: dict[str, str] = {}
        self._changed = False

    def of(self, path: Path) -> str:
        """Return the digest of a file or folder, 64 hexadecimal digits.

        What cannot be read in it has its name there, and that it is unreadable.

        Raises:
            OSError: It is not there, or cannot be looked at.
        """
        key = str(path.resolve())
        if key not in self._found:
            self._found[key] = self._digest(path, key)
        return self._found[key]

    def save(self) -> None:
        """Write what is new to the file, if it can be written. Entries of folders that are gone leave it."""
        if self._changed:
            known = {path: it for path, it in sorted(self._known.items()) if os.path.lexists(path)}
            with suppress(OSError):  # where nothing can be written, the files are read again the next time
                write_atomic(self._memory, json.dumps(known, indent=1) + "\n")

    def _digest(self, path: Path, key: str) -> str:
        seen, total, newest, whole = hashlib.sha256(), 0, 0, True
        for name, file, status in self._files(path):
            if status is None:
                whole = whole and not file
                seen.update(b"%s\0\n" % name)
                continue
            seen.update(b"%s\0%d %d %d\n" % (name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
            total += status.st_size
            newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
        signature, known = seen.hexdigest(), self._known.get(key)
        if whole and known and known[0] == signature:
            return str(known[1])
        digest = hashlib.sha256()
        for name, file, status in self._files(path):
            content = UNREADABLE if file else "again"
            with suppress(OSError):
                if status is not None:
                    content = str(status.st_size) if total > MOST_READ and path.is_dir() else file_digest(file)
            whole = whole and content != UNREADABLE
            digest.update(b"%s\0%s\n" % (name, content.encode()))
        if whole and newest < time.time_ns() - SETTLED:
            self._known[key] = [signature, digest.hexdigest()]
            self._changed = True
        return digest.hexdigest()

    def _files(self, path: Path) -> Iterator[tuple[bytes, str, os.stat_result | None]]:
        """Yield the files of a folder in the order of their names: the name from there on, the path, and the status.

        What cannot be read has no status. A folder that came before has no path either.
        """
        status = path.stat()
        if path.is_dir():
            yield from self._below(os.fspath(path), b"", {self._apart}, _identity(status))
        elif path.is_file():
            yield b"", os.fspath(path), status

    def _below(
        self, folder: str, start: bytes, visited: set[tuple[int, int]], own: tuple[int, int]
    ) -> Iterator[tuple[bytes, str, os.stat_result | None]]:
        if own in visited:  # links lead to a folder again, or to the project itself
            yield start, "", None
            return
        visited.add(own)
        try:
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: (entry.is_symlink(), os.fsencode(entry.name)))
        except OSError:
            yield start, folder, None
            return
        for entry in ordered:
            name = start + os.fsencode(entry.name)
            if entry.name.startswith("."):
                continue
            try:
                status = os.stat(entry.path)
            except FileNotFoundError:  # a link to nothing, which is no file of the data
                continue
            except OSError:
                yield name, entry.path, None
                continue
            if stat.S_ISDIR(status.st_mode):
                yield from self._below(entry.path, name + b"/", visited, _identity(status))
            elif stat.S_ISREG(status.st_mode):
                yield name, entry.path, status


def data_digests(digests: DataDigests) -> dict[str, Any]:
    """Return the digests of the files and folders that the options of the dataset name, by option.

    Options have their values from the config, or else from the signature of the dataset's class. Data that no option
    names come with a package, and have its version as `edition`; see `Dataset.edition`. What is missing is left out:
    the stage says so.

    Raises:
        TangleNASError: No plugin has a dataset of that name, its class cannot be imported, or its `edition` fails.
    """
    registered = manager().resolve("dataset", str(macro_value("DATASET")))
    target = registered.load()
    options: dict[str, Any] = {}
    with suppress(TypeError, ValueError):  # a callable without a signature
        parameters = inspect.signature(target).parameters.values()
        options = {it.name: it.default for it in parameters if it.default is not it.empty}
    options.update(registered.defaults)
    for values in bindings_of("create_dataset"):
        options.update(values)
    edition = _edition(target, registered.name)
    return {**_named(options, digests), **({"edition": edition} if edition else {})}


def _edition(target: Any, name: str) -> str:
    """Return `Dataset.edition()` of the class, or "" if `edition` cannot be called without arguments.

    Raises:
        EditionError: It fails.
    """
    told = getattr(target, "edition", None)
    if not callable(told):
        return ""
    try:
        inspect.signature(told).bind()
    except (TypeError, ValueError):  # a method of its instances, which the library does not know
        return ""
    try:
        return str(told() or "")
    except Exception as error:  # of a plugin's code
        raise EditionError(f"the dataset {name!r} cannot tell its edition: {describe(error)}") from None


def _named(options: Mapping[str, Any], digests: DataDigests) -> dict[str, Any]:
    """Return the digests of what options name: a text for one path, and a list for a list of paths."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        several = isinstance(value, list | tuple)
        of_option = [it for part in (value if several else [value]) if (it := _digest(resolved(part), digests))]
        if of_option:
            found[name] = of_option if several else of_option[0]
    return found


def _digest(value: Any, digests: DataDigests) -> str:
    """Return the digest of an option's value if it names a file or folder, else ""."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        return ""
    try:
        path = data_path(value)
        return digests.of(path) if path.is_dir() or path.is_file() else ""
    except (OSError, ValueError):  # it cannot be read, or is too long for a path
        return ""


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
