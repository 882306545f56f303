"""Discretize: derive one architecture from the trained supernet, within the budget."""

import sys
from collections.abc import Sequence

from tanglenas_engine.pipeline import discretize, figures, files, methods, objectives, open_stage, outputs


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with open_stage("discretize", arguments, (files.SUPERNET, files.MIXTURE, files.SPLITS)) as stage:
        files.load_into(stage.space, files.SUPERNET)
        mixture, derivation = files.read_mixture(stage.space, methods)
        targets = files.read_targets()
        result = discretize(
            stage.space,
            stage.open("weights", "architecture", "validation", augment=False),
            mixture,
            derivation=derivation,
            seed=stage.seed,
            device=stage.device,
            methods=methods,
            objectives=objectives(stage.space, targets),
            targets=targets,
            checkpoints=stage.checkpoints,
            progress=stage.progress,
        )
        stage.alone()
        front = outputs.write_discretize(stage, result)
        figures.architecture(stage.space, result.architecture, stage.folder / "architecture.png")
        if front:
            figures.candidates(result.candidates, stage.folder / "candidates.png")
            figures.pareto(result.candidates, front, result.front_cost, stage.folder / "pareto.png")
        stage.progress.note(f"discretize: {result.architecture}")
        stage.finish(outputs.discretize_metrics(result), result.architecture)


if __name__ == "__main__":
    main(sys.argv[1:])
