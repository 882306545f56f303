"""The blocks of a found network: where each is, what it puts out, and what it costs."""

import pytest
import torch
from tiny import ALL, tiny
from torch import nn

from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.pipeline import figures
from tanglenas_engine.pipeline.blocks import blocks


@pytest.mark.parametrize("name", ALL)
@pytest.mark.part(3)
def test_the_costs_of_all_blocks_are_the_cost_of_the_network(name):
    space = tiny(name)
    state = torch.get_rng_state()
    for architecture in (space.smallest(), space.largest()):
        assert sum(block.macs for block in blocks(space, architecture)) == space.cost(architecture).macs
    assert torch.equal(torch.get_rng_state(), state)


class Images(SearchSpace):
    """A stem and two stages of one to two convolutions, each of which halves the image at its start."""

    name = "images"

    def __init__(self):
        super().__init__()
        depth = self.choice("depth", (1, 2), per=2)
        self.choice("kind", ("a", "b"), per=[depth[0], depth[1]])
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.ModuleList(
            elastic.Depth(depth[s], [nn.Conv2d(4, 4, 3, stride=2 - i, padding=1) for i in range(2)]) for s in range(2)
        )

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def example_input(self, batch):
        return torch.randn(batch, 3, 8, 8)


def test_blocks_have_the_numbers_of_their_layers_their_shapes_and_strides():
    space = Images()
    found = space.architecture(depth=[2, 1], kind=["a", "a", "a"])
    assert [(block.name, block.output, block.stride) for block in blocks(space, found)] == [
        ("stem", "4 x 8 x 8", 1), ("1.1", "4 x 4 x 4", 2), ("1.2", "4 x 4 x 4", 1), ("2.1", "4 x 2 x 2", 2),
    ]  # fmt: skip


def test_a_network_that_cannot_run_without_data_is_drawn_without_its_blocks(tmp_path, monkeypatch):
    space = Images()
    figures.architecture(space, space.largest(), tmp_path / "with.png")
    monkeypatch.setattr(Images, "forward", lambda self, x: x.tolist())
    monkeypatch.setattr(space, "standalone", lambda architecture: nn.Linear(7, 7))
    figures.architecture(space, space.largest(), tmp_path / "without.png")
    assert (tmp_path / "without.png").stat().st_size < (tmp_path / "with.png").stat().st_size
