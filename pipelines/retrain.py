"""Retrain: give the architecture found its final weights, and write it as a plain model."""

import sys
from collections.abc import Sequence

import gin

from pipelines._stage import (
    ARCHITECTURE,
    SPLITS,
    SUPERNET,
    WEIGHTS,
    device,
    load_into,
    read_architecture,
    retrain_,
    stage,
)
from tanglenas_engine import figures
from tanglenas_engine.data import Splits, open_splits


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with stage("retrain", arguments, (SUPERNET, ARCHITECTURE, SPLITS)) as run:
        architecture = read_architecture(run.space)
        mode = gin.get_bindings("retrain").get("mode", "scratch")
        if mode != "scratch":
            load_into(
                run.space,
                SUPERNET,
                f"retrain.mode {mode!r} takes the weights of the search: create the space as there, or use 'scratch', "
                "which may build a larger network",
            )
        result = retrain_(
            run.space,
            architecture,
            open_splits(
                run.dataset,
                Splits.from_json(SPLITS.read_text("utf-8", errors="replace")),
                ("training", "validation"),
            ),
            seed=run.seed,
            device=device(),
            checkpoints=run.checkpoints,
            tracker=run.tracker,
            progress=run.progress,
        )
        run.alone()
        run.space.export(result.network.cpu(), architecture, WEIGHTS.parent, run.dataset)
        run.table("history.csv", result.history)
        if result.history:
            figures.training(result.history, run.folder / "training.png")
        run.finish({"validation_accuracy": result.validation_accuracy}, architecture)


if __name__ == "__main__":
    main(sys.argv[1:])
