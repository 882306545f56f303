"""Environment: write down what DVC cannot see, the code and the installed packages that the results depend on.

python -m pipelines.environment SPACE OPTIMIZER DATASET [WEIGHTS]
"""

import sys
from collections.abc import Sequence

from tanglenas_engine.pipeline import write_environment


def main(arguments: Sequence[str]) -> None:
    """Write environment.json for these plugins."""
    write_environment(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
