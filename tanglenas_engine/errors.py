"""The error for wrong input. Its message says what was given, what was expected and what to do next."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any


class TangleNASError(ValueError):
    """An error caused by wrong input. The message names the input, the expectation and the next step.

    The command line prints the message without a traceback.
    """


class DivergedError(TangleNASError):
    """The error for a training with values that are not finite. Training again gives it again.

    A race takes it as a result of the network. All other errors end the race.
    """


class OutOfReachError(TangleNASError):
    """The error for a stage that asked for a data split that it must not see."""


SHOWN_CHARACTERS = 300
"""The most characters of a value that came from outside in a message."""

LINE_CHARACTERS = 2000
MESSAGE_CHARACTERS = 8000
"""The most characters of a line of an error, and of the whole, that a terminal is given."""


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a value from outside as text for a terminal or a figure: cut, on one line, without control characters.

    A value may be large, its `str` may fail, and what it says may be codes that a terminal acts upon.
    """
    return _printable(value, str, limit)


def readable(message: object) -> str:
    """Return the text of an error for a terminal, with its lines, but cut and without other control characters."""
    lines = str(message)[:MESSAGE_CHARACTERS].splitlines()
    return "\n".join(_escaped(line[:LINE_CHARACTERS]) for line in lines)


def quoted(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Return the `repr` of a value from outside, as `shown` returns its text."""
    return _printable(value, repr, limit)


def listed(names: Sequence[object], most: int = 3) -> str:
    """Return the first names with commas between them, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more


def _printable(value: object, form: Callable[[object], str], limit: int) -> str:
    if isinstance(value, list | tuple | dict | set) and len(value) > limit:
        return f"{type(value).__name__} of {len(value):,}"
    try:
        text = form(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        text = f"<{type(value).__name__} without a text>"
    cut = len(text) > 4 * limit
    text = " ".join(text[: 4 * limit].split())
    text = _escaped(text)
    return f"{text[: limit - 3]}..." if cut or len(text) > limit else text


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


CLOSEST_CHARACTERS = 100
"""The most characters of names that are compared. The time that it takes grows with their square."""


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as " Did you mean 'drnas'?", or "" if no known name is similar."""
    bounded = [one for one in known if len(one) <= CLOSEST_CHARACTERS]
    matches = difflib.get_close_matches(str(name)[:CLOSEST_CHARACTERS], bounded, n=1)
    return f" Did you mean {shown(matches[0])!r}?" if matches else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> TangleNASError:
    """Return the error for a name that is not in `known`. It lists the known names and suggests the closest one."""
    names = sorted(known)
    listed = shown(", ".join(names), 2000) or "(none)"
    return TangleNASError(f"unknown {kind} {quoted(str(name))}.{closest(shown(name), names)} Choose one of: {listed}.")


def at_least(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return `value` if it is an int of at least `least`, and at most `most` where that is given.

    Raises:
        TangleNASError: `value` is no int, or is outside.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise TangleNASError(f"{name} is {quoted(value)}, expected a whole number {expected}")
    return int(value)


def positive(name: str, value: float, infinite: bool = False) -> float:
    """Return `value` if it is a number greater than 0, which is finite unless `infinite` allows it to be infinite.

    Raises:
        TangleNASError: `value` is no number, or is not greater than 0, or is infinite.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and value > 0
    if not number or (value == math.inf and not infinite):
        raise TangleNASError(f"{name} is {quoted(value)}, expected a {'finite' if number else 'positive'} number")
    return value


def within(name: str, value: float, least: float, most: float = math.inf) -> float:
    """Return `value` if it is a number from `least` to `most`, which is finite.

    Raises:
        TangleNASError: `value` is no number, or is outside.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not (least <= value <= most) or value == math.inf:
        kind = "share" if (least, most) == (0, 1) else "number"
        expected = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise TangleNASError(f"{name} is {quoted(value)}, expected a {kind} {expected}")
    return value


def print_anything() -> None:
    """Make this process print what its console cannot show, such as an emoji on Windows, as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):  # a notebook's stream has no such method
            reconfigure(errors="backslashreplace")


def describe(cause: BaseException) -> str:
    """Return an exception's type and message on one line, cut and escaped, without a final full stop."""
    message = shown(cause).rstrip(".")
    kind = shown(type(cause).__name__, 80)
    return f"{kind}: {message}" if message else kind
