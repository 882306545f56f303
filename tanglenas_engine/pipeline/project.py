"""The folder of a project."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path


def project_root() -> Path:
    """Return the folder of the DVC project or git repository, or the current one: state that outlives a run lies there.

    `dvc exp run --queue` runs stages in a copy that it deletes, but `$DVC_ROOT` is the original.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    return _repository(Path.cwd())


def _repository(folder: Path) -> Path:
    return next((f for f in (folder, *folder.parents) if (f / ".dvc").is_dir() or (f / ".git").exists()), folder)


@contextmanager
def in_project_of(file: Path) -> Iterator[None]:
    """Stand in the project that a file lies in until the block ends, as its config names code and data from there.

    It is the closest folder with a dvc.yaml. The runs of a study are such folders, with code and data in the study's.
    A file in no project, or in the one where the command runs, changes nothing.
    """
    folder = next((parent for parent in file.absolute().parents if (parent / "dvc.yaml").is_file()), None)
    if folder is None or folder == Path.cwd():
        yield
        return
    root = _repository(folder)
    sys.path += [place for place in (str(folder), str(root)) if place not in sys.path]
    with chdir(folder), environment({"DVC_ROOT": str(root)}):
        yield


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment until the block ends. What the command starts later has those of before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
