"""The output of commands, aligned tables and short numbers, and the files that a person names."""

import sys
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from tanglenas_engine.errors import TangleNASError


def print_table(columns: list[str], rows: list[list[str]], styles: Iterable[str] = ()) -> None:
    """Print aligned columns. `styles` has a style of rich for each row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row, style in zip_longest(rows, styles, fillvalue=""):
        table.add_row(*row, style=style)
    width = None if sys.stdout.isatty() else 1000  # in a pipe a row is one line
    Console(markup=False, highlight=False, emoji=False, width=width).print(table)


def number(value: float) -> str:
    """Write a number with three decimals at most and three digits at least: 94.373, 73306, -0.000214."""
    return f"{value:.3g}" if 0 < abs(value) < 0.1 else f"{value:.3f}".rstrip("0").rstrip(".")


def read_text(path: str | Path, expected: str) -> str:
    """Return the text of a file that a person named, with its ends of lines as they are, as datasets of text read it.

    `expected` says in words what the file should be.

    Raises:
        TangleNASError: The file is missing, not readable or not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise TangleNASError(f"cannot read {path}: {error}. Expected {expected}") from None
