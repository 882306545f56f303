"""Search: split the data, train the supernet and its architecture parameters."""

import sys
from collections.abc import Sequence

from tanglenas_engine.pipeline import (
    benchmark,
    check_later_stages,
    create_optimizer,
    figures,
    make_splits,
    open_stage,
    outputs,
    required,
    search,
)


def main(arguments: Sequence[str]) -> None:
    """Run the stage with these gin files and bindings."""
    with open_stage("search", arguments) as stage:
        splits = make_splits(stage.dataset, seed=stage.seed)
        check_later_stages(stage, splits)
        optimizer = create_optimizer(name=required("OPTIMIZER", str))
        stage.announce(optimizer, splits)
        result = search(
            stage.space,
            optimizer,
            stage.open("weights", "architecture", "validation", splits=splits),
            seed=stage.seed,
            device=stage.device,
            table=benchmark(stage.space),
            checkpoints=stage.checkpoints,
            tracker=stage.tracker,
            progress=stage.progress,
        )
        stage.alone()
        outputs.write_search(stage, optimizer, splits, result)
        figures.anytime(result.history, stage.folder / "anytime.png")
        if result.mixture is not None:
            figures.alphas(result.history, stage.space.choices, stage.folder / "alphas.png")
        stage.finish(outputs.search_metrics(result), result.architecture)


if __name__ == "__main__":
    main(sys.argv[1:])
