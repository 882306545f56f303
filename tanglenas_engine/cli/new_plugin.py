"""`tanglenas new-plugin`: the example plugin under a name of one's own."""

import re
from importlib.util import find_spec
from pathlib import Path

import click

from tanglenas_engine.errors import TangleNASError

from ..plugins import PluginManager
from ._shipped import example


@click.command(short_help="Start a plugin of your own: a space and an optimizer.")
@click.argument("name")
@click.option("--output", metavar="DIR", type=click.Path(path_type=Path), help="By default tanglenas-NAME.")
def command(name: str, output: Path | None) -> None:
    """Write a package with a search space and an optimizer called NAME, which works and passes its own tests.

    Replace what they do by what you want; drop the one that you do not need, with its hook.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9_]*[a-z0-9])?", name) or name == "example":
        suggestion = re.sub(r"\W+", "_", name.lower().removeprefix("tanglenas").lstrip("-_")).strip("_0123456789")
        raise TangleNASError(
            f"a plugin cannot be called {name!r}: give a short name of lower-case letters, digits and underscores"
            + (f", such as {suggestion!r}" if suggestion not in ("", "example", name) else "")
        )
    for taken in PluginManager().registrations():
        if taken.name == name:
            raise TangleNASError(f"there is {taken} already: choose another name")
    if find_spec(f"tanglenas_{name}") is not None:
        raise TangleNASError(
            f"there is a package tanglenas_{name} already, which yours would hide: choose another name"
        )
    output = output or Path(f"tanglenas-{name}")
    if output.exists():
        raise TangleNASError(f"{output} exists already: choose another folder with --output")
    source = example()
    for path in sorted(source.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            target = output / _renamed(path.relative_to(source).as_posix(), name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_renamed(path.read_text(encoding="utf-8"), name), encoding="utf-8")
    click.echo(f"{output}: space {name}, optimizer {name}.\n\nNext:\n    cd {output}")
    click.echo(f"    pip install --editable '.[dev]'\n    tanglenas plugins check {name}\n    pytest")


def _renamed(text: str, name: str) -> str:
    """Replace the names of the example: its package, classes and registered names. `example_input` is the library's."""
    text = text.replace("tanglenas_example", f"tanglenas_{name}")
    text = re.sub(r"\bexample\b", name, text)
    return re.sub(r"\bExample(?=[A-Z])", name.title().replace("_", ""), text)
