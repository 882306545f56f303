"""Pool: train random networks of equal cost, which say what an architecture is worth.

python -m pipelines.pool COUNT BUDGET SEEDS
"""

import sys
from collections.abc import Sequence

from tanglenas_engine.pipeline import studies


def main(arguments: Sequence[str]) -> None:
    """Train so many networks that cost up to a share of the largest, with so many seeds, and write pool/pool.csv."""
    count, budget, seeds = arguments
    studies.build_pool(int(count), None if budget in ("None", "null") else float(budget), int(seeds))


if __name__ == "__main__":
    main(sys.argv[1:])
