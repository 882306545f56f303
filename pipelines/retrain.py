"""Retrain: give the architecture found its final weights, and write it as a plain model."""

import sys
from collections.abc import Sequence

from tanglenas_engine.pipeline import figures, files, open_stage, read_architecture, retrain


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with open_stage("retrain", arguments, (files.SUPERNET, files.ARCHITECTURE, files.SPLITS)) as stage:
        architecture = read_architecture(stage.space)
        files.load_inherited(stage.space)
        result = retrain(
            stage.space,
            architecture,
            stage.open("training", "validation"),
            seed=stage.seed,
            device=stage.device,
            checkpoints=stage.checkpoints,
            tracker=stage.tracker,
            progress=stage.progress,
        )
        stage.alone()
        stage.space.export(result.network.cpu(), architecture, files.WEIGHTS.parent, stage.dataset)
        stage.table("history.csv", result.history)
        if result.history:
            figures.training(result.history, stage.folder / "training.png")
        stage.finish({"validation_accuracy": result.validation_accuracy}, architecture)


if __name__ == "__main__":
    main(sys.argv[1:])
