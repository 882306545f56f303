"""A benchmark: values from a table of the whole space, a place in a pool."""

import pytest
import torch
from tiny import tiny

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.configurables import benchmark
from tanglenas_engine.superposition.size import combinations
from tanglenas_engine.tables import Benchmark, Table


@pytest.fixture
def space():
    return tiny("convolutional")


def pool(space, count=20):
    generator, keys = torch.Generator().manual_seed(0), {}
    while len(keys) < count:
        keys[space.to_string(space.sample(generator))] = float(len(keys))
    losses = list(keys.values())
    return Table(keys, {"test_loss": losses, "test_acc": [99 - loss for loss in losses]}, space.name).of(space)


@pytest.mark.parametrize(("metric", "name"), [("test_loss", "test_loss"), ("test_acc", "test_accuracy")])
def test_a_network_has_a_percentile_in_a_pool(space, metric, name):
    benchmark = Benchmark(pool(space, 10), metric)
    assert len(benchmark.listed) == 10
    value = {"test_loss": 2.5, "test_accuracy": 96.5}[name]  # three are better, seven are worse
    placed = benchmark.judged(space.largest(), {name: value})
    assert placed["pool_percentile"] == pytest.approx(70) and placed["pool_size"] == 10
    # The exact interval of 7 in 10, from tables of the binomial distribution.
    assert placed["pool_percentile_low"] == pytest.approx(34.755, abs=0.01)
    assert placed["pool_percentile_high"] == pytest.approx(93.326, abs=0.01)
    best = benchmark.placed({name: {"test_loss": -1.0, "test_accuracy": 100.0}[name]})
    assert best["pool_percentile"] == 100 and best["pool_percentile_high"] == 100
    assert benchmark.placed({}) == {}


def test_a_percentile_is_among_single_trainings(space):
    generator = torch.Generator().manual_seed(0)
    trainings = torch.rand(3, 20, generator=generator).tolist()  # the seeds decide alone
    means = torch.tensor(trainings).mean(0).tolist()
    table = Table([*pool(space).keys], {"test_loss": means}, space.name).of(space)
    benchmark, lucky = Benchmark(table, "test_loss"), {"test_loss": 0.1}
    assert benchmark.placed(lucky)["pool_percentile"] == 100
    worse = 100 * sum(value > 0.1 for values in trainings for value in values) / 60
    placed = benchmark.judged(space.largest(), lucky, trainings)
    assert placed["pool_percentile"] == pytest.approx(worse) and worse < 100
    assert placed["pool_percentile_low"] < worse < placed["pool_percentile_high"] < 100
    assert placed["pool_size"] == 20


def test_a_pool_looks_up_what_it_lists(space):
    benchmark = Benchmark(pool(space), "test_loss")
    found = benchmark(benchmark.listed[2])
    assert (found["table_value"], found["table_rank"]) == (2.0, 3)
    judged = benchmark.judged(benchmark.listed[2], {"test_loss": 2.5})
    assert judged == {**found, **benchmark.placed({"test_loss": 2.5})} and judged["pool_size"] == 20
    other = next(one for one in space.all_architectures() if one not in benchmark.listed)
    assert benchmark(other) == {}


@pytest.mark.parametrize(("left_out", "pools"), [(0, False), (1, False), (400, True)])
def test_a_table_says_how_many_architectures_it_lists(tmp_path, capsys, left_out, pools):
    space = tiny("toy_cell")
    keys = [space.to_string(one) for one in space.all_architectures()][left_out * 10 :]
    Table(keys, {"test_loss": [1.0] * len(keys)}, space.name).write(tmp_path / "table.csv")
    found = benchmark(space, str(tmp_path / "table.csv"), "test_loss")
    told = capsys.readouterr().err
    expected = f"table.csv: the table lists {len(keys):,} of 4,096 architectures: the values of all others are"
    assert expected in told if left_out else told == ""
    assert ("(a pool)" in told) == (found.listed is not None) == pools


def test_a_table_of_the_whole_space_has_values_and_no_percentile(space):
    keys = {space.to_string(space.architecture_of(picks)): 1.0 for picks in combinations(space.rows)}
    values = [float(i) for i in range(len(keys))]
    benchmark = Benchmark(Table(keys, {"test_loss": values}, space.name).of(space), "test_loss")
    assert benchmark.listed is None
    assert benchmark.judged(space.largest(), {"test_loss": 1.0}) == benchmark.row(space.largest())


def test_a_table_that_lacks_a_few_architectures_is_no_pool(space):
    keys = [*dict.fromkeys(space.to_string(space.architecture_of(picks)) for picks in combinations(space.rows))]
    missing, known = space.from_string(keys.pop(3)), space.from_string(keys[0])
    benchmark = Benchmark(
        Table(keys, {"test_loss": [float(i) for i in range(len(keys))]}, space.name).of(space), "test_loss"
    )
    assert benchmark.listed is None and benchmark(known)["table_rank"] == 1
    assert benchmark(missing) == {} and benchmark.judged(missing, {"test_loss": 1.0}) == {}


def test_an_unknown_metric_is_refused_at_once(space):
    with pytest.raises(TangleNASError, match="test_los"):
        Benchmark(pool(space), "test_los")
