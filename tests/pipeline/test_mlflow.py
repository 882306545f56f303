"""What a stage leaves in MLflow, and that a store in trouble costs a warning and nothing else."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forked

from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.project import project_root
from tanglenas_engine.pipeline.tracking import spool, store
from tanglenas_engine.pipeline.tracking import tracker as tracking
from tanglenas_engine.pipeline.tracking.tracker import (
    MlflowTracker,
    lineage,
    mark_killed,
    spooled_runs,
    stale_runs,
    upload_spool,
)
from tanglenas_engine.runtime.tracking import NullTracker

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
    with MlflowTracker.open(stage="retrain", root=root, tags={"architecture.digest": "0123456789abcdef"}):
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
        send = tracker._run._client.log_batch

        def count(run_id: str, metrics=(), params=(), tags=()) -> None:
            calls.append((len(metrics), len(params), len(tags)))
            send(run_id, metrics=metrics, params=params, tags=tags)

        monkeypatch.setattr(tracker._run._client, "log_batch", count)
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


def test_the_four_stages_share_an_experiment_and_are_found_by_their_pipeline(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "study")
    for stage in ("search", "discretize", "retrain", "evaluate"):
        with MlflowTracker.open(stage=stage, root=root, pipeline_id="p7"):
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


class Server:
    """A real MLflow server in a thread, which `stop` takes away and `start` brings back at the same address.

    `before` is called with the method of every request; what it returns, if anything, is the status it is refused with.
    """

    def __init__(self, app: Callable) -> None:
        self.app = app
        self.before: Callable[[str], str | None] = lambda method: None
        self.port = 0
        self.start()

    def __call__(self, environ: dict, respond: Callable) -> object:
        if status := self.before(environ["REQUEST_METHOD"]):
            respond(status, [])
            return [b""]
        return self.app(environ, respond)

    def start(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *arguments: object) -> None: ...

        self._server = make_server("127.0.0.1", self.port, self, threaded=True, request_handler=Silent)
        self._server.block_on_close = False
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01])
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The store of MLFLOW_TRACKING_URI, which gives up at the first failure."""
    shutil.copy(migrated, tmp_path / "served.db")
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{tmp_path / 'served.db'}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(tmp_path / "served"))
    from mlflow.server import app, handlers

    monkeypatch.setattr(handlers, "_tracking_store", None)  # the one of the test before
    serving = Server(app)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{serving.port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield serving
    serving.stop()


def served_run():
    from mlflow import MlflowClient

    found = MlflowClient()
    (run,) = found.search_runs([experiment.experiment_id for experiment in found.search_experiments()])
    return run


def served_steps(name: str) -> list[int]:
    from mlflow import MlflowClient

    return [metric.step for metric in MlflowClient().get_metric_history(served_run().info.run_id, name)]


def kept(root: Path) -> list[Path]:
    return [path for path in (root / ".tanglenas").rglob("*") if path.is_file()]


@pytest.mark.exhaustive
def test_a_server_out_of_reach_costs_one_warning_and_seconds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"the MLflow store .* cannot be used.* is kept in .*unsent-") as warned:
        with MlflowTracker.open(stage="search", root=root) as tracker:
            tracker.log_params({"seed": 0})
            tracker.log_metrics({"loss": 1.0}, step=0)
    assert len(warned) == 1
    assert "secret" not in str(warned[0].message) and "127.0.0.1:9" in str(warned[0].message)
    assert not any("secret" in path.read_text() for path in kept(root))
    assert time.monotonic() - start < 30
    (waiting,) = spooled_runs(root)
    assert (waiting.run_id, waiting.stage, waiting.records, waiting.busy) == (None, "search", 3, False)
    assert waiting.folder.name == tracker.run_id


