"""Where the checkout is, and the tables and texts that are shared beside it."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("TANGLENAS_SHARED_DATA", ROOT.parent / "shared" / "data"))


def shared(name: str) -> Path:
    """Return the path of a shared file; skip the test where the file is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there: set TANGLENAS_SHARED_DATA to the folder that has {name}")
    return path
