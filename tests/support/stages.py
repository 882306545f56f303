"""The scripts of the stages, called in this process, and what a test expects of them."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

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
    from dvc.repo import Repo

    with Repo(project) as repo:
        (found,) = [entry for entry in repo.index.stages if entry.name == stage]
        python, flag, module, *rest = shlex.split(found.cmd)
    assert (python, flag, module) == ("python", "-m", f"pipelines.{stage}")
    return rest
