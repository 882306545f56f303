"""Evaluate: judge the final network on the test split, and say where everything is."""

import json
import sys
from collections.abc import Sequence

from pipelines._config import register
from pipelines._stage import ARCHITECTURE, METRICS, OUT, SPLITS, SUPERNET, WEIGHTS, device, stage
from tanglenas_engine import Architecture, figures
from tanglenas_engine.checkpoint import load_weights
from tanglenas_engine.data import Splits, open_splits
from tanglenas_engine.evaluate import evaluate

evaluate_ = register(evaluate)


def summary() -> None:
    """A table of what the stages found and where it lies, for a person."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "result", "files", title="TangleNAS", title_justify="left")
    for name in ("search", "discretize", "retrain", "evaluate"):
        path = METRICS / f"{name}.json"
        numbers = json.loads(path.read_text()) if path.exists() else {}
        lines = [f"{k.replace('_', ' ')} {_readable(k, v)}" for k, v in numbers.items()]
        table.add_row(name, "\n".join(lines), str(OUT / name))
    Console().print(table)


def _readable(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}{' %' if key.endswith('accuracy') else ''}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with stage("evaluate", arguments, (SUPERNET, ARCHITECTURE, WEIGHTS, SPLITS)) as run:
        architecture = Architecture.from_json(ARCHITECTURE.read_text())
        network = run.space.standalone(architecture)
        network.load_state_dict(load_weights(WEIGHTS))
        result = evaluate_(
            run.space,
            architecture,
            network.eval(),
            open_splits(run.dataset, Splits.from_json(SPLITS.read_text()), ("test",)),
            device=device(),
        )
        figures.architecture(run.space, architecture, run.folder / "architecture.png")
        run.finish(
            {
                "test_accuracy": result.test_accuracy,
                "test_samples": result.samples,
                "params": result.cost.params,
                "flops": result.cost.flops,
                "digest": architecture.digest,
            },
            architecture,
        )
    summary()


if __name__ == "__main__":
    main(sys.argv[1:])
