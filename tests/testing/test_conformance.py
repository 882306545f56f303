"""`tanglenas plugins check`: what keeps the contract passes, and each way to break it is found and named."""

import inspect
import re
import sys

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny
from torch import nn

from tanglenas_engine import Dataset, Objective, SearchSpace, create_dataset, create_objective, create_space, elastic
from tanglenas_engine.cli import main
from tanglenas_engine.data import TensorSamples, TokenSamples, content_hash, make_splits
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.plugins import manager
from tanglenas_engine.spaces.cost import Cost
from tanglenas_engine.superposition.size import combinations
from tanglenas_engine.testing import (
    check_architectures,
    check_batches,
    check_corners,
    check_costs,
    check_dataset,
    check_expectation,
    check_learning,
    check_measure,
    check_objective,
    check_pool,
    check_slope,
    check_space,
    check_standalone,
    report,
)
from tanglenas_objectives.latency_measurement import measure_latency

sys.modules["test_conformance"] = sys.modules[__name__]  # the plugin below names its classes by this module


class Right(SearchSpace):
    def __init__(self, **options):
        super().__init__(**options)
        self.width = width = self.choice("width", (4, 2, 3))
        self.first = elastic.Linear(5, width)
        self.norm = elastic.LayerNorm(width)
        self.drop = nn.Dropout(0.5)
        self.last = elastic.Linear(width, 3)

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)).relu()))

    def example_input(self, batch):
        return torch.randn(batch, 5)


class PlainNorm(Right):
    """Normalises over what comes in: in a mixture, the tail is counted too."""

    def forward(self, x):
        x = self.first(x)
        return self.last(nn.functional.layer_norm(x, x.shape[-1:]))


class PlainLayer(Right):
    """Has a layer that cannot take fewer features."""

    def __init__(self, **options):
        super().__init__(**options)
        self.drop = nn.LayerNorm(4)


class Unused(Right):
    def __init__(self, **options):
        super().__init__(**options)
        self.spare = nn.Parameter(torch.zeros(2))


class Misspelt(Right):
    def forward(self, x):
        return self.frist(x)


class Infinite(Right):
    def forward(self, x):
        return super().forward(x) / 0


class Miscounted(Right):
    def cost(self, architecture):
        return Cost(super().cost(architecture).params + 1, super().cost(architecture).flops)


class Restless(Right):
    """Its architectures depend on torch's global generator."""

    def sample(self, generator=None):
        return super().sample(None)


class Ignored(Right):
    """Has a choice that nothing reads."""

    def __init__(self, **options):
        super().__init__(**options)
        self.choice("spare", (1, 2, 3))  # as many as the width has, so that they are stacked


class Counting(Right):
    """Keeps something from one forward to the next."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + 0.1 * self.calls


class Mixing(Right):
    """Looks at the other samples of the batch."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Dropping(Right):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5))


class Reversed(Right):
    def most_probable(self, mixture):
        return self.smallest()


class Unread(Right):
    def from_string(self, text):
        return self.largest()


class Scaled:
    """Goes on from what it is mixed into."""

    def forward(self, x):
        return 2 * super().forward(x)


class Extended(Scaled, Right):
    """Extends the forward of another space, and of its parts."""

    @property
    def shift(self):
        return self.offset()

    @staticmethod
    def offset():
        return 1.0

    def forward(self, x, *, scale=0.5):
        return scale * super().forward(x) + self.shift


class Overstated(Right):
    size = 4


class Stuck(Right):
    def moves(self, assignment):
        return iter(())


class Inheriting(Right):
    """Its new networks have the supernet's weights."""

    def standalone(self, architecture):
        network = super().standalone(architecture)
        network.load_state_dict(self.inherited(architecture))
        return network


class OfTheSupernet(Right):
    """Writes other weights than it is given."""

    def export(self, network, architecture, folder, dataset=None):
        super().export(self.extract(architecture), architecture, folder, dataset)


class Crash(Right):
    def __init__(self):
        raise ZeroDivisionError("nothing to divide by")


class Choiceless(SearchSpace):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)


@pytest.mark.parametrize("space", [Right, lambda: Right(relaxation="gated"), Extended])
@pytest.mark.slow
def test_a_space_that_keeps_the_contract_passes(space):
    check_space(space)


