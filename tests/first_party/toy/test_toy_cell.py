"""The toy cell has the authors' numbers and the table's notation."""

import pytest
import torch

from tanglenas_engine import create_space
from tanglenas_engine.errors import TangleNASError


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
