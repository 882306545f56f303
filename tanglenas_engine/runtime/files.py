"""Files that are complete even if the process is killed, and folders that only one process can hold."""

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import filelock

from tanglenas_engine.errors import TangleNASError


def write_atomic(path: str | Path, data: str | bytes | memoryview) -> None:
    """Write a file so that it always has the old or the new content, even if the process is killed.

    Text is written as UTF-8 with unchanged newlines, and with escapes for names of files that are not UTF-8. Missing
    parent folders are created.

    Raises:
        TangleNASError: The disk is full or the path is not writable. The previous content is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise TangleNASError(
            f"cannot write {path}: {error.strerror or error}. What was there before is untouched; "
            "make room or choose another place, then run again."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
        TangleNASError: Another process holds the folder (the message has its pid), or the folder cannot be created.
    """
    folder = Path(folder)
    owner = folder / "owner.json"
    lock = filelock.FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise TangleNASError(_held(folder, owner)) from None
    except OSError as error:
        raise TangleNASError(
            f"cannot hold the folder {folder}: {error.strerror or error} ({error.filename}). "
            "Make place for it there, then run again."
        ) from error
    claim = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
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


def _held(folder: Path, owner: Path) -> str:
    """Return a message that names the process that holds a folder."""
    try:
        claim = json.loads(owner.read_bytes())
        pid, host, since = int(claim["pid"]), str(claim["host"]), claim["since"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pid, host, since = None, "", None
    here = host == socket.gethostname()
    if pid is None or (here and not _alive(pid)):  # the holder has just started and has not yet written owner.json
        return f"another process is still running this stage (folder {folder}). Wait for it, then run again."
    if not here:
        return (
            f"pid {pid} on {host} is still running this stage (folder {folder}, since {since}). "
            "Wait for it, or stop it there, then run again."
        )
    return (
        f"pid {pid} is still running this stage (folder {folder}, since {since}). "
        f"Wait for it, or stop it with `kill {pid}`, then run again."
    )


def _alive(pid: int) -> bool:
    if os.name == "nt":  # on Windows the call below would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
