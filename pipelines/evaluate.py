"""Evaluate: judge the final network on the test split, and say where everything is."""

import sys
from collections.abc import Sequence

from tanglenas_engine.pipeline import (
    benchmark,
    evaluate,
    figures,
    files,
    open_stage,
    outputs,
    rank_correlation,
    read_architecture,
)

INPUTS = (files.SUPERNET, files.ARCHITECTURE, files.WEIGHTS, files.SPLITS)


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with open_stage("evaluate", arguments, INPUTS) as stage:
        architecture = read_architecture(stage.space)
        network = stage.space.standalone(architecture)
        files.load_into(network, files.WEIGHTS, space=stage.space)
        result = evaluate(stage.space, architecture, network.eval(), stage.open("test"), device=stage.device)
        table = benchmark(stage.space)
        before = None
        if table is not None:
            before = files.state_before_search(stage.space)
            files.load_into(stage.space, files.SUPERNET)
        ranking = rank_correlation(
            stage.space,
            stage.open("weights", "architecture", augment=False),
            table and table.row,
            listed=table.listed if table else None,
            before=before,
            seed=stage.seed,
            device=stage.device,
            checkpoints=stage.checkpoints,
            progress=stage.progress,
        )
        stage.alone()
        if ranking is not None:
            stage.table("rank_correlation.csv", ranking.rows)
            path = stage.folder / "rank_correlation.png"
            figures.rank_correlation(ranking.rows, ranking.kendall_tau, ranking.spearman, path)
        figures.architecture(stage.space, architecture, stage.folder / "architecture.png")
        outputs.write_classes(stage, result)
        if result.confusion is not None:
            figures.confusion(result.confusion, stage.dataset.class_names, stage.folder / "confusion.png")
        sample = outputs.write_sample(stage, network)
        looked_up = outputs.looked_up(stage, table, architecture, result)
        stage.finish(outputs.evaluate_metrics(result, architecture, looked_up, ranking), architecture)
    outputs.print_summary(architecture, f"{stage.space.name} on {stage.dataset.name}", sample)


if __name__ == "__main__":
    main(sys.argv[1:])
