"""What a person is told when the input is wrong: what was given, what was expected, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class TangleNASError(ValueError):
    """Bad input. The message names the input, the expectation and the next step; no traceback is needed."""


class OutOfReachError(TangleNASError):
    """A stage asked for data that it must not see."""


def closest(name: str, known: Iterable[str]) -> str:
    """A hint such as " Did you mean 'drnas'?", or the empty string when nothing is close."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> TangleNASError:
    """The error for a name that is not among `known`: lists them and names the closest."""
    names = sorted(known)
    return TangleNASError(
        f"unknown {kind} {str(name)!r}.{closest(str(name), names)} Choose one of: {', '.join(names) or '(none)'}."
    )


def at_least(name: str, value: Any, least: int) -> int:
    """`value`, checked to be an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TangleNASError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return value


def positive(name: str, value: float) -> float:
    """`value`, checked to be a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise TangleNASError(f"{name} is {value!r}, expected a positive number")
    return value


def describe(cause: BaseException) -> str:
    """Type and message of an exception, on one line and without a closing stop."""
    message = " ".join(str(cause).split()).rstrip(".")
    return f"{type(cause).__name__}: {message}" if message else type(cause).__name__
