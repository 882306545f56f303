"""`tanglenas tables`: benchmark tables."""

import click

from ._console import number, print_table, read_text
from ._space import ARCHITECTURE_FILE


@click.group()
def command() -> None:
    """Benchmark tables: import, look up, summarise. The tables themselves are your own copies."""


@command.command("import", short_help="Convert a table to the canonical CSV and check it.")
@click.argument("file")
@click.option("--space", "space_name", metavar="NAME", required=True, help="The space that the table is of.")
@click.option("--out", metavar="PATH", help="Where to write; by default NAME.table.csv.gz in this folder.")
def import_table(file: str, space_name: str, out: str | None) -> None:
    """Convert FILE, a CSV or a published pickle, to the canonical CSV and check it against the space.

    Nothing in a pickle is executed. A table that misses architectures is written too: rank and regret then count
    what is there.
    """
    from ..plugins import create_space
    from ..tables import load_table

    space = create_space(space_name)
    table = load_table(file, space)
    check = table.check(space)
    out = out or f"{space_name}.table.csv.gz"
    table.write(out)
    click.echo(f"{out}: {check}; {', '.join(table.metrics)}")
    if not check.complete:
        click.echo("Warning: the table is incomplete: rank and regret count what is there.", err=True)


@command.command(short_help="Value, rank and regret of an architecture.")
@click.argument("table")
@click.argument("architecture")
@click.option("--metric", help="Show only this one.")
def query(table: str, architecture: str, metric: str | None) -> None:
    """Look up ARCHITECTURE in TABLE: its text in the space's notation, or the path of an architecture.json."""
    from tanglenas_engine.spaces.architecture import Architecture

    from ..plugins import create_space
    from ..tables import load_table

    found = load_table(table)
    asked: Architecture | str = architecture
    space = found.space
    if architecture.endswith(".json"):
        asked = Architecture.from_json(read_text(architecture, ARCHITECTURE_FILE))
        space = asked.space
    if asked not in found and space is not None:  # not before, as a space needs torch
        found = found.of(create_space(space))
    rows = []
    for name in [metric] if metric else found.metrics:
        row = found.row(asked, name)
        rank = f"{row['table_rank']} of {len(found)}"
        rows.append([name, number(row["table_value"]), rank, number(row["table_regret"])])
    print_table(["metric", "value", "rank", "regret"], rows)


@command.command(short_help="What a table holds.")
@click.argument("table")
def show(table: str) -> None:
    """Show how many architectures TABLE lists, and the best, median and worst of each metric."""
    from ..tables import load_table

    shown = load_table(table)
    click.echo(f"{len(shown)} architectures of {shown.space or 'a space that the file does not name'}\n")
    rows = []
    for metric in shown.metrics:
        best = shown.best(metric)
        numbers = shown.value(best, metric), shown.median(metric), shown.value(shown.worst(metric), metric)
        rows.append([metric, *map(number, numbers), best])
    print_table(["metric", "best", "median", "worst", "best architecture"], rows)
