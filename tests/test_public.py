"""The public surface is all that plugins, examples and the code in the documentation use."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import tanglenas_engine
import tanglenas_engine.testing

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "tanglenas_engine": {*tanglenas_engine.__all__, "testing"},
    "tanglenas_engine.testing": set(tanglenas_engine.testing.__all__),
}


def sources() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every module of a plugin, and of every Python block of a page."""
    for folder in ("plugins", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
    for page in sorted((ROOT / "docs").glob("*.md")):
        fence = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
        for number, code in enumerate(fence.findall(page.read_text("utf-8"))):
            yield f"docs/{page.name}, block {number + 1}", code


def imports(code: str) -> Iterator[tuple[str, str | None]]:
    """Yield the module and the name of every import; the name is None where a module itself is imported."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def private(code: str) -> list[str]:
    """List the imports of code that are of the engine and not public."""
    found = [(module, name) for module, name in imports(code) if module.split(".")[0] == "tanglenas_engine"]
    return [
        module if name is None else f"{module}.{name}"
        for module, name in found
        if module not in PUBLIC or (name is not None and name not in PUBLIC[module])
    ]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from tanglenas_engine import SearchSpace, elastic", []),
        ("from tanglenas_engine.testing import check_space", []),
        ("from tanglenas_engine import nothing", ["tanglenas_engine.nothing"]),
        ("def later():\n    from tanglenas_engine.spaces import cells", ["tanglenas_engine.spaces.cells"]),
        ("import tanglenas_engine.spaces.space as space", ["tanglenas_engine.spaces.space"]),
    ],
)
def test_private_imports_are_found(code, found):
    assert private(code) == found


@pytest.mark.parametrize(("place", "code"), [pytest.param(*source, id=source[0]) for source in sources()])
def test_only_the_public_surface_is_imported(place, code):
    assert not private(textwrap.dedent(code)), place
