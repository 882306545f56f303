"""Page: compare what the runs of the study were measured by, and write page/.

python -m pipelines.page
"""

from tanglenas_engine.pipeline import studies


def main() -> None:
    """Write the page, its figure, and all numbers."""
    studies.compare_runs()


if __name__ == "__main__":
    main()
