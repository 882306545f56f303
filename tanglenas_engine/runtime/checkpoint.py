"""Checkpoints: the state from which an interrupted stage continues.

A checkpoint, called a generation, is two files. They are written in this order, each atomically:

    state-000007.pt      tensors, numbers, strings, lists, dicts: what `torch.load(weights_only=True)` reads
    state-000007.json    its sha256, the schema version and the fingerprint of the run: this commits it

The previous generation is kept, in case the newest one is damaged.
"""

import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from tanglenas_engine.errors import TangleNASError, describe
from tanglenas_engine.runtime.files import exclusive, write_atomic

SCHEMA_VERSION = 1
"""The version of the checkpoint format."""
KEEP_TO = "Keep to tensors, Python numbers, strings, lists, tuples and dicts."
"""The remedy for a state that no checkpoint can hold."""


class _DamagedError(Exception):
    """The error for a generation that cannot be read back as it was written."""


def encoded(state: Mapping[str, Any]) -> memoryview:
    """Return the bytes of a state, with Python's numbers in place of NumPy's.

    Raises:
        TangleNASError: The state holds an object that `decoded` could not read.
    """
    buffer = io.BytesIO()
    try:
        torch.save(native(dict(state)), buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # a function, a generator, an open file
        raise TangleNASError(
            f"the state to be checkpointed cannot be written ({describe(error)}). {KEEP_TO}"
        ) from error
    buffer.seek(0)
    if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):
        raise TangleNASError(
            f"the state to be checkpointed holds {', '.join(foreign)}, which could not be loaded again. {KEEP_TO}"
        )
    return buffer.getbuffer()


def native(value: Any) -> Any:
    """Return a value in whose dicts, lists and tuples Python's numbers stand for NumPy's."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {key: native(one) for key, one in value.items()}
    return type(value)(map(native, value)) if type(value) in (list, tuple) else value


def decoded(data: bytes | memoryview) -> Any:
    """Return the state of these bytes with its tensors on the CPU. Nothing in it is executed."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class CheckpointFolder(AbstractContextManager["CheckpointFolder"]):
    """The checkpoints of one run in their own folder. Inside `with`, no other process can use the folder.

        with CheckpointFolder(folder, fingerprint(config=config, code=code_version(package))) as checkpoints:
            state = checkpoints.load() or start
            ...
            checkpoints.save(state)
            ...
            checkpoints.discard()

    Args:
        folder: The folder. It is created if it is missing, and removed at the end if it has no checkpoint.
        fingerprint: A digest of what the state depends on. A checkpoint with another fingerprint is refused.
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self._hold: AbstractContextManager[None] | None = None
        self._trusted: int | None = None  # the generation to keep when the next one is written

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
        """Commit a new generation and delete all older ones except the previous one.

        Args:
            state: Tensors (loaded on the CPU later), numbers, strings, and lists, tuples and dicts of them.

        Raises:
            TangleNASError: The state holds an object that `load` could not read, or the file cannot be written.
            RuntimeError: The folder is not held by `with`.
        """
        if self._hold is None:
            raise RuntimeError("save() belongs inside `with CheckpointFolder(...)`, which holds the folder")
        data = encoded(state)
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
        """Return the newest undamaged state with its tensors on the CPU, or None if there is no checkpoint yet.

        It warns if a generation was skipped, with the reason: it is damaged, or of another run or release.

        Raises:
            TangleNASError: Every generation is damaged, or belongs to another run or release.
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
                    f"checkpoint left out: {'; '.join(map(str, problems))}. Going on from the one before it, "
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
        """Delete all checkpoints of a finished stage."""
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
        try:  # another program may have written both files, so a correct sha256 does not prove that this is a state
            state = decoded(data)
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
        """Return the numbers of the committed generations, oldest first."""
        return sorted(number for path, number in self._files() if path.suffix == ".json")

    def _files(self) -> list[tuple[Path, int]]:
        """Return the checkpoint files with their generation, in the order in which to delete them: .json before .pt."""
        found = ((path, re.fullmatch(r"state-(\d+)\.(json|pt)", path.name)) for path in self.folder.glob("state-*"))
        return sorted((path, int(match[1])) for path, match in found if match)

    def _drop_all_but(self, *kept: int) -> None:
        for path, generation in self._files():
            if generation not in kept:
                path.unlink(missing_ok=True)
