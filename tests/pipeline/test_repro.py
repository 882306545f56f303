"""The whole pipeline as people run it: `dvc repro` and `dvc exp run` in repositories of their own."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import interruptions
import pytest
import torch
from forked import Forked
from paths import ROOT
from project import STAGES, contents, dvc, environment, git, lay_out, set_params
from stages import arguments

pytestmark = [
    pytest.mark.slow,
    # MLflow's own models, on SQLAlchemy 2.1.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


def repository(folder: Path) -> Path:
    """A repository with the pipeline, committed; its search can be cut off (see interruptions.py)."""
    lay_out(folder)
    shutil.copy(ROOT / ".gitignore", folder)
    shutil.copy(interruptions.__file__, folder)
    with open(folder / "gin" / "stages" / "search.gin", "a") as file:
        file.write("search.loss = @interruptions.loss\n")
    git(folder, "init", "-q")
    dvc(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "the pipeline")
    return folder


def runs(folder: Path) -> list:
    """The MLflow runs of a repository's stages, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = "tags.`tanglenas.stage` != 'pipeline'"
    return client.search_runs(experiments, query, order_by=["attributes.start_time"])


def pipelines(folder: Path) -> dict:
    """The MLflow runs of a repository's pipelines by their ids."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_id: run for run in client.search_runs(experiments, "tags.`tanglenas.stage` = 'pipeline'")}


@dataclass
class Finished:
    folder: Path
    output: str  # what `dvc repro` printed


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A repository after `dvc repro`, which tests leave as it is."""
    folder = repository(tmp_path_factory.mktemp("finished") / "a project")
    return Finished(folder, dvc(folder, "repro"))


LATER = """
import json, sys
from stages import MAIN
for stage, given in json.loads(sys.argv[1]):
    MAIN[stage](given)
"""


@dataclass
class Disturbed:
    folder: Path
    refusal: str  # what the second `dvc repro` printed, while the search of the killed first one ran on
    pid: int  # of that search
    run_id: str
    resumed: str  # what the third one printed


