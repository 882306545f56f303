"""What several studies have in common: methods in two stages and in one, and how a found network is measured."""

from __future__ import annotations

from pathlib import Path

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.comparison.estimates import Metric
from tanglenas_engine.pipeline.config.reader import configured
from tanglenas_engine.pipeline.studies.run import Run, arguments_of
from tanglenas_engine.spaces.space import SearchSpace
from tanglenas_engine.tables import Benchmark, load_table

TEST = {
    "table_value": Metric("table value", "", 2),
    "table_regret": Metric("distance from the table's best", "", 2),
    "test_accuracy": Metric("test accuracy", "%", 2),
    "test_loss": Metric("test loss", "nats", 4),
}
"""What an architecture is worth: by a table of the whole space, or as a network of its own."""
HIGHER = {"table_regret": False, "test_accuracy": True, "test_loss": False}
"""What methods are compared by, and whether more is better. Of a table's metric, either more or less may be better."""
SECONDS = Metric("search and derivation, time", "s", 1)
"""Of processors; on a GPU of the wall."""
SPOS: dict[str, object] = {"optimizer": "spos"}
ONE_STAGE: dict[str, object] = {"optimizer": "drnas", "discretize": {"method": "argmax"}}
"""A search whose alpha alone says what is found, as in the paper: nothing is judged."""
PAPER_SEEDS = (9001, 9002, 9003, 9004)


def worth(run: Run) -> dict[str, float]:
    """Return what the architecture of a run is worth, by the name of the metric in TEST.

    Raises:
        TangleNASError: The table is a pool, or of another space.
    """
    if run.table is None:
        return run.tested()
    with run.opened() as bench:
        from tanglenas_engine.pipeline.config.configurables import read_architecture

        row = _benchmark(run.table, run.metric, bench.space).row(read_architecture(bench.space))
        return {name: row[name] for name in ("table_value", "table_regret") if name in row}


def check_table(run: Run) -> None:
    """Check before anything runs that the table of a run has the whole space.

    Raises:
        TangleNASError: The table is a pool, or of another space.
    """
    from tanglenas_engine.pipeline.config.configurables import create

    if run.table is not None:
        with configured(arguments_of("search")):
            _, space, _ = create()
        _benchmark(run.table, run.metric, space)


def _benchmark(table: Path, metric: str, space: SearchSpace) -> Benchmark:
    benchmark = Benchmark(load_table(table, space), metric)
    if benchmark.listed is not None:
        raise TangleNASError(
            f"{table.name} is a pool, which has few architectures of {space.label}: give a table of the whole space, "
            "or leave --table out, and what is found is trained"
        )
    return benchmark


def moved(one: dict[str, object], other: dict[str, object]) -> float:
    """Return the share of decisions, in %, that differ between two architectures, given by their choices.

    A layer that only one of them has counts as a decision that differs.
    """
    differ = total = 0
    for name in one.keys() | other.keys():
        both = [
            value if isinstance(value, list | tuple) else [value] for value in (one.get(name, []), other.get(name, []))
        ]
        total += max(map(len, both))
        differ += max(map(len, both)) - sum(a == b for a, b in zip(*both, strict=False))
    return 100 * differ / max(1, total)
