"""What `make test` and `make test-fast` leave out of tables of tests. It loads all plugins, so import it late."""

import zlib
from pathlib import Path

import pytest
from spaces import LAYERS
from tiny import ALL, DISTINCT

from tanglenas_engine.plugins import manager

FEW = {"vit", "autoformer_nano", "gpt_nano", "nb201_nano", "drnas", "spos"}
"""The spaces of the tables of invariants, and an optimizer of each family, that `make test-fast` keeps."""

FIRST = 3
"""The entries of a table that `make test-fast` takes."""

LONG = 6
"""The length up to which `make test` takes a third of a table, from three entries on; of a longer one, a quarter."""

OPTIMIZERS = sorted(manager().names("optimizer"))
OTHERS = {*ALL, *OPTIMIZERS} - FEW

REPEATED = {*ALL} - {*DISTINCT}
"""Presets of a class that another preset stands for. `make test-all` has them, `make test` has one of each class."""


def is_other(item: pytest.Item) -> bool:
    """Return whether a test is of a space or an optimizer that `make test-fast` leaves out."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return bool(OTHERS & {value for value in values if isinstance(value, str)})


def mark(items: list[pytest.Item]) -> None:
    """Mark what `make test` leaves out of each table as exhaustive, and begin with files that have a slow test.

    No worker is left with a long file at the end.
    """
    tables: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if hasattr(item, "callspec"):
            tables.setdefault((item.path, item.originalname), []).append(item)
    for table in tables.values():
        for rule in (_out_of_turn, _repeated, _pairs_of_known, _others):
            for item in rule(table):
                item.add_marker("exhaustive")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for table in tables.values():
        quick = [item for item in table if not {"slow", "exhaustive"} & {marker.name for marker in item.iter_markers()}]
        for item in quick[FIRST:]:
            item.add_marker("slow")


def _out_of_turn(table: list[pytest.Item]) -> list[pytest.Item]:
    """Return what `part(n)` leaves out: all but one entry of n, in turn over each parameter."""
    marker = table[0].get_closest_marker("part")
    every = marker.args[0] if marker else 1
    return [item for number, item in enumerate(table) if (number + number // every) % every]


def _columns(table: list[pytest.Item], values: set[str]) -> list[str]:
    """Return the parameters of a table all of whose values are among these."""
    names = table[0].callspec.params
    return [name for name in names if all(_in(item.callspec.params.get(name), values) for item in table)]


def _in(value: object, values: set[str]) -> bool:
    return isinstance(value, str) and value in values


def _repeated(table: list[pytest.Item]) -> list[pytest.Item]:
    """Return the entries of presets of a class that another preset stands for, where that is in the table too."""
    # An optimizer and a space are called darts.
    spaces = {*_columns(table, {*ALL, *LAYERS})} - {*_columns(table, {*OPTIMIZERS})}
    return [item for item in table if any(item.callspec.params[name] in REPEATED for name in spaces)]


def _pairs_of_known(table: list[pytest.Item]) -> list[pytest.Item]:
    """Return the pairs of a space and an optimizer that are not needed for each to be in one pair at least."""
    names = [*_columns(table, {*ALL})[:1], *_columns(table, {*OPTIMIZERS})[:1]]
    if len({*names}) < 2:
        return []
    pairs = {item: {(name, item.callspec.params[name]) for name in names} for item in table}
    seen: set[tuple[str, str]] = set()
    needed = set()
    for new in (2, 1):  # pairs in which both are new come first: fewer do
        for item, pair in pairs.items():
            if len(pair - seen) >= new and not item.get_closest_marker("exhaustive"):
                seen |= pair
                needed.add(item)
    return [item for item in pairs if item not in needed]


def _others(table: list[pytest.Item]) -> list[pytest.Item]:
    """Return what is left out of a table that is long still: all but every third or fourth entry.

    The first one that stays differs between tables, so an option that many tables have, such as a space, is in a part
    of them. Tables of pairs are short already.
    """
    left = [item for item in table if not item.get_closest_marker("exhaustive")]
    if len(left) < 3 or table[0].get_closest_marker("part") or _pairs_of_known(table):
        return []
    every = 3 if len(left) <= LONG else 4
    turn = zlib.crc32(table[0].originalname.encode())
    return [item for number, item in enumerate(left) if (number + turn) % every]
