"""Figures are valid, the same bytes for the same input, show what they are given, and need no pyplot."""

import itertools
import subprocess
import sys
from collections import OrderedDict

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from spaces import SPACES, make, random_mixture, vit
from torch import nn

from tanglenas_engine import SearchSpace, create_optimizer, elastic, elasticize
from tanglenas_engine.data import DataView, TensorSamples
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import figures
from tanglenas_engine.pipeline.figures import drawing
from tanglenas_engine.stages.discretize import discretize
from tanglenas_engine.stages.search import search


class Once(SearchSpace):
    """Choices made once only."""

    name = "once"

    def __init__(self, width=(4, 2, 8)):
        super().__init__()
        size = self.choice("width", width)
        self.layers = nn.Sequential(elastic.Linear(3, size), nn.Tanh(), elastic.Linear(size, 2))

    def forward(self, x):
        return self.layers(x)

    def example_input(self, batch):
        return torch.randn(batch, 3)


def view(space, classes=3, samples=12):
    """The same few samples in every split."""
    same = TensorSamples(space.example_input(samples), torch.arange(samples) % classes)
    return DataView(dict.fromkeys(("weights", "architecture", "validation", "training"), same))


def options(space):
    return {name: choice.options for name, choice in space.choices.items()}


def history(space, epochs):
    """Rows as `search` writes them, of a mixture that becomes more and more decided."""
    logits = {name: alpha.detach() for name, alpha in random_mixture(space)[0].items()}
    rows = []
    for epoch in range(1, epochs + 1):
        sway = {name: epoch / epochs * value + 0.1 * torch.randn_like(value) for name, value in logits.items()}
        mixture = space.mixture({name: value.softmax(-1) for name, value in sway.items()})
        current = space.most_probable(mixture)
        cost, expected = space.cost(current), space.expected_cost(mixture)
        rows.append(
            {
                "epoch": epoch,
                "weight_accuracy": 90 - 60 / epoch,
                "validation_accuracy": 85 - 50 / epoch,
                "entropy": mixture.entropy(),
                "expected_params": float(expected.params),
                "expected_macs": float(expected.flops),
                "params": cost.params,
                "macs": cost.flops,
                "digest": current.digest,
                "architecture": str(current),
                "mixture": {name: mixture[name].tolist() for name in mixture},
            }
        )
    return rows


def retraining(epochs):
    return [
        {"epoch": e, "loss": 2 / e, "accuracy": 95 - 60 / e, "validation_accuracy": 94 - 50 / e}
        for e in range(1, epochs + 1)
    ]


def tried(space, count):
    rows = []
    for seed in range(count):
        found = space.sample(torch.Generator().manual_seed(seed))
        cost = space.cost(found)
        scores = {"loss": 2.0 - seed / 10, "accuracy": 50.0 + seed}
        rows.append({"digest": found.digest, **scores, "params": cost.params, "macs": cost.flops})
    return rows[::-1]


def drawn(path):
    """The pixels of a figure, (height, width, 3), after checks that a page can show it."""
    with Image.open(path, formats=("PNG",)) as image:
        assert image.format == "PNG"
        assert image.width == 1600
        assert 100 <= image.height <= 4000
        assert "Software" not in image.info
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.min() < 128 < pixels.max()  # ink on paper
    return pixels


