"""Discretize: derive one architecture from the trained supernet, within the budget."""

import sys
from collections.abc import Sequence

from pipelines._stage import (
    ARCHITECTURE,
    FRONT,
    MIXTURE,
    SPLITS,
    SUPERNET,
    device,
    discretize_,
    load_into,
    methods,
    objectives,
    stage,
)
from tanglenas_engine import SearchSpace, figures
from tanglenas_engine.data import Splits, open_splits
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.files import write_atomic
from tanglenas_engine.runtime.weights import load_weights, weights_metadata
from tanglenas_engine.superposition.mixture import Mixture


def searched(space: SearchSpace) -> tuple[Mixture | None, str]:
    """What a search ended with: its mixture, or None after a sampled one, and how its method derives.

    Raises:
        TangleNASError: The file is another one than search writes for this space.
    """
    weights, derivation = load_weights(MIXTURE), weights_metadata(MIXTURE).get("derivation")
    try:
        if derivation not in methods:
            raise TangleNASError(
                f"its metadata has the derivation {derivation!r}, expected one of {', '.join(methods)}"
            )
        return space.mixture(weights) if weights else None, derivation
    except (TangleNASError, RuntimeError, ValueError) as error:
        raise TangleNASError(
            f"{MIXTURE} is not what search writes for {space.name!r}: {error}. Run search again, or `dvc repro`"
        ) from None


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with stage("discretize", arguments, (SUPERNET, MIXTURE, SPLITS)) as run:
        splits = Splits.from_json(SPLITS.read_text("utf-8", errors="replace"))
        load_into(run.space, SUPERNET)
        mixture, derivation = searched(run.space)
        result = discretize_(
            run.space,
            open_splits(run.dataset, splits, ("weights", "architecture", "validation"), augment=False),
            mixture,
            derivation=derivation,
            seed=run.seed,
            device=device(),
            methods=methods,
            objectives=objectives(run.space),
            checkpoints=run.checkpoints,
            progress=run.progress,
        )
        run.alone()
        run.write(ARCHITECTURE.name, result.architecture.to_json())
        run.table("candidates.csv", result.candidates)
        figures.architecture(run.space, result.architecture, run.folder / "architecture.png")
        if len(result.candidates) > 1:
            figures.candidates(result.candidates, run.folder / "candidates.png")
            rows = {row["digest"]: row for row in result.candidates}
            front = [rows[architecture.digest] for architecture in result.front]
            run.table("pareto.csv", front)
            figures.pareto(result.candidates, front, result.front_cost, run.folder / "pareto.png")
            for architecture in result.front:
                write_atomic(FRONT / f"{architecture.digest}.json", architecture.to_json())
        run.progress.note(f"discretize: {result.architecture}")
        run.finish(
            {
                "validation_accuracy": result.validation_accuracy,
                "params": result.cost.params,
                "flops": result.cost.flops,
                **({} if result.exact is None else {"exact": result.exact}),
                "digest": result.architecture.digest,
            },
            result.architecture,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
