"""Copies of this repository's pipeline, with parameters that take seconds, for tests to run and to break."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from paths import ROOT
from ruamel.yaml import YAML

CODE = ("pipelines", "gin", "tanglenas_engine", "plugins")
CONFIG = ("dvc.yaml", "params.yaml", ".dvcignore")
STAGES = ("search", "discretize", "retrain", "evaluate")
SMALL = {
    "space": "autoformer_nano",
    "optimizer": "drnas",
    "dataset": "digits",
    "seed": 0,
    "search": {"epochs": 2, "batch_size": 64, "warmup_epochs": 1},
    "discretize": {"candidates": 3},
    "retrain": {"epochs": 1, "batch_size": 64},
}


def lay_out(folder: Path, *, code: bool = True) -> Path:
    """A project in `folder` with small parameters; without the code it is for `main` in this process."""
    for name in CODE if code else ("gin",):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in CONFIG:
        shutil.copy(ROOT / name, folder)
    set_params(folder, **SMALL)
    return folder


def set_params(project: Path, **changes: object) -> None:
    """Change values of params.yaml; a mapping changes those keys of its group."""
    yaml = YAML()
    params = yaml.load(project / "params.yaml")
    for key, value in changes.items():
        if isinstance(value, dict):
            params.setdefault(key, {}).update(value)
        else:
            params[key] = value
    yaml.dump(params, project / "params.yaml")


def environment(project: Path, **changes: str) -> dict[str, str]:
    """That of a person who activated the environment: nothing of the caller's git, DVC or MLflow gets in."""
    kept = {k: v for k, v in os.environ.items() if not re.match("GIT_|DVC_|MLFLOW_|TANGLENAS_|INTERRUPT", k)}
    person = {"NAME": "Tester", "EMAIL": "tester@example.org"}
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(project / "plugins"),  # before the installed ones
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        **{f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in person.items()},
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_NO_ANALYTICS": "1",
        **{f"DVC_{kind}_DIR": str(project / ".dvc" / "tmp" / kind) for kind in ("GLOBAL_CONFIG", "SITE_CACHE")},
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **changes,
    }


def execute(project: Path, *command: str, status: int | None = 0, **changes: str) -> str:
    """Run a command in the project and return what it printed; its exit status must be `status` unless that is None."""
    done = subprocess.run(
        command, cwd=project, env=environment(project, **changes), text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    assert status is None or done.returncode == status, f"{' '.join(command)}\n{done.returncode}\n{done.stdout}"
    return done.stdout


def dvc(project: Path, *arguments: str, **options) -> str:
    return execute(project, sys.executable, "-m", "dvc", *arguments, **options)


def git(project: Path, *arguments: str) -> str:
    return execute(project, "git", *arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
