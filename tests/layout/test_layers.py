"""The folders of the engine are in an order, and no modules import each other in a circle, even for annotations."""

import ast
import functools
import itertools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tanglenas_engine

ROOT = Path(tanglenas_engine.__file__).parent


def modules(root: Path) -> dict[str, Path]:
    """The files of a package by the names of their modules; `template/` holds files for other projects."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        if "template" not in parts:
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path) -> list[tuple[str, str | None, str]]:
    """All imports of a module, wherever they are in it: (module, the name taken from it or None, the name here)."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: list[tuple[str, str | None, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None]
            base = ".".join([*parents, *([node.module] if node.module else [])]) if node.level else node.module or ""
            found += [(base, alias.name, alias.asname or alias.name) for alias in node.names]
    return found


@functools.cache
def graph(root: Path) -> dict[str, set[str]]:
    """For each module of a package the ones that it imports.

    A name that a package only passes on counts as imported from the module that defines it.
    """
    files = modules(root)
    imports = {name: imported(name, path) for name, path in files.items()}

    def home(module: str, taken: str | None) -> str:
        """The module in which what is taken from `module` is defined."""
        if taken is None or module not in files:
            return module
        if f"{module}.{taken}" in files:
            return f"{module}.{taken}"
        for source, original, alias in imports[module]:
            if alias == taken and source in files and files[module].name == "__init__.py":
                return home(source, original)
        return module

    homes = {name: {home(module, taken) for module, taken, _ in imports[name]} for name in files}
    return {name: (needed & files.keys()) - {name} for name, needed in homes.items()}


def circle(needs: dict[str, set[str]]) -> list[str]:
    """A circle of modules, the first one again at the end, each importing the next; empty if there is none."""
    try:
        TopologicalSorter({name: sorted(needs[name]) for name in sorted(needs)}).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_modules_of_the_engine_import_each_other_in_a_circle():
    needs = graph(ROOT)
    assert len(needs) > 50 and sum(map(len, needs.values())) > 100
    assert not (found := circle(needs)), f"modules that import each other in a circle: {' -> '.join(found)}"


LAYERS = (
    "errors",
    "superposition",
    "elastic",
    "runtime",
    "data",
    "spaces",
    "conversion",
    "optimizers",
    "training",
    "tables",
    "plugins",
    "derivation",
    "stages",
    "testing",
    "pipeline",
    "cli",
)
"""The folders of the engine, from the bottom up."""


def test_no_folder_imports_from_one_above_it():
    def layer(name: str) -> int:
        return LAYERS.index(name.split(".")[1])

    needs = {name: needed - {ROOT.name} for name, needed in graph(ROOT).items() if name != ROOT.name}
    upward = [f"{name} -> {other}" for name, needed in needs.items() for other in needed if layer(other) > layer(name)]
    assert not upward, "imports from a folder above: " + ", ".join(sorted(upward))


PACKAGE = {"sub/__init__": "from .one import f\nfrom .two import h\ng = 1", "sub/one": "", "sub/two": ""}


@pytest.mark.parametrize(
    "files, found",
    [
        ({"a": "from pkg.b import x", "b": "import pkg.c", "c": ""}, None),
        ({"a": "from pkg.b import x", "b": "from .a import y"}, {"a", "b"}),
        ({"a": "import pkg.b as b", "b": "def f():\n    from pkg import a"}, {"a", "b"}),
        ({"a": "from . import b", "b": "if TYPE_CHECKING:\n    from pkg.c import C", "c": "import pkg.a"}, set("abc")),
        # A package passes on what its modules define.
        ({**PACKAGE, "one": "", "two": "from .sub import f"}, None),
        ({**PACKAGE, "sub/one": "from ..two import x", "two": "from .sub import f"}, {"sub.one", "two"}),
        ({**PACKAGE, "sub/one": "from .two import g", "sub/two": "from . import f"}, {"sub.one", "sub.two"}),
        ({**PACKAGE, "sub/one": "from . import g"}, {"sub", "sub.one"}),
    ],
)
def test_circles_are_found(tmp_path, files, found):
    for name, text in {"__init__": "", **files}.items():
        path = tmp_path / "pkg" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    names = circle(graph(tmp_path / "pkg"))
    assert {name.removeprefix("pkg.") for name in names} == (found or set())
    assert names[:1] == names[-1:]
    assert all(b in graph(tmp_path / "pkg")[a] for a, b in itertools.pairwise(names))
