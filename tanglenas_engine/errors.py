"""The error for wrong input. Its message says what was given, what was expected and what to do next."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any


class TangleNASError(ValueError):
    """An error caused by wrong input. The message names the input, the expectation and the next step.

    The command line prints the message without a traceback.
    """


class OutOfReachError(TangleNASError):
    """The error for a stage that asked for a data split that it must not see."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as " Did you mean 'drnas'?", or "" if no known name is similar."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> TangleNASError:
    """Return the error for a name that is not in `known`. It lists the known names and suggests the closest one."""
    names = sorted(known)
    return TangleNASError(
        f"unknown {kind} {str(name)!r}.{closest(str(name), names)} Choose one of: {', '.join(names) or '(none)'}."
    )


def at_least(name: str, value: Any, least: int) -> int:
    """Return `value` if it is an int of at least `least`.

    Raises:
        TangleNASError: `value` is no int, or is smaller than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TangleNASError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return value


def positive(name: str, value: float) -> float:
    """Return `value` if it is a number greater than 0.

    Raises:
        TangleNASError: `value` is no number, or is not greater than 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise TangleNASError(f"{name} is {value!r}, expected a positive number")
    return value


def print_anything() -> None:
    """Make this process print what its console cannot show, such as an emoji on Windows, as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):  # a notebook's stream has no such method
            reconfigure(errors="backslashreplace")


def describe(cause: BaseException) -> str:
    """Return an exception's type and message on one line, without a final full stop."""
    message = " ".join(str(cause).split()).rstrip(".")
    return f"{type(cause).__name__}: {message}" if message else type(cause).__name__
