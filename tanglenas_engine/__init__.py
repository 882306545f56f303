"""TangleNAS: gradient-based one-shot architecture search over weight-entangled spaces.

The public surface, grouped by who needs it, is listed in `__init__.pyi`. Names load on first use: importing the package
imports neither torch nor any plugin, so that `tanglenas --help` and the listing of plugins stay fast.
"""

import sys
from pathlib import Path

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_program = sys.modules.get("__main__")
if getattr(getattr(_program, "__spec__", None), "name", "").startswith("pipelines."):
    # Such a copy fails at whichever of its imports has moved since, without saying what to do.
    if Path(str(getattr(_program, "__file__", ""))).with_name("_stage.py").exists():
        sys.exit(
            "the scripts in pipelines/ are of an earlier version of tanglenas, which kept a copy of the pipeline in "
            "every project. Run `tanglenas init --upgrade .`: it replaces the scripts and dvc.yaml, and leaves gin/ "
            "and params.yaml as they are"
        )
