"""`tanglenas tables`: benchmark tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tanglenas_engine.errors import TangleNASError

from ._console import number, print_table
from ._space import read_architecture

if TYPE_CHECKING:
    from tanglenas_engine.tables import Table


@click.group()
def command() -> None:
    """Benchmark tables: import, look up, summarise. The tables themselves are your own copies."""


@command.command("import", short_help="Convert a table to the canonical CSV and check it.")
@click.argument("file")
@click.option("--space", "space_name", metavar="NAME", required=True, help="The space that the table is of.")
@click.option("--out", metavar="PATH", help="Where to write; by default NAME.table.csv.gz, if this folder has none.")
@click.option("--higher", metavar="METRIC", multiple=True, help="More of this metric is better; may be repeated.")
@click.option("--lower", metavar="METRIC", multiple=True, help="Less of this metric is better; may be repeated.")
def import_table(file: str, space_name: str, out: str | None, higher: tuple[str, ...], lower: tuple[str, ...]) -> None:
    """Convert FILE, a CSV or a published pickle, to the canonical CSV and check it against the space.

    Nothing in a pickle is executed. A table that misses architectures is written too: rank and regret then count
    what is there. The name of a metric says whether more or less of it is better (test_acc, test-loss); --higher and
    --lower say it where the name does not.
    """
    from ..plugins import create_space
    from ..tables import load_table

    target = out or f"{space_name}.table.csv.gz"
    if out is None and Path(target).exists():
        raise TangleNASError(f"{target} exists: name the file to write with --out PATH, or {target} to replace it")
    space = create_space(space_name)
    if both := sorted({*higher} & {*lower}):
        raise TangleNASError(f"--higher and --lower both name {both[0]!r}: leave one out")
    table = load_table(file, space, {**dict.fromkeys(higher, True), **dict.fromkeys(lower, False)})
    check = table.check(space)
    table.write(target)
    click.echo(f"{target}: {check}; {', '.join(f'{metric} ({_better(table, metric)})' for metric in table.metrics)}")
    _notes(table)
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
        asked = read_architecture(architecture)
        space = asked.space
    if asked not in found and space is not None:  # not before, as a space needs torch
        found = found.of(create_space(space))
    rows = []
    for name in [metric] if metric else found.metrics:
        if metric is None and found.higher_is_better(name) is None:
            rows.append([name, number(found.value(asked, name)), "-", "-"])
            continue
        row = found.row(asked, name)
        rank = f"{row['table_rank']} of {len(found)}"
        rows.append([name, number(row["table_value"]), rank, number(row["table_regret"])])
    print_table(["metric", "value", "rank", "regret"], rows)


@command.command(short_help="What a table holds.")
@click.argument("table")
def show(table: str) -> None:
    """Show how many architectures TABLE lists, and the best, median and worst of each metric.

    Where nothing says whether more or less of a metric is better, only its median is shown.
    """
    from ..tables import load_table

    shown = load_table(table)
    click.echo(f"{len(shown)} architectures of {shown.space or 'a space that the file does not name'}\n")
    rows, best_ones = [], []
    for metric in shown.metrics:
        if shown.higher_is_better(metric) is None:
            rows.append([metric, _better(shown, metric), "-", number(shown.median(metric)), "-"])
            continue
        best = shown.best(metric)
        numbers = shown.value(best, metric), shown.median(metric), shown.value(shown.worst(metric), metric)
        rows.append([metric, _better(shown, metric), *map(number, numbers)])
        best_ones.append(f"best {metric}: {best}")
    print_table(["metric", "better", "best", "median", "worst"], rows)
    if best_ones:  # below the table, which a narrow terminal cuts
        click.echo("\n" + "\n".join(best_ones))
    _notes(shown)


def _better(table: Table, metric: str) -> str:
    """Return which direction of a metric is better, in a word."""
    higher = table.higher_is_better(metric)
    return "unknown" if higher is None else "more" if higher else "less"


def _notes(table: Table) -> None:
    if table.origin:
        click.echo(f"\nNote: {table.origin}")
    if table.tied is not None and table.key_columns not in ((), table.tied.table_columns):
        click.echo(
            f"\nNote: an architecture is the columns {', '.join(table.key_columns)}, and their order counts: the first "
            f"one is read as {table.keys[0]}"
        )
    if table.fractions:
        click.echo(f"\nRead as fractions of 1, shown in %: {', '.join(table.fractions)}")
    if unknown := [metric for metric in table.metrics if table.higher_is_better(metric) is None]:
        click.echo(
            f"\nNothing says whether more or less is better of: {', '.join(unknown)}. Without that there is no rank: "
            "import the table with --higher METRIC or --lower METRIC"
        )
