"""The folder of a project."""

from __future__ import annotations

import os
from pathlib import Path


def project_root() -> Path:
    """Return the folder of the DVC project or git repository, or the current one: state that outlives a run lies there.

    `dvc exp run --queue` runs stages in a copy that it deletes, but `$DVC_ROOT` is the original.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    here = Path.cwd()
    return next((f for f in (here, *here.parents) if (f / ".dvc").is_dir() or (f / ".git").exists()), here)