def shows(pixels, colour):
    """How many pixels have exactly a colour, given as "#rrggbb"."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels == wanted).all(-1).sum())


MADE = {
    **{name: lambda name=name: make(name) for name in SPACES},
    "once": Once,
    "no choice": lambda: Once(width=(4,)),
    "one option of some": lambda: vit(depth=(2,), mlp_ratio=(2,)),
    "one layer": lambda: vit(depth=(1,)),
    "14 layers": lambda: vit(depth=(12, 14)),
    "many options": lambda: vit(embed_dim=range(4, 13), num_heads=range(1, 11)),
    "many layers": lambda: vit(depth=(25, 30)),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.part(4)
@pytest.mark.exhaustive
def test_every_space_can_be_drawn(name, tmp_path):
    space = MADE[name]()
    figures.alphas(history(space, 3), options(space), tmp_path / "alphas.png")
    figures.architecture(space, space.smallest(), tmp_path / "smallest.png")
    figures.architecture(space, space.largest(), tmp_path / "largest.png")
    for path in tmp_path.iterdir():
        drawn(path)


@pytest.mark.parametrize("epochs", [1, 2, 100])
@pytest.mark.exhaustive
def test_searches_and_trainings_of_any_length_can_be_drawn(epochs, tmp_path):
    space = vit()
    rows = history(space, epochs)
    figures.alphas(rows, options(space), tmp_path / "alphas.png")
    figures.anytime(rows, tmp_path / "anytime.png")
    figures.training(retraining(epochs), tmp_path / "training.png")
    figures.candidates(tried(space, epochs), tmp_path / "candidates.png")
    for path in tmp_path.iterdir():
        drawn(path)


@pytest.mark.parametrize("method", ["darts", "spos"])
def test_what_the_stages_return_can_be_drawn(method, tmp_path):
    space, optimizer = vit(), create_optimizer(method)
    data = view(space)
    result = search(space, optimizer, data, epochs=2, batch_size=6, device="cpu")
    found = discretize(space, data, result.mixture, method=optimizer.derivation, candidates=3, device="cpu")
    figures.alphas(result.history, options(space), tmp_path / "alphas.png")
    figures.anytime(result.history, tmp_path / "anytime.png")
    figures.candidates(found.candidates, tmp_path / "candidates.png")
    figures.architecture(space, found.architecture, tmp_path / "architecture.png")
    for path in tmp_path.iterdir():
        drawn(path)


@pytest.mark.exhaustive
def test_equal_input_gives_equal_bytes_whatever_the_settings_of_matplotlib(tmp_path):
    space, rows = vit(), history(vit(), 3)

    def draw(folder):
        figures.alphas(rows, options(space), folder / "alphas.png")
        figures.anytime(rows, folder / "anytime.png")
        figures.training(retraining(3), folder / "training.png")
        figures.architecture(space, space.largest(), folder / "architecture.png")
        figures.candidates(tried(space, 5), folder / "candidates.png")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = draw(tmp_path / "first")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red", "savefig.dpi": 10}):
        settings = dict(matplotlib.rcParams)
        second = draw(tmp_path / "second")
        assert dict(matplotlib.rcParams) == settings
    assert len(first) == 5
    assert first == second


@pytest.mark.exhaustive
def test_no_pyplot_and_no_matplotlib_before_it_is_needed(tmp_path):
    code = f"""
import sys

