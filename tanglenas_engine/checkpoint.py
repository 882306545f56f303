"""Files that survive a kill: atomic writes, weights, and the state from which an interrupted stage goes on.

A checkpoint is two files of one generation, written in this order, each one atomically:

    state-000007.pt      tensors, numbers, strings, lists, dicts: what `torch.load(weights_only=True)` reads
    state-000007.json    its sha256, the schema version and the fingerprint of the run: this commits it

The generation before stays, for the day the newest one turns out damaged.
"""

import hashlib
import io
import json
import os
import re
import secrets
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import filelock
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tanglenas_engine.errors import TangleNASError

SCHEMA_VERSION = 1


def write_atomic(path: str | Path, data: str | bytes | memoryview) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new, never a part.

    Text is written as UTF-8 with its newlines as they are. Folders on the way are made.

    Raises:
        TangleNASError: the disk is full or the place cannot be written; what was there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
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
    """Remove the temporary files that killed writes of `name` left in a folder; only its one writer may do this."""
    for leftover in Path(folder).glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):
            leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically; equal input gives equal bytes.

    Slices are made contiguous. Tensors that share memory (tied weights) are each stored in full.

    Raises:
        TangleNASError: the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    data = safetensors.torch.save(stored, dict(metadata or {}))
    write_atomic(path, _sort_header(data) if metadata and len(metadata) > 1 else data)


def _sort_header(data: bytes) -> bytes:
    """safetensors writes the metadata in hash order, another one in each process: sort them."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[end:]))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        TangleNASError: the file is missing, truncated, or something else.
    """
    with _reading(Path(path)):
        return safetensors.torch.load_file(path)


def weights_metadata(path: str | Path) -> dict[str, str]:
    """What `save_weights` was told to store beside the tensors; reads the header only.

    Raises:
        TangleNASError: the file is missing, truncated, or something else.
    """
    with _reading(Path(path)), safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise TangleNASError(f"no weights at {path}. Run the stage that writes this file, or correct the path.")
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise TangleNASError(
            f"cannot read {path} as a safetensors file: {error}. It is truncated or was never one: "
            "delete it and run the stage that writes it again."
        ) from error


def fingerprint(**parts: Any) -> str:
    """16 hexadecimal digits that change when any part does: the configuration, the data, the code version.

    Parts are what JSON can hold; the order of the keys of a mapping does not matter.

    Raises:
        TangleNASError: a part has no JSON form, so that nothing says when it is the same.
    """
    for name, part in parts.items():
        try:
            json.dumps(part)
        except TypeError as error:
            raise TangleNASError(
                f"cannot fingerprint {name}={part!r}: {error}. Pass strings, numbers, lists and dicts."
            ) from error
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def code_version(*modules: ModuleType) -> str:
    """16 hexadecimal digits over the Python sources of packages and modules, wherever they are installed."""
    digest = hashlib.sha256()
    for module in sorted(set(modules), key=lambda module: module.__name__):
        if roots := [Path(folder) for folder in getattr(module, "__path__", ())]:
            sources = {s.relative_to(root).as_posix(): s for root in roots for s in root.rglob("*.py")}
        else:
            sources = {"": Path(str(module.__file__))}
        for name, source in sorted(sources.items()):
            content = hashlib.sha256(source.read_bytes()).hexdigest()
            digest.update(f"{module.__name__} {name} {content}\n".encode())
    return digest.hexdigest()[:16]


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold a folder against every other process, until the block or the process ends, however it ends.

    A killed `dvc repro` leaves its stage running, and the next `dvc repro` starts a second one beside it.

    Raises:
        TangleNASError: another process holds the folder (the message has its pid), or there can be no such folder.
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
            if all(entry.name == "lock" for entry in folder.iterdir()):  # leave nothing where nothing is kept
                Path(lock.lock_file).unlink(missing_ok=True)
                folder.rmdir()
        lock.release()


