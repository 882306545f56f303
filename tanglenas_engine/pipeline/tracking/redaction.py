"""Messages without the passwords and tokens of MLflow's addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from tanglenas_engine.errors import shown

HIDDEN = "***"
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
LONGEST_TEXT = 20_000
"""The most characters of an error that are searched for secrets. What is behind them is dropped."""
SHORTEST_SECRET = 3
"""Blotting out shorter ones would hide most of a message, and they protect nothing."""


def reason(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, without secrets and control characters."""
    try:
        text = str(error)
    except Exception:
        text = ""
    line = next(iter(text[:LONGEST_TEXT].splitlines()), "")
    return shown(redacted(f"{type(error).__name__}: {line}"))


def redacted(text: str) -> str:
    """Hide passwords and queries of all addresses in a text, and those of MLflow's address wherever they are."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return re.sub(r"\b[a-z][\w+.-]*://[^\s\"'<>`]*", lambda found: address(found[0]), text, flags=re.IGNORECASE)


def address(uri: str) -> str:
    """Return an address without user, password, query and fragment.

    A password may hold an unquoted "/", "?" or "@", so that all up to the last "@" goes. Where an "@" follows a "?",
    nobody knows what is what, and all of it goes.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return re.split(r"[?#;]", uri, maxsplit=1)[0]
    place, *query = re.split(r"[?#;]", rest, maxsplit=1)
    if any("@" in part for part in query):
        return f"{scheme}://{HIDDEN}"
    if "@" in place and not place.startswith("/"):  # a path alone has no user
        place = f"{HIDDEN}@{place.rpartition('@')[2]}"
    return f"{scheme}://{place}{f'?{HIDDEN}' * bool(query)}"


def _secrets() -> set[str]:
    """Return what no message may hold, as it is and as libraries write it."""
    plain = {os.environ.get(name, "") for name in SECRETS} | set(_parts(os.environ.get("MLFLOW_TRACKING_URI", "")))
    plain |= {unquote(part) for part in plain} | {unquote_plus(part) for part in plain}
    written = {form for part in plain for form in (part, quote(part), quote(part, safe=""), quote_plus(part))}
    written |= {repr(part)[1:-1] for part in plain}
    return {part for part in written if len(part) >= SHORTEST_SECRET}


def _parts(uri: str) -> Iterator[str]:
    """Yield the password of an address, its query and fragment, and the values in them."""
    rest = uri.partition("://")[2] or uri
    if "@" in rest and not rest.startswith("/"):
        user = rest.rpartition("@")[0]
        yield user
        yield user.partition(":")[2]
    for query in re.split(r"[?#;]", rest, maxsplit=1)[1:]:
        yield query
        for part in re.split(r"[&;@]", f"{query}&{unquote_plus(query)}"):
            yield part.partition("=")[2].strip("{}")
