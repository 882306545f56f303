"""Evaluation: a plain loop's accuracy, exact costs, and how well a supernet ranks architectures."""

import math
import re
import statistics

import pytest
import torch
from spaces import SPACES, vit
from tiny import tiny
from torch import nn

from tanglenas_engine import SearchSpace, elastic
from tanglenas_engine.data import DataView, TensorSamples
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.errors import OutOfReachError, TangleNASError
from tanglenas_engine.pipeline import figures
from tanglenas_engine.runtime.progress import ConsoleProgress
from tanglenas_engine.stages.evaluate import evaluate, rank_correlation
from tanglenas_engine.testing import random_data, same
from tanglenas_engine.training.measure import measure, random_inputs, recalibrate


@pytest.mark.parametrize("name", SPACES)
def test_accuracy_and_costs_are_those_of_the_network(name):
    space = SPACES[name]()
    architecture = space.sample()
    network = space.extract(architecture).train()
    data = random_data(space, ("test",), samples=50)
    result = evaluate(space, architecture, network, data, batch_size=7)
    assert network.training and result.samples == 50

    inputs, targets = data.test.batch(torch.arange(50))
    with torch.no_grad():
        right = network.eval()(inputs).argmax(-1) == targets
    assert result.test_accuracy == pytest.approx(100 * right.double().mean().item())
    assert 0 < result.test_accuracy < 100
    assert result.cost.params == sum(parameter.numel() for parameter in network.parameters())
    assert isinstance(result.cost.flops, int) and result.cost == space.cost(architecture)
    assert (result.smallest, result.largest) == (space.cost(space.smallest()), space.cost(space.largest()))


def test_the_accuracy_of_a_network_that_knows_the_answers():
    space = vit(num_classes=3)
    network = space.extract(space.smallest()).eval()
    inputs = space.example_input(20)
    with torch.no_grad():
        answers = network(inputs).argmax(-1)
    data = DataView({"test": TensorSamples(inputs, answers)})
    assert evaluate(space, space.smallest(), network, data).test_accuracy == 100
    data = DataView({"test": TensorSamples(inputs, (answers + 1) % 3)})
    assert evaluate(space, space.smallest(), network, data).test_accuracy == 0


class Answers(nn.Module):
    """Answers with the number in the first pixel."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.scale = classes, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * nn.functional.one_hot(x[:, 0, 0, 0].long(), self.classes).float()


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8])
def test_a_confusion_matrix_counts_many_classes_whatever_type_labels_have(kind):
    space = vit(num_classes=20)
    inputs = space.example_input(40)
    inputs[:, 0, 0, 0] = labels = torch.arange(40) % 20
    data = DataView({"test": TensorSamples(inputs, labels.to(kind))})
    found = evaluate(space, space.smallest(), Answers(20), data)
    assert found.test_accuracy == 100
    assert torch.tensor(found.confusion).equal(2 * torch.eye(20, dtype=torch.int64))


def test_data_that_do_not_fit_or_are_out_of_reach():
    space = vit()
    architecture, network = space.smallest(), space.extract(space.smallest())
    with pytest.raises(TangleNASError, match="the data are of shape 1 x 6 x 6"):
        wrong = DataView({"test": TensorSamples(torch.randn(4, 1, 6, 6), torch.zeros(4).long())})
        evaluate(space, architecture, network, wrong)
    with pytest.raises(OutOfReachError, match="the test split is out of reach"):
        evaluate(space, architecture, network, random_data(space, ("validation",)))
    with pytest.raises(TangleNASError, match="device 'tpu' cannot be used"):
        evaluate(space, architecture, network, random_data(space, ("test",)), device="tpu")
    with pytest.raises(TangleNASError, match="batch_size is 0, expected a whole number of at least 1"):
        evaluate(space, architecture, network, random_data(space, ("test",)), batch_size=0)


# Rank correlation


def ranked(values):
    """What a benchmark says, from the value of an architecture by its digest."""
    ordered = sorted(values.values(), reverse=True)

    def table(architecture):
        value = values[architecture.digest]
        return {"table_value": value, "table_rank": 1 + ordered.index(value)}

    return table


def scores(space, data, architectures):
    """What each architecture is worth with the supernet's weights, the long way: the less loss, the more."""
    found = {}
    for architecture in architectures:
        network = space.extract(architecture)
        recalibrate(network, random_inputs(data.weights, 256, 8, 0, torch.device("cpu")))
        found[architecture.digest] = -measure(network, data.architecture).loss
    return found


