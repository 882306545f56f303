"""Discretize: derive one architecture from the trained supernet, within the budget."""

import sys
from collections.abc import Sequence

from pipelines._config import register
from pipelines._stage import ARCHITECTURE, MIXTURE, SPLITS, SUPERNET, device, load_into, stage
from tanglenas_engine import figures
from tanglenas_engine.checkpoint import load_weights, weights_metadata
from tanglenas_engine.data import Splits, open_splits
from tanglenas_engine.discretize import discretize

discretize_ = register(discretize)


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with stage("discretize", arguments, (SUPERNET, MIXTURE, SPLITS)) as run:
        splits = Splits.from_json(SPLITS.read_text())
        load_into(run.space, SUPERNET)
        mixture = load_weights(MIXTURE)
        result = discretize_(
            run.space,
            open_splits(run.dataset, splits, ("weights", "architecture", "validation"), augment=False),
            run.space.mixture(mixture) if mixture else None,
            derivation=weights_metadata(MIXTURE)["derivation"],
            seed=run.seed,
            device=device(),
            progress=run.progress,
        )
        run.write(ARCHITECTURE.name, result.architecture.to_json())
        run.table("candidates.csv", result.candidates)
        figures.architecture(run.space, result.architecture, run.folder / "architecture.png")
        if len(result.candidates) > 1:
            figures.candidates(result.candidates, run.folder / "candidates.png")
        run.progress.note(f"discretize: {result.architecture}")
        run.finish(
            {
                "validation_accuracy": result.validation_accuracy,
                "params": result.cost.params,
                "flops": result.cost.flops,
                "digest": result.architecture.digest,
            },
            result.architecture,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
