"""Measure: take the numbers, curves and matrices of one arm of the study and one seed.

python -m pipelines.measure ARM SEED
"""

import sys
from collections.abc import Sequence

from tanglenas_engine.pipeline import studies


def main(arguments: Sequence[str]) -> None:
    """Measure the run, and write measured/ARM-SEED.json."""
    arm, seed = arguments
    studies.measure_run(arm, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
