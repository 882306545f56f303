"""Environment: write down what DVC cannot see, the installed packages that the results depend on.

    python -m pipelines.environment SPACE OPTIMIZER DATASET

Beside versions it notes a digest of the sources of the library and of the plugins in use: what is installed for editing
keeps its version while its code changes. Objectives may be named anywhere in gin/: all that are installed count.
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


def _package(used: Registration) -> str:
    """The top-level package of what a plugin registered, which is not imported for that."""
    module = used.target.partition(":")[0] if isinstance(used.target, str) else used.target.__module__
    return module.split(".")[0]


def main(arguments: Sequence[str]) -> None:
    """Write environment.json."""
    try:
        if len(arguments) != len(KINDS):
            raise TangleNASError(f"got the arguments {list(arguments)}, expected the names of {', '.join(KINDS)}")
        used = [manager().resolve(*named) for named in zip(KINDS, arguments, strict=True)]
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
    write_atomic(Path("environment.json"), json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