def test_what_no_server_took_is_uploaded_later_as_it_would_have_been(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "out").mkdir()
    (root / "out" / "a.txt").write_text("of the first run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match="cannot be used"):
        with MlflowTracker.open(stage="search", root=root, pipeline_id="p1") as tracker:
            tracker.log_params({"seed": 0, "search": {"lr": 0.1}})
            for step in range(3):
                tracker.log_metrics({"loss": 1 / (step + 1), "bad@name": math.inf}, step)
            tracker.set_tags({"architecture.digest": "abc"})
            tracker.log_artifact(root / "out")
            tracker.log_text("lr = 1", "operative.gin")
    ended = time.time_ns() // 1_000_000
    shutil.rmtree(root / "out")  # as the next run of the stage does
    (upload,) = upload_spool(root)
    assert upload.run_id is None and upload.problem.startswith("http://***@127.0.0.1:9: ")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (upload,) = upload_spool(root)
    run = only_run(root)
    assert (upload.run_id, upload.problem) == (run.info.run_id, "")
    assert (run.info.status, run.info.run_name, run.data.params) == (
        "FINISHED",
        "search",
        {"seed": "0", "search.lr": "0.1"},
    )
    assert run.info.start_time <= run.info.end_time <= ended
    assert run.data.tags["architecture.digest"] == "abc" and run.data.tags["tanglenas.pipeline_id"] == "p1"
    history = client(root).get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert all(metric.timestamp <= ended for metric in history)
    assert math.isnan(run.data.metrics["bad_name"])
    folder = root / "mlartifacts" / run.info.run_id / "artifacts"
    assert (folder / "a.txt").read_text() == "of the first run" and (folder / "operative.gin").read_text() == "lr = 1"
    assert not kept(root) and not spooled_runs(root) and upload_spool(root) == []


def test_the_error_of_a_stage_without_server_comes_through_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match="cannot be used"), pytest.raises(KeyError) as error:
        with MlflowTracker.open(stage="search", root=root):
            raise KeyError("the stage's own")
    assert error.value.__context__ is None


@pytest.mark.parametrize("trouble", ["dead", "read-only", "failing"])
@pytest.mark.parametrize("recovers", [True, False])
@pytest.mark.part(2)
@pytest.mark.exhaustive
def test_a_server_in_trouble_midway_costs_one_warning_and_no_record(
    root: Path, server: Server, trouble: str, recovers: bool
) -> None:
    status = {"read-only": "403 FORBIDDEN", "failing": "500 INTERNAL SERVER ERROR"}.get(trouble)
    with pytest.warns(UserWarning, match=r"did not take metrics .*kept in") as warned:
        with MlflowTracker.open(stage="search", root=root) as tracker:
            tracker.log_metrics({"loss": 0.0}, step=0)
            server.before = lambda method: status if method == "POST" else None
            if trouble == "dead":
                server.stop()
            for step in range(1, 6):
                tracker.log_metrics({"loss": step}, step)
            tracker.log_params({"seed": 0})
            (waiting,) = spooled_runs(root)
            assert waiting.busy and waiting.run_id == tracker.run_id
            assert "is still running this stage" in upload_spool(root)[0].problem
            if recovers:
                server.before = lambda method: None
                if trouble == "dead":
                    server.start()
    assert len(warned) == 1
    if not recovers:
        if trouble == "dead":
            server.start()
        server.before = lambda method: None
        (waiting,) = spooled_runs(root)
        assert (waiting.run_id, waiting.records, waiting.busy) == (tracker.run_id, 7, False)
        assert [(upload.run_id, upload.problem) for upload in upload_spool(root)] == [(tracker.run_id, "")]
    run = served_run()
    assert (run.info.run_id, run.info.status, run.data.params) == (tracker.run_id, "FINISHED", {"seed": "0"})
    assert served_steps("loss") == list(range(6))
    assert not kept(root)


