"""`tanglenas pool`: random networks of equal cost, against which searches are judged."""

from pathlib import Path

import click

from ._console import number, print_table


@click.group(short_help="Train random networks of equal cost, to judge searches by.")
def command() -> None:
    """Train random networks of equal cost, to judge searches by."""


@command.command(short_help="Train random architectures of this project's space within a budget.")
@click.argument("table", metavar="TABLE", type=click.Path(path_type=Path))
@click.option("--count", default=24, show_default=True, help="Random architectures.")
@click.option("--seeds", default=1, show_default=True, help="Trainings of each, with a seed of its own; the table has "
              "their means.")  # fmt: skip
@click.option("--budget", "share", type=float, metavar="SHARE", help="Of the largest network's MACs; by default the "
              "limits of discretize in params.yaml.")  # fmt: skip
@click.option("--least", type=float, metavar="SHARE", help="Of the budget, that each network uses at least; by "
              "default 0.95.")  # fmt: skip
@click.option("--jobs", default=1, show_default=True, help="Trainings at a time.")
@click.option("--backend", help="Backend of joblib that runs the trainings: dask or ray, for a cluster.")
@click.option("--bind", "bindings", multiple=True, metavar="BINDING", help="Such as 'retrain.epochs = 5'; repeatable.")
def build(
    table: Path,
    count: int,
    seeds: int,
    share: float | None,
    least: float | None,
    jobs: int,
    backend: str | None,
    bindings: tuple[str, ...],
) -> None:
    """Train random architectures of this project's space, each by itself, and write TABLE, a .csv or .csv.gz.

    Space, data, recipe and splits are those of the project. Run the command again after an interruption, or with a
    larger --count or --seeds: what was trained stays. With `benchmark.path = "TABLE"` in gin/stages/evaluate.gin,
    evaluate says at which percentile of the pool the network found lies, and how well the supernet ranks the pool.
    """
    from tanglenas_engine.pipeline.pools import build as build_pool
    from tanglenas_engine.runtime.progress import ConsoleProgress
    from tanglenas_engine.tables import load_table

    record = build_pool(
        table, count=count, seeds=seeds, share=share, least=least, jobs=jobs, backend=backend, bindings=bindings,
        progress=ConsoleProgress(),
    )  # fmt: skip
    built = load_table(table)
    rows = []
    for metric in ("test_loss", "test_acc"):
        values = built.value(built.best(metric), metric), built.median(metric), built.value(built.worst(metric), metric)
        rows.append([metric, *map(number, values)])
    print_table([f"{len(built)} networks", "best", "median", "worst"], rows)
    for name, key in record.baselines.items():
        trained, common = record.complete_networks([key])
        if trained:
            loss = record.mean(key, "test_loss", common)
            click.echo(f"most {name} within the budget: test loss {loss:.4f}  {key}")
    if found := record.reliability("test_loss", built.keys):
        click.echo(
            f"trainings with two seeds rank the networks alike with a Spearman correlation of {found.correlation:.2f}; "
            f"a perfect ranking would have about {found.ceiling:.2f} with this table"
        )
    elif seeds == 1:
        click.echo("how far seeds change the ranks is unknown: --seeds 2 trains each network again")
