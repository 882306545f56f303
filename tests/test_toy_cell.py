"""The toy cell has the authors' numbers and the table's notation."""

import pytest
import torch

from tanglenas_engine import create_space
from tanglenas_engine.errors import TangleNASError


@pytest.mark.parametrize(
    ("sharing", "parameters"), [("superposed", 239_146), ("entangled", 239_146), ("separate", 304_810)]
)
def test_the_supernet_has_the_papers_size(sharing, parameters):
    space = create_space("toy_cell", sharing=sharing)
    assert sum(p.numel() for p in space.parameters()) == parameters
    assert space.size == 4_096


@pytest.mark.parametrize("sharing", ["superposed", "entangled", "separate"])
@pytest.mark.parametrize("training", [True, False])
def test_corners_are_exact(sharing, training):
    space = create_space("toy_cell", sharing=sharing, channels=4).double()
    generator = torch.Generator().manual_seed(0)
    images = space.example_input(3).double()
    with torch.no_grad():  # running statistics of a mixture
        uniform = {name: torch.full(choice.shape, 0.25).double() for name, choice in space.choices.items()}
        space.relax(uniform)(images)
    space.train(training)
    for _ in range(4):
        architecture = space.sample(generator)
        expected = space.extract(architecture)(images)
        torch.testing.assert_close(space.select(architecture)(images), expected)
        torch.testing.assert_close(space.relax(space.one_hot(architecture))(images), expected)


def test_the_tables_notation_goes_both_ways():
    space = create_space("toy_cell", channels=4)
    architecture = space.sample(torch.Generator().manual_seed(1))
    text = space.to_string(architecture)
    assert text.count(",") == 5 and space.from_string(text) == architecture
    normal, reduce = (
        [(op, i) for op, i in zip(architecture.choices[name], (0, 0, 1), strict=True)] for name in ("normal", "reduce")
    )
    genotype = f"Genotype(normal={normal}, normal_concat=range(1, 3), reduce={reduce}, reduce_concat=range(1, 3))"
    assert space.from_string(genotype) == architecture
    with pytest.raises(TangleNASError, match="names 2 operations, expected 6"):
        space.from_string("sep_conv_3x3, dil_conv_3x3")


def test_small_images_are_refused():
    with pytest.raises(TangleNASError, match="image_size is 4"):
        create_space("toy_cell", image_size=4)