@pytest.mark.parametrize(
    "check, space, message",
    [
        (check_corners, PlainNorm, r"\(exact\) and the extracted network differ by up to"),
        (check_corners, PlainLayer, "is every layer of a chosen size elastic"),
        (check_learning, Unused, "the weight spare gets no gradient"),
        (check_learning, Infinite, "not finite"),
        (check_costs, Miscounted, "its network has"),
        (check_architectures, Restless, "give other architectures"),
        (check_architectures, Reversed, r"by most_probable\(one_hot\)"),
        (check_architectures, Unread, r"by from_string\(to_string\)"),
        (check_architectures, Overstated, "the size is 4, but the decisions make 3"),
        (check_architectures, Stuck, "leads to no other architecture"),
        (check_corners, Dropping, "is there dropout that does not"),
        (check_corners, Mixing, "depends on others of its batch"),
        (check_corners, Counting, "evaluation mode differ"),
        (check_standalone, Inheriting, "has the supernet's values"),
        (check_standalone, OfTheSupernet, r"export\(\) writes another"),
        (check_learning, Ignored, "zeros only: the output does not depend on this choice"),
        (check_architectures, Choiceless, "no choice"),
    ],
)
def test_a_space_that_breaks_the_contract_is_told_how(check, space, message):
    with pytest.raises(AssertionError, match=message):
        check(space)


class Images(Dataset):
    num_classes, image_size, in_channels, class_names = 3, 4, 1, ("a", "b", "c")
    name = fingerprint = "images"
    noise = 0.0

    def __init__(self):
        self.images = torch.arange(960.0).reshape(60, 1, 4, 4)
        self.labels = torch.arange(60) % 3

    def subset(self, indices, *, train):
        return TensorSamples(self.images[indices], self.labels[indices], self.prepare)

    @classmethod
    def prepare(cls, rows):
        return rows + cls.noise * torch.rand_like(rows)


class Noisy(Images):
    noise = 1.0


class Renamed(Images):
    @property
    def fingerprint(self):
        return str(id(self))


class Fewer(Images):
    num_classes, class_names = 2, ("a", "b")


class Unnamed(Images):
    class_names = ("a", "b")


class Larger(Images):
    image_size = 8


class Whole(Images):
    """Gives every split the whole pool."""

    def subset(self, indices, *, train):
        return super().subset(torch.arange(60), train=train)


class Swapped(Images):
    """Gives samples the labels of others."""

    def subset(self, indices, *, train):
        return TensorSamples(self.images[indices], self.labels[: len(indices)], self.prepare)


class OwnNoise(Images):
    """Augments by a generator that no seed of a batch reaches."""

    generator = torch.Generator().manual_seed(0)

    @classmethod
    def prepare(cls, rows):
        return rows + torch.rand(rows.shape, generator=cls.generator)


class FirstRows(Images):
    """Gives samples the inputs of others, as by a slice in place of the indices."""

    def subset(self, indices, *, train):
        return TensorSamples(self.images[: len(indices)], self.labels[indices], self.prepare)


class Turned(TensorSamples):
    def batch(self, indices):
        inputs, targets = super().batch(indices)
        return inputs.flip(0), targets


class OtherOrder(Images):
    def subset(self, indices, *, train):
        return Turned(self.images[indices], self.labels[indices])


class Pool(TensorSamples):
    """Samples of some positions in the whole pool."""

    def __init__(self, rows, labels, indices):
        super().__init__(rows, labels[indices])
        self.indices = indices

    def batch(self, indices):
        return self._rows[self.indices[indices]], self.labels[indices]


class Holding(Images):
    """Gives the samples of every split the whole pool."""

    def subset(self, indices, *, train):
        return Pool(self.images, self.labels, indices)


LARGE = torch.arange(60.0 * 32 * 32).reshape(60, 1, 32, 32)


class Numbered(Pool):
    """Samples that are read by their numbers, with something large that is not of samples."""

    def __init__(self, labels, indices):
        super().__init__(None, labels, indices)
        self.vocabulary = bytes(20_000)

    def batch(self, indices):
        return LARGE[self.indices[indices]], self.labels[indices]


class Reading(Images):
    image_size = 32

    def subset(self, indices, *, train):
        return Numbered(self.labels, indices)


class Tokens(Dataset):
    name, labels = "tokens", None

    def __init__(self):
        self.rows = torch.randint(30, (400, 9), generator=torch.Generator().manual_seed(0))
        self.fingerprint = content_hash(self.rows)

    def __len__(self):
        return len(self.rows)

    def space_options(self):
        return {"vocab_size": 30, "block_size": 8}

    def subset(self, indices, *, train):
        return TokenSamples(self.rows[indices], indices, shift=train)


