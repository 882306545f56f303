"""What `make test` takes of tables whose entries show much the same; `make test-all` takes everything."""

from collections.abc import Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def one_of(every: int, values: Sequence[Any]) -> list[Any]:
    """Mark all but the first of every so many values as exhaustive."""
    return [value if number % every == 0 else _exhaustive(value) for number, value in enumerate(values)]


def _exhaustive(value: Any) -> ParameterSet:
    if isinstance(value, ParameterSet):
        return value._replace(marks=(*value.marks, pytest.mark.exhaustive))
    return pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.exhaustive)
