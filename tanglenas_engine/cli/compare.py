"""`tanglenas compare`: groups of finished runs over seeds, with intervals and paired differences."""

from pathlib import Path

import click


@click.command(short_help="Compare finished runs over seeds, with intervals.")
@click.option("--by", metavar="NAMES", default="", help="Settings that make a group, by their names in params.yaml, "
              "such as optimizer,search.relaxation; by default all that differ apart from the seed.")  # fmt: skip
@click.option("--join", metavar="NAMES", default="", help="Settings that make no difference, such as search.seconds "
              "where each seed has its own.")  # fmt: skip
@click.option("--against", metavar="GROUP", help="The group with which the others are compared, as the table names "
              "it; by default the one with the most seeds.")  # fmt: skip
@click.option("--metric", "metrics", metavar="NAME", multiple=True, help="Show only this one; may be repeated. The "
              "figure has the first.")  # fmt: skip
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False),
              help="Also write compare.md, compare.csv, compare.tex and compare.png.")  # fmt: skip
def command(by: str, join: str, against: str | None, metrics: tuple[str, ...], out: Path | None) -> None:
    """Compare the finished runs of this project that MLflow knows, as Markdown.

    Runs that differ by seed alone are a group. Each metric has its mean, standard deviation and bootstrap interval over
    seeds, and groups have their differences over common seeds, with the number of seeds that a claim needs. Runs of
    other spaces, datasets or budgets have a table of their own.
    """
    from tanglenas_engine.runtime.files import write_atomic

    from ..pipeline.comparison.curves import read_curves
    from ..pipeline.comparison.figure import draw
    from ..pipeline.comparison.groups import compare
    from ..pipeline.comparison.tables import latex, markdown, table_csv
    from ..pipeline.project import project_root

    root = project_root()
    grouped, joined = ([name.strip() for name in names.split(",") if name.strip()] for names in (by, join))
    comparison = compare(root, grouped, metrics, against, joined)
    text = markdown(comparison)
    click.echo(text, nl=False)
    if out:
        write_atomic(out / "compare.md", text)
        write_atomic(out / "compare.csv", table_csv(comparison))
        write_atomic(out / "compare.tex", latex(comparison))
        curves = read_curves(root, comparison)
        write_atomic(out / "compare.png", draw(comparison, curves))
        if spread := sorted({curve.label for each in curves for curve in each.curves if curve.spread}):
            click.echo(
                f"\nSearches of {', '.join(spread)} logged no time by epoch: the figure spreads their time evenly.",
                err=True,
            )
        click.echo(f"\n{out}: compare.md, compare.csv, compare.tex and compare.png", err=True)