class FirstTokens(Tokens):
    """Gives every split the first part of the text."""

    def subset(self, indices, *, train):
        return TokenSamples(self.rows[: len(indices)], indices, shift=train)


class SameTokens(TokenSamples):
    def batch(self, indices):
        inputs, _ = super().batch(indices)
        return inputs, inputs


class NoNextTokens(Tokens):
    def subset(self, indices, *, train):
        return SameTokens(self.rows[indices], indices)


class Plain(Dataset):
    """Images whose classes have no names."""

    num_classes, image_size, in_channels, name, fingerprint = 3, 4, 1, "plain", "plain"
    __init__, subset, prepare, noise = Images.__init__, Images.subset, Images.prepare, 0.0


class Unpicklable(Images):
    def subset(self, indices, *, train):
        return TensorSamples(self.images[indices], self.labels[indices], lambda rows: rows)


class Broken(Images):
    @classmethod
    def prepare(cls, rows):
        return rows / 0


class Masked(Images):
    test_indices = torch.arange(60) >= 50


class Twice(Images):
    class_names = ("a", "b", "b")


class Table(Images):
    """Rows of a table, with an option of its own for a space."""

    def __init__(self):
        super().__init__()
        self.images = self.images.flatten(1)

    def space_options(self):
        return {"num_classes": 3, "features": 4}


def python_code():
    return create_dataset("stdlib_text", characters=20_000)


@pytest.mark.parametrize("dataset", [Images, Table, Tokens, Plain, lambda: create_dataset("digits"), python_code])
def test_a_dataset_that_keeps_the_contract_passes(dataset):
    check_dataset(dataset)


@pytest.mark.parametrize(
    "check, dataset, message",
    [
        (check_batches, Noisy, "the validation split is augmented"),
        (check_batches, Larger, r"expected \(\d+, 1, 8, 8\)"),
        (check_batches, Whole, "does it ignore them"),
        (check_batches, Swapped, "are not those of its indices in the pool"),
        (check_batches, OwnNoise, "must draw from the global generators"),
        (check_batches, Unpicklable, "cannot be pickled"),
        (check_batches, FirstRows, "the input of sample .* another one in a batch of the validation split than alone"),
        (check_batches, OtherOrder, "the input of sample .* another one in a batch"),
        (check_batches, Holding, "it holds the samples of other splits"),
        (check_batches, FirstTokens, "the input of sample .* another one in a batch"),
        (check_batches, NoNextTokens, "targets are not the tokens that follow"),
        (check_batches, Broken, "are not finite"),
        (check_pool, Twice, "class_names"),
        (check_pool, Renamed, "differs from time to time"),
        (check_pool, Fewer, "labels go from 0 to 2, expected 0 to 1"),
        (check_pool, Unnamed, "class_names"),
    ],
)
def test_a_dataset_that_breaks_the_contract_is_told_how(check, dataset, message):
    with pytest.raises(AssertionError, match=message):
        check(dataset)


def test_a_mask_is_no_list_of_official_test_samples():
    with pytest.raises(TangleNASError, match=r"test_indices of images is torch.bool of shape \(60,\), expected"):
        make_splits(Masked(), seed=0)


class Weight(Objective):
    """A cost that is no sum of tables: the square of the parameters. It is for spaces that can be enumerated."""

    name, unit = "weight", "g"

    def terms(self, space):
        if space.size > 100:
            raise TangleNASError(f"{space.name!r} is too large")

    def measure(self, architecture):
        return float(self.space.cost(architecture).params) ** 2

    def expectation(self, mixture):
        total = torch.zeros((), dtype=torch.float64)
        for picks in combinations(self.space.rows):
            weights = [mixture.stacks[len(row.options)][row.slot][option] for row, option in picks.items()]
            total = total + torch.stack(weights).prod() * self.measure(self.space.architecture_of(picks))
        return total


class ForOne(Weight):
    def terms(self, space):
        raise TangleNASError(f"it is for the space 'mine', not {space.name!r}")


class Unitless(Weight):
    unit = ""


class Falling(Weight):
    def measure(self, architecture):
        return 1.0 / super().measure(architecture)


class Moody(Weight):
    def measure(self, architecture):
        return super().measure(architecture) + torch.rand(()).item()


class OfTheMean(Weight):
    """The square of the expected number: right at the corners only."""

    def expectation(self, mixture):
        return self.space.expected_cost(mixture).params ** 2


