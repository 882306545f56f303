"""The values of a benchmark table in a search's history."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Real

from tanglenas_engine.errors import TangleNASError, quoted
from tanglenas_engine.spaces.architecture import Architecture

Table = Callable[[Architecture], Mapping[str, float]]
"""A function that returns a benchmark's values of an architecture."""


def table_values(table: Table, architecture: Architecture, taken: Collection[str]) -> dict[str, float]:
    """Return the values of an architecture. A table may lack it, and then gives no values.

    Args:
        table: The table.
        architecture: The architecture.
        taken: The names that the record has for what the search measured.

    Raises:
        TangleNASError: A value is no number, or has a name that is taken.
    """
    values = table(architecture)
    for name, value in values.items():
        if name in taken:
            raise TangleNASError(
                f"search.table gives a value {quoted(name)}, which is the search's own: name it otherwise, such as "
                f"{quoted(f'table_{name}')}"
            )
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TangleNASError(
                f"search.table gives {quoted(value)} for {quoted(name)}, expected a number: leave out what is not known"
            )
    return {name: float(value) for name, value in values.items()}
