"""Where a stage reports what it does. The engine knows this protocol only; the caller brings the server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]
"""What is known of an epoch or of a candidate: numbers and text by name."""


class Tracker(Protocol):
    """A record of one run. No call may raise for want of a server: tracking never ends a training."""

    @property
    def run_id(self) -> str | None:
        """What to keep in a checkpoint so that a run that was cut off goes on in the same record."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """What the run was given, once; nested mappings become dotted names."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers measured at a step; one call holds all of them."""

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A copy of a file, or of all that a directory holds, under `folder` of the run's artifacts."""

    def log_text(self, text: str, name: str) -> None:
        """Text as an artifact called `name`."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Short facts to find the run by."""


class NullTracker:
    """Tracking is off: nothing is read, computed or kept."""

    run_id = None

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None: ...

    def log_text(self, text: str, name: str) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...