class Offset(Weight):
    def expectation(self, mixture):
        return super().expectation(mixture) + 1e5


class Flat(Weight):
    def expectation(self, mixture):
        return super().expectation(mixture).detach()


class Halved(Weight):
    """Its gradient is half of what its values say."""

    def expectation(self, mixture):
        expected = super().expectation(mixture)
        return (expected + expected.detach()) / 2


class TwoPrices(Objective):
    """Measures another cost than its tables hold."""

    name, unit = "two", "g"

    def terms(self, space):
        return space.terms("params")

    def measure(self, architecture):
        return 2.0 * super().measure(architecture)


class Square(Right):
    """Two choices, one of which counts twice."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = inner = self.choice("inner", (2, 4))
        self.last = nn.Sequential(elastic.Linear(self.width, inner), elastic.Linear(inner, 3))


@pytest.mark.parametrize("objective", [Weight, lambda: create_objective("params"), lambda: create_objective("macs")])
@pytest.mark.parametrize("space", [Right, Square])
def test_an_objective_that_keeps_the_contract_passes(objective, space):
    check_objective(objective, space)


@pytest.mark.parametrize("space", ["autoformer_nano", "toy_cell", "gpt_nano", "darts"])
@pytest.mark.parametrize("metric", ["params", "macs"])
@pytest.mark.slow
def test_our_counts_keep_the_contract_on_every_kind_of_space(metric, space):
    check_objective(lambda: create_objective(metric), lambda: tiny(space))


@pytest.mark.slow
def test_our_latency_keeps_the_contract(tmp_path):
    measure_latency(tiny("toy_conv_macro"), threads=1, fitted=2, validated=0, repeats=1).save(tmp_path / "table.json")
    for check in (check_expectation, check_slope):  # of one hurried measurement, the largest need not be slowest
        check(lambda: create_objective("latency", table=tmp_path / "table.json"), lambda: tiny("toy_conv_macro"))


@pytest.mark.parametrize(
    "check, objective, message",
    [
        (check_measure, Unitless, "no unit"),
        (check_measure, Falling, "less than the smallest"),
        (check_measure, Moody, "asked again"),
        (check_measure, TwoPrices, r"by terms\(\), which hard budgets are kept in"),
        (check_expectation, OfTheMean, "under a mixture over .* the architectures cost"),
        (check_expectation, Offset, "at its corner"),
        (check_slope, Flat, "does not depend on the mixing weights"),
        (check_slope, Halved, "but its values rise by"),
    ],
)
def test_an_objective_that_breaks_the_contract_is_told_how(check, objective, message):
    with pytest.raises(AssertionError, match=message):
        check(objective, Square)


class ByRows(Objective):
    """Expects each row by itself, in a space that decides rows together."""

    name, unit = "by_rows", "parameters"

    def terms(self, space):
        return space.terms("params")

    def expectation(self, mixture):
        return self.additive.expected(mixture)


def test_an_expectation_that_is_not_over_architectures_is_told():
    with pytest.raises(AssertionError, match=r"under a mixture over .*\[13\] the architectures cost"):
        check_expectation(ByRows, lambda: tiny("darts"))


PLUGIN = """
from tanglenas_engine import hookimpl

@hookimpl
def tanglenas_register_spaces(register):
    register("right", "test_conformance:Right", summary="keeps the contract")
    register("plain_norm", "test_conformance:PlainNorm", summary="does not")
    register("ignored", "test_conformance:Ignored", summary="has a choice that does nothing")
    register("absent", "test_conformance:Absent", summary="cannot be imported")
    register("misspelt", "test_conformance:Misspelt", summary="calls a layer that it has not")
    register("crash", "test_conformance:Crash", summary="fails in its constructor")
    register("silent", "test_conformance:Right")
    register("no_space", "test_conformance:Images", summary="a dataset")

@hookimpl
def tanglenas_register_objectives(register):
    register("weight", "test_conformance:Weight", summary="keeps the contract")
    register("of_the_mean", "test_conformance:OfTheMean", summary="does not")
    register("for_one", "test_conformance:ForOne", summary="is for another space")
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """The command, where the distribution tanglenas-theirs is installed."""
    info = tmp_path / "tanglenas_theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tanglenas-theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tanglenas]\ntheirs = tanglenas_theirs\n")
    (tmp_path / "tanglenas_theirs.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TANGLENAS_PLUGINS", raising=False)
    manager.cache_clear()
    yield lambda *arguments: CliRunner().invoke(main, ["plugins", "check", *arguments])
    sys.modules.pop("tanglenas_theirs", None)
    manager.cache_clear()


