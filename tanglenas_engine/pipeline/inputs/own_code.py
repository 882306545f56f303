"""Files of a project that the code behind an @ imports, such as a helper beside the module that a gin file names.

Imports are read from the sources, also those within functions, which Python makes only when the function is called. A
name that is built while the program runs, as for `importlib.import_module`, is not seen.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from tanglenas_engine.pipeline.config.reader import referred
from tanglenas_engine.pipeline.project import project_root

INSTALLED = ("site-packages", "dist-packages")
"""Folders of installed packages, whose versions stand for their code."""


def own_code() -> dict[str, str]:
    """Return 16 hexadecimal digits over each such file, by its path from the root of the project.

    The modules and packages that an @ names are left out: `code_version` has them.
    """
    found: dict[str, str] = {}
    for name in sorted({path.split(".")[0] for path in referred()}):
        for own, base in _portions(sys.modules[name]):
            if _is_own(base):
                for file in _imported_by(own, base) - {*own}:
                    content = file.read_bytes()
                    found[file.relative_to(_root(base)).as_posix()] = hashlib.sha256(content).hexdigest()[:16]
    return dict(sorted(found.items()))


def _portions(module: ModuleType) -> list[tuple[list[Path], Path]]:
    """Return the files of a module or package, and the folder in which Python finds it; nothing for one in C.

    A package without `__init__.py` may have parts in several folders. A link to a file counts where the link lies, as
    Python looks there for what the file imports.
    """
    places = [Path(folder) for folder in getattr(module, "__path__", ())]
    roots = [place.absolute().parent.resolve() / place.name for place in places]
    if roots:
        return [(list(root.rglob("*.py")), root.parent) for root in roots]
    if not (place := getattr(module, "__file__", None)) or not place.endswith(".py"):
        return []
    base = Path(place).absolute().parent.resolve()
    return [([base / Path(place).name], base)]


def _root(base: Path) -> Path:
    """Return the root of the project that has a folder, which is the current folder or, in a study, one above."""
    roots = (Path.cwd().resolve(), project_root().resolve())
    return next((root for root in roots if base.is_relative_to(root)), base)


def _is_own(base: Path) -> bool:
    """Return whether a folder is of this project: below the current one, or above, as for the runs of a study."""
    here = Path.cwd().resolve()
    inner = base.relative_to(here).parts if base.is_relative_to(here) else ()
    hidden = any(part.startswith(".") or part in INSTALLED for part in inner)
    return (base.is_relative_to(here) or here.is_relative_to(base)) and not hidden


def _imported_by(files: list[Path], base: Path) -> set[Path]:
    """Return the files below a folder that some files there import, and those that these import, with themselves."""
    found, waiting = set(files), list(files)
    while waiting:
        file = waiting.pop()
        for name in _imports(file, base):
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):  # a.b.c runs the files of a and of a.b, too
                place = base.joinpath(*parts[:depth])
                for one in (place.with_suffix(".py"), place / "__init__.py"):
                    if one not in found and one.is_file():
                        found.add(one)
                        waiting.append(one)
    return found


def _imports(file: Path, base: Path) -> Iterator[str]:
    """Yield the full names of what a file imports, wherever in it: modules, and what may be modules of packages."""
    package = file.relative_to(base).parent.parts
    with suppress(SyntaxError, ValueError, RecursionError):  # of a file that Python has not read yet
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else ()
                module = ".".join([*above, *([node.module] if node.module else [])])
                yield from (".".join(filter(None, (module, alias.name))) for alias in node.names)