class Small(SearchSpace):
    """Two convolutions: 54 architectures that batch norms tell apart."""

    name = "small"

    def __init__(self):
        super().__init__()
        first, second = self.choice("first", (2, 4, 6)), self.choice("second", (3, 5, 2))
        self.layers = nn.Sequential(
            elastic.Conv2d(1, first, self.choice("kernel1", (1, 3, 5))), elastic.BatchNorm2d(first), nn.ReLU(),
            elastic.Conv2d(first, second, self.choice("kernel2", (3, 1))), elastic.BatchNorm2d(second), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), elastic.Linear(second, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)

    def example_input(self, batch):
        return torch.randn(batch, 1, 5, 5)


@pytest.fixture(scope="module")
def judged():
    torch.manual_seed(0)
    space = Small()
    data = random_data(space, ("weights", "architecture"), samples=200)
    generator = torch.Generator().manual_seed(0)
    every = {a.digest: a for a in (space.sample(generator) for _ in range(1000))}
    assert len(every) == space.size
    return space, data, scores(space, data, every.values())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_table_of_the_supernets_own_scores_is_ranked_perfectly(judged):
    space, data, worth = judged
    before = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    found = rank_correlation(space, data, ranked(worth), architectures="all")
    assert found.kendall_tau == pytest.approx(1) and found.spearman == pytest.approx(1)
    assert {row["digest"]: -row["loss"] for row in found.rows} == pytest.approx(worth, rel=1e-6)
    same({**space.state_dict()}, before, "the supernet")
    assert space.superposition.assignment is None
    reverse = rank_correlation(space, data, ranked({d: -v for d, v in worth.items()}), architectures=10**6)
    assert reverse.kendall_tau == pytest.approx(-1) and reverse.spearman == pytest.approx(-1)
    assert len(reverse.rows) == space.size


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_sample_is_of_distinct_architectures_and_follows_from_the_seed(judged):
    space, data, worth = judged
    noise, spread = torch.Generator().manual_seed(1), statistics.pstdev(worth.values())
    table = ranked({d: v + spread * float(torch.randn((), generator=noise)) for d, v in worth.items()})
    samples = [rank_correlation(space, data, table, architectures=40, seed=seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] and samples[0].rows != samples[2].rows
    assert all(len({row["digest"] for row in sample.rows}) == 40 for sample in samples)
    assert all(0.1 < sample.kendall_tau < sample.spearman < 0.95 for sample in samples)


@pytest.mark.parametrize("architectures, compared", [(None, 12), ("all", 12), (5, 5), (1000, 12)])
def test_of_listed_architectures_a_number_is_compared_that_the_seed_decides(judged, architectures, compared):
    space, data, worth = judged
    listed = list(space.all_architectures())[:12]
    first, again, other = (
        rank_correlation(space, data, ranked(worth), listed=listed, architectures=architectures, seed=seed)
        for seed in (0, 0, 1)
    )
    digests, others = ([row["digest"] for row in found.rows] for found in (first, other))
    assert len({*digests}) == compared and {*digests} <= {one.digest for one in listed}
    assert first == again and (digests != others) == (compared < 12)


def test_a_table_that_ranks_nothing_has_no_correlation(judged):
    space, data, _ = judged
    found = rank_correlation(space, data, lambda _: {"table_value": 5, "table_rank": 1}, architectures=5)
    assert math.isnan(found.kendall_tau) and math.isnan(found.spearman)


def test_an_architecture_whose_loss_is_not_finite_is_the_last_and_the_others_are_ranked(capsys):
    class Widths(SearchSpace):
        def __init__(self):
            super().__init__()
            width = self.choice("width", (2, 4, 6, 8))
            self.layers = nn.Sequential(elastic.Linear(3, width), elastic.Linear(width, 2))

        def forward(self, x):
            return self.layers(x)

        def example_input(self, batch):
            return torch.randn(batch, 3)

    torch.manual_seed(0)
    space = Widths()
    with torch.no_grad():
        space.layers[0].weight[-1] = math.nan  # of the widest network alone
    data = random_data(space, ("weights", "architecture"), samples=40)
    every = list(space.all_architectures())
    worth = {digest: -1e9 if math.isnan(loss) else loss for digest, loss in scores(space, data, every).items()}
    assert list(worth.values()).count(-1e9) == 1
    found = rank_correlation(space, data, ranked(worth), architectures="all", progress=ConsoleProgress())
    assert found.spearman == pytest.approx(1) == found.kendall_tau
    assert (
        "the loss of 1 of 4 architectures is not finite in the supernet: they are its worst" in capsys.readouterr().out
    )


def test_counts_and_the_supernet_before_the_search_are_baselines(judged):
    space, data, worth = judged
    torch.manual_seed(1)
    other = Small()
    every = [space.sample(torch.Generator().manual_seed(seed)) for seed in range(12)]
    every = [*{architecture.digest: architecture for architecture in every}.values()]
    before, own = other.state_dict(), {name: tensor.clone() for name, tensor in space.state_dict().items()}
    found = rank_correlation(space, data, ranked(scores(other, data, every)), listed=every, before=before)
    same({**space.state_dict()}, own, "the supernet")
    assert found.baselines["before_search"] == pytest.approx(1) and found.spearman < 0.9
    assert {row["digest"]: -row["loss"] for row in found.rows} == pytest.approx(
        {architecture.digest: worth[architecture.digest] for architecture in every}, rel=1e-6
    )
    for name in ("params", "macs"):
        costs = {architecture.digest: getattr(space.cost(architecture), name) for architecture in every}
        values = {digest: cost + number / 1000 for number, (digest, cost) in enumerate(costs.items())}
        by_cost = rank_correlation(space, data, ranked(values), listed=every)
        assert by_cost.baselines[name] == pytest.approx(1, abs=0.03) and "before_search" not in by_cost.baselines
        assert [row[name] for row in by_cost.rows] == [*costs.values()]


def test_a_state_of_another_network_is_told_before_the_comparison_and_leaves_the_supernet_as_it_was(judged):
    space, data, _ = judged
    own = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    before = {name: torch.zeros_like(tensor) for name, tensor in own.items()} | {"layers.8.bias": torch.zeros(4)}
    del before["layers.0.weight"]
    message = (
        r"rank_correlation.before holds the weights of another network \(it lacks layers.0.weight; "
        r"the shapes differ: layers.8.bias is \(4,\) there and \(3,\) here\)"
    )
    with pytest.raises(TangleNASError, match=message):
        rank_correlation(space, data, lambda _: pytest.fail("compared"), architectures=5, before=before)
    same({**space.state_dict()}, own, "the supernet")


def test_a_comparison_tells_no_best_loss(judged, capsys):
    space, data, worth = judged
    rank_correlation(space, data, ranked(worth), architectures=3, progress=ConsoleProgress(every=0))
    assert re.match(r"rank correlation 1/3  eta \d+ s\n", capsys.readouterr().out)


def test_nothing_is_compared_unless_asked_for():
    space = vit()
    assert rank_correlation(space, DataView({}), None) is None
    assert rank_correlation(space, DataView({}), ranked({})) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architectures": 1}, "rank_correlation.architectures is 1, expected a whole number of at least 2"),
        ({"architectures": "some"}, "rank_correlation.architectures is 'some', expected a whole number"),
        ({"architectures": 5, "table": None}, "there is no table to compare with: set benchmark.path"),
        ({"architectures": 5, "recalibration_batches": -1}, "rank_correlation.recalibration_batches is -1"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message):
    space = vit()
    options = {"table": ranked({}), **options}
    with pytest.raises(TangleNASError) as caught:
        rank_correlation(space, random_data(space, ("weights", "architecture")), **options)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_space_too_large_to_go_through_is_refused():
    space = tiny("darts")
    with pytest.raises(TangleNASError, match=r"architectures, too many to go through: set rank_correlation.arch"):
        rank_correlation(space, random_data(space, ("weights", "architecture")), ranked({}), architectures="all")


def test_an_incomplete_table_is_told_before_anything_is_judged(judged):
    space, data, _ = judged

    def table(architecture):
        raise TangleNASError(f"the table has no architecture {architecture}")

    forwards = []
    hook = space.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(TangleNASError, match="the table has no architecture"):
        rank_correlation(space, data, table, architectures=20)
    hook.remove()
    assert len(forwards) <= 1  # a look at the shapes


@pytest.mark.parametrize("known", [0, 1])
def test_a_table_that_lists_too_few_of_the_architectures_is_named_before_anything_is_judged(known, monkeypatch):
    space, row = Small(), {"table_value": 90.0, "table_rank": 1}
    rows = iter([row] * known)
    monkeypatch.setattr(Candidates, "measured", None)
    with pytest.raises(
        TangleNASError,
        match=rf"architectures is 5, but the table lists {known} of the 5 .* or set benchmark.path to a table",
    ):
        data = random_data(space, ("weights", "architecture"), samples=20)
        rank_correlation(space, data, lambda _: next(rows, {}), architectures=5)


@pytest.mark.slow
def test_the_figure_shows_every_architecture_and_both_numbers(tmp_path):
    rows = [{"loss": 3.0 - i / 10, "table_value": 90.0 + i % 5} for i in range(20)]
    drawn = []
    for name, shown, tau in (("one", rows, 0.5), ("same", rows, 0.5), ("tau", rows, 0.4), ("less", rows[:9], 0.5),
                             ("none", [], math.nan)):  # fmt: skip
        figures.rank_correlation(shown, tau, 0.6, tmp_path / f"{name}.png")
        drawn.append((tmp_path / f"{name}.png").read_bytes())
    assert drawn[0] == drawn[1] and len(set(drawn)) == 4 and all(image[:4] == b"\x89PNG" for image in drawn)