@pytest.mark.slow
def test_one_name_is_checked_and_passes(check):
    result = check("right")
    assert result.exit_code == 0
    assert result.stdout.count("\n  ok  ") == 7 and result.stdout.startswith("space right\n")


@pytest.mark.slow
def test_an_exception_is_told_with_its_place_in_the_plugin(check):
    result = check("misspelt")
    line = inspect.getsourcelines(Misspelt.forward)[1] + 1
    assert f"has no attribute 'frist' ({__file__}:{line}, in forward)" in result.stdout


def test_claims_of_checks_are_sentences():
    claims = [report._sentence(check) for checks in report.CHECKS.values() for check in checks]
    assert not [claim for claim in claims if re.search(r"(, )?and that ", claim) or not claim[0].isupper()]


@pytest.mark.parametrize(
    "name, status, passed, message",
    [
        ("weight", 0, 4, "Every check passed"),
        ("of_the_mean", 1, 3, "the architectures cost"),
        ("for_one", 1, 1, "it is for the space 'mine', not 'right'"),
    ],
)
@pytest.mark.slow
def test_an_objective_is_checked_on_the_space_that_is_named(check, name, status, passed, message):
    result = check(name, "--space", "right")
    assert result.exit_code == status and message in result.stdout
    assert result.stdout.count("\n  ok  ") == passed and result.stdout.count("(right)") == 3


@pytest.mark.slow
def test_a_choice_may_do_nothing_if_it_is_named(check):
    assert "zeros only" in check("ignored").stdout
    assert "zeros only" not in check("ignored", "--idle", "spare").stdout
    assert "Did you mean 'spare'?" in check("ignored", "--idle", "spares").stderr
    told = check("theirs", "--idle", "spare").stdout
    assert "unknown idle choice" not in told and "zeros only" not in told


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_objective_is_checked_where_it_fits(check, tmp_path):
    measure_latency(create_space("toy_cell"), threads=1, fitted=0, validated=0, repeats=1).save(tmp_path / "table.json")
    result = check("latency", "-o", f"table={tmp_path / 'table.json'}")
    assert result.stdout.count("(toy_cell)") == 3 and "(autoformer_nano)" not in result.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_plugin_is_checked_whole_and_each_fault_is_in_the_report(check):
    result = check("Tanglenas_Theirs")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    failed = [i for i, line in enumerate(lines) if line.startswith("  FAIL")]
    reasons = [lines[i + 1].strip() for i in failed]
    assert ["differ by up to" in reason for reason in reasons].count(True) == 1
    assert any("has no attribute 'Absent'" in reason for reason in reasons)
    assert sum(reason.startswith("ZeroDivisionError: nothing to divide by (") for reason in reasons) == 6
    assert any("has no summary" in reason for reason in reasons)
    assert any("no subclass of tanglenas_engine.SearchSpace" in reason for reason in reasons)
    assert result.stderr == f"\n{len(failed)} checks failed.\n"


def test_a_plugin_that_does_not_load_is_told_why(check, tmp_path):
    (tmp_path / "tanglenas_theirs.py").write_text("import nothing_of_that_name")
    with pytest.warns(UserWarning, match="nothing_of_that_name"):
        result = check("theirs")
    assert result.exit_code == 1 and "No module named 'nothing_of_that_name'" in result.stdout


def test_an_unknown_plugin_names_the_closest(check):
    result = check("thiers")
    assert result.exit_code == 2 and "Did you mean 'theirs'?" in result.stderr


def test_options_go_to_what_takes_them(check, tmp_path):
    result = check("image_folder", "-o", f"root={tmp_path / 'none'}")
    assert result.exit_code == 1 and str(tmp_path / "none") in result.stdout


def test_an_option_that_nothing_takes_is_named_with_the_closest(check):
    result = check("digits", "-o", "imagesize=16")
    assert result.exit_code == 2 and "Did you mean 'image_size'?" in result.stderr


def test_a_dataset_names_each_class_once():
    with pytest.raises(TangleNASError, match="class_names of images has 2 names for 3 classes, expected one for each"):
        make_splits(Unnamed(), seed=0)
    assert Plain().input_config()["label_names"] == ["0", "1", "2"]
    unnamed = Plain()
    unnamed.class_names = ()
    make_splits(unnamed, seed=0)


def test_what_is_large_and_no_sample_is_no_alarm():
    check_batches(Reading)
