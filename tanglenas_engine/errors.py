"""What a person is told when the input is wrong: what was given, what was expected, what to do next."""

import difflib
from collections.abc import Iterable


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
