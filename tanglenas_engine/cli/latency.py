"""`tanglenas latency`: tables of how long the parts of a space take on a machine."""

from pathlib import Path

import click

from tanglenas_engine.errors import TangleNASError

from ._console import number, print_table
from ._space import make_space, parsed, project_options, read, space_options


@click.group(short_help="Measure a space here, and predict latencies.")
def command() -> None:
    """Measure a space on this machine, and predict the latency of its networks."""


@command.command(short_help="Measure the parts of a space on this machine.")
@click.argument("space", metavar="SPACE")
@click.argument("table", metavar="TABLE", type=click.Path(path_type=Path))
@space_options
@click.option("--batch-size", default=1, show_default=True, help="Inputs a batch.")
@click.option("--threads", type=int, help="Threads of torch; by default as many as it takes itself.")
@click.option("--device", help="Such as cpu or cuda:0; by default CUDA where there is one.")
@click.option(
    "--networks",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Whole networks that predictions are compared with.",
)
@click.option("--repeats", default=5, show_default=True, help="Measurements of each part; the median counts.")
@click.option("--figure", metavar="FILE", type=click.Path(path_type=Path), help="Draw predicted against measured.")
def build(
    space: str, table: Path, options: tuple[str, ...], batch_size: int, threads: int | None, device: str | None,
    networks: int, repeats: int, figure: Path | None,
) -> None:  # fmt: skip
    """Measure the parts of SPACE on this machine, in eval mode, and write the file TABLE.

    Use it as an objective: `create_objective.table = "TABLE"` for the objective `latency`. The space needs the options
    that the search has. In a project that searches SPACE they are those of the project; -o gives others.
    """
    from tanglenas_engine.runtime.files import check_writable
    from tanglenas_engine.runtime.progress import ConsoleProgress
    from tanglenas_objectives.latency_measurement import measure_latency

    if figure is not None and networks < 2:
        raise click.UsageError("--figure draws predicted against measured latencies: it needs at least --networks 2")
    for path in filter(None, (table, figure)):
        check_writable(path)
    made = make_space(space, {**project_options(space), **parsed(options)})
    measured = measure_latency(
        made,
        batch_size=batch_size,
        threads=threads,
        device=device,
        validated=networks,
        repeats=repeats,
        progress=ConsoleProgress(),
    )
    measured.save(table)
    machine = measured.machine
    click.echo(
        f"{machine.processor}, {machine.threads} threads, torch {machine.torch_version}, batches of {batch_size}"
    )
    if networks:
        validation = measured.validation
        least, most = (f"{bound(validation.measured):.3g}" for bound in (min, max))
        ranks = f"Spearman {validation.spearman:.3f}, " if networks > 1 else ""
        click.echo(
            f"{networks} other network{'s'[: networks > 1]} of {least} to {most} ms: {ranks}"
            f"mean relative error {100 * validation.relative_error:.1f} %"
        )
        if figure is not None:
            from ..pipeline.figures import predictions

            predictions(validation.predicted, validation.measured, figure)
            click.echo(str(figure))
    click.echo(str(table))


@command.command(short_help="Predict the latency of an architecture.")
@click.argument("file", metavar="ARCH", type=click.Path(path_type=Path))
@click.argument("table", metavar="TABLE", type=click.Path(path_type=Path))
@space_options
def predict(file: Path, table: Path, options: tuple[str, ...]) -> None:
    """Predict how long the network of the file ARCH takes, from a TABLE that `latency build` wrote."""
    from tanglenas_objectives.latency_table import LatencyTable

    space, architecture, *_ = read(file, options)
    found = LatencyTable.load(table)
    try:
        terms = found.terms(space)
    except TangleNASError as error:
        raise TangleNASError(f"{table}: {error}") from None
    machine = found.machine
    click.echo(f"{machine.processor}, {machine.threads} threads, torch {machine.torch_version}, "
               f"batches of {found.batch_size}\n")  # fmt: skip
    networks = {"this one": architecture, "smallest": space.smallest(), "largest": space.largest()}
    times = (float(terms.cost(space.assignment_of(network))) for network in networks.values())
    print_table(["", *networks], [["milliseconds", *map(number, times)]])
