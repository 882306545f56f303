"""JSON as the standard has it: no NaN, and no key twice. Python's own module takes and writes both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from tanglenas_engine.errors import TangleNASError


def loads(text: str | bytes) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, holds NaN or an infinity, or has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_twins, parse_constant=_refused, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _refused(text)
    return number


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def dumps(content: Mapping[str, Any]) -> str:
    """Return the text of a file of numbers by name.

    Raises:
        TangleNASError: A number is not finite. The message has its name.
    """
    for name, value in content.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise TangleNASError(
                f"{name} is {value}, which is no number that a file of metrics can hold: the network's outputs are not "
                "finite. Train again with a lower learning rate or in full precision, and look for values in the data "
                "that are not finite"
            )
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
