"""Files that are complete even if the process is killed, and folders that only one process can hold."""

import errno
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import filelock
import psutil

from tanglenas_engine.errors import TangleNASError, shown

ACQUIRE_SECONDS = 0.3
"""Seconds in which a lock is tried again: `holder` takes it for a moment."""
ACQUIRE_TRIES = 100
"""Times that a folder is made: who lets go of its lock removes it, and may do so before another one has the lock."""
START_SECONDS = 2.0
"""The largest difference in seconds between two readings of the start time of one process."""
NOTE_BYTES = 100_000
"""The most bytes of a file in which a process leaves a note, such as owner.json."""


class HeldError(TangleNASError):
    """The error for a folder that another process holds."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder.

    Attributes:
        pid: Its number, or None where owner.json is not its own.
        host: The other machine on which it runs, or "" for this one.
        since: When it took the folder, as it wrote it.
    """

    pid: int | None = None
    host: str = ""
    since: str = ""


def write_atomic(path: str | Path, data: str | bytes | memoryview) -> None:
    """Write a file so that it always has the old or the new content, even if the process is killed.

    Text is written as UTF-8 with unchanged newlines, and with escapes for names of files that are not UTF-8. Missing
    parent folders are created.

    Raises:
        TangleNASError: The disk is full, or the path is a folder or a device, or is not writable. The previous content
            is unchanged.
    """
    path = Path(path)
    with _beside(path) as temporary:
        with open(temporary, "xb") as file:
            file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


def check_writable(path: str | Path) -> None:
    """Check that `write_atomic` can write a file, before long work whose result it holds. Nothing is left of the check.

    Raises:
        TangleNASError: The path is a folder or a device, or is not writable.
    """
    path = Path(path)
    missing = [folder for folder in path.parents if not os.path.exists(folder)]  # Path.exists fails for long names
    try:
        with _beside(path) as temporary:
            temporary.touch()
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file beside a file, and tell in a sentence why it cannot be written."""
    try:
        if path.exists() and not path.is_file():  # to replace a device, such as /dev/full, breaks the machine
            raise OSError(errno.EINVAL, "it is there, and no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TangleNASError(
            f"cannot write {path}: {error.strerror or error}. What was there before is untouched; "
            "make room or choose another place, then run again."
        ) from error


def read_note(path: Path) -> bytes:
    """Return the content of a small file that a process left, which others may have replaced since.

    Raises:
        OSError: The file is missing, no regular file, or larger than `NOTE_BYTES`.
    """
    # Opening a pipe waits for its other end.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > NOTE_BYTES:
            raise OSError(None, f"is no file of at most {NOTE_BYTES:,} bytes", str(path))
        return file.read(NOTE_BYTES)


def sweep(folder: str | Path, name: str = "*") -> None:
    """Delete the temporary files that killed writes of `name` left in a folder.

    Only the folder's one writer may call this.
    """
    for leftover in Path(folder).glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold a folder against all other processes until the block or the process ends.

    A killed `dvc repro` can leave its stage running. The next `dvc repro` would then start a second one beside it.

    Raises:
        HeldError: Another process holds the folder (the message has its pid).
        TangleNASError: The folder cannot be created or written.
    """
    folder = Path(folder)
    owner = folder / "owner.json"
    lock = filelock.FileLock(folder / "lock")
    try:
        _acquire(lock, folder)
    except filelock.Timeout:
        raise HeldError(_told(folder, _claimant(folder))) from None
    except OSError as error:
        raise TangleNASError(
            f"cannot hold the folder {folder}: {error.strerror or error} ({error.filename}). "
            "Make place for it there, then run again."
        ) from error
    claim = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "started": psutil.Process().create_time(),
    }
    try:
        sweep(folder)
        write_atomic(owner, json.dumps(claim))
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
            if all(entry.name == "lock" for entry in folder.iterdir()):  # remove the folder if it is empty
                Path(lock.lock_file).unlink(missing_ok=True)
                folder.rmdir()
        lock.release()


def _acquire(lock: filelock.BaseFileLock, folder: Path) -> None:
    """Take the lock in a folder, which is made where it is missing.

    Raises:
        filelock.Timeout: Another process has it for longer than `ACQUIRE_SECONDS`.
        OSError: The folder cannot be made, or the lock cannot be written.
    """
    for left in reversed(range(ACQUIRE_TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=ACQUIRE_SECONDS)
            return
        except FileNotFoundError:  # another process let go in between, and removed the folder
            if not left:
                raise


def holder(folder: Path) -> Holder | None:
    """Return the process that holds a folder with `exclusive`, or None. The lock decides, and not what a file says.

    The lock is free again at once if nobody had it.
    """
    if not (folder / "lock").is_file():
        return None
    try:
        with filelock.FileLock(folder / "lock").acquire(timeout=0):
            return None
    except (filelock.Timeout, PermissionError):
        return _claimant(folder)
    except OSError:
        return None


def _claimant(folder: Path) -> Holder:
    """Return who owner.json says holds a folder. A number on this machine counts if its process started when it says.

    The holder may have just started, and not have written the file. Then a killed process may have left one, whose
    number now belongs to a stranger.
    """
    try:
        claim = json.loads(read_note(folder / "owner.json"))
        pid, host, since, started = (claim[key] for key in ("pid", "host", "since", "started"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Holder()
    sound = type(pid) is int and 1 < pid < 2**31 and isinstance(host, str) and isinstance(started, int | float)
    if not sound:
        return Holder()
    if host != socket.gethostname():
        return Holder(pid, shown(host, 80), shown(since, 40))
    try:
        same = abs(psutil.Process(pid).create_time() - started) < START_SECONDS
    except psutil.Error:
        same = False
    return Holder(pid, "", shown(since, 40)) if same else Holder()


def _told(folder: Path, by: Holder) -> str:
    """Return a message that names the process that holds a folder."""
    if by.pid is None:
        return f"another process is still running this stage (folder {folder}). Wait for it, then run again."
    if by.host:
        return (
            f"pid {by.pid} on {by.host} is still running this stage (folder {folder}, since {by.since}). "
            "Wait for it, or stop it there, then run again."
        )
    return (
        f"pid {by.pid} is still running this stage (folder {folder}, since {by.since}). "
        f"Wait for it, or stop it with `kill {by.pid}`, then run again."
    )
