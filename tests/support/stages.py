"""The scripts of the stages, called in this process, and what a test expects of them."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.repo import Repo

from pipelines import discretize, evaluate, retrain, search

MAIN: dict[str, Callable[[list[str]], None]] = {
    module.__name__.split(".")[-1]: module.main for module in (search, discretize, retrain, evaluate)
}


def forget_settings(patch: pytest.MonkeyPatch) -> None:
    """Remove what the caller's environment says about DVC, MLflow and this project, and turn tracking off."""
    for name in [name for name in os.environ if re.match("DVC_|MLFLOW_|TANGLENAS_|INTERRUPT", name)]:
        patch.delenv(name)
    patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    patch.setenv("TANGLENAS_TRACKING", "off")


def arguments(project: Path, stage: str) -> list[str]:
    """Return what `dvc repro` would run the stage with, as DVC reads params.yaml."""
    files = tuple((project / name).read_bytes() for name in ("dvc.yaml", "params.yaml"))
    if files not in _commands:
        with Repo(project) as repo:
            _commands[files] = {entry.name: shlex.split(entry.cmd) for entry in repo.index.stages}
    python, flag, module, *rest = _commands[files][stage]
    assert (python, flag, module) == ("python", "-m", f"pipelines.{stage}")
    return rest


_commands: dict[tuple[bytes, ...], dict[str, list[str]]] = {}
"""The commands of all stages by the files that say them: DVC takes a third of a second to read these."""