@pytest.mark.exhaustive
def test_a_server_that_answers_again_is_told_what_waits(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    with pytest.warns(UserWarning, match="did not take metrics"):
        with MlflowTracker.open(stage="search", root=root) as tracker:
            server.before = lambda method: "503 SERVICE UNAVAILABLE"
            for step in range(3):
                tracker.log_metrics({"loss": step}, step)
            server.before = lambda method: None
            tracker.log_metrics({"loss": 3}, step=3)
            assert served_steps("loss") == [0, 1, 2, 3] and not spooled_runs(root)
            tracker.log_metrics({"loss": 4}, step=4)
            assert served_steps("loss") == [0, 1, 2, 3, 4]
    assert served_run().info.status == "FINISHED" and not kept(root)


@pytest.mark.exhaustive
def test_a_slow_server_costs_a_bounded_time_and_doubles_nothing(
    root: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ANSWER_SECONDS", 0.3)
    answer = threading.Event()
    with pytest.warns(UserWarning, match=r"did not take metrics \(TimeoutError: no answer within 0.3 seconds\)"):
        with MlflowTracker.open(stage="search", root=root) as tracker:
            tracker.log_metrics({"loss": 0}, step=0)
            server.before = lambda method: answer.wait() and None
            start = time.monotonic()
            for step in range(1, 20):
                tracker.log_metrics({"loss": step}, step)
            assert time.monotonic() - start < 3
            answer.set()  # the call that was given up arrives after all
            while len(served_steps("loss")) < 2:
                pass
    assert served_steps("loss") == list(range(20))
    assert served_run().info.status == "FINISHED" and not kept(root)


def test_a_store_that_breaks_on_the_way_costs_one_warning(root: Path) -> None:
    good = root / "mlflow.db"
    with pytest.warns(UserWarning, match="did not take metrics") as warned:
        with MlflowTracker.open(stage="search", root=root) as tracker:
            backup = good.read_bytes()
            good.write_bytes(b"no database" * 1000)
            for step in range(10):
                tracker.log_metrics({"loss": 1.0}, step)
            tracker.log_params({"seed": 0})
    assert len(warned) == 1
    good.write_bytes(backup)
    assert [upload.run_id for upload in upload_spool(root)] == [tracker.run_id]
    assert len(client(root).get_metric_history(tracker.run_id, "loss")) == 10
    assert only_run(root).info.status == "FINISHED"


def test_after_a_refused_call_the_next_ones_are_still_sent(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"did not take artifact \(there is no .*missing.json") as warned:
        with MlflowTracker.open(stage="search", root=root) as tracker:
            for step in range(5):
                tracker.log_artifact(root / "missing.json")
                tracker.log_metrics({"loss": step}, step)
    assert only_run(root).data.metrics == {"loss": 4}
    assert len(warned) == 1 and not kept(root)


def test_a_place_where_nothing_can_be_kept_ends_no_stage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / ".tanglenas").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match=r"this run is not tracked .*\.tanglenas"):
        with MlflowTracker.open(stage="search", root=root) as tracker:
            tracker.log_metrics({"loss": 1.0}, step=0)
    assert isinstance(tracker, NullTracker)


def test_a_disk_that_fills_up_ends_no_stage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning) as warned:
        with MlflowTracker.open(stage="search", root=root) as tracker:
            (folder,) = (root / ".tanglenas" / "runs").iterdir()
            (folder / "spool.jsonl").unlink()
            (folder / "spool.jsonl").mkdir()
            tracker.log_metrics({"loss": 1.0}, step=0)
    assert len(warned) == 1


