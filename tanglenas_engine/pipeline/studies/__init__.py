"""The paper's analyses, each a pipeline of its own: `tanglenas study NAME`.

study.py has what a study consists of, and a module of the same name describes each. study_folder.py writes the folder
of a study, run_folder.py lays out the folder of one arm with one seed, and page.py writes the page from what all runs
were measured by. The functions below are what the scripts in the folder of a study call.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tanglenas_engine.errors import unknown

if TYPE_CHECKING:
    from tanglenas_engine.pipeline.studies.study import Study

NAMES = ("anytime", "stages", "fractions", "inheritance", "sharing", "ranking", "insights", "stability")
"""The studies."""

_CALLS = ("build_pool", "compare_runs", "measure_run", "stage_of", "take_supernet")

__all__ = ["NAMES", "load", *_CALLS]


def load(name: str) -> "Study":
    """Return a study.

    Raises:
        TangleNASError: There is no study of this name.
    """
    if name not in NAMES:
        raise unknown("study", name, NAMES)
    found: Study = importlib.import_module(f"{__name__}.{name}").STUDY
    return found


def __getattr__(name: str) -> Any:
    if name not in _CALLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.scripts"), name)