from tanglenas_engine.pipeline import figures
assert "matplotlib" not in sys.modules
figures.training({retraining(2)!r}, {str(tmp_path / "training.png")!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_current_architecture_is_marked_where_it_changes(tmp_path):
    rows = history(vit(), 8)
    for row in rows:
        row["digest"] = "same"
    figures.anytime(rows, tmp_path / "same.png")
    rows[4] = {**rows[4], "digest": "other"}  # there and back
    figures.anytime(rows, tmp_path / "changed.png")
    assert shows(drawn(tmp_path / "same.png"), drawing.ORANGE) == 0
    assert shows(drawn(tmp_path / "changed.png"), drawing.ORANGE) > 0


def test_costs_appear_only_where_there_is_a_current_architecture(tmp_path):
    rows = history(vit(), 3)
    figures.anytime(rows, tmp_path / "gradient.png")
    keys = ("epoch", "weight_accuracy", "validation_accuracy")
    figures.anytime([{key: row[key] for key in keys} for row in rows], tmp_path / "sampled.png")
    assert len(drawn(tmp_path / "sampled.png")) < len(drawn(tmp_path / "gradient.png"))
    assert (
        shows(drawn(tmp_path / "sampled.png"), drawing.GREEN)
        == 0
        < shows(drawn(tmp_path / "gradient.png"), drawing.GREEN)
    )


def test_longer_bars_mean_larger_options_and_layers_beyond_the_depth_have_none(tmp_path):
    space = vit(depth=(2, 3))
    for name, heads, ratios in (
        ("few", [1, 1], [1.5, 1.5]),
        ("more", [3, 1], [1.5, 1.5]),
        ("deep", [1] * 3, [1.5] * 3),
    ):
        found = space.architecture(embed_dim=8, depth=len(heads), num_heads=heads, mlp_ratio=ratios)
        figures.architecture(space, found, tmp_path / f"{name}.png")
    blue = {name: shows(drawn(tmp_path / f"{name}.png"), drawing.BLUE) for name in ("few", "more", "deep")}
    assert blue["few"] < blue["more"]
    assert blue["few"] < blue["deep"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first_projection, self.second_projection = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return x + self.second_projection(torch.relu(self.first_projection(x)))


@pytest.mark.parametrize("count", [2, 4, 22])
def test_headings_of_layered_choices_are_apart_and_on_the_page(count, tmp_path, monkeypatch):
    def checked(figure):
        figure.draw_without_rendering()
        titles = [axes.title if axes.get_title() else axes._left_title for axes in figure.axes]
        boxes = [title.get_window_extent() for title in titles if "projection" in title.get_text()]
        assert len(boxes) == count
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        return b""

    stages = OrderedDict((f"stage{n}", nn.Sequential(Block(), Block())) for n in range(count))
    space = elasticize(nn.Sequential(stages), torch.randn(2, 64))
    monkeypatch.setattr(drawing, "png", checked)
    figures.architecture(space, space.smallest(), tmp_path / "drawn.png")


def test_the_order_in_which_options_are_listed_does_not_matter(tmp_path):
    rows = [{"epoch": e, "mixture": {"width": [0.5, 0.2, 0.3], "kernel": [[0.9, 0.1]]}} for e in (1, 2)]
    turned = [{"epoch": e, "mixture": {"width": [0.3, 0.2, 0.5], "kernel": [[0.1, 0.9]]}} for e in (1, 2)]
    figures.alphas(rows, {"width": (4, 8, 6), "kernel": (3, 5)}, tmp_path / "one.png")
    figures.alphas(turned, {"width": (6, 8, 4), "kernel": (5, 3)}, tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_a_weight_that_moved_changes_the_map_of_its_layer(tmp_path):
    still = [{"epoch": e, "mixture": {"kernel": [[0.5, 0.5], [0.6, 0.4]]}} for e in (1, 2)]
    moved = [still[0], {"epoch": 2, "mixture": {"kernel": [[0.4, 0.6], [0.6, 0.4]]}}]
    figures.alphas(still, {"kernel": (3, 5)}, tmp_path / "still.png")
    figures.alphas(moved, {"kernel": (3, 5)}, tmp_path / "moved.png")
    before, after = drawn(tmp_path / "still.png"), drawn(tmp_path / "moved.png")
    assert before.shape == after.shape
    changed = (before != after).any((1, 2))
    assert changed.any()
    assert not changed[len(changed) * 3 // 5 :].any()  # the second layer, and what is below it


def test_nothing_to_draw_is_said_in_the_file_that_a_pipeline_expects(tmp_path):
    sampled = [{"epoch": 1, "weight_accuracy": 10.0, "validation_accuracy": 10.0}]
    figures.alphas(sampled, {"width": (4, 2)}, tmp_path / "sampled.png")
    figures.alphas(history(Once(width=(4,)), 2), {"width": (4,)}, tmp_path / "fixed.png")
    figures.training([], tmp_path / "inherit.png")
    figures.anytime([], tmp_path / "anytime.png")
    figures.candidates([], tmp_path / "candidates.png")
    assert {len(drawn(path)) for path in tmp_path.iterdir()} == {120}


def test_an_architecture_of_another_space_is_refused(tmp_path):
    with pytest.raises(TangleNASError, match="'once'"):
        figures.architecture(vit(), Once().largest(), tmp_path / "architecture.png")
    assert not list(tmp_path.iterdir())
