"""`tanglenas report`: one page that tells what a project searched and found, readable without a network."""

from pathlib import Path

import click


@click.command(short_help="Write one page about what was searched and found.")
@click.option("--output", metavar="FILE", type=click.Path(path_type=Path), default="report.html", show_default=True)
def command(output: Path) -> None:
    """Write a page about the project in this folder: the last run in full, and all runs that MLflow knows, compared.

    Where only queued experiments ran, the page compares them. It is one file; figures are inside, and nothing is loaded
    from elsewhere.
    """
    from tanglenas_engine.runtime.files import write_atomic

    from ..pipeline.project import project_root
    from ..pipeline.report import page
    from ._shipped import pipeline

    html, runs, mixed = page(project_root(), pipeline() / "params.yaml")
    write_atomic(output, html)
    if mixed:
        click.secho(mixed, fg="yellow", err=True)
    click.echo(f"{output}: {runs} evaluated run{'s' * (runs != 1)}, {len(html.encode()):,} bytes")
