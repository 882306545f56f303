"""`tanglenas plugins check`: what keeps the contract passes, and each way to break it is found and named."""

import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from tanglenas_engine import Dataset, SearchSpace, create_dataset, elastic
from tanglenas_engine.cli import main
from tanglenas_engine.cost import Cost
from tanglenas_engine.data import TensorSamples
from tanglenas_engine.plugins import manager
from tanglenas_engine.testing import (
    check_architectures,
    check_batches,
    check_corners,
    check_costs,
    check_dataset,
    check_learning,
    check_pool,
    check_space,
)


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


class Crash(Right):
    def __init__(self):
        raise ZeroDivisionError("nothing to divide by")


class Choiceless(SearchSpace):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)


@pytest.mark.parametrize("space", [Right, lambda: Right(relaxation="gated")])
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

    def prepare(self, rows):
        return rows + self.noise * torch.rand_like(rows)


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


@pytest.mark.parametrize("dataset", [Images, lambda: create_dataset("digits")])
def test_a_dataset_that_keeps_the_contract_passes(dataset):
    check_dataset(dataset)


@pytest.mark.parametrize(
    "check, dataset, message",
    [
        (check_batches, Noisy, "the validation split is augmented"),
        (check_batches, Larger, r"expected \(4, 1, 8, 8\)"),
        (check_pool, Renamed, "differs from time to time"),
        (check_pool, Fewer, "labels go from 0 to 2, expected 0 to 1"),
        (check_pool, Unnamed, "class_names"),
    ],
)
def test_a_dataset_that_breaks_the_contract_is_told_how(check, dataset, message):
    with pytest.raises(AssertionError, match=message):
        check(dataset)


PLUGIN = """
from tanglenas_engine import hookimpl

@hookimpl
def tanglenas_register_spaces(register):
    register("right", "test_conformance:Right", summary="keeps the contract")
    register("plain_norm", "test_conformance:PlainNorm", summary="does not")
    register("absent", "test_conformance:Absent", summary="cannot be imported")
    register("crash", "test_conformance:Crash", summary="fails in its constructor")
    register("silent", "test_conformance:Right")
    register("no_space", "test_conformance:Images", summary="a dataset")
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


def test_one_name_is_checked_and_passes(check):
    result = check("right")
    assert result.exit_code == 0
    assert result.stdout.count("\n  ok  ") == 6 and result.stdout.startswith("space right\n")


def test_a_plugin_is_checked_whole_and_each_fault_is_in_the_report(check):
    result = check("Tanglenas_Theirs")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    failed = [i for i, line in enumerate(lines) if line.startswith("  FAIL")]
    reasons = [lines[i + 1].strip() for i in failed]
    assert ["differ by up to" in reason for reason in reasons].count(True) == 1
    assert any("has no attribute 'Absent'" in reason for reason in reasons)
    assert reasons.count("ZeroDivisionError: nothing to divide by") == 5
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
