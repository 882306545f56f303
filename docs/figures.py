"""Draw the figures of the documentation: `python docs/figures.py`. The masks are the engine's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.pipeline.figures.drawing import STYLE

IMAGES = Path(__file__).parent / "images"


class Layers(SearchSpace):
    """A layer for each way in which a weight can follow choices."""

    def __init__(self) -> None:
        super().__init__()
        width, ratio, kernel = self.choice("width", (2, 4, 6)), self.choice("ratio", (1, 2)), self.choice("k", (3, 5))
        self.square = elastic.Linear(width, width, bias=False)
        self.apart = elastic.Linear(self.choice("inputs", (2, 4, 6)), width, bias=False)
        self.joint = elastic.Linear(width, width * ratio, bias=False)
        self.conv = elastic.Conv2d(1, 1, kernel, bias=False)

    def mask(self, layer: nn.Module, **probabilities: Sequence[float]) -> Tensor:
        """What the layer's weight is multiplied with: (outputs, inputs), or the (height, width) of its kernel."""
        uniform = {name: torch.full(choice.shape, 1 / len(choice.options)) for name, choice in self.choices.items()}
        given = {name: torch.tensor(values) for name, values in probabilities.items()}
        self.relax({**uniform, **given})
        mask = layer.covered("weight", torch.ones_like(layer.weight)).detach()
        return mask.reshape(mask.shape[-2:])


def draw(place: Axes, mask: Tensor, title: str, below: str, numbers: str | None = None) -> None:
    """A mask as a picture, with its `numbers` in this form."""
    place.imshow(mask, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    place.set_title(title, loc="center")
    place.set_xlabel(below)
    place.set(xticks=[], yticks=[])
    place.spines[:].set(visible=True, color="0.7")
    for (row, column), value in np.ndenumerate(mask) if numbers else ():
        place.text(column, row, numbers.format(value), ha="center", va="center", fontsize=7,
                   color="white" if value > 0.7 else "0.3")  # fmt: skip


def superposition(path: Path) -> None:
    """The expected padded slice of a weight is one mask; at a corner it is the slice."""
    space, probabilities = Layers(), (0.2, 0.5, 0.3)
    corners = {2: (1.0, 0.0, 0.0), 4: (0.0, 1.0, 0.0), 6: (0.0, 0.0, 1.0)}
    slices = {width: space.mask(space.square, width=corner) for width, corner in corners.items()}
    mixed = space.mask(space.square, width=probabilities)
    assert torch.allclose(mixed, sum(p * one for p, one in zip(probabilities, slices.values(), strict=True)))
    figure = Figure(figsize=(10, 1.85))
    axes = figure.subplots(1, 5)
    for place, (width, one) in zip(axes, slices.items(), strict=False):
        draw(place, one, f"slice of width {width}", "inputs")
    draw(axes[3], mixed, "mask of the mixture", "inputs", "{:.1f}")
    draw(axes[4], slices[4], "mask at a corner", "the slice of width 4", "{:.0f}")
    figure.subplots_adjust(left=0.055, right=0.995, bottom=0.13, top=0.88, wspace=0.42)
    for place, before in zip(axes, ("0.2 ·", "+ 0.5 ·", "+ 0.3 ·", "=", ""), strict=True):
        place.text(-0.05, 0.5, before, transform=place.transAxes, ha="right", va="center", fontsize=10)
    save(figure, path)


def masks(path: Path) -> None:
    """Masks of weights whose dimensions follow different choices, the same, and of a kernel."""
    space = Layers()
    shown: Mapping[str, tuple[Tensor, str]] = {
        "two choices": (space.mask(space.apart, width=(0.2, 0.5, 0.3), inputs=(0.6, 0.3, 0.1)), "inputs"),
        "width * ratio against width": (space.mask(space.joint, width=(0.2, 0.5, 0.3), ratio=(0.5, 0.5)), "width"),
        "kernel of 3 or 5": (space.mask(space.conv, k=(0.6, 0.4)), "columns"),
    }
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for place, (title, (mask, below)) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        draw(place, mask, title, below, "{:.2f}")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    with style.context(["default", STYLE]):
        superposition(IMAGES / "superposition.png")
        masks(IMAGES / "masks.png")
