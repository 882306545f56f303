"""What a stage leaves in MLflow, and that a store in trouble costs a warning and nothing else."""

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines._tracking import MlflowTracker, lineage, project_root
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.tracking import NullTracker

# MLflow's own models, on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

NOWHERE = "http://someone:secret@127.0.0.1:9"  # nothing listens there
VARIABLES = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "TANGLENAS_TRACKING")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *(name for name in os.environ if name.startswith("MLFLOW_"))):
        monkeypatch.delenv(name, raising=False)
    for name in ("MAX_RETRIES", "BACKOFF_FACTOR", "TIMEOUT"):  # the code sets defaults: undo them afterwards
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "0")
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without experiments: making one takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").get_experiment_by_name("none")
    return path


@pytest.fixture
def root(tmp_path: Path, migrated: Path) -> Path:
    folder = tmp_path / "project with space"
    folder.mkdir()
    shutil.copy(migrated, folder)
    return folder


def client(root: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


def only_run(root: Path):
    (run,) = client(root).search_runs([experiment.experiment_id for experiment in client(root).search_experiments()])
    return run


# --- one run --------------------------------------------------------------------------------------------------


def test_a_stage_that_ends_well_is_a_finished_run_with_all_it_logged(root: Path) -> None:
    with MlflowTracker.open(stage="search", root=root, pipeline_id="p1", tags={"note": "first"}) as tracker:
        assert only_run(root).info.status == "RUNNING"
        tracker.log_params({"seed": 0, "space": "autoformer_t", "search": {"lr": 0.1, "milestones": [1, 2]}})
        tracker.set_tags({"architecture.digest": "abc"})
    run = only_run(root)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "search")
    assert run.info.run_id == tracker.run_id
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {
        "seed": "0",
        "space": "autoformer_t",
        "search.lr": "0.1",
        "search.milestones": "[1, 2]",
    }
    tags = run.data.tags
    assert tags["tanglenas.pipeline_id"] == "p1" and tags["tanglenas.stage"] == "search"
    assert tags["note"] == "first" and tags["architecture.digest"] == "abc"
    assert len(tags["params.hash"]) == 16


def test_the_run_of_a_known_architecture_is_named_by_its_digest(root: Path) -> None:
    with MlflowTracker.open(stage="retrain", root=root, architecture="0123456789abcdef"):
        pass
    run = only_run(root)
    assert run.info.run_name == "retrain 01234567"
    assert run.data.tags["architecture.digest"] == "0123456789abcdef"


def test_the_hash_that_a_stage_gives_its_parameters_stays(root: Path) -> None:
    with MlflowTracker.open(stage="search", root=root, tags={"params.hash": "own"}) as tracker:
        tracker.log_params({"seed": 0})
    assert only_run(root).data.tags["params.hash"] == "own"


