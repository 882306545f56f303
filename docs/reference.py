"""Write docs/commands.md, the help of every command: `python docs/reference.py`. A test says when that is due."""

from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from tanglenas_engine.cli import main

PAGE = Path(__file__).parent / "commands.md"


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of all commands, those of groups behind them."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def page() -> str:
    """The text of the page."""
    runner, parts = CliRunner(), ["# Commands\n"]
    for path in commands(main):
        said = runner.invoke(main, [*path, "--help"], prog_name="tanglenas", terminal_width=100, max_content_width=100)
        title = f"{'#' * (1 + len(path))} tanglenas {' '.join(path)}"
        parts.append(f"{title}\n\n```text\n{said.output.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