# --- killed runs ----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from tanglenas_engine.pipeline.tracking.tracker import MlflowTracker
with MlflowTracker.open(stage="search", root=sys.argv[1], run_id=sys.argv[2] or None) as tracker:
    for step in range(3):
        tracker.log_metrics({"loss": step}, step)
    print(tracker.run_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(root: Path, run_id: str = "") -> str:
    return Forked(KILLED, root, run_id).finished(-signal.SIGKILL).splitlines()[-1]


@pytest.mark.exhaustive
def test_a_killed_run_is_found_and_marked_and_may_go_on_after_all(root: Path) -> None:
    run_id = killed(root)
    with MlflowTracker.open(stage="retrain", root=root) as living:
        (stale,) = stale_runs(root)
        assert (stale.run_id, stale.name, stale.resumable) == (run_id, "search", False)
        record = root / ".tanglenas" / "resume" / "search-0123" / "run"
        record.parent.mkdir(parents=True)
        record.write_text(run_id)
        assert stale_runs(root)[0].resumable
        assert living.run_id != run_id
    mark_killed([run_id], root)
    assert client(root).get_run(run_id).info.status == "KILLED" and not stale_runs(root)
    record.unlink()
    assert not kept(root)
    with MlflowTracker.open(stage="search", root=root, run_id=run_id) as again:
        again.log_metrics({"loss": 3}, step=3)
    assert client(root).get_run(run_id).info.status == "FINISHED"
    assert not stale_runs(root) and not kept(root)


def test_a_stage_that_begins_while_the_store_answers_is_no_killed_run(root: Path, monkeypatch) -> None:
    with contextlib.ExitStack() as stages, MlflowTracker.open(stage="search", root=root) as living:
        query = spool._running

        def slow(store, known):
            stages.enter_context(MlflowTracker.open(stage="retrain", root=root))
            return query(store, known)

        monkeypatch.setattr(spool, "_running", slow)
        assert stale_runs(root) == []
        assert client(root).get_run(living.run_id).info.status == "RUNNING"


def test_a_run_that_goes_on_again_is_not_marked_killed_nor_is_the_pipeline_of_a_living_stage(root: Path) -> None:
    with MlflowTracker.open(stage="search", root=root, pipeline_id="p", pipeline="drnas s0") as tracker:
        run_id = tracker.run_id
    parent = client(root).get_run(run_id).data.tags["mlflow.parentRunId"]
    client(root).update_run(run_id, status="RUNNING")
    assert [stale.run_id for stale in stale_runs(root) if stale.run_id != parent] == [run_id]
    with MlflowTracker.open(stage="search", root=root, run_id=run_id):
        assert mark_killed([run_id], root) == []
        assert client(root).get_run(run_id).info.status == "RUNNING"
    client(root).update_run(run_id, status="RUNNING")
    with MlflowTracker.open(stage="retrain", root=root, pipeline_id="p", pipeline="drnas s0"):
        assert mark_killed([run_id], root) == [run_id]
        assert [client(root).get_run(one).info.status for one in (run_id, parent)] == ["KILLED", "RUNNING"]


@pytest.mark.exhaustive
def test_a_run_killed_before_it_held_its_folder_is_found_in_the_own_store(root: Path) -> None:
    run_id = killed(root)
    shutil.rmtree(root / ".tanglenas" / "runs")
    assert [stale.run_id for stale in stale_runs(root)] == [run_id]
    mark_killed([run_id], root)
    assert not stale_runs(root)


@pytest.mark.exhaustive
def test_no_store_has_no_stale_runs_and_one_in_trouble_says_so(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stale_runs(tmp_path) == [] and not (tmp_path / "mlflow.db").exists()
    killed(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TangleNASError, match=r"the MLflow store http://\*\*\*@127.0.0.1:9 cannot be used"):
        stale_runs(root)


@pytest.mark.parametrize("uploaded_between", [False, True])
@pytest.mark.exhaustive
def test_a_run_killed_while_the_server_was_down_goes_on_as_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, uploaded_between: bool
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    name = killed(root)
    assert name.startswith("unsent-") and killed(root, name) == name
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if uploaded_between:
        (upload,) = upload_spool(root)
        assert [stale.run_id for stale in stale_runs(root)] == [upload.run_id]
    with MlflowTracker.open(stage="search", root=root, run_id=name) as tracker:
        for step in range(2, 5):
            tracker.log_metrics({"loss": step}, step)
    run = only_run(root)
    assert (run.info.run_id, run.info.status) == (tracker.run_id, "FINISHED")
    assert [metric.step for metric in client(root).get_metric_history(run.info.run_id, "loss")] == [0, 1, 2, 3, 4]
    assert not kept(root)


@pytest.mark.exhaustive
def test_a_damaged_or_hostile_spool_sends_what_is_whole_and_no_file_of_others(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    killed(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (root / "private.txt").write_text("not for the store")
    (waiting,) = spooled_runs(root)
    with open(waiting.folder / "spool.jsonl", "a") as file:
        for path in ("../../../private.txt", str(root / "private.txt")):
            file.write(json.dumps({"what": "artifact", "path": path, "folder": None, "time": 0}) + "\n")
        file.write('[1]\n{"what": "nothing"}\n\xff\n{"what": "metrics", "metr')  # a kill in the middle of a line
    (upload,) = upload_spool(root)
    assert upload.problem == ""
    assert [metric.step for metric in client(root).get_metric_history(upload.run_id, "loss")] == [0, 1, 2]
    assert not list((root / "mlartifacts").rglob("private.txt"))


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
from tanglenas_engine.pipeline.tracking.tracker import MlflowTracker
sys.stdin.read()
with MlflowTracker.open(stage=sys.argv[2], root=sys.argv[1]) as tracker:
    tracker.log_metrics({"loss": 1.0}, step=0)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_four_processes_start_at_once_on_a_store_that_does_not_exist(tmp_path: Path) -> None:
    root = tmp_path / "fresh"
    processes = [Forked(START, root, f"s{index}") for index in range(4)]
    for process in processes:
        process.let_go()
    for process in processes:
        assert process.finished() == ""
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


@pytest.mark.exhaustive
def test_runs_of_later_stages_say_which_optimizer_they_go_back_to(tmp_path: Path) -> None:
    with MlflowTracker.open(stage="evaluate", root=tmp_path, pipeline_id="p", tags={"optimizer": "gdas"}) as tracker:
        run_id = tracker.run_id
    run = client(tmp_path).get_run(run_id)
    assert run.info.run_name == "evaluate gdas" and run.data.tags["optimizer"] == "gdas"


# --- the run of a pipeline ------------------------------------------------------------------------------------


def staged(root: Path, stage: str, pipeline_id: str = "p", digest: str = "", **options):
    tags = {"space": "nano", **({"architecture.digest": digest} if digest else {})}
    return MlflowTracker.open(
        stage=stage, root=root, pipeline_id=pipeline_id, pipeline="drnas nano s0", tags=tags, **options
    )


def pipelines(root: Path) -> dict[str, tuple[object, list[str]]]:
    """The run of each pipeline by its id, with the names of the runs nested in it."""
    experiments = [experiment.experiment_id for experiment in client(root).search_experiments()]
    runs = client(root).search_runs(experiments, order_by=["attributes.start_time"])
    parents = {run.info.run_id: (run, []) for run in runs if run.data.tags["tanglenas.stage"] == "pipeline"}
    for run in runs:
        if run.info.run_id not in parents:
            parents[run.data.tags["mlflow.parentRunId"]][1].append(run.info.run_name)
    return parents


def test_the_stages_of_a_pipeline_are_nested_in_one_run_that_has_what_compares_it(root: Path) -> None:
    with staged(root, "search") as tracker:
        (parent, nested), *_ = pipelines(root).values()
        assert (parent.info.status, nested) == ("RUNNING", ["search"])
        tracker.log_pipeline({"seconds": 3}, {"search": {"epochs": 2}})
    assert {run.info.status for run, _ in pipelines(root).values()} == {"FINISHED"}
    with staged(root, "evaluate", digest="0123456789abcdef") as tracker:
        tracker.log_pipeline({"seconds": 5, "test_loss": math.inf}, {"search": {"epochs": 4}}, {"digest": "abc"})
    with staged(root, "search", "another"):
        pass
    ((parent, nested), (other, _)) = pipelines(root).values()
    assert nested == ["search", "evaluate 01234567"] and parent.info.run_name == "drnas nano s0"
    assert parent.data.metrics == {"seconds": 5} and parent.data.params == {"search.epochs": "2"}
    assert parent.data.tags["digest"] == "abc" and parent.data.tags["space"] == "nano"
    assert not {"architecture.digest", "params.hash", "mlflow.parentRunId"} & parent.data.tags.keys()
    assert other.data.tags["tanglenas.pipeline_id"] == "another"


def test_the_page_of_the_experiment_opens_on_columns_that_compare_pipelines(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = client(root).create_experiment("tanglenas")
    with staged(root, "search"):
        pass
    tags = client(root).get_experiment(bare).tags
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with MlflowTracker.open(stage="search", root=root):
        pass
    assert client(root).get_experiment_by_name("another").tags.items() >= store.VIEW.items() <= tags.items()
    columns = json.loads(tags["mlflow.sharedViewState.tanglenas"])["selectedColumns"]
    assert columns[0] == "metrics.`test_accuracy`"


def test_a_stage_that_runs_again_finds_the_run_of_its_pipeline(root: Path) -> None:
    for _ in range(2):
        with staged(root, "retrain"):
            pass
    with pytest.raises(RuntimeError), staged(root, "evaluate"):
        raise RuntimeError
    ((parent, nested),) = pipelines(root).values()
    assert nested == ["retrain", "retrain", "evaluate"] and parent.info.status == "FAILED"


def test_experiments_of_dvc_that_share_a_search_are_pipelines_of_their_own(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ritzy-waws", "itchy-thar"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        with staged(root, "retrain"):
            pass
    assert [run.data.tags["dvc.exp_name"] for run, _ in pipelines(root).values()] == ["ritzy-waws", "itchy-thar"]


def test_a_stage_that_goes_on_as_another_experiment_takes_its_pipeline_along(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "first")
    with staged(root, "search"):
        pass
    with pytest.raises(KeyboardInterrupt), staged(root, "retrain") as tracker:
        raise KeyboardInterrupt
    monkeypatch.setenv("DVC_EXP_NAME", "second")
    with staged(root, "retrain", run_id=tracker.run_id):
        pass
    with staged(root, "evaluate"):
        pass
    ((parent, nested),) = pipelines(root).values()
    assert nested == ["search", "retrain", "evaluate"] and parent.data.tags["dvc.exp_name"] == "second"


def test_the_run_of_a_pipeline_whose_id_was_lost_on_the_way_is_made_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    create, made = MlflowClient.create_run, []

    def lose(*args, **kwargs):
        made.append(kwargs["run_name"])
        create(*args, **kwargs)
        raise TimeoutError("no answer")

    monkeypatch.setattr(MlflowClient, "create_run", lose)
    with pytest.warns(UserWarning, match="no answer"), staged(root, "search") as tracker:
        tracker.log_pipeline({"seconds": 3})
    assert all(upload.problem == "" for upload in [*upload_spool(root), *upload_spool(root)] if upload.run_id)
    ((parent, nested),) = pipelines(root).values()
    assert nested == ["search"] and parent.data.metrics == {"seconds": 3} and parent.info.status == "FINISHED"
    assert made == ["drnas nano s0", "search"]


def test_a_pipeline_whose_run_was_deleted_gets_another(root: Path) -> None:
    with staged(root, "search"):
        pass
    ((first, _),) = pipelines(root).values()
    client(root).delete_run(first.info.run_id)
    with staged(root, "search") as tracker:
        pass
    (parent,) = (client(root).get_run(tracker.run_id).data.tags["mlflow.parentRunId"],)
    assert parent != first.info.run_id and client(root).get_run(parent).info.lifecycle_stage == "active"


@pytest.mark.exhaustive
def test_a_killed_stage_ends_the_run_of_its_pipeline_too(root: Path) -> None:
    code = KILLED.replace('stage="search"', 'stage="search", pipeline_id="p", pipeline="drnas nano s0"')
    run_id = Forked(code, root, "").finished(-signal.SIGKILL).splitlines()[-1]
    assert [stale.run_id for stale in stale_runs(root)] == [run_id]
    mark_killed([run_id], root)
    ((parent, _),) = pipelines(root).values()
    assert parent.info.status == "KILLED" and stale_runs(root) == []
    client(root).update_run(parent.info.run_id, status="RUNNING")  # as if it was killed before its first stage began
    assert [stale.run_id for stale in stale_runs(root)] == [parent.info.run_id]


@pytest.mark.parametrize("parent", ["text", {"name": 3, "tags": {}}, {"name": "a", "tags": {}}, {"name": "a"},
                                    {"name": "a", "tags": {"tanglenas.key": 1}}])  # fmt: skip
def test_a_spool_with_a_damaged_pipeline_is_not_read(root: Path, parent: object) -> None:
    folder = root / ".tanglenas" / "runs" / "unsent-1"
    folder.mkdir(parents=True)
    start = {"what": "start", "time": 1, "experiment": "e", "name": "n", "tags": {}, "run_id": None, "parent": parent}
    (folder / "spool.jsonl").write_text(json.dumps(start) + "\n")
    assert spooled_runs(root) == []
