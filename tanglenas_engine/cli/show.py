"""`tanglenas show`: an architecture, layer by layer."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ._console import print_table
from ._space import read, space_options

if TYPE_CHECKING:
    from tanglenas_engine.spaces.architecture import Architecture
    from tanglenas_engine.spaces.space import SearchSpace


@click.command(short_help="Show an architecture, layer by layer.")
@click.argument("file", metavar="ARCH", type=click.Path(path_type=Path))
@space_options
@click.option("--figure", metavar="FILE", type=click.Path(path_type=Path), help="Draw it into a PNG file as well.")
def command(file: Path, options: tuple[str, ...], figure: Path | None) -> None:
    """Show what the file ARCH chooses, once and per layer, and what the network costs.

    Sizes that do not belong to the architecture (classes, image size) are those of the stage that wrote it, or the
    space's own defaults where no operative.gin lies beside it. A network that retrain builds for larger images costs
    more: give their size, such as `-o image_size=48`.
    """
    space, architecture, *_ = read(file, options)
    cost, least, most = (space.cost(a) for a in (architecture, space.smallest(), space.largest()))
    click.echo(f"{architecture.space}  {architecture.digest}  (one of {space.size:,})\n")
    rows = [
        [name, *(f"{getattr(c, key):,}" for c in (cost, least, most))]
        for key, name in (("params", "params"), ("macs", "multiply-accumulates"))
    ]
    print_table(["cost", "this one", "smallest", "largest"], rows)
    once = [choice for choice in space.choices.values() if not choice.layered]
    if once:
        click.echo()
        chosen = [[c.name, str(architecture.choices[c.name]), " ".join(map(str, c.options))] for c in once]
        print_table(["choice", "chosen", "options"], chosen)
    columns, table = layers(space, architecture)
    if table:
        click.echo()
        print_table(columns, table)
    if figure is not None:
        from ..pipeline.figures import architecture as draw

        draw(space, architecture, figure)
        click.echo(f"\n{figure}")


def layers(space: "SearchSpace", architecture: "Architecture") -> tuple[list[str], list[list[str]]]:
    """Return a row for each layer in use, numbered from 1 as in figures, with its option of every layered choice.

    A choice made per stage and layer numbers both: "2.1" is the first layer of the second stage.
    """
    assignment = space.assignment_of(architecture)
    layered = [choice for choice in space.choices.values() if choice.layered]
    cells: dict[str, dict[str, str]] = {}
    for choice in layered:
        rows = [row for row in choice.rows if row.active(assignment)]
        for row, option in zip(rows, architecture.choices[choice.name], strict=True):
            cells.setdefault(row.label, {})[choice.name] = str(option)
    names = [choice.name for choice in layered]
    ordered = sorted(cells, key=lambda label: [int(number) for number in label.split(".")])
    table = [[label, *(cells[label].get(name, "-") for name in names)] for label in ordered]
    return ["layer", *names], table
