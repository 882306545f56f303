"""Retrain: give the architecture found its final weights, and write it as a plain model."""

import sys
from collections.abc import Sequence

from pipelines._config import register
from pipelines._stage import ARCHITECTURE, SPLITS, SUPERNET, WEIGHTS, device, load_into, read_architecture, stage
from tanglenas_engine import figures
from tanglenas_engine.data import Splits, open_splits
from tanglenas_engine.retrain import retrain

retrain_ = register(retrain)


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with stage("retrain", arguments, (SUPERNET, ARCHITECTURE, SPLITS)) as run:
        architecture = read_architecture(run.space)
        load_into(run.space, SUPERNET)
        result = retrain_(
            run.space,
            architecture,
            open_splits(run.dataset, Splits.from_json(SPLITS.read_text()), ("training", "validation")),
            seed=run.seed,
            device=device(),
            checkpoints=run.checkpoints,
            tracker=run.tracker,
            progress=run.progress,
        )
        run.space.export(result.network.cpu(), architecture, WEIGHTS.parent)
        run.table("history.csv", result.history)
        if result.history:
            figures.training(result.history, run.folder / "training.png")
        run.finish({"validation_accuracy": result.validation_accuracy}, architecture)


if __name__ == "__main__":
    main(sys.argv[1:])
