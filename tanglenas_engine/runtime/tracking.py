"""The tracking protocol, through which a stage reports. The engine knows no tracking server; the caller brings one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]
"""The numbers and texts known about an epoch or a candidate, by name: one row of a history."""


class Tracker(Protocol):
    """The tracking record of one run. No call may raise because a server fails: tracking never ends a training."""

    @property
    def run_id(self) -> str | None:
        """The id under which a resumed run continues the same record. Checkpoints keep it."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the run's inputs once. Nested mappings become dotted names."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log all numbers measured at a step."""

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a file, or the content of a directory, to `folder` of the run's artifacts."""

    def log_text(self, text: str, name: str) -> None:
        """Store text as an artifact called `name`."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set short facts by which people find the run."""


class NullTracker:
    """A tracker that does nothing, for runs without tracking."""

    run_id = None

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None: ...

    def log_text(self, text: str, name: str) -> None: ...

    def set_tags(self, tags: Mapping[str, str]) -> None: ...
