"""Layers have one number everywhere: `stage.block` where a depth is per stage, in figures and on the console."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.cli.show import layers
from tanglenas_engine.pipeline import figures
from tanglenas_engine.pipeline.figures import network, search


class Staged(SearchSpace):
    """Two stages of one to three layers, whose widths inside and activations are chosen for each layer."""

    name = "staged"

    def __init__(self):
        super().__init__()
        depth = self.choice("depth", (1, 2, 3), per=2)
        inner = self.choice("inner", (4, 2), per=[depth[0], depth[1]])
        self.choice("kind", ("plain", "other"), per=[depth[0], depth[1]])
        self.stages = nn.ModuleList(
            elastic.Depth(
                depth[s],
                [nn.Sequential(elastic.Linear(3, inner[s, i]), elastic.Linear(inner[s, i], 3)) for i in range(3)],
            )
            for s in range(2)
        )

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x

    def example_input(self, batch):
        return torch.randn(batch, 3)


LABELS = ["1.1", "1.2", "1.3", "2.1", "2.2", "2.3"]
ACTIVE = [1, 4, 5]  # of six layers, for the depths 1 and 2: the rows 1.1, 2.1 and 2.2


@pytest.fixture
def panels(monkeypatch):
    """The panels of the figure drawn last, by title."""
    drawn = {}
    original = network.drawing_to

    @contextmanager
    def drawing(path, height):
        with original(path, height) as figure:
            yield figure
            drawn.clear()
            drawn.update({axes.get_title("left") or f"panel {i}": axes for i, axes in enumerate(figure.axes)})

    for module in (network, search):
        monkeypatch.setattr(module, "drawing_to", drawing)
    return drawn


def found(space):
    return space.architecture(depth=(1, 2), inner=(4, 2, 4), kind=("plain", "other", "plain"))


def labels(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


def test_the_drawing_of_an_architecture_hatches_the_layers_that_it_lacks(panels, tmp_path):
    space = Staged()
    figures.architecture(space, found(space), tmp_path / "a.png")
    bars, names = panels["inner (2, 4)"], panels["kind"]
    assert labels(bars) == labels(names) == LABELS
    hatched = [round(patch.get_y() + patch.get_height() / 2) for patch in bars.patches if patch.get_hatch()]
    assert hatched == [row for row in range(1, 7) if row not in ACTIVE]
    assert [(round(text.get_position()[1]), text.get_text()) for text in bars.texts] == [(1, "4"), (4, "2"), (5, "4")]
    assert [(text.get_position()[1], text.get_text()) for text in names.texts] == [
        (1, "plain"),
        (4, "other"),
        (5, "plain"),
    ]
    assert labels(panels["depth (1, 2, 3)"]) == ["1", "2"]


def history(space):
    """One epoch whose mixture leans to the architecture found; the layers beyond the depths lean too."""
    weights = {
        "depth": [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2]],
        "inner": [[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1]],
        "kind": [[0.5, 0.5]] * 6,
    }
    return [{"epoch": 1, "mixture": weights}]


def test_the_maps_of_the_mixture_have_the_same_numbers_and_no_dot_for_a_dropped_layer(panels, tmp_path):
    space = Staged()
    figures.alphas(history(space), space.choices, tmp_path / "a.png")
    assert labels(panels["2"]) == LABELS  # the first map of the line names the layers of all
    dots = {option: list(panels[option].lines[0].get_ydata()) for option in ("2", "4")}
    assert dots == {"2": [4], "4": [1, 5]}


def test_without_choices_layers_are_counted(panels, tmp_path):
    space = Staged()
    options = {name: choice.options for name, choice in space.choices.items()}
    figures.alphas(history(space), options, tmp_path / "a.png")
    assert labels(panels["2"]) == ["1", "2", "3", "4", "5", "6"]
    assert list(panels["4"].lines[0].get_ydata()) == [1, 2, 3, 5, 6]


def test_the_console_has_the_numbers_of_the_figures():
    space = Staged()
    _, rows = layers(space, found(space))
    assert [row[0] for row in rows if row[0] != "1" and row[0] != "2"] == [LABELS[i - 1] for i in ACTIVE]
    named = [row.label for row in space.choices["inner"].rows]
    assert named == LABELS
    assert [row.label for row in space.choices["depth"].rows] == ["1", "2"]


def test_of_many_layers_the_first_of_each_stage_is_named(panels):
    ticks = {}

    class Axes:
        def set_yticks(self, places, names):
            ticks.update(zip(places, names, strict=True))

    search._layer_ticks(Axes(), [f"{s}.{b}" for s in (1, 2, 3) for b in range(1, 12)])
    assert ticks == {1: "1.1", 12: "2.1", 23: "3.1", 33: "3.11"}
    ticks.clear()
    search._layer_ticks(Axes(), [str(i) for i in range(1, 31)])
    assert ticks == {1: "1", 30: "30"}
