"""NAS-Bench-201 has the official networks, counts and notation."""

import csv
import gzip

import pytest
import torch
from paths import shared
from torch import nn

from tanglenas_engine import create_space
from tanglenas_engine.errors import TangleNASError

ALL_3X3 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
MIXED = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|none~2|"


def small(**options):
    return create_space("nb201", channels=4, cells=1, image_size=8, num_classes=3, **options).double()


@pytest.mark.parametrize(("text", "parameters", "macs"), [(ALL_3X3, 1_531_546, 220_119_680), (MIXED, 129_306, None)])
@pytest.mark.slow
def test_architectures_have_the_official_counts(text, parameters, macs):
    with torch.device("meta"):
        space = create_space("nb201")
    cost = space.cost(space.from_string(text))
    assert cost.params == parameters
    assert macs is None or cost.flops == macs


@pytest.mark.exhaustive
def test_every_architecture_of_the_table_has_its_parameters_and_its_notation():
    path = shared("nb201.csv.gz")
    with torch.device("meta"):
        space = create_space("nb201")
    seen = set()
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            architecture = space.from_string(row["arch"])
            assert space.to_string(architecture) == row["arch"]
            assert space.cost(architecture).params == int(row["params_c10"]), row["arch"]
            seen.add(architecture)
    assert len(seen) == space.size


def reference(space, operations, x):
    """A cell written out: node 3 is reached from nodes 0, 1 and 2, whose operations are on edges 3, 4 and 5."""
    edges = space.stages[0][0].edges

    def apply(edge, source):
        name = operations[edge]
        if name == "none":
            return 0 * source
        if name == "skip_connect":
            return source
        if name == "avg_pool_3x3":
            padded = nn.functional.pad(torch.ones_like(source), (1, 1, 1, 1))
            windows = [nn.functional.avg_pool2d(m, 3, 1) for m in (nn.functional.pad(source, (1, 1, 1, 1)), padded)]
            return windows[0] / windows[1]
        _, conv, norm = edges[edge]["nor_conv"]
        weight = conv.weight if name.endswith("3x3") else nn.functional.pad(conv.weight[..., 1:2, 1:2], (1, 1, 1, 1))
        return norm(nn.functional.conv2d(source.relu(), weight, conv.bias, padding=1))

    one = apply(0, x)
    two = apply(1, x) + apply(2, one)
    return apply(3, x) + apply(4, one) + apply(5, two)


@pytest.mark.parametrize("affine", [True, False])
def test_a_cell_sums_the_operations_on_all_nodes_before(affine):
    space = small(affine=affine).eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for text in (
        ALL_3X3,
        MIXED,
        "|nor_conv_1x1~0|+|avg_pool_3x3~0|nor_conv_3x3~1|+|none~0|skip_connect~1|avg_pool_3x3~2|",
    ):
        architecture = space.from_string(text)
        found = space.select(architecture).stages[0][0](x)
        torch.testing.assert_close(found, reference(space, architecture.choices["operation"], x))


@pytest.mark.parametrize("image_size", [4, 8, 9, 28])
def test_images_of_any_size_are_classified(image_size):
    space = create_space("nb201", channels=2, cells=1, image_size=image_size, in_channels=1)
    assert space(space.example_input(2)).shape == (2, 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an architecture of 'nb201'"),
        (ALL_3X3[:-1], "is not an architecture of 'nb201'"),
        (ALL_3X3.replace("~2", "~1"), "is not an architecture of 'nb201'"),
        (ALL_3X3 + "+|none~0|", "is not an architecture of 'nb201'"),
        (ALL_3X3.replace("3x3~2", "3x2~2"), "unknown operation of 'nb201' 'nor_conv_3x2'. Did you mean 'nor_conv_3x3'"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(TangleNASError) as caught:
        small().from_string(text)
    assert message in str(caught.value)


def test_spaces_around_the_nodes_do_no_harm():
    space = small()
    assert space.to_string(space.from_string(MIXED.replace("+", " + ") + "\n")) == MIXED