def _held(folder: Path, owner: Path) -> str:
    """Who holds a folder, for a person."""
    try:
        claim = json.loads(owner.read_bytes())
        pid, host, since = int(claim["pid"]), str(claim["host"]), claim["since"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pid, host, since = None, "", None
    here = host == socket.gethostname()
    if pid is None or (here and not _alive(pid)):  # the holder is just starting, and has not said who it is
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
    if os.name == "nt":  # there the call below ends the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


class _DamagedError(Exception):
    """A generation that does not read back as it was written."""


class CheckpointFolder(AbstractContextManager["CheckpointFolder"]):
    """The checkpoints of one run in a folder of their own, held against other processes inside `with`.

        with CheckpointFolder(folder, fingerprint(config=config, code=code_version(package))) as checkpoints:
            state = checkpoints.load() or start
            ...
            checkpoints.save(state)
            ...
            checkpoints.discard()

    Args:
        folder: made when missing, and removed at the end when no checkpoint is left in it.
        fingerprint: what the state depends on; a checkpoint with another one is refused.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self._hold: AbstractContextManager[None] | None = None
        self._trusted: int | None = None  # the generation that stays when the next one is written

    def __enter__(self) -> Self:
        hold = exclusive(self.folder)
        hold.__enter__()
        self._hold = hold
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.__exit__(None, None, None)

    def save(self, state: Mapping[str, Any]) -> None:
        """Commit a new generation and drop all but the one before it.

        Args:
            state: tensors (stored as on the CPU), numbers, strings, and lists, tuples and dicts of them.

        Raises:
            TangleNASError: the state holds something that could not be loaded again, or the disk is full.
        """
        if self._hold is None:
            raise RuntimeError("save() belongs inside `with CheckpointFolder(...)`, which holds the folder")
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        buffer.seek(0)
        if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
            raise TangleNASError(
                f"the state to be checkpointed holds {', '.join(foreign)}, which could not be loaded again. "
                "Keep to tensors, Python numbers, strings, lists, tuples and dicts."
            )
        data = buffer.getbuffer()
        generations = self._generations()
        generation = max(generations, default=0) + 1
        previous = self._trusted if self._trusted is not None else max(generations, default=0)
        manifest = {
            "schema": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "torch": torch.__version__,
        }
        write_atomic(self._state_path(generation), data)
        write_atomic(self._manifest_path(generation), json.dumps(manifest, indent=2) + "\n")
        self._trusted = generation
        self._drop_all_but(generation, previous)

    def load(self) -> dict[str, Any] | None:
        """The newest good state with its tensors on the CPU, or None when there is none yet.

        Warns when the newest one is damaged and the one before it takes its place.

        Raises:
            TangleNASError: every generation is damaged, or belongs to another run.
        """
        problems: list[Exception] = []
        for generation in reversed(self._generations()):
            try:
                state = self._read(generation)
            except (_DamagedError, TangleNASError) as problem:
                problems.append(problem)
                continue
            if problems:
                warnings.warn(
                    f"damaged checkpoint: {'; '.join(map(str, problems))}. Going on from the one before it, "
                    f"{self._state_path(generation).name}.",
                    stacklevel=2,
                )
            self._trusted = generation
            return state
        if refusal := next((problem for problem in problems if isinstance(problem, TangleNASError)), None):
            raise refusal
        if problems:
            raise TangleNASError(
                f"no checkpoint in {self.folder} can be read: {'; '.join(map(str, problems))}. "
                "Delete the folder to start this stage afresh."
            )
        return None

    def discard(self) -> None:
        """Delete the checkpoints: the stage is done."""
        self._drop_all_but()
        self._trusted = None

    def _read(self, generation: int) -> dict[str, Any]:
        manifest, path = self._manifest_path(generation), self._state_path(generation)
        try:
            claim = json.loads(manifest.read_bytes())
            schema, owner, sha256, size = (claim[key] for key in ("schema", "fingerprint", "sha256", "bytes"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise _DamagedError(f"{manifest} is no manifest ({type(error).__name__})") from error
        if schema != SCHEMA_VERSION:
            raise TangleNASError(
                f"{manifest} has schema version {schema!r}, this release reads version {SCHEMA_VERSION}. "
                f"Go on with the release that wrote it, or delete {self.folder} to start this stage afresh."
            )
        if owner != self.fingerprint:
            raise TangleNASError(
                f"{self.folder} holds the checkpoint of another run: its fingerprint is {owner}, not "
                f"{self.fingerprint} (other configuration, data or code). Give this run a folder of its own, "
                "or delete that one to start afresh."
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _DamagedError(f"{path} cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise _DamagedError(f"{path} has {len(data)} of {size} bytes")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _DamagedError(f"{path} is not what was written (its sha256 differs)")
        try:  # the manifest may be as foreign as the rest: what it vouches for need not be a state
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise _DamagedError(f"{path} is no checkpoint ({type(error).__name__})") from error
        if not isinstance(state, dict):
            raise _DamagedError(f"{path} holds a {type(state).__name__}, no state")
        return state

    def _state_path(self, generation: int) -> Path:
        return self.folder / f"state-{generation:06d}.pt"

    def _manifest_path(self, generation: int) -> Path:
        return self.folder / f"state-{generation:06d}.json"

    def _generations(self) -> list[int]:
        """Committed ones, oldest first."""
        return sorted(number for path, number in self._files() if path.suffix == ".json")

    def _files(self) -> list[tuple[Path, int]]:
        """What is ours in the folder, with the generation it is of; .json before .pt, as they are to be deleted."""
        found = ((path, re.fullmatch(r"state-(\d+)\.(json|pt)", path.name)) for path in self.folder.glob("state-*"))
        return sorted((path, int(match[1])) for path, match in found if match)

    def _drop_all_but(self, *kept: int) -> None:
        for path, generation in self._files():
            if generation not in kept:
                path.unlink(missing_ok=True)
