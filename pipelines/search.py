"""Search: split the data, train the supernet and its architecture parameters."""

import sys
from collections.abc import Sequence

import gin

from pipelines._config import configured, macro_value, required, stage_arguments
from pipelines._stage import (
    MIXTURE,
    SPLITS,
    SUPERNET,
    benchmark_,
    create_optimizer_,
    device,
    make_splits_,
    objectives,
    search_,
    stage,
)
from tanglenas_engine import Dataset, SearchSpace, figures
from tanglenas_engine.data import open_splits
from tanglenas_engine.derivation.budget import Budget
from tanglenas_engine.runtime.weights import save_weights
from tanglenas_engine.stages.discretize import limits_of


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with stage("search", arguments) as run:
        check_later_budget(run.space, run.dataset)
        splits = make_splits_(run.dataset, seed=run.seed)
        optimizer = create_optimizer_(name=required("OPTIMIZER", str))
        size = run.space.size
        architectures = f"{size:,}" if size < 10**9 else f"about 10^{len(str(size)) - 1}"
        samples = ", ".join(f"{count:,} {split}" for split, count in splits.sizes().items())
        run.progress.note(
            f"search: {optimizer.name} on {run.space.name} ({architectures} architectures), "
            f"{run.dataset.name} ({samples} samples)"
        )
        result = search_(
            run.space,
            optimizer,
            open_splits(run.dataset, splits, ("weights", "architecture", "validation")),
            seed=run.seed,
            device=device(),
            table=benchmark_(run.space),
            checkpoints=run.checkpoints,
            tracker=run.tracker,
            progress=run.progress,
        )
        run.alone()
        run.write(SPLITS.name, splits.to_json())
        save_weights(
            SUPERNET,
            run.space.state_dict(),
            {"space": run.space.name, "optimizer": optimizer.name, "pipeline_id": run.pipeline_id},
        )
        save_weights(MIXTURE, result.mixture.tensors() if result.mixture else {}, {"derivation": optimizer.derivation})
        run.table("history.csv", result.history)
        run.table(
            "mixture.csv",
            [
                {"epoch": row["epoch"], "choice": name, "layer": layer, "option": option, "weight": weight}
                for row in result.history
                for name, rows in row.get("mixture", {}).items()
                for layer, weights in enumerate(rows if run.space.choices[name].layered else [rows])
                for option, weight in zip(run.space.choices[name].options, weights, strict=True)
            ],
        )
        figures.anytime(result.history, run.folder / "anytime.png")
        if result.mixture is not None:
            options = {name: choice.options for name, choice in run.space.choices.items()}
            figures.alphas(result.history, options, run.folder / "alphas.png")
        last = result.history[-1]
        keep = (
            "weight_loss",
            "weight_accuracy",
            "architecture_loss",
            "validation_accuracy",
            "validation_loss",
            "table_value",
            "table_rank",
            "table_regret",
            "entropy",
            "params",
            "flops",
        )
        costs = [key for key in last if key.startswith(("expected_", "penalty_"))]
        run.finish({key: last[key] for key in (*keep, *costs, "stopped") if key in last}, result.architecture)


def check_later_budget(space: SearchSpace, dataset: Dataset) -> None:
    """Refuse before training what discretize would refuse after it, where params.yaml is about this space and dataset.

    The search does not depend on the budget otherwise: another one does not make it run again.

    Raises:
        TangleNASError: No architecture of the space meets the budget, or an objective in it fails.
    """
    later = stage_arguments("discretize")
    if later is None:
        return
    with configured(later):
        if (macro_value("SPACE"), macro_value("DATASET")) == (space.name, dataset.name):
            limits = gin.get_bindings("discretize")
            given = limits_of(*(limits.get(name) for name in ("max_params", "max_flops", "limits")))
            Budget(space, given, objectives(space)).check()


if __name__ == "__main__":
    main(sys.argv[1:])
