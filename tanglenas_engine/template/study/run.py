"""Run: a stage of the main pipeline for one arm of the study and one seed.

python -m pipelines.run ARM SEED STAGE
python -m pipelines.run ARM SEED search OTHER-ARM     takes the supernet of another arm in place of a search
"""

import importlib
import sys
from collections.abc import Sequence

from tanglenas_engine.pipeline import studies


def main(arguments: Sequence[str]) -> None:
    """Run the stage in the folder of the run."""
    arm, seed, stage, *other = arguments
    with studies.stage_of(arm, seed, stage, share=not other) as given:
        if other:
            studies.take_supernet(*other, seed)
        else:
            importlib.import_module(f"pipelines.{stage}").main(given)


if __name__ == "__main__":
    main(sys.argv[1:])
