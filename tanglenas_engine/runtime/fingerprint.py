"""Fingerprints: short digests of the inputs of a run."""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from tanglenas_engine.errors import TangleNASError


def fingerprint(**parts: Any) -> str:
    """Return 16 hexadecimal digits that change if any part changes: the configuration, the data, the code version.

    Parts are JSON values. The order of a mapping's keys does not matter.

    Raises:
        TangleNASError: A part cannot be written as JSON.
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


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of the content of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_version(*modules: ModuleType) -> str:
    """Return 16 hexadecimal digits over the Python sources of packages and modules, wherever they are installed."""
    digest = hashlib.sha256()
    for module in sorted(set(modules), key=lambda module: module.__name__):
        if roots := [Path(folder) for folder in getattr(module, "__path__", ())]:
            sources = {s.relative_to(root).as_posix(): s for root in roots for s in root.rglob("*.py")}
        else:
            sources = {"": Path(str(module.__file__))}
        for name, source in sorted(sources.items()):
            digest.update(f"{module.__name__} {name} {file_digest(source)}\n".encode())
    return digest.hexdigest()[:16]
