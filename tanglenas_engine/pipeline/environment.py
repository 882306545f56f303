"""Writes environment.json, which tells DVC about the installed packages that results depend on.

It has versions, and a digest of the sources of the library and of each plugin in use: a package that is installed for
editing keeps its version while its code changes. The library's digest covers the stages' code in this package.
"""

import importlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import tanglenas_engine
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import Registration, manager
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.runtime.fingerprint import code_version

KINDS = ("space", "optimizer", "dataset")
LIBRARIES = ("tanglenas", "timm", "torch")


def write_environment(names: Sequence[str], path: Path = Path("environment.json")) -> None:
    """Write the versions and the sources for the plugins of these names: a space, an optimizer, a dataset.

    gin files may name an objective anywhere, so all objectives that are installed count. A name that no plugin has
    ends the process with one sentence and the status 2.
    """
    try:
        if len(names) != len(KINDS):
            raise TangleNASError(f"got the arguments {list(names)}, expected the names of {', '.join(KINDS)}")
        used = [manager().resolve(*named) for named in zip(KINDS, names, strict=True)]
    except TangleNASError as problem:
        print(f"environment: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    used += manager().registrations("objective")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions.update((it.distribution, it.version) for it in used)
    modules = {package: importlib.import_module(package) for package in map(_package, used)}
    modules["tanglenas_engine"] = tanglenas_engine
    content = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "versions": dict(sorted(versions.items())),
        "sources": {name: code_version(module) for name, module in sorted(modules.items())},
    }
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def _package(used: Registration) -> str:
    """Return the top-level package of what a plugin registered, without importing it."""
    module = used.target.partition(":")[0] if isinstance(used.target, str) else used.target.__module__
    return module.split(".")[0]