@pytest.mark.parametrize(
    "ending, status",
    [
        (RuntimeError("out of memory"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
    ids=repr,
)
def test_how_the_stage_ends_is_the_status_of_the_run(root: Path, ending: BaseException, status: str) -> None:
    with pytest.raises(type(ending)) as caught, MlflowTracker.open(stage="search", root=root):
        raise ending
    assert caught.value is ending
    assert only_run(root).info.status == status


def test_metrics_keep_their_history_with_steps(root: Path) -> None:
    with MlflowTracker.open(stage="search", root=root) as tracker:
        for step in range(3):
            tracker.log_metrics({"search/loss": 1.0 / (step + 1), "bad@name": step}, step)
    history = client(root).get_metric_history(tracker.run_id, "search/loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert only_run(root).data.metrics["bad_name"] == 2


def test_infinite_metrics_are_stored_as_not_a_number(root: Path) -> None:
    with MlflowTracker.open(stage="search", root=root) as tracker:
        tracker.log_metrics({"loss": math.inf, "other": -math.inf, "third": math.nan, "fine": 1.0}, step=0)
    metrics = only_run(root).data.metrics
    assert metrics.pop("fine") == 1.0
    assert len(metrics) == 3 and all(map(math.isnan, metrics.values()))


def test_more_than_fits_one_call_is_split_and_long_values_are_cut(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    with MlflowTracker.open(stage="search", root=root) as tracker:
        send = tracker._client.log_batch

        def count(run_id: str, metrics=(), params=(), tags=()) -> None:
            calls.append((len(metrics), len(params), len(tags)))
            send(run_id, metrics=metrics, params=params, tags=tags)

        monkeypatch.setattr(tracker._client, "log_batch", count)
        tracker.log_params({f"p{index}": index for index in range(230)} | {"long": "x" * 7000})
        tracker.log_metrics({f"m{index}": index for index in range(1100)}, step=0)
        tracker.set_tags({f"t{index}": str(index) for index in range(130)})
    assert calls == [(0, 100, 0), (0, 100, 0), (0, 31, 0), (1000, 0, 0), (100, 0, 0), (0, 0, 100), (0, 0, 30)]
    data = only_run(root).data
    assert len(data.params) == 231 and data.params["long"] == "x" * 6000
    assert len(data.metrics) == 1100
    assert data.tags["t129"] == "129"


def test_artifacts_lie_under_the_root_wherever_the_stage_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    (elsewhere / "arch.json").write_text("{}")
    (elsewhere / "model" / "config.json").write_text("[]")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("DVC_ROOT", str(root))
    with MlflowTracker.open(stage="discretize") as tracker:
        tracker.log_artifact("arch.json")
        tracker.log_artifact("model", "export")
        tracker.log_text("lr = 1\n", "operative.gin")
    folder = root / "mlartifacts" / tracker.run_id / "artifacts"
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"arch.json": "{}", "export/config.json": "[]", "operative.gin": "lr = 1\n"}
    assert sorted(os.listdir(elsewhere)) == ["arch.json", "model"]


def test_the_four_stages_share_an_experiment_and_are_found_by_their_pipeline(root: Path) -> None:
    for stage in ("search", "discretize", "retrain", "evaluate"):
        with MlflowTracker.open(stage=stage, experiment="study", root=root, pipeline_id="p7"):
            pass
    experiment = client(root).get_experiment_by_name("study")
    runs = client(root).search_runs([experiment.experiment_id], "tags.`tanglenas.pipeline_id` = 'p7'")
    assert {run.data.tags["tanglenas.stage"] for run in runs} == {"search", "discretize", "retrain", "evaluate"}


# --- going on after a kill ------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_goes_on_without_repeating_itself(root: Path) -> None:
    with pytest.raises(RuntimeError), MlflowTracker.open(stage="search", root=root) as tracker:
        tracker.log_params({"seed": 0, "device": "cpu"})
        for step in range(3):
            tracker.log_metrics({"loss": step}, step)
        raise RuntimeError("killed after its checkpoint of step 1")
    with MlflowTracker.open(stage="search", root=root, run_id=tracker.run_id) as again:
        assert again.run_id == tracker.run_id
        assert only_run(root).info.status == "RUNNING"
        again.log_params({"seed": 0, "device": "cuda", "added": 1})
        for step in range(2, 5):
            again.log_metrics({"loss": step, "new": step}, step)
    run = only_run(root)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "device": "cpu", "added": "1"}
    assert [m.step for m in client(root).get_metric_history(again.run_id, "loss")] == [0, 1, 2, 3, 4]
    assert [m.step for m in client(root).get_metric_history(again.run_id, "new")] == [2, 3, 4]


def test_a_run_that_the_store_does_not_have_is_started_anew_with_a_warning(root: Path) -> None:
    with pytest.warns(UserWarning, match="run 0123abcd cannot go on"):
        with MlflowTracker.open(stage="search", root=root, run_id="0123abcd") as tracker:
            pass
    assert tracker.run_id == only_run(root).info.run_id != "0123abcd"


# --- trouble --------------------------------------------------------------------------------------------------


def test_a_server_out_of_reach_costs_one_warning_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    start = time.monotonic()
    with pytest.warns(UserWarning, match="this run is not tracked") as warned:
        with MlflowTracker.open(stage="search") as tracker:
            tracker.log_params({"seed": 0})
            tracker.log_metrics({"loss": 1.0}, step=0)
    assert isinstance(tracker, NullTracker)
    assert len(warned) == 1
    assert "secret" not in str(warned[0].message) and "127.0.0.1:9" in str(warned[0].message)
    assert time.monotonic() - start < 30


def test_the_error_of_an_untracked_stage_comes_through_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match="not tracked"), pytest.raises(KeyError) as error:
        with MlflowTracker.open(stage="search"):
            raise KeyError("the stage's own")
    assert error.value.__context__ is None


def test_a_store_that_breaks_on_the_way_costs_one_warning(root: Path) -> None:
    with pytest.warns(UserWarning, match="did not take log_metrics") as warned:
        with MlflowTracker.open(stage="search", root=root) as tracker:
            (root / "mlflow.db").write_bytes(b"no database" * 1000)
            for step in range(10):
                tracker.log_metrics({"loss": 1.0}, step)
            tracker.log_params({"seed": 0})
    assert len(warned) == 1


def test_after_a_refused_call_the_next_ones_are_still_sent(root: Path) -> None:
    with pytest.warns(UserWarning, match="did not take log_artifact") as warned:
        with MlflowTracker.open(stage="search", root=root) as tracker:
            for step in range(5):
                tracker.log_artifact(root / "missing.json")
                tracker.log_metrics({"loss": step}, step)
    assert only_run(root).data.metrics == {"loss": 4}
    assert len(warned) == 1


def test_a_dead_server_is_left_alone_until_the_run_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def refuse(*_: object, **batch: object) -> None:
        sent.append(batch)
        raise ConnectionError("no route")

    with pytest.warns(UserWarning, match="did not take log_metrics .ConnectionError: no route"):
        with MlflowTracker.open(stage="search", root=root) as tracker:
            monkeypatch.setattr(tracker._client, "log_batch", refuse)
            for step in range(10):
                tracker.log_metrics({"loss": step}, step)
    assert len(sent) == 3
    assert only_run(root).info.status == "FINISHED"


def test_tracking_off_touches_no_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANGLENAS_TRACKING", "off")
    with MlflowTracker.open(stage="search", root=root) as tracker:
        tracker.log_metrics({"loss": 1.0}, step=0)
    assert isinstance(tracker, NullTracker)
    assert os.listdir(root) == ["mlflow.db"]


def test_a_misspelt_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANGLENAS_TRACKING", "offf")
    with pytest.raises(TangleNASError, match="TANGLENAS_TRACKING='offf' is neither"):
        with MlflowTracker.open(stage="search"):
            pass


START = """
import sys
from pipelines._tracking import MlflowTracker
assert "mlflow" not in sys.modules
sys.stdin.read()
with MlflowTracker.open(stage=sys.argv[2], root=sys.argv[1]) as tracker:
    tracker.log_metrics({"loss": 1.0}, step=0)
"""


@pytest.mark.slow
def test_four_processes_start_at_once_on_a_store_that_does_not_exist(tmp_path: Path) -> None:
    root = tmp_path / "fresh"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(root), f"s{index}"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for index in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 0
        process.stderr.close()
    (experiment,) = [e for e in client(root).search_experiments() if e.name == "tanglenas"]
    assert experiment.artifact_location == (root / "mlartifacts").as_uri()
    runs = client(root).search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["s0", "s1", "s2", "s3"]
    assert {run.info.status for run in runs} == {"FINISHED"}


# --- lineage --------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    (folder / "sub").mkdir(parents=True)
    for name in ("code.py", "dvc.lock"):
        (folder / name).write_text("")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    monkeypatch.chdir(folder / "sub")
    return folder


def test_lineage_names_the_commit_and_whether_code_differs_from_it(repository: Path) -> None:
    (repository / "dvc.lock").write_text("rewritten by DVC after each stage")
    (repository / "untracked.txt").write_text("")
    tags = lineage("search")
    assert tags == {
        "tanglenas.stage": "search",
        "git.sha": git(repository, "rev-parse", "HEAD"),
        "git.dirty": "false",
    }
    (repository / "code.py").write_text("changed")
    assert lineage("search")["git.dirty"] == "true"


def test_lineage_has_what_dvc_says_and_no_commit_outside_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("DVC_STAGE", "search@darts")
    monkeypatch.setenv("DVC_EXP_NAME", "plain-fish")
    assert lineage("search") == {
        "tanglenas.stage": "search",
        "dvc.stage": "search@darts",
        "dvc.exp_name": "plain-fish",
    }


def test_the_project_root_is_that_of_dvc_then_of_the_repository_then_here(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert project_root() == repository
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert project_root() == tmp_path
