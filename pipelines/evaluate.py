"""Evaluate: judge the final network on the test split, and say where everything is."""

import json
import math
import sys
from collections.abc import Sequence

from pipelines._config import register
from pipelines._stage import (
    ARCHITECTURE,
    METRICS,
    OUT,
    SPLITS,
    SUPERNET,
    WEIGHTS,
    benchmark_,
    device,
    evaluate_,
    load_into,
    read_architecture,
    stage,
)
from tanglenas_engine import Architecture, figures
from tanglenas_engine.data import Splits, open_splits
from tanglenas_engine.stages.evaluate import rank_correlation

rank_correlation_ = register(rank_correlation)


def summary(architecture: Architecture, title: str) -> None:
    """A table of what the stages found and where it lies, for a person."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "result", "files", title=title, title_justify="left")
    for name in ("search", "discretize", "retrain", "evaluate"):
        path = METRICS / f"{name}.json"
        numbers = json.loads(path.read_text()) if path.exists() else {}
        lines = [f"{key.replace('_', ' ')} {_readable(key, value)}" for key, value in numbers.items()]
        if name == "discretize":
            lines = [*str(architecture).split(), *lines]
        table.add_row(name, "\n".join(lines), str(OUT / name))
    Console().print(table)


def _readable(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}{' %' if key.endswith('accuracy') else ''}"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"{text} multiply-accumulates" if key == "flops" else text


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with stage("evaluate", arguments, (SUPERNET, ARCHITECTURE, WEIGHTS, SPLITS)) as run:
        architecture = read_architecture(run.space)
        network = run.space.standalone(architecture)
        load_into(network, WEIGHTS)
        splits = Splits.from_json(SPLITS.read_text("utf-8", errors="replace"))
        result = evaluate_(
            run.space, architecture, network.eval(), open_splits(run.dataset, splits, ("test",)), device=device()
        )
        table = benchmark_(run.space)
        if table is not None:
            load_into(run.space, SUPERNET)
        ranking = rank_correlation_(
            run.space,
            open_splits(run.dataset, splits, ("weights", "architecture"), augment=False),
            table,
            seed=run.seed,
            device=device(),
            checkpoints=run.checkpoints,
            progress=run.progress,
        )
        run.alone()
        agreement = {}
        if ranking is not None:
            run.table("rank_correlation.csv", ranking.rows)
            found = {"kendall_tau": ranking.kendall_tau, "spearman": ranking.spearman}
            figures.rank_correlation(ranking.rows, **found, path=run.folder / "rank_correlation.png")
            # JSON has no nan, which says that the supernet, or the table, ranks none.
            agreement = {name: value for name, value in found.items() if not math.isnan(value)}
            agreement["ranked_architectures"] = len(ranking.rows)
        shown = run.space.show(network.cpu(), run.dataset)
        if shown is not None:
            run.write("sample.txt", shown + "\n")
        figures.architecture(run.space, architecture, run.folder / "architecture.png")
        run.finish(
            {
                "test_accuracy": result.test_accuracy,
                "test_loss": result.test_loss,
                "test_samples": result.samples,
                "params": result.cost.params,
                "flops": result.cost.flops,
                "digest": architecture.digest,
                **(table(architecture) if table else {}),
                **agreement,
            },
            architecture,
        )
    if shown is not None:
        print(shown)
    summary(architecture, f"{run.space.name} on {run.dataset.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
