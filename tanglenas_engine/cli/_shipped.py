"""Finds the files that ship beside the library: a project (scripts, gin files, dvc.yaml) and the example plugin.

In a checkout they are the repository's own files; a wheel carries copies under `tanglenas_engine/template`.
"""

from pathlib import Path

ENGINE = Path(__file__).resolve().parents[1]
TEMPLATE = ENGINE / "template"
EARLIER = ("_config.py", "_records.py", "_spool.py", "_stage.py", "_store.py", "_tracking.py")
"""Files in the pipelines/ of a project from before the pipeline came with the package."""


def pipeline() -> Path:
    """Return the folder with `pipelines/`, `gin/`, `dvc.yaml`, `params.yaml` and `.dvcignore`."""
    packed = TEMPLATE / "pipeline"
    return packed if packed.is_dir() else ENGINE.parent


def example() -> Path:
    """Return the folder of the example plugin, a distribution of its own."""
    packed = TEMPLATE / "plugin"
    return packed if packed.is_dir() else ENGINE.parent / "examples" / "tanglenas-example"
