"""Discretize: derive one architecture from the trained supernet, within the budget."""

import sys
from collections.abc import Mapping, Sequence

import gin

from pipelines._config import register
from pipelines._stage import (
    ARCHITECTURE,
    FRONT,
    MIXTURE,
    SPLITS,
    SUPERNET,
    create_objective_,
    device,
    discretize_,
    load_into,
    stage,
)
from tanglenas_engine import SearchSpace, figures
from tanglenas_engine.checkpoint import load_weights, weights_metadata, write_atomic
from tanglenas_engine.cost import METRICS
from tanglenas_engine.data import Splits, open_splits
from tanglenas_engine.discretize import METHODS
from tanglenas_engine.objective import Objective

# Their options are bound by the names of the methods: `evolution.population = 50`.
methods = {name: register(method) for name, method in METHODS.items()}


def objectives(space: SearchSpace) -> list[Objective]:
    """The plugins' objectives that `discretize.limits` and `discretize.cost` name."""
    bound = gin.get_bindings("discretize")
    limits = bound.get("limits")
    names = {bound.get("cost", "params"), *(limits if isinstance(limits, Mapping) else ())}
    return [create_objective_(name=name).bind(space) for name in sorted(names - set(METRICS))]


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with stage("discretize", arguments, (SUPERNET, MIXTURE, SPLITS)) as run:
        splits = Splits.from_json(SPLITS.read_text("utf-8", errors="replace"))
        load_into(run.space, SUPERNET)
        mixture = load_weights(MIXTURE)
        result = discretize_(
            run.space,
            open_splits(run.dataset, splits, ("weights", "architecture", "validation"), augment=False),
            run.space.mixture(mixture) if mixture else None,
            derivation=weights_metadata(MIXTURE)["derivation"],
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
                "digest": result.architecture.digest,
            },
            result.architecture,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
