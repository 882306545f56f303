"""Choices that are made per layer of several stages, each with a depth of its own."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from tanglenas_engine import Architecture, SearchSpace, elastic
from tanglenas_engine.errors import TangleNASError


class Staged(SearchSpace):
    """Stages of residual layers; `per` says how the choice of widths is tied to their depths."""

    def __init__(self, depths=(2, 1), per="choice", **options):
        super().__init__(**options)
        D = self.choice("depth", depths, per=2)
        W = self.choice("width", (3, 1, 2), per=D if per == "choice" else [D[0], D[1]])
        self.last = self.choice("last", (1, 2))
        self.stages = nn.ModuleList(elastic.Depth(D[s], [Residual(W[s, i]) for i in range(D[s].max)]) for s in range(2))
        self.head = nn.Sequential(elastic.Linear(4, self.last), elastic.Linear(self.last, 2))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 4)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = elastic.Linear(4, width), elastic.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Grown(SearchSpace):
    """How many stages there are is a choice too: rows that hang on rows that hang on a row."""

    def __init__(self, **options):
        super().__init__(**options)
        S = self.choice("stages", (1, 2))
        D = self.choice("depth", (1, 2), per=S)
        W = self.choice("width", (1, 2, 3), per=D)
        self.body = elastic.Depth(
            S, [elastic.Depth(D[s], [Residual(W[s, i]) for i in range(D[s].max)]) for s in range(S.max)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, 4)


SPACES = {"per choice": Staged, "per list": lambda: Staged(per="list"), "grown": Grown}
every = pytest.mark.parametrize("name", SPACES)


def everything(space):
    """Options for all rows, those that do not count included."""
    listed = {
        name: list(itertools.product(c.options, repeat=len(c))) if c.layered else list(c.options)
        for name, c in space.choices.items()
    }
    for picks in itertools.product(*listed.values()):
        yield dict(zip(listed, picks, strict=True))


@every
def test_size_counts_the_distinct_architectures(name):
    space = SPACES[name]()
    assert space.size == len({space.architecture(**chosen).digest for chosen in everything(space)})


@pytest.mark.parametrize(("name", "size"), [("per choice", (3 + 9) ** 2 * 2), ("grown", (3 + 9) + (3 + 9) ** 2)])
def test_size_is_a_product_over_stages(name, size):
    assert SPACES[name]().size == size


@every
def test_architectures_list_the_rows_in_use_and_are_read_again(name):
    space = SPACES[name]()
    generator = torch.Generator().manual_seed(0)
    for architecture in (space.smallest(), space.largest(), *(space.sample(generator) for _ in range(30))):
        assert len(architecture.choices["width"]) == sum(architecture.choices["depth"])
        again = Architecture.from_json(architecture.to_json())
        assert again == architecture
        assert space.architecture(**again.choices) == architecture
        assert space.architecture_of(space.assignment_of(again)) == architecture


def test_rows_lie_stage_by_stage():
    space = Staged()
    depth, width = space.choices["depth"], space.choices["width"]
    assert (depth.shape, width.shape, len(width)) == ((2, 2), (4, 3), 4)
    assert [repr(row) for row in width.rows] == ["width[0, 0]", "width[0, 1]", "width[1, 0]", "width[1, 1]"]
    assert width[1, 0].rows == width[2].rows == (width.rows[2],)
    assert [size.rows for size in width] == [(row,) for row in width.rows]
    picks = {depth.rows[0]: 1, depth.rows[1]: 0}  # one layer in the first stage, two in the second
    assert [row.active(picks) for row in width.rows] == [True, False, True, True]
    with pytest.raises(IndexError):
        width[0, 2]


def test_stages_may_differ_in_depth():
    space = SearchSpace()
    depths = [space.choice("shallow", (1, 2)), space.choice("deep", (3, 1))]
    width = space.choice("width", (1, 2), per=depths)
    assert [len(stage) for stage in width.stages] == [2, 3]
    assert space.size == (2 + 4) * (8 + 2)
    architecture = space.architecture(shallow=1, deep=1, width=[2, 1])
    assert architecture == space.architecture(shallow=1, deep=1, width=[2, 2, 1, 2, 2])
    assert architecture.choices["width"] == (2, 1)


def test_a_list_for_all_rows_leaves_out_those_beyond_each_depth():
    space = Staged()
    full = space.architecture(depth=[1, 2], width=[3, 1, 2, 1], last=2)
    assert full.choices["width"] == (3, 2, 1)
    assert full == space.architecture(depth=[1, 2], width=[3, 2, 1], last=2)
    assert full.digest == space.architecture(depth=[1, 2], width=[3, 2, 2, 1], last=2).digest
    assert full.digest != space.architecture(depth=[2, 1], width=[3, 2, 1], last=2).digest


@every
@pytest.mark.parametrize("path", ["hard", "exact", "gated"])
def test_a_corner_is_the_extracted_network(name, path):
    space = SPACES[name]().double()
    x = space.example_input(3).double()
    generator = torch.Generator().manual_seed(2)
    for architecture in (space.smallest(), space.largest(), *(space.sample(generator) for _ in range(10))):
        network = space.extract(architecture)
        space.relaxation = "exact" if path == "hard" else path
        _ = space.select(architecture) if path == "hard" else space.relax(space.one_hot(architecture))
        torch.testing.assert_close(space(x), network(x))
        params = sum(p.numel() for p in network.parameters())
        assert space.cost(architecture).params == space.expected_cost(space.one_hot(architecture)).params == params


@every
def test_the_expected_cost_is_the_expectation_over_all_architectures(name):
    space = SPACES[name]()
    mixture = {n: torch.randn(c.shape, dtype=torch.float64).softmax(-1) for n, c in space.choices.items()}
    expected = 0.0
    for chosen in everything(space):
        probability = 1.0
        for n, options in chosen.items():
            rows = mixture[n].reshape(-1, len(space.choices[n].options))
            for row, option in zip(rows, options if isinstance(options, tuple) else [options], strict=True):
                probability *= row[space.choices[n].options.index(option)].item()
        expected += probability * space.cost(space.architecture(**chosen)).params
    assert space.expected_cost(mixture).params.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"width": [3, 2]}, r"choice 'width' of 'Staged' is \[3, 2\], expected a list of 3 options"),
        ({"width": [3] * 5}, "choice 'width' has 4 layers, 3 of them in use, but 5 were given"),
        ({"width": [3, 2, 7]}, r"choice width\[1, 1\] of 'Staged' is 7, expected one of 3, 1, 2"),
        ({"width": 3}, "choice 'width' of 'Staged' is 3, expected a list of 3 options"),
        ({"depth": [1, 3]}, r"choice depth\[1\] of 'Staged' is 3, expected one of 2, 1"),
    ],
)
def test_lists_that_do_not_fit_are_refused(choices, message):
    with pytest.raises(TangleNASError, match=message):
        Staged().architecture(**{"depth": [1, 2], "width": [1, 1, 1], "last": 1, **choices})


def test_a_length_between_those_in_use_and_all_is_refused():
    with pytest.raises(TangleNASError, match="choice 'width' has 4 layers, 2 of them in use, but 3 were given"):
        Staged().architecture(depth=[1, 1], width=[3, 3, 3], last=1)


def test_a_depth_is_one_choice():
    space = SearchSpace()
    a, b = space.choice("a", (1, 2)), space.choice("b", (1, 2))
    assert len(space.choice("scaled", (1, 2), per=a * 2)) == 4
    for number, per in enumerate((a * b, [a, a + b])):
        with pytest.raises(TangleNASError, match=r"is made per Size\(a, b: .*: expected a depth that is one choice"):
            space.choice(f"width{number}", (1, 2), per=per)
