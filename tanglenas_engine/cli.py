"""The command `tanglenas`. Each command imports what it needs itself: `tanglenas --help` loads no torch."""

import json
import sys
import warnings
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

    from rich.console import Console
    from rich.table import Table

    columns = ["name", "kind", "summary", "distribution", "version", "status"]
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(row[column] or "-" for column in columns), style="" if row["status"] == "ok" else "yellow")
    width = None if sys.stdout.isatty() else 1000  # a row stays on one line in a pipe
    Console(markup=False, highlight=False, emoji=False, width=width).print(table)
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
