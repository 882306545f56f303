"""The command `tanglenas`. Each command imports what it needs itself: `tanglenas --help` loads no torch."""

import json
import sys
import warnings
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import click

from .errors import TangleNASError
from .plugins import KINDS, Plugin, PluginManager, PluginWarning


class WrongInput(click.ClickException):
    exit_code = 2


class Commands(click.Group):
    """Commands that tell a person about wrong input in one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TangleNASError as error:
            raise WrongInput(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tanglenas", prog_name="tanglenas")
def main() -> None:
    """Architecture search over weight-entangled spaces."""


@main.command(short_help="List what the installed plugins provide.")
@click.option("--kind", type=click.Choice(KINDS), help="Show only what is of this kind.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects.")
def plugins(kind: str | None, as_json: bool) -> None:
    """List what the installed plugins provide, and what is wrong with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the listing itself shows the faults
        rows = _rows(PluginManager(), kind)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return

    columns = ["name", "kind", "summary", "distribution", "version", "status"]
    styles = ["" if row["status"] == "ok" else "yellow" for row in rows]
    _print_table(columns, [[row[column] or "-" for column in columns] for row in rows], styles)
    for detail in dict.fromkeys(row["detail"] for row in rows if row["detail"]):
        click.echo(f"\n{detail}")


def _rows(manager: PluginManager, kind: str | None) -> list[dict[str, str | None]]:
    """One row for each registration, then one for each fault and for each plugin that is kept out.

    Nobody knows what a plugin that did not load would have registered: its row has neither name nor kind.
    """
    rows = []
    for it in manager.registrations(kind):
        conflict = manager.conflict(it.kind, it.name)
        rows.append(_row(it.plugin, "conflict" if conflict else "ok", conflict, it.name, it.kind, it.summary))
    for fault in manager.faults:
        rows.append(_row(fault.plugin, "broken", str(fault)))
    for plugin in manager.blocked:
        rows.append(_row(plugin, "blocked", f"{plugin} is kept out: TANGLENAS_PLUGINS does not name it."))
    return rows


def _row(
    plugin: Plugin,
    status: str,
    detail: str,
    name: str | None = None,
    kind: str | None = None,
    summary: str = "",
) -> dict[str, str | None]:
    described: dict[str, str | None] = {"name": name, "kind": kind, "summary": summary}
    return described | vars(plugin) | {"status": status, "detail": detail}


@main.group()
def tables() -> None:
    """Benchmark tables: import, look up, summarise. The tables themselves are your own copies."""


@tables.command("import", short_help="Convert a table to the canonical CSV and check it.")
@click.argument("file")
@click.option("--space", "space_name", metavar="NAME", required=True, help="The space that the table is of.")
@click.option("--out", metavar="PATH", help="Where to write; by default NAME.table.csv.gz in this folder.")
def import_table(file: str, space_name: str, out: str | None) -> None:
    """Convert FILE, a CSV or a published pickle, to the canonical CSV and check it against the space.

    Nothing in a pickle is executed. A table that misses architectures is written too: rank and regret then count
    what is there.
    """
    from .plugins import create_space
    from .tables import load_table

    space = create_space(space_name)
    table = load_table(file, space)
    check = table.check(space)
    out = out or f"{space_name}.table.csv.gz"
    table.write(out)
    click.echo(f"{out}: {check}; {', '.join(table.metrics)}")
    if not check.complete:
        click.echo("Warning: the table is incomplete: rank and regret count what is there.", err=True)


@tables.command(short_help="Value, rank and regret of an architecture.")
@click.argument("table")
@click.argument("architecture")
@click.option("--metric", help="Show only this one.")
def query(table: str, architecture: str, metric: str | None) -> None:
    """Look up ARCHITECTURE in TABLE: its text in the space's notation, or the path of an architecture.json."""
    from .architecture import Architecture
    from .plugins import create_space
    from .tables import load_table

    found = load_table(table)
    asked: Architecture | str = architecture
    space = found.space
    if architecture.endswith(".json"):
        asked = Architecture.from_json(_read_text(architecture))
        space = asked.space
    if asked not in found and space is not None:  # only now: a space needs torch
        found = found.of(create_space(space))
    rows = []
    for name in [metric] if metric else found.metrics:
        row = found.row(asked, name)
        rank = f"{row['table_rank']} of {len(found)}"
        rows.append([name, _number(row["table_value"]), rank, _number(row["table_regret"])])
    _print_table(["metric", "value", "rank", "regret"], rows)


@tables.command("show", short_help="What a table holds.")
@click.argument("table")
def show_table(table: str) -> None:
    """Show how many architectures TABLE lists, and the best, median and worst of each metric."""
    from .tables import load_table

    shown = load_table(table)
    click.echo(f"{len(shown)} architectures of {shown.space or 'a space that the file does not name'}\n")
    rows = []
    for metric in shown.metrics:
        best = shown.best(metric)
        numbers = shown.value(best, metric), shown.median(metric), shown.value(shown.worst(metric), metric)
        rows.append([metric, *map(_number, numbers), best])
    _print_table(["metric", "best", "median", "worst", "best architecture"], rows)


def _print_table(columns: list[str], rows: list[list[str]], styles: Iterable[str] = ()) -> None:
    """Print aligned columns; `styles` are rich's, one per row."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row, style in zip_longest(rows, styles, fillvalue=""):
        table.add_row(*row, style=style)
    width = None if sys.stdout.isatty() else 1000  # a row stays on one line in a pipe
    Console(markup=False, highlight=False, emoji=False, width=width).print(table)


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise TangleNASError(
            f"cannot read {path}: {error}. Expected the architecture.json that discretize writes"
        ) from None


def _number(value: float) -> str:
    """Three decimals at most, three digits at least: 94.373, 73306, 0.000214."""
    return f"{value:.3g}" if 0 < value < 0.1 else f"{value:.3f}".rstrip("0").rstrip(".")
