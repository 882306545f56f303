"""Architectures: the results of a search, stored as small files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tanglenas_engine.errors import TangleNASError

FORMAT = 1
"""The version of the file format."""


@dataclass(frozen=True)
class Architecture:
    """The chosen option of every choice of a space: one option, or one option per layer that is used.

    Layers beyond the chosen depth are dropped, so equal networks have equal files and equal digests. A space makes
    architectures (`space.architecture(...)`, `space.sample(...)`), because it knows which options exist.

    Attributes:
        space: The name of the space.
        choices: The chosen option, or the tuple of options by layer, of each choice.
    """

    space: str
    choices: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", MappingProxyType(dict(self.choices)))

    def __reduce__(self) -> Any:  # a mapping proxy cannot be copied or pickled
        return Architecture, (self.space, dict(self.choices))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return " ".join(
            f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in self.choices.items()
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the space's name and the choices."""
        content = json.dumps([self.space, dict(self.choices)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return the file's text, with one line per choice."""
        content = {
            "format": FORMAT,
            "space": self.space,
            "digest": self.digest,
            "choices": dict(self.choices),
        }
        lines = json.dumps(content, indent=2)
        for value in self.choices.values():  # a list of layers reads better on one line
            if isinstance(value, tuple):
                lines = lines.replace(json.dumps(value, indent=2).replace("\n", "\n    "), json.dumps(value))
        return lines + "\n"

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read a file's text.

        Raises:
            TangleNASError: The text is not JSON, holds no architecture, has another format version, or has choices that
                do not fit its digest because it was edited.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # a number with thousands of digits raises a ValueError
            raise TangleNASError(
                f"not an architecture file: {error}. Expected the JSON that discretize writes"
            ) from None
        expected = {"space": str, "choices": dict}
        if not isinstance(content, dict) or any(
            not isinstance(content.get(key), kind) for key, kind in expected.items()
        ):
            raise TangleNASError("not an architecture file: expected an object with 'format', 'space' and 'choices'")
        if content.get("format") != FORMAT:
            raise TangleNASError(
                f"architecture file of format {content.get('format')!r}, but this version reads format {FORMAT}: "
                "run discretize again, or use the version of tanglenas that wrote it"
            )
        choices = {}
        for name, value in content["choices"].items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(v, str) or _finite(v) for v in values):
                raise TangleNASError(f"architecture file: choice {name!r} is {value!r}, expected options")
            choices[name] = tuple(value) if isinstance(value, list) else value
        architecture = cls(content["space"], choices)
        if content.get("digest") not in (None, architecture.digest):
            raise TangleNASError(
                f"architecture file: its digest is {content['digest']!r}, but its choices give "
                f"{architecture.digest!r}. Remove the line 'digest' if the choices were changed on purpose"
            )
        return architecture


def _finite(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
