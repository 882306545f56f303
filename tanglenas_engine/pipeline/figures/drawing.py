"""The style of all figures, and their parts: panels, frames, ticks and labels.

matplotlib is imported when something is drawn, without pyplot, and its global settings stay as they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tanglenas_engine.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

WIDTH = 8.0  # inches: once the figure fills a README's column, 9 points are as large as the text around it
LETTER = 0.085  # inches of a letter
BLOCK = 0.17  # inches of the line of a block
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, told apart by the colour-blind
INK, FAINT, PALE = "#333333", "#8a8a8a", "#e6e6e6"
STYLE: dict[str, Any] = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.dpi": 200,
    "font.size": 9,
    "image.cmap": "PuOr_r",
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


@contextmanager
def drawing_to(path: str | Path, height: float) -> Iterator[Figure]:
    """Open a figure `height` inches high, and write it to `path` when the block ends."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # not the user's matplotlibrc: equal input gives equal bytes
        figure = Figure(figsize=(WIDTH, height))
        yield figure
        content = png(figure)
    write_atomic(path, content)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, byte-equal for an equal figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    # The file would name matplotlib's release otherwise.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add a panel, placed in inches from the upper left corner.

    matplotlib's own layouts give up, with a warning, where a space has many or few options or layers.
    """
    full = figure.get_figheight()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / full, width / WIDTH, height / full))


def write(figure: Figure, left: float, middle: float, text: str, **options: Any) -> None:
    """Add a line of text, placed in inches from the upper left corner."""
    figure.text(left / WIDTH, 1 - middle / figure.get_figheight(), text, va="center", **options)


def note(text: str, path: str | Path) -> None:
    """Write a figure that says why there is nothing to draw."""
    with drawing_to(path, 0.6) as figure:
        write(figure, WIDTH / 2, 0.3, text, ha="center")


def short(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 3]}..."


def curve(axes: Axes, epochs: list[int], values: list[float], colour: Any, label: str | None, **options: Any) -> None:
    axes.plot(epochs, values, color=colour, label=label, marker="o" if len(epochs) <= 20 else "", **options)


def frame(axes: Axes, epochs: list[int], title: str) -> None:
    """Set what all panels over epochs share: title, ticks and limits."""
    axes.set_title(title)
    axes.set_xlabel("epoch")
    margin = 0.02 * (epochs[-1] - epochs[0]) or 0.5
    axes.set_xlim(max(epochs[0] - margin, 0.5), epochs[-1] + margin)
    axes.xaxis.set_major_locator(epoch_ticks(6))
    axes.ticklabel_format(axis="y", useOffset=False)


def epoch_ticks(number: int) -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(number, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def widen(axes: Axes) -> None:
    """Let the vertical axis span at least a tenth of its values: the last digits of a constant are no trend."""
    low, high = axes.get_ylim()
    centre, reach = (low + high) / 2, max(high - low, 0.1 * high) / 2
    axes.set_ylim(centre - reach, centre + reach)


def from_zero(axes: Axes, *, both: bool = False) -> None:
    """Let the vertical axis, or both, begin at 0; mark one as broken where 0 would leave the values half of it."""
    for vertical in (True, False) if both else (True,):
        low, high = axes.get_ylim() if vertical else axes.get_xlim()
        least = axes.dataLim.y0 if vertical else axes.dataLim.x0
        if low > high / 2:
            _break(axes, vertical)
        elif least >= 0 and vertical:
            axes.set_ylim(0, high)
        elif least >= 0:
            axes.set_xlim(0, high)


def _break(axes: Axes, vertical: bool) -> None:
    """Mark an axis as broken, by two strokes through its line: it does not begin at 0."""
    along, across = axes.bbox.height, axes.bbox.width
    if not vertical:
        along, across = across, along
    inch, wide = axes.figure.dpi / along, axes.figure.dpi / across
    for place, colour, width in ((0.10, "white", 3.0), (0.08, FAINT, 0.8), (0.12, FAINT, 0.8)):
        low, high = (place - 0.015) * inch, (place + 0.015) * inch
        ends = [-0.05 * wide, 0.05 * wide], [low, high]
        axes.plot(*(ends if vertical else ends[::-1]), transform=axes.transAxes, color=colour, linewidth=width,
                  marker="", clip_on=False, zorder=5)  # fmt: skip


def label_ends(axes: Axes, ends: list[tuple[float, str, Any]]) -> None:
    """Name curves at their ends, to the right of the panel, moved apart where names would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.15 * axes.figure.dpi / axes.bbox.height
    inch = axes.figure.dpi / axes.bbox.width
    ends = sorted(ends, key=lambda end: end[0])
    places: list[float] = []
    for y, _, _ in ends:
        places.append(max(y, places[-1] + gap) if places else y)
    above = max(0.0, places[-1] - high)
    at_right = axes.get_yaxis_transform()
    for place, (y, text, colour) in zip((place - above for place in places), ends, strict=True):
        axes.text(1 + 0.2 * inch, place, text, transform=at_right, color=colour, va="center_baseline")
        if abs(place - y) > gap / 2:
            axes.plot([1 + 0.02 * inch, 1 + 0.16 * inch], [y, place], transform=at_right, color=colour,
                      linewidth=0.6, marker="", clip_on=False)  # fmt: skip


def unit_of(largest: float) -> tuple[float, str]:
    """Return the scale in which numbers up to `largest` are short, and the words for it on an axis."""
    for scale, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= scale:
            return scale, f" ({name})"
    return 1.0, ""
