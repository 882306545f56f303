"""What the distribution ships beside the library: the pipeline (stages, gin files, dvc.yaml), and the example plugin.

In a checkout they are the repository's own files; a wheel carries copies under `tanglenas_engine/template`.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

ENGINE = Path(__file__).resolve().parents[1]
TEMPLATE = ENGINE / "template"


def pipeline() -> Path:
    """The folder with `pipelines/`, `gin/`, `dvc.yaml`, `params.yaml` and `.dvcignore`."""
    packed = TEMPLATE / "pipeline"
    return packed if packed.is_dir() else ENGINE.parent


def example() -> Path:
    """The example plugin, a distribution of its own."""
    packed = TEMPLATE / "plugin"
    return packed if packed.is_dir() else ENGINE.parent / "examples" / "tanglenas-example"


def stage_module(name: str) -> ModuleType:
    """A module of `pipelines`, where everything lives that knows gin, DVC and MLflow.

    The engine imports none of the three. Commands that read what stages wrote use the stages' own code for it, as it
    came with this version, whatever the project's copy has become.
    """
    folder = str(pipeline())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(f"pipelines.{name}")
