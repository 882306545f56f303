"""Pools: what is trained, what goes on after an interruption, and what is refused."""

import json
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import gin
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from project import lay_out, set_params
from scipy.stats import spearmanr
from stages import forget_settings

from tanglenas_engine import TangleNASError, create_dataset, create_space
from tanglenas_engine.cli import main
from tanglenas_engine.pipeline import outputs, pools, trainings
from tanglenas_engine.pipeline.config.configurables import create, make_splits
from tanglenas_engine.pipeline.config.reader import configured, material_config
from tanglenas_engine.spaces.cost import Cost
from tanglenas_engine.stages.retrain import Retraining
from tanglenas_engine.tables import Benchmark, load_table


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project with a pool of two networks, and those that cost most."""
    folder = lay_out(tmp_path_factory.mktemp("pool") / "project", code=False)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        result = build("--count", "2")
        assert result.exit_code == 0, result.output
    gin.clear_config()
    return folder, result


def test_a_limit_that_is_lifted_is_none(trained, monkeypatch):
    folder, _ = trained
    enter(monkeypatch, folder)
    monkeypatch.setattr(pools, "bound_limits", lambda: {"params": float("inf"), "macs": 2_000_000})
    assert pools._limits(create_space("autoformer_nano"), None) == {"macs": 2_000_000}


def enter(patch, folder):
    forget_settings(patch)
    patch.chdir(folder)


def make_splits_here():
    with configured(trainings.project_arguments()):
        return make_splits(create()[2], seed=0)


def build(*options):
    return CliRunner().invoke(main, ["pool", "build", "pool.csv", "--budget", "0.3", *options])


@pytest.fixture
def project(trained, monkeypatch):
    folder, _ = trained
    kept = {name: (folder / name).read_bytes() for name in ("pool.csv", "pool.json", "params.yaml")}
    enter(monkeypatch, folder)
    yield folder
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    gin.clear_config()


def test_a_pool_is_a_table_of_networks_within_the_band(trained):
    folder, result = trained
    space = create_space("autoformer_nano", image_size=8, in_channels=1, num_classes=10)
    record = json.loads((folder / "pool.json").read_text())
    most = record["identity"]["limits"]["macs"]
    table = load_table(folder / "pool.csv", space)
    assert len(table) == 2
    for key in table.keys:
        assert 0.95 * most <= table.value(key, "macs") <= most
        assert table.value(space.from_string(key), "test_acc") > 10
    assert {*record["baselines"]} == {"params", "macs"} and {*record["rows"]} > {*table.keys}
    for name, key in record["baselines"].items():
        row = record["rows"][key]["0"]
        assert row[name] >= max(table.columns[name])
        assert f"most {name} within the budget: test loss {row['test_loss']:.4f}" in result.output
    assert "how far seeds change the ranks is unknown" in result.output


@pytest.mark.exhaustive
def test_a_pool_goes_on_and_trains_nothing_twice(project, monkeypatch):
    before = json.loads((project / "pool.json").read_text())["rows"]
    done = []

    def run(job):
        done.append(job.architecture)
        return job.architecture, job.seed, dict.fromkeys(pools.COLUMNS, 1.0)

    monkeypatch.setattr(pools.Job, "run", run)
    assert build("--count", "4").exit_code == 0
    after = json.loads((project / "pool.json").read_text())["rows"]
    assert len(done) == 2 and not {*done} & {*before}
    assert {key: after[key] for key in before} == before
    assert len(load_table(project / "pool.csv")) == 4


@pytest.mark.parametrize("losses", [2, 3])
def test_what_is_lost_with_a_worker_runs_again(project, monkeypatch, losses):
    before = json.loads((project / "pool.json").read_text())["rows"]
    called = []

    def run(job):
        called.append((job.architecture, job.seed))
        first, second = (*called, None)[:2]
        if called[-1] == second and called.count(second) <= losses:
            raise BrokenProcessPool("A worker was terminated. Memory?")
        row = "it diverged" if called[-1] == first else dict.fromkeys(pools.COLUMNS, 1.0)
        return job.architecture, job.seed, row

    monkeypatch.setattr(pools.Job, "run", run)
    result = build("--count", "5")
    after = json.loads((project / "pool.json").read_text())
    first, lost, *others = dict.fromkeys(called)
    assert result.output.count("pool: a worker was lost (A worker was terminated); its trainings run again") == 2
    assert list(after["failed"]) == [first[0]] and called.count(first) == 1
    if losses == 3:
        assert result.exit_code == 2 and "the pool lost workers 3 times in a row" in result.output
        assert "lower --jobs" in result.output and not others and after["rows"].keys() == before.keys()
    else:
        assert result.exit_code == 0 and "pool: 3 of 3: " in result.output
        assert called.count(lost) == 3 and len(others) == 1
        assert after["rows"].keys() == {*before, lost[0], others[0][0]}


def test_a_network_whose_test_loss_is_no_number_has_failed(project, monkeypatch):
    recipe = trainings.Recipe(trainings.project_arguments(), str(project), make_splits_here().to_json())
    key = next(iter(json.loads((project / "pool.json").read_text())["rows"]))
    measured = SimpleNamespace(test_loss=float("nan"))
    monkeypatch.setattr(pools, "evaluate", lambda *_: measured)
    assert pools.Job(recipe, key, 0).run() == (key, 0, "its test loss is nan")


def test_a_stop_in_the_last_validation_of_a_network_ends_the_pool(project, monkeypatch):
    validated, end_epoch = [], Retraining.end_epoch

    def stopped(training, epoch, means):
        if epoch == training.epochs:
            validated.append(epoch)
            signal.raise_signal(signal.SIGINT)
        return end_epoch(training, epoch, means)

    monkeypatch.setattr(Retraining, "end_epoch", stopped)
    result = build("--count", "4")
    assert result.exit_code == 1 and "Aborted" in result.output and len(validated) == 1


def test_an_error_that_is_no_divergence_ends_the_pool(project, monkeypatch):
    def full(bench, architecture):
        raise TangleNASError("cannot write state.pt: No space left on device")

    monkeypatch.setattr(trainings.Bench, "train", full)
    result = build("--count", "3")
    assert result.exit_code == 2 and "No space left on device" in result.stderr and "left out" not in result.output


@pytest.mark.exhaustive
def test_a_training_that_fails_is_left_out_and_named(project, monkeypatch):
    monkeypatch.setattr(pools.Job, "run", lambda job: (job.architecture, job.seed, "the loss is nan"))
    result = build("--count", "3")
    assert result.exit_code == 0 and "failed with seed 0 and is left out: the loss is nan" in result.output
    assert len(json.loads((project / "pool.json").read_text())["failed"]) == 1
    assert len(load_table(project / "pool.csv")) == 2


def test_more_seeds_train_each_network_again_and_the_table_has_the_means(project, monkeypatch):
    before = json.loads((project / "pool.json").read_text())["rows"]
    done = []

    def run(job):
        done.append((job.architecture, job.seed))
        return job.architecture, job.seed, dict.fromkeys(pools.COLUMNS, float(job.seed))

    monkeypatch.setattr(pools.Job, "run", run)
    assert build("--count", "2", "--seeds", "3").exit_code == 0
    assert [seed for _, seed in done] == [1] * len(before) + [2] * len(before)
    table = load_table(project / "pool.csv")
    for key in table.keys:
        assert table.value(key, "test_loss") == pytest.approx((before[key]["0"]["test_loss"] + 3) / 3)


def test_a_second_training_has_the_next_seed_and_the_splits_of_the_first(project):
    recipe = trainings.Recipe(trainings.project_arguments(), str(project), make_splits_here().to_json())
    with recipe.open(1) as bench:
        assert bench.seed == 1 and bench.splits.seed == 0
    key = next(iter(json.loads((project / "pool.json").read_text())["rows"]))
    _, seed, again = pools.Job(recipe, key, 1).run()
    first = json.loads((project / "pool.json").read_text())["rows"][key]["0"]
    assert seed == 1 and again["macs"] == first["macs"] and again["test_loss"] != first["test_loss"]


def test_a_network_of_which_one_training_fails_is_left_out_until_it_succeeds(project, monkeypatch):
    fails = load_table(project / "pool.csv").keys[0]

    def run(job):
        return job.architecture, job.seed, "nan" if job.architecture == fails else dict.fromkeys(pools.COLUMNS, 1.0)

    monkeypatch.setattr(pools.Job, "run", run)
    build("--count", "2", "--seeds", "2")
    assert fails not in load_table(project / "pool.csv").keys
    assert f"{fails} is left out, as it failed with another seed: nan" in build("--count", "2").output
    fails = ""
    build("--count", "2", "--seeds", "2")
    assert len(load_table(project / "pool.csv")) == 2


def test_the_record_of_a_pool_without_seeds_is_read(project):
    record = json.loads((project / "pool.json").read_text())
    record["rows"] = {key: row["0"] for key, row in record["rows"].items()}
    (project / "pool.json").write_text(json.dumps(record))
    before = (project / "pool.csv").read_bytes()
    result = build("--count", "2")
    assert "0 of them to do" in result.output and (project / "pool.csv").read_bytes() == before


def test_reliability_foretells_the_correlation_of_the_truth_with_the_means():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=4000)
    for seeds, noise in ((2, 1.0), (3, 2.0)):
        columns = [truth + noise * generator.normal(size=len(truth)) for _ in range(seeds)]
        found = pools.Reliability.of(columns)
        assert found.trainings == seeds
        assert found.correlation == pytest.approx(1 / (1 + noise**2), abs=0.04)
        assert found.ceiling == pytest.approx(spearmanr(truth, np.mean(columns, axis=0)).statistic, abs=0.04)
    assert pools.Reliability.of([[1, 2, 3, 4], [4, 3, 2, 1]]).ceiling == 0


def test_reliability_is_of_networks_that_every_seed_trained(trained):
    folder, _ = trained
    identity = pools.Record.read(folder / "pool.json").identity
    rows = {name: {seed: {"test_loss": float(value)} for seed in ("0", "1")} for value, name in enumerate("abc")}
    record = pools.Record(identity, rows)
    assert record.reliability("test_loss", "abc").correlation == pytest.approx(1)
    assert record.reliability("test_loss", "ab") is None
    for row in rows.values():
        row["1"] = {"test_loss": 1.0}
    assert record.reliability("test_loss", "abc") is None  # equal ranks have no correlation
    del rows["c"]["1"]
    assert record.reliability("test_loss", "abc") is None


def test_a_table_has_means_over_the_seeds_that_all_networks_have(trained, tmp_path):
    folder, _ = trained
    identity = pools.Record.read(folder / "pool.json").identity
    rows = {name: {seed: dict.fromkeys(pools.COLUMNS, float(seed)) for seed in ("0", "1")} for name in "abc"}
    record = pools.Record(identity, rows)
    record.write(tmp_path / "pool.csv", "abc")
    assert load_table(tmp_path / "pool.csv").columns["test_loss"].tolist() == [0.5] * 3
    del rows["c"]["1"]  # a pool that grows
    record.write(tmp_path / "pool.csv", "abc")
    assert load_table(tmp_path / "pool.csv").columns["test_loss"].tolist() == [0.0] * 3
    rows["c"] = {"1": rows["a"]["1"]}  # its first training failed, and is tried again
    record.write(tmp_path / "pool.csv", "abc")
    assert load_table(tmp_path / "pool.csv").columns["test_loss"].tolist() == [0.5] * 2
    rows["c"] = rows["a"]
    record.failed["c"] = "nan"
    record.write(tmp_path / "pool.csv", "abc")
    assert load_table(tmp_path / "pool.csv").columns["test_loss"].tolist() == [0.5] * 2


def test_evaluate_says_what_a_perfect_ranking_of_the_pool_would_reach(project):
    space = create_space("autoformer_nano", image_size=8, in_channels=1, num_classes=10)
    generator = torch.Generator().manual_seed(0)
    keys = list({space.to_string(space.sample(generator)): None for _ in range(8)})
    record = pools.Record.read(project / "pool.json")
    columns = [dict.fromkeys(pools.COLUMNS, float(number)) for number in range(len(keys))]
    record.rows = {key: {"0": columns[place], "1": columns[place - 1]} for place, key in enumerate(keys)}
    record.write(project / "pool.csv", keys)
    expected = record.reliability("test_loss", keys)
    stage = SimpleNamespace(space=space, dataset=create_dataset("digits"), progress=SimpleNamespace(note=print))
    result = SimpleNamespace(cost=SimpleNamespace(macs=10**9), test_accuracy=1.0, test_loss=1.0)
    with (
        configured((*trainings.project_arguments(), 'benchmark.path = "pool.csv"')),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(outputs, "read_splits", lambda: make_splits(stage.dataset, seed=0))
        benchmark = Benchmark(load_table(project / "pool.csv", space), "test_loss")
        found = outputs.looked_up(stage, benchmark, space.largest(), result)
        result.cost = SimpleNamespace(macs=0, params=0)
        comparable = outputs.looked_up(stage, benchmark, space.largest(), result)
    assert found == {"spearman_ceiling": expected.ceiling} and 0 < expected.ceiling < 1
    # The losses are 0 to 7 with both seeds. Of the means, 7 of 8 are above 1.
    assert comparable["pool_percentile"] == 75.0 and comparable["pool_size"] == 8
    (project / "pool.json").unlink()
    assert pools.agreement(project / "pool.csv", "test_loss", keys) is None


@pytest.mark.parametrize(
    ("change", "part"),
    [({"retrain": {"epochs": 2}}, "recipe"), ({"seed": 1}, "splits"), ({"space": "autoformer_t"}, "space")],
)
def test_a_pool_of_something_else_is_refused(project, change, part):
    set_params(project, **change)
    result = build("--count", "2")
    assert result.exit_code == 2 and f"pool.csv is a pool of another {part}: give another file" in result.output


@pytest.mark.parametrize(
    ("change", "macs", "reason"),
    [
        ({}, 1, ""),
        ({"seed": 1}, 1, "pool.csv is a pool of another test split, which the seed decides for this dataset"),
        ({}, 10**9, "the network has 1,000,000,000 macs, and those of pool.csv at most"),
        ({"retrain": {"epochs": 2}}, 1, "pool.csv is a pool of another recipe"),
        ({"retrain": {"mode": "finetune"}}, 1, "were trained from scratch, and retrain.mode is 'finetune'"),
    ],
)
def test_a_network_is_compared_with_a_pool_of_its_own_recipe_and_data(project, change, macs, reason):
    set_params(project, **change)
    with configured(trainings.project_arguments()):
        seed, space, dataset = create()
        splits = make_splits(dataset, seed=seed)
    assert reason in pools.incomparable(Path("pool.csv"), space, dataset, splits, Cost(1, macs))
    assert reason or not pools.incomparable(Path("pool.csv"), space, dataset, splits, Cost(1, macs))


@pytest.mark.parametrize(
    "bindings", [[], ['read_architecture.pick = "12"'], ["retrain.checkpoint_every = 7"], ['benchmark.path = "x.csv"']]
)
def test_a_recipe_has_nothing_that_no_result_depends_on(project, bindings):
    arguments = trainings.project_arguments(*bindings)
    with configured(arguments):
        seed, space, dataset = create()
    splits, known = make_splits(dataset, seed=seed), pools.Record.read(Path("pool.json")).identity.recipe
    assert pools.Identity.here(arguments, seed, space, dataset, splits, {}).recipe == known
    other = trainings.project_arguments("retrain.clip = 7.5")
    assert pools.Identity.here(other, seed, space, dataset, splits, {}).recipe != known


def test_pools_of_earlier_versions_stay_of_their_recipe(project):
    with configured((*trainings.project_arguments(), "SEED = 0")):
        before = gin.config_str()
        assert material_config() == before and gin.config_str() == before


def test_a_network_is_not_compared_with_a_pool_of_other_data(project):
    with configured(trainings.project_arguments()):
        seed, space, dataset = create()
        splits = make_splits(dataset, seed=seed)
    record = json.loads((project / "pool.json").read_text())
    record["identity"]["dataset"] = "of another day"
    (project / "pool.json").write_text(json.dumps(record))
    assert (
        pools.incomparable(Path("pool.csv"), space, dataset, splits, Cost(1, 1))
        == "pool.csv is a pool of another dataset"
    )


def test_a_person_is_told_that_a_pool_was_trained_with_other_code(project, monkeypatch):
    monkeypatch.setattr(pools.Job, "run", lambda job: (job.architecture, job.seed, dict.fromkeys(pools.COLUMNS, 1.0)))
    record = json.loads((project / "pool.json").read_text())
    assert not pools.other_code(Path("pool.csv")) and "other code" not in build("--count", "2").output
    assert "tanglenas_vit" in record["code"]
    record["code"]["tanglenas_vit"] = "of a former release"
    (project / "pool.json").write_text(json.dumps(record))
    told = "the networks of the pool were trained with other code of tanglenas_vit: if that changes how networks start"
    assert pools.other_code(Path("pool.csv")).startswith(told)
    assert told in " ".join(build("--count", "3").output.split())
    assert pools.other_code(Path("pool.csv")).startswith(told)  # the former networks are still there
    del record["code"]  # a record of a former release
    (project / "pool.json").write_text(json.dumps(record))
    assert "tanglenas_engine" in pools.other_code(Path("pool.csv"))


def test_a_network_beyond_any_limit_of_a_pool_is_not_compared_with_it(project):
    with configured(trainings.project_arguments()):
        seed, space, dataset = create()
        splits = make_splits(dataset, seed=seed)
    record = json.loads((project / "pool.json").read_text())
    record["identity"]["limits"] = {"params": 12_800}
    (project / "pool.json").write_text(json.dumps(record))
    reason = "the network has 12,801 params, and those of pool.csv at most 12,800"
    assert pools.incomparable(Path("pool.csv"), space, dataset, splits, Cost(12_801, 1)) == reason
    assert not pools.incomparable(Path("pool.csv"), space, dataset, splits, Cost(12_800, 10**9))


def test_a_pool_that_was_measured_elsewhere_is_taken_as_it_is(project):
    with configured(trainings.project_arguments()):
        seed, space, dataset = create()
        splits = make_splits(dataset, seed=seed)
    (project / "pool.json").unlink()
    assert not pools.incomparable(Path("pool.csv"), space, dataset, splits, Cost(1, 10**9))


def test_a_table_that_was_measured_elsewhere_is_not_written_over(project):
    (project / "pool.json").unlink()
    before = (project / "pool.csv").read_bytes()
    result = build("--count", "2")
    assert result.exit_code == 2 and "pool.csv exists, and is no pool that can go on" in result.output
    assert (project / "pool.csv").read_bytes() == before and not (project / "pool.json").exists()


def test_a_pool_of_another_seed_is_refused_where_the_splits_are_a_file(project):
    with configured(trainings.project_arguments()):
        seed, _, dataset = create()
        splits = make_splits(dataset, seed=seed)
    pools.SPLITS.parent.mkdir(parents=True, exist_ok=True)
    pools.SPLITS.write_text(splits.to_json())
    try:
        set_params(project, seed=1)
        result = build("--count", "2")
    finally:
        pools.SPLITS.unlink()
    assert result.exit_code == 2 and "pool.csv is a pool of another seed" in result.output


def test_a_pool_of_another_budget_is_refused(project):
    result = CliRunner().invoke(main, ["pool", "build", "pool.csv", "--budget", "0.4", "--count", "2"])
    assert result.exit_code == 2 and "pool.csv is a pool of another limits" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "1.5"), "--budget is 1.5, expected a share of the largest network's MACs"),
        (("--jobs", "0"), "--jobs is 0, expected a number of trainings at a time, or -1"),
        (("--seeds", "0"), "--seeds is 0, expected a whole number of at least 1"),
        (("--least", "5"), "--least is 5.0, expected a share of the budget from 0 to 1"),
        (("--count", "1"), "--count is 1, expected a whole number of at least 2"),
        (("--count", "300"), "but the pool asks for 300: lower --count or --least"),
    ],
)
def test_options_that_make_no_pool_are_refused(project, monkeypatch, options, message):
    monkeypatch.setattr(pools, "DRAWS", 1)
    result = CliRunner().invoke(main, ["pool", "build", "other.csv", "--budget", "0.3", *options])
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_a_share_of_no_budget_is_refused(project):
    result = CliRunner().invoke(main, ["pool", "build", "other.csv", "--least", "0.9"])
    assert result.exit_code == 2 and "a share of the budget, but there is none: give --budget" in result.output


@pytest.mark.parametrize(
    "content, found", [('{"runs": 3}', "none"), ("[1]", "none"), ('{"rows": {}}', "damaged"), ("{", "damaged")]
)
def test_another_file_beside_a_table_is_no_record(tmp_path, content, found):
    (tmp_path / "table.json").write_text(content)
    if found == "none":
        assert pools.agreement(tmp_path / "table.csv", "test_loss", ["a"]) is None
        return
    with pytest.raises(TangleNASError, match=r"table\.json is not the record of a pool"):
        pools.agreement(tmp_path / "table.csv", "test_loss", ["a"])


@pytest.mark.parametrize("damage", ["all", "a column", "a row"])
def test_a_damaged_record_is_told(project, damage):
    record = json.loads((project / "pool.json").read_text())
    row = next(iter(record["rows"].values()))
    if damage == "a column":
        del row["0"]["macs"]
    if damage == "a row":
        row["0"] = 3
    (project / "pool.json").write_text(json.dumps({"rows": {}} if damage == "all" else record))
    result = build("--count", "2")
    assert result.exit_code == 2 and "pool.json is not the record of a pool" in result.output


def test_a_pool_needs_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = build()
    assert result.exit_code == 2 and "a pool is built in a project" in result.output
