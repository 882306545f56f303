"""A size handed to a layer of torch or timm ends in a sentence that says what to write in its place."""

import gc
import inspect

import pytest
import timm.layers
import torch
from torch import nn

from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.errors import TangleNASError


def built(make):
    """The error of a space whose block makes a layer by `make(choice, expression)`."""

    class Block(nn.Module):
        def __init__(self, width, twice):
            super().__init__()
            self.layer = make(width, twice)

    class Space(SearchSpace):
        def __init__(self):
            super().__init__()
            width = self.choice("width", (4, 8))
            self.block = Block(width, width * 2)

    with pytest.raises(TangleNASError) as raised:
        Space()
    return str(raised.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda c, s: nn.Linear(c, 3), "nn.Linear takes numbers only, but its in_features is Choice('width', (4, 8))"),
        (lambda c, s: nn.Linear(3, s), "out_features is Size(width: [8, 16]). Use elastic.Linear, whose"),
        (lambda c, s: nn.Embedding(3, c), "Use elastic.Embedding"),
        (lambda c, s: nn.LayerNorm(c), "Use elastic.LayerNorm"),
        (lambda c, s: nn.LayerNorm(s), "Use elastic.LayerNorm"),
        (lambda c, s: nn.LayerNorm((2, s)), "Use elastic.LayerNorm"),
        (lambda c, s: nn.RMSNorm(s), "Use elastic.RMSNorm"),
        (lambda c, s: nn.GroupNorm(2, s), "Use elastic.GroupNorm"),
        (lambda c, s: nn.BatchNorm2d(s), "Use elastic.BatchNorm2d"),
        (lambda c, s: nn.Conv2d(s, 3, 1), "Use elastic.Conv2d"),
        (lambda c, s: nn.Conv2d(3, 4, c), "its kernel_size is Choice('width', (4, 8)). Use elastic.Conv2d"),
        (lambda c, s: nn.Conv1d(3, s, 1), "Use elastic.Conv1d"),
        (lambda c, s: nn.ConvTranspose2d(s, 3, 1), "Use elastic.ConvTranspose2d"),
        (lambda c, s: nn.Bilinear(s, 3, 4), "nn.Bilinear takes numbers only"),
        (lambda c, s: nn.Bilinear(s, 3, 4), "no elastic form yet. Build it from the layers in `elastic`, or derive"),
        (
            lambda c, s: nn.TransformerEncoderLayer(s, 2),
            "nn.TransformerEncoderLayer takes numbers only, but its d_model",
        ),
        (lambda c, s: nn.Dropout(s), "nn.Dropout takes numbers only, but its p is"),
        (lambda c, s: nn.MaxPool2d(s), "nn.MaxPool2d takes numbers only, but its kernel_size is"),
        (lambda c, s: nn.LSTM(s, 3), "nn.LSTM takes numbers only, but its input_size"),
        (lambda c, s: nn.GRU(3, s), "Recurrent layers have no elastic form"),
        (lambda c, s: timm.layers.Mlp(s), "timm.Mlp takes numbers only, but its in_features is Size(width: [8, 16])"),
        (lambda c, s: timm.layers.LayerNorm2d(s), "Use elastic.LayerNorm2d"),
        (lambda c, s: timm.layers.RmsNorm(s), "Use elastic.RMSNorm"),
    ],
)
def test_a_size_in_a_foreign_layer_ends_in_a_sentence(make, said):
    assert said in built(make)


@pytest.mark.slow
def test_an_elastic_layer_of_an_author_is_named_too():
    class Bilinear(elastic.Elastic, nn.Bilinear):
        pass

    class Linear(elastic.Elastic, nn.Linear):
        pass

    assert built(lambda c, s: nn.Bilinear(s, 3, 4)).endswith("Use Bilinear, whose dimensions may be choices")
    assert "Use elastic.Linear" in built(lambda c, s: nn.Linear(s, 3))
    del Bilinear, Linear
    gc.collect()  # other tests ask for the forms too


def test_other_errors_of_a_constructor_stay_as_they_are():
    class Space(SearchSpace):
        def __init__(self, width):
            super().__init__()
            self.layer = nn.Linear(width, 3)

    with pytest.raises(TypeError, match="empty"):
        Space("4")
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        Space()


def test_the_options_of_a_space_can_be_read_from_its_class():
    class Space(SearchSpace):
        def __init__(self, width=(4, 8), *, classes: int = 3, **options):
            super().__init__(**options)

    assert list(inspect.signature(Space).parameters) == ["width", "classes", "options"]


def test_a_foreign_block_may_have_elastic_layers():
    class Space(SearchSpace):
        def __init__(self):
            super().__init__()
            width = self.choice("width", (4, 8))
            self.mlp = timm.layers.Mlp(8, 16)
            self.mlp.fc1, self.mlp.fc2 = elastic.Linear(width, width * 2), elastic.Linear(width * 2, width)

        def forward(self, x):
            return self.mlp(x)

    space = Space()
    assert space(torch.randn(2, 8)).shape == (2, 8)
