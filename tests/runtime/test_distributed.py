"""Two processes that train as one: what they find is what one finds, and what becomes of them when one dies."""

import json
import os
import sys
from functools import partial
from importlib.machinery import ModuleSpec

import pytest
import ranked
import ranks
import torch
from forked import Forked
from project import STAGES, environment, execute, lay_out
from torch.distributed.launcher.api import LaunchConfig

from tanglenas_engine.data import Stream, TensorSamples
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime import distributed
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.testing import same
from tanglenas_engine.training.options import Computation

SEARCHES = ["drnas", "darts2", "gdas", "spos", "simultaneous", "accumulated"]
MASKED = ["masked_darts2", "masked_drnas", "masked_sandwich"]


@pytest.fixture(scope="module")
def two(request, tmp_path_factory):
    """What a case gives on two ranks: one pair of processes, whose start takes longest, runs the cases of all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    tests = [item for item in request.session.items if item.path == request.path]
    named = [case for item in tests for marker in item.iter_markers("cases") for case in marker.args]
    given = [item.callspec.params["case"] for item in tests if "two" in item.fixturenames and hasattr(item, "callspec")]
    processes = ranks.start(list(dict.fromkeys([*given, *named])), folder, 2)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return lambda case: ranks.results(case, folder, 2)


def apart(one, other):
    """The largest difference between two states of the same tensors."""
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


@pytest.mark.parametrize("case", SEARCHES + MASKED)
@pytest.mark.part(4)
def test_two_processes_search_as_one_does(two, case):
    alone, both = getattr(ranked, case)(), two(case)
    same(both[0], both[1], f"{case} on the ranks")
    for part in ("alphas", "weights"):
        if alone[part]:
            assert apart(alone[part], both[0][part]) < 1e-5
    assert alone["architecture"] == both[0]["architecture"]
    for row, other in zip(alone["history"], both[0]["history"], strict=True):
        for key in {"weight_loss", "architecture_loss", "weight_accuracy"} & row.keys():
            assert row[key] == pytest.approx(other[key], abs=1e-4)
        assert row["validation_accuracy"] == other["validation_accuracy"]


def test_a_search_moves_what_is_compared():
    start, end = ranked.searched("drnas", epochs=1), ranked.drnas()
    assert apart(start["alphas"], end["alphas"]) > 1e-3
    assert apart(start["weights"], end["weights"]) > 1e-2


@pytest.mark.cases("digits", "dropped")
@pytest.mark.exhaustive
def test_noise_alone_lets_the_number_of_processes_decide(two):
    alone, (first, second) = ranked.digits(), two("digits")
    same(first, second, "the ranks")
    assert apart(alone["alphas"], first["alphas"]) < 1e-5
    assert alone["architecture"] == first["architecture"]
    # Each process has drop path of its own: other losses than one process would have, hence another alpha.
    alone, (first, second) = ranked.dropped(), two("dropped")
    same(first, second, "the ranks")
    assert apart(alone["alphas"], first["alphas"]) > 1e-3


@pytest.mark.cases("bfloat16")
@pytest.mark.exhaustive
def test_ranks_agree_in_low_precision_too(two):
    both = two("bfloat16")
    same(both[0], both[1], "the ranks")
    assert both[0]["weights"].keys() == ranked.drnas()["weights"].keys()


@pytest.mark.parametrize("search", [partial(ranked.searched, "drnas"), ranked.masked_drnas, ranked.masked_sandwich])
@pytest.mark.part(1)
def test_accumulated_batches_are_one_batch(search):
    whole, parts = search(), search(accumulate=4)
    for part in ("alphas", "weights"):
        if whole[part]:
            assert apart(whole[part], parts[part]) < 1e-5
    for key in {"weight_loss", "architecture_loss", "weight_accuracy"} & whole["history"][-1].keys():
        assert parts["history"][-1][key] == pytest.approx(whole["history"][-1][key], abs=1e-4)


@pytest.mark.cases("darts2_autograd")
def test_the_exact_hypergradient_is_that_of_the_whole_batch(two):
    alone, both = ranked.darts2_autograd(), two("darts2_autograd")
    for one, first, second in zip(alone, *both, strict=True):
        assert first.equal(second)
        torch.testing.assert_close(one, first, rtol=1e-4, atol=1e-7)


@pytest.mark.cases("batch_norm")
def test_batch_norms_see_the_ranks_part_but_keep_equal_statistics(two):
    both = two("batch_norm")
    same(both[0], both[1], "the ranks")
    alone = ranked.batch_norm()
    # Each rank normalises by its own four samples: another network in train mode than with eight.
    assert apart(alone["weights"], both[0]["weights"]) > 1e-5


@pytest.mark.parametrize("case", ["retrained", "masked_retrained"])
def test_two_processes_retrain_and_evaluate_as_one_does(two, case):
    alone, both = getattr(ranked, case)(), two(case)
    same(both[0], both[1], "the ranks")
    assert apart(alone["weights"], both[0]["weights"]) < 1e-5
    assert alone["test"][0] == both[0]["test"][0] and alone["test"][2] == both[0]["test"][2] == 36
    assert alone["test"][1] == pytest.approx(both[0]["test"][1], abs=1e-5)
    for key in ("loss", "accuracy"):
        assert alone["history"][-1][key] == pytest.approx(both[0]["history"][-1][key], rel=1e-5)


def test_accumulated_batches_of_a_retraining_are_one_batch():
    whole, parts = ranked.masked_retrained(), ranked.masked_retrained(accumulate=6)
    assert apart(whole["weights"], parts["weights"]) < 1e-5
    for key in ("loss", "accuracy"):
        assert parts["history"][-1][key] == pytest.approx(whole["history"][-1][key], rel=1e-5)


@pytest.mark.cases("raced")
def test_two_processes_share_a_race_and_judge_as_one_does(two):
    alone, both = ranked.raced(), two("raced")
    assert both[0] == both[1] == alone
    assert {record["samples"] for record in alone[0]} == {5, 40} and len(alone[0]) == 9


@pytest.mark.cases("trained")
def test_two_processes_share_the_trainings_of_a_race_and_each_trains_as_one_does(two):
    alone, (first, second) = ranked.trained(), two("trained")
    assert first["records"] == second["records"] == alone["records"] and len(alone["records"]) == 8
    assert sum(record["entered"] == "proposed" for record in alone["records"]) == 4
    assert (alone["kept"], first["kept"], second["kept"]) == (8 + 3, 8 + 3, None)


@pytest.mark.cases("walked")
def test_every_rank_draws_noise_of_its_own_and_rank_0_that_of_one_process(two):
    alone, (first, second) = ranked.walked(), two("walked")
    assert alone["drawn"] == first["drawn"]
    assert not set(first["drawn"]) & set(second["drawn"])
    means = [sum(pair) / 2 for pair in zip(first["drawn"], second["drawn"], strict=True)]
    expected = [sum(means[:4]) / 4, sum(means[4:]) / 4]
    for run in (first, second):
        assert [row["loss"] for row in run["history"]] == pytest.approx(expected)
        assert [row["rank"] for row in run["history"]] == [0, 0]  # rows are decided on rank 0


@pytest.mark.cases("paced")
@pytest.mark.exhaustive
def test_ranks_agree_how_many_epochs_fit_into_the_seconds(two):
    first, second = two("paced")
    assert len(first["history"]) > 1
    same(first, second, "the search of the other rank")


@pytest.mark.cases("resumed_search", "resumed_batch_norm", "resumed")
def test_ranks_resume_to_the_same_bits(two):
    for rank in two("resumed_search") + two("resumed_batch_norm"):
        same(rank["whole"], rank["resumed"], "the search that was resumed")
    for rank in two("resumed"):
        assert rank["whole"]["history"] == rank["resumed"]["history"]
        # It was cut off in step 6, before that was saved.
        assert rank["whole"]["drawn"][5:] == rank["resumed"]["drawn"]


@pytest.mark.cases("interrupted")
def test_a_request_to_stop_that_one_rank_gets_stops_all_at_the_same_step(two):
    first, second = two("interrupted")
    assert first["position"] == 6
    assert "stopped at step 6 of 20" in first["message"] and "stopped at step 6 of 20" in second["message"]


@pytest.mark.cases("exchanged")
def test_what_is_exchanged(two):
    alone, (first, second) = ranked.exchanged(), two("exchanged")
    for got in (first, second):
        assert [one["text"] for one in got["gather"]] == ["é", "éé"]
        assert [one["numbers"] for one in got["gather"]] == [[0, 0.5], [1, 0.5]]
        assert [one["tensor"].tolist() for one in got["gather"]] == [[0, 0], [1, 1, 1]]
        assert got["broadcast"]["text"] == "é"
        assert got["total"] == [1, 2]
        assert got["anywhere"] == [True, False]
        matrix, missing, vector, double = got["average"]
        assert missing is None and matrix.tolist() == [[0.5, 0.5]] * 2 and vector.tolist() == [0, 0.5, 1]
        assert double.dtype == torch.float64 and float(double) == 0.5
        same(got["averaged"], [matrix, vector, double], "averaged")
        assert got["synchronize"][0].tolist() == [0]
    assert (first["shard"], second["shard"], alone["shard"]) == (["a", "c", "e"], ["b", "d"], list("abcde"))
    assert first["each"] == second["each"] == [["a", 0], ["b", 1], ["c", 0], ["d", 1], ["e", 0]]
    assert alone["each"] == [[letter, 0] for letter in "abcde"]
    assert alone["gather"][0]["text"] == alone["broadcast"]["text"] == "é"
    assert (alone["total"], alone["anywhere"], alone["average"][1]) == ([0, 1.0], [True, False], None)


@pytest.mark.cases("after_the_first")
def test_rank_0_goes_first_and_says_why_it_failed(two):
    first, second = two("after_the_first")
    assert (first["found"], second["found"]) == (False, True)
    assert first == {"found": False, "error": "no disk", "kind": "TangleNASError"}
    assert second == {"found": True, "error": "no disk", "kind": "LostError"}


@pytest.mark.cases("apart")
def test_ranks_that_hold_different_weights_are_told(two):
    assert all("2 processes no longer hold the same weights" in message for message in two("apart"))
    assert ranked.apart() is None


@pytest.mark.exhaustive
def test_a_dead_rank_ends_the_job_and_leaves_a_checkpoint_for_any_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    alive, dead = ranks.start(["killed"], tmp_path, 2)
    _, errors = alive.communicate(timeout=120)
    dead.communicate(timeout=120)
    assert dead.returncode == -9
    assert alive.returncode == 1
    assert "LostError: process 0 of 2 has lost another" in errors and "go on from the last checkpoint" in errors
    with CheckpointFolder(tmp_path / "checkpoints", "ranked") as checkpoints:
        assert checkpoints.load()["position"] == 6
    resumed = ranked.killed()  # by one process: no rank is the last of several
    with CheckpointFolder(tmp_path / "checkpoints", "ranked") as checkpoints:
        assert checkpoints.load()["position"] == 20
    whole = ranked.drnas()
    assert apart(whole["weights"], resumed["weights"]) < 1e-5
    assert apart(whole["alphas"], resumed["alphas"]) < 1e-5


WAITING = """
import time
from datetime import timedelta
import torch
import torch.distributed as dist
from tanglenas_engine.runtime import distributed

