"""`tanglenas plugins`: what is installed, and whether it keeps the contract."""

import json
import warnings

import click

from ..plugins import KINDS, Plugin, PluginManager, PluginWarning
from ._console import print_table
from ._space import parsed


@click.group(invoke_without_command=True, short_help="List what the installed plugins provide, or check one.")
@click.option("--kind", type=click.Choice(KINDS), help="Show only what is of this kind.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects.")
@click.pass_context
def command(context: click.Context, kind: str | None, as_json: bool) -> None:
    """List what the installed plugins provide, and what is wrong with them."""
    if context.invoked_subcommand:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the listing itself shows the faults
        rows = _rows(PluginManager(), kind)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return

    columns = ["name", "kind", "summary", "distribution", "version", "status"]
    styles = ["" if row["status"] == "ok" else "yellow" for row in rows]
    print_table(columns, [[row[column] or "-" for column in columns] for row in rows], styles)
    for detail in dict.fromkeys(row["detail"] for row in rows if row["detail"]):
        click.echo(f"\n{detail}")


def _rows(manager: PluginManager, kind: str | None) -> list[dict[str, str | None]]:
    """Return a row for each registration, then a row for each fault and for each plugin that is kept out.

    A plugin that did not load has neither name nor kind in its row, as it could not register any.
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


@command.command(short_help="Check that a plugin keeps the contract.")
@click.argument("name")
@click.option("options", "-o", "--option", metavar="NAME=VALUE", multiple=True,
              help="An option for whatever takes it, such as image_size=32.")  # fmt: skip
@click.option("--space", metavar="SPACE", help="What optimizers and objectives are checked on; else two small ones.")
@click.option("--idle", metavar="CHOICE", multiple=True, help="A choice of a space that does nothing, on purpose.")
def check(name: str, options: tuple[str, ...], space: str | None, idle: tuple[str, ...]) -> None:
    """Run the checks of tanglenas_engine.testing on what a plugin registered.

    NAME is a distribution, an entry point, or one registered name. The exit status is 1 where a check fails.
    """
    from ..testing.report import run

    failed, subject = 0, ""
    for outcome in run(name, parsed(options), space, idle):
        if outcome.subject != subject:
            click.echo(("\n" if subject else "") + (subject := outcome.subject))
        mark = click.style("FAIL", fg="red", bold=True) if outcome.problem else click.style("ok  ", fg="green")
        click.echo(f"  {mark} {outcome.check} ({outcome.seconds:.1f} s)")
        if outcome.problem:
            failed += 1
            click.echo(f"       {outcome.problem}")
    if failed:
        click.echo(f"\n{failed} check{'s' * (failed > 1)} failed.", err=True)
        raise SystemExit(1)
    click.echo("\nEvery check passed.")