@pytest.fixture(scope="session")
def disturbed(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """A clone whose DVC was killed, then its search, and which `dvc repro` finished all the same.

    The stages after the search ran without tracking, in one process: starting takes most of a stage's time.
    """
    folder = tmp_path_factory.mktemp("disturbed") / "project"
    git(finished.folder, "clone", "-q", ".", str(folder))
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    first = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "search"],
        cwd=folder,
        env=environment(folder, INTERRUPT=f"14:{fifo}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with open(fifo, "w"):  # opens once the search stands still, in its second epoch
        first.kill()
        first.wait()
        refusal = dvc(folder, "repro", "search", status=None)
        (run,) = runs(folder)
        pid = int(re.search(r"pid (\d+) is still running", refusal)[1])
        os.kill(pid, signal.SIGKILL)
        first.stdout.read()  # ends with the last process that could write there
    first.stdout.close()
    resumed = dvc(folder, "repro", "search")
    later = [(stage, arguments(folder, stage)) for stage in STAGES[1:]]
    untracked = environment(folder, TANGLENAS_TRACKING="off")
    Forked(LATER, json.dumps(later), folder=folder, environment=untracked).finished()
    return Disturbed(folder, refusal, pid, run.info.run_id, resumed)


# --- one pipeline ---------------------------------------------------------------------------------------------


def test_the_four_stages_are_finished_runs_of_one_lineage(finished: Finished) -> None:
    found = runs(finished.folder)
    assert [(run.data.tags["tanglenas.stage"], run.info.status) for run in found] == [(s, "FINISHED") for s in STAGES]
    assert len({run.data.tags["tanglenas.pipeline_id"] for run in found}) == 1
    digest = json.loads((finished.folder / "out" / "discretize" / "architecture.json").read_text())["digest"]
    sha = git(finished.folder, "rev-parse", "HEAD").strip()
    for run in found:
        assert (run.data.tags["git.sha"], run.data.tags["git.dirty"]) == (sha, "false")
        assert re.fullmatch("[0-9a-f]{16}", run.data.tags["params.hash"])
        assert run.data.tags["dvc.stage"] == run.data.tags["tanglenas.stage"]
        assert (run.data.params["SPACE"], run.data.params["SEED"]) == ("autoformer_nano", "0")
        assert re.fullmatch(r"[0-9a-f]{12}", run.data.params["dataset.fingerprint"])
        record = json.loads((finished.folder / "out" / f"{run.data.tags['tanglenas.stage']}.run.json").read_text())
        assert record["mlflow_run_id"] == run.info.run_id
    assert {run.data.tags["architecture.digest"] for run in found[1:]} == {digest}
    assert {"search/validation_accuracy", "search/entropy", "final/entropy"} < set(found[0].data.metrics)
    test_accuracy = json.loads((finished.folder / "metrics" / "evaluate.json").read_text())["test_accuracy"]
    assert found[-1].data.metrics["final/test_accuracy"] == test_accuracy


def test_the_stages_are_nested_in_a_run_of_the_pipeline_that_has_what_compares_it(finished: Finished) -> None:
    ((parent, pipeline),) = pipelines(finished.folder).items()
    found = runs(finished.folder)
    assert {run.data.tags["mlflow.parentRunId"] for run in found} == {parent}
    assert (pipeline.info.run_name, pipeline.info.status) == ("drnas autoformer_nano s0", "FINISHED")
    evaluated = json.loads((finished.folder / "metrics" / "evaluate.json").read_text())
    numbers = pipeline.data.metrics
    assert {name: numbers[name] for name in ("test_accuracy", "test_loss", "params", "macs")} == {
        name: evaluated[name] for name in ("test_accuracy", "test_loss", "params", "macs")
    }
    assert {"search_validation_accuracy", "search_validation_loss", "validation_accuracy"} < set(numbers)
    used = [run.data.metrics for run in found]
    assert all(0 < one["stage/processor_seconds"] and one["stage/peak_memory_MiB"] > 100 for one in used)
    assert numbers["seconds"] == pytest.approx(sum(one["stage/seconds"] for one in used), abs=0.1)
    assert numbers["peak_memory_MiB"] == max(one["stage/peak_memory_MiB"] for one in used)
    assert (pipeline.data.params["OPTIMIZER"], pipeline.data.params["search.epochs"]) == ("drnas", "2")
    assert pipeline.data.tags["architecture.digest"] == evaluated["digest"]


def test_figures_and_config_are_files_and_artifacts(finished: Finished) -> None:
    figures = {"search/anytime.png", "search/alphas.png", "discretize/architecture.png", "retrain/training.png"}
    configs = {f"{stage}/operative.gin" for stage in STAGES}
    files = contents(finished.folder / "out")
    assert figures | configs < set(files)
    for run in runs(finished.folder):
        stage = run.data.tags["tanglenas.stage"]
        artifacts = finished.folder / "mlartifacts" / run.info.run_id / "artifacts"
        assert contents(artifacts) == contents(finished.folder / "out" / stage)
    assert all(files[name].startswith(b"\x89PNG") for name in figures)


def test_the_history_has_a_row_for_every_epoch(finished: Finished) -> None:
    with open(finished.folder / "out" / "search" / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    last = json.loads((finished.folder / "metrics" / "search.json").read_text())
    losses = {f"{split}_split_loss" for split in ("weights", "architecture", "validation")}
    assert losses < last.keys()
    assert {float(rows[-1][name]) == value for name, value in last.items() if name not in losses} == {True}


def test_what_a_person_sees_is_the_result_and_no_noise(finished: Finished) -> None:
    accuracy = json.loads((finished.folder / "metrics" / "evaluate.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2f} %" in finished.output
    assert re.search(r"discretize │ embed_dim=\d+ +│ out/discretize", finished.output)
    assert not re.search("warning|loading pretrained|deprecat", finished.output, re.IGNORECASE)


def test_the_exported_folder_is_the_network_that_was_judged(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    import tanglenas_vit.network  # noqa: F401  # tells timm about the networks of this space
    from tanglenas_engine import Architecture, create_dataset, create_space
    from tanglenas_engine.data import Splits, open_splits
    from tanglenas_engine.runtime.weights import load_weights
    from tanglenas_engine.training.measure import measure

    monkeypatch.chdir(finished.folder)
    dataset = create_dataset("digits")
    test = open_splits(dataset, Splits.from_json(Path("out/search/splits.json").read_text()), ("test",)).test
    loaded = timm.create_model("local-dir:out/retrain/model", pretrained=True).eval()

    architecture = Architecture.from_json(Path("out/discretize/architecture.json").read_text())
    gin_file = Path("out/evaluate/operative.gin").read_text()
    options = {"relative_position": True} if "relative_position = True" in gin_file else {}
    judged = create_space("autoformer_nano", **options).standalone(architecture).eval()
    judged.load_state_dict(load_weights("out/retrain/model/model.safetensors"))

    inputs, _targets = test.batch(torch.arange(32))
    with torch.no_grad():
        assert torch.equal(loaded(inputs), judged(inputs))
    assert measure(loaded, test).accuracy == json.loads(Path("metrics/evaluate.json").read_text())["test_accuracy"]
    assert loaded.pretrained_cfg["input_size"] == (1, 8, 8) and len(loaded.pretrained_cfg["mean"]) == 1


def test_nothing_is_left_that_git_should_not_see(finished: Finished) -> None:
    status = git(finished.folder, "status", "--porcelain").splitlines()
    assert sorted(status) == ["?? dvc.lock", "?? environment.json", "?? metrics/"]
    git(finished.folder, "add", "-A", "-n")
    tracked = git(finished.folder, "ls-files", "--others", "--exclude-standard").split()
    metrics = [f"metrics/{stage}.json" for stage in sorted(STAGES)]
    assert sorted(tracked) == ["dvc.lock", "environment.json", *metrics]
    assert not contents(finished.folder / ".tanglenas")  # no lock, no checkpoint


# --- equal parameters, equal bytes ----------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_second_stage_beside_the_first_is_told_its_pid(disturbed: Disturbed) -> None:
    assert re.search(
        rf"search: pid {disturbed.pid} is still running this stage .* `kill {disturbed.pid}`", disturbed.refusal
    )
    assert "Traceback" not in disturbed.refusal


@pytest.mark.exhaustive
def test_a_search_that_was_killed_goes_on_in_the_same_run(disturbed: Disturbed) -> None:
    assert "search: resuming at step 10 of 20" in disturbed.resumed
    (run,) = runs(disturbed.folder)
    assert (run.info.run_id, run.info.status) == (disturbed.run_id, "FINISHED")
    record = json.loads((disturbed.folder / "out" / "search.run.json").read_text())
    assert record["mlflow_run_id"] == disturbed.run_id and record["used"]["seconds"] > 0
    (pipeline,) = pipelines(disturbed.folder).values()
    assert run.data.tags["mlflow.parentRunId"] == pipeline.info.run_id and pipeline.info.status == "FINISHED"


@pytest.mark.exhaustive
def test_kills_and_tracking_and_place_change_no_byte(finished: Finished, disturbed: Disturbed) -> None:
    for folder in (*(f"out/{stage}" for stage in STAGES), "metrics"):
        assert contents(disturbed.folder / folder) == contents(finished.folder / folder), folder


def test_no_output_says_where_when_or_as_which_run_it_was_made(finished: Finished) -> None:
    run_ids = [run.info.run_id for run in runs(finished.folder)]
    for folder in (*(f"out/{stage}" for stage in STAGES), "metrics"):
        for name, content in contents(finished.folder / folder).items():
            for word in (str(finished.folder), str(finished.folder.parent.parent), str(ROOT), sys.prefix, *run_ids):
                assert word.encode() not in content, f"{folder}/{name} holds {word}"
            assert not re.search(rb"20\d\d-\d\d-\d\d|tIME", content), f"{folder}/{name} holds a date"


# --- what runs again ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def changed(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed copy of `finished`, for tests that change it."""
    folder = tmp_path_factory.mktemp("changed") / "project"
    shutil.copytree(finished.folder, folder)
    for state in ("mlflow.db", "mlartifacts"):  # the copy's artifacts would go to the original's place
        path = folder / state
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "after the first run")
    return folder


def stages_that_ran(output: str) -> list[str]:
    """Without the one that always runs."""
    first, *others = re.findall(r"^Running stage '(\w+)'", output, re.MULTILINE)
    assert first == "environment"
    return others


@pytest.mark.exhaustive
def test_a_second_repro_does_nothing_whatever_python_left_beside_the_code(changed: Path) -> None:
    for folder in ("pipelines", "tanglenas_engine", "plugins/tanglenas_vit"):
        (changed / folder / "__pycache__").mkdir(exist_ok=True)
        (changed / folder / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"x")
    output = dvc(changed, "repro")
    assert stages_that_ran(output) == [] and output.count("didn't change, skipping") == len(STAGES)


@pytest.mark.exhaustive
def test_an_upgrade_makes_every_stage_run_again_unless_its_results_are_committed(changed: Path) -> None:
    before = contents(changed / "out")
    module = changed / "tanglenas_engine" / "pipeline" / "files.py"
    source = module.read_text()
    module.write_text(source + "# another version\n")
    dvc(changed, "repro", "environment")
    assert re.findall(r"^(\w+):$", dvc(changed, "status"), re.MULTILINE) == ["environment", *STAGES]
    dvc(changed, "commit", "--force")
    assert stages_that_ran(dvc(changed, "repro")) == [] and contents(changed / "out") == before
    module.write_text(source)
    output = dvc(changed, "repro")
    assert stages_that_ran(output) == [] and contents(changed / "out") == before
    assert output.count("is cached - skipping run, checking out outputs") == len(STAGES)


@pytest.mark.exhaustive
def test_a_changed_parameter_runs_what_it_touches_and_comes_back_from_the_cache(changed: Path) -> None:
    before = contents(changed / "out" / "retrain")
    set_params(changed, retrain={"epochs": 2})
    assert stages_that_ran(dvc(changed, "repro", TANGLENAS_TRACKING="off")) == ["retrain", "evaluate"]
    assert contents(changed / "out" / "retrain") != before
    set_params(changed, retrain={"epochs": 1})
    output = dvc(changed, "repro")
    assert stages_that_ran(output) == []
    assert output.count("is cached - skipping run, checking out outputs") == 2
    assert contents(changed / "out" / "retrain") == before


@pytest.mark.exhaustive
def test_a_queued_experiment_is_tracked_in_the_repository_and_not_in_its_temporary_copy(changed: Path) -> None:
    assert "Queued" in dvc(changed, "exp", "run", "--queue", "-S", "discretize.max_params=60000", "discretize")
    dvc(changed, "exp", "run", "--run-all", status=None)
    status = dvc(changed, "queue", "status")
    assert "Success" in status, dvc(changed, "queue", "logs", re.findall(r"^\w{7}", status, re.MULTILINE)[-1])
    (run,) = runs(changed)
    assert (run.info.status, run.data.tags["dvc.stage"]) == ("FINISHED", "discretize")
    assert run.data.metrics["final/params"] <= 60000
    # The search was skipped: the experiment is a pipeline of its own, and its numbers are complete all the same.
    (pipeline,) = pipelines(changed).values()
    assert run.data.tags["mlflow.parentRunId"] == pipeline.info.run_id
    assert pipeline.data.tags["dvc.exp_name"] == run.data.tags["dvc.exp_name"]
    assert {"search_validation_loss", "params"} < set(pipeline.data.metrics)
    assert run.info.artifact_uri.startswith((changed / "mlartifacts").as_uri())
    assert (changed / "mlartifacts" / run.info.run_id / "artifacts" / "architecture.json").exists()


@pytest.mark.exhaustive
def test_an_experiment_searches_with_another_optimizer(changed: Path) -> None:
    output = dvc(changed, "exp", "run", "-S", "optimizer=spos", "discretize")
    assert stages_that_ran(output) == ["search", "discretize"]
    with open(changed / "out" / "discretize" / "candidates.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and float(rows[0]["loss"]) <= float(rows[2]["loss"])
    assert not (changed / "out" / "search" / "alphas.png").exists()
    searched, discretized = runs(changed)[-2:]
    assert (searched.data.tags["tanglenas.stage"], searched.info.status) == ("search", "FINISHED")
    assert (discretized.data.tags["tanglenas.stage"], discretized.info.status) == ("discretize", "FINISHED")
    assert searched.data.params["OPTIMIZER"] == "spos"
    assert searched.data.tags["dvc.exp_name"] and searched.data.tags["git.dirty"] == "true"