with distributed.process_group():
    distributed.gather(0)
    torchs = dist.group.WORLD._get_backend(torch.device("cpu"))
    torchs._set_default_timeout(timedelta(seconds=1))  # instead of 30 minutes
    time.sleep(2 * distributed.rank())
    print(distributed.gather(distributed.rank()), distributed.broadcast(7), distributed.sum_over_ranks([1.0]))
"""


def test_a_rank_waits_for_another_for_longer_than_torch_lets_it(tmp_path):
    given = {**os.environ, "TANGLENAS_DEVICE": "cpu"}
    pair = [Forked(WAITING, folder=tmp_path, environment={**given, **told}) for told in ranks.environments(2)]
    assert [process.finished() for process in pair] == ["[0, 1] 7 [2.0]\n"] * 2


def test_the_parts_of_a_stream_are_its_batches():
    samples = TensorSamples(torch.arange(20.0).view(20, 1), torch.arange(20))
    whole = Stream(samples, 6, seed=1).start(2)
    parts = [Stream(samples, 6, seed=1, part=(rank, 3)).start(2) for rank in range(3)]
    for _ in range(5):
        inputs, targets = next(whole)
        shares = [next(part) for part in parts]
        assert torch.cat([share[0] for share in shares]).equal(inputs)
        assert torch.cat([share[1] for share in shares]).equal(targets)


def test_a_batch_that_cannot_be_shared():
    samples = TensorSamples(torch.zeros(8, 1), torch.zeros(8, dtype=torch.long))
    with pytest.raises(TangleNASError, match="batch size 8 cannot be shared equally: use a multiple of 3"):
        Stream(samples, 8, seed=0, part=(0, 3))
    with pytest.raises(TangleNASError, match=r"search.batch_size is 8, expected a multiple of 3.* in 3 piece"):
        Computation(accumulate=3).share("search", 8)
    with pytest.raises(TangleNASError, match=r"search\.accumulate is 0"):
        ranked.searched("drnas", accumulate=0)
    with pytest.raises(TangleNASError, match=r"accumulate is 2, but darts2 takes alpha's gradient from a whole batch"):
        ranked.searched("darts2", accumulate=2)


@pytest.mark.parametrize("count", ["two", "0", "-1", "1.5"])
def test_a_number_of_processes_that_cannot_be(monkeypatch, count):
    monkeypatch.setenv("TANGLENAS_NPROC", count)
    with pytest.raises(TangleNASError, match=f"TANGLENAS_NPROC is '{count}', expected a whole number of at least 1"):
        distributed.relaunch("pipelines.search", [])


def test_only_the_program_itself_starts_again(monkeypatch):
    monkeypatch.setenv("TANGLENAS_NPROC", "2")
    distributed.relaunch("pipelines.search", [])  # this program is pytest: it would be gone


@pytest.mark.skipif(not hasattr(LaunchConfig, "shutdown_timeout"), reason="this torch has no such limit to set")
@pytest.mark.parametrize("given, limit", [(None, 3600), ("60", 60)])
def test_processes_that_are_asked_to_stop_have_time_for_a_step_and_a_checkpoint(monkeypatch, given, limit):
    limits = []
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("pipelines.search", None))
    monkeypatch.setattr("torch.distributed.run.main", lambda _: limits.append(LaunchConfig(1, 1, 2).shutdown_timeout))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TANGLENAS_NPROC", "2")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", given or "")  # is back as it was after the test
    if given is None:
        monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    with pytest.raises(SystemExit):
        distributed.relaunch("pipelines.search", [])
    assert limits == [limit]


ONE_STAGE = """
import sys
from stages import MAIN
MAIN[sys.argv[1]](sys.argv[2:])
"""


@pytest.mark.slow
# MLflow's own models, on SQLAlchemy 2.1.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
@pytest.mark.exhaustive
def test_the_pipeline_in_two_processes(tmp_path):
    from mlflow import MlflowClient

    project = lay_out(tmp_path / "project")
    options = {
        "search": ["OPTIMIZER = 'drnas'", "search.epochs = 1"],
        "discretize": ["discretize.method = 'random'", "discretize.candidates = 3"],
        "retrain": ["retrain.epochs = 1"],
        "evaluate": [],
    }
    last = {"discretize": "discretize 3/3  best loss", "evaluate": "autoformer_nano on digits"}
    for name in STAGES:
        bindings = ["SPACE = 'autoformer_nano'", "DATASET = 'digits'", "SEED = 0", *options[name]]
        command = [sys.executable, "-m", f"pipelines.{name}", f"gin/stages/{name}.gin", *bindings]
        if name == "search":
            said = execute(project, *command, TANGLENAS_NPROC="2")
        else:
            together = [
                Forked(ONE_STAGE, name, *command[3:], folder=project, environment={**environment(project), **told})
                for told in ranks.environments(2)
            ]
            said = "".join(process.finished() for process in together)
        # One of them speaks, and writes.
        assert said.count(last.get(name, f"{name} 1/1")) == 1, said
        assert json.loads((project / "metrics" / f"{name}.json").read_text())
    judged = json.loads((project / "metrics" / "evaluate.json").read_text())
    assert judged["test_samples"] == 359 and 0 < judged["test_accuracy"] < 100
    client = MlflowClient(tracking_uri=f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == [
        "FINISHED"
    ] * 5  # one for each stage, not for each process, and the pipeline's
    typo = ["SPACE = 'autoformer_nana'", "OPTIMIZER = 'drnas'", "DATASET = 'digits'", "SEED = 0"]
    command = [sys.executable, "-m", "pipelines.search", "gin/stages/search.gin", *typo]
    said = execute(project, *command, status=2, TANGLENAS_NPROC="2")
    assert said.count("Did you mean 'autoformer_nano'") == 1 and "Traceback" not in said, said
