"""`tanglenas doctor`: it finds what is wrong, says what to do, and can be trusted where it says nothing."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gin
import interruptions
import pytest
from click.testing import CliRunner
from forked import Forked

from tanglenas_engine.cli import doctor, main
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.files import exclusive

# MLflow's own models, on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

DIES = """
import os, signal, sys
from tanglenas_engine.pipeline.tracking.tracker import MlflowTracker

with MlflowTracker.open(stage="search", root=sys.argv[1]) as tracker:
    tracker.log_metrics({"loss": 1.0}, 0)
    print(tracker.run_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project in order; the current folder."""
    for name in [name for name in os.environ if name.startswith(("TANGLENAS_", "MLFLOW_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["init", "project"]).exit_code == 0
    (tmp_path / "project" / ".git").mkdir()
    monkeypatch.chdir("project")
    return tmp_path / "project"


@pytest.fixture
def ask(project):
    """Call the command: its exit status, and what it found as (state, text with the remedy)."""

    def call(*arguments: str) -> tuple[int, list[tuple[str, str]]]:
        result = CliRunner().invoke(main, ["doctor", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        found: list[tuple[str, str]] = []
        for line in result.stdout.splitlines():
            state, _, rest = line.strip().partition(" ")
            if state == "->":
                found[-1] = (found[-1][0], f"{found[-1][1]} -> {rest}")
            elif line.startswith("  "):
                found.append((state, rest.strip()))
        return result.exit_code, found

    return call


def those(found: list[tuple[str, str]], state: str) -> list[str]:
    return [text for kind, text in found if kind == state]


def test_a_project_in_order_has_no_problem(ask):
    status, found = ask()
    assert status == 0
    assert not those(found, "problem") and not those(found, "note")
    assert {"nothing is running", "every run has ended, or its process lives"} <= set(those(found, "ok"))


@pytest.mark.parametrize(
    "break_it, message, remedy",
    [
        (lambda p: shutil.rmtree(p / ".dvc"), "dvc does not know this folder", "dvc init"),
        (lambda p: (p / "params.yaml").unlink(), "params.yaml are missing", "tanglenas init DIR"),
        (lambda p: (p / "pipelines" / "_stage.py").write_text(""), "an earlier version", "tanglenas init --upgrade /"),
        (lambda p: (p / "gin" / "__init__.py").write_text(""), "hides the package gin-config", "delete the file"),
    ],
)
def test_what_is_wrong_with_a_project_is_told_with_what_to_do(ask, project, break_it, message, remedy):
    break_it(project)
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and message in problem and remedy in problem.partition(" -> ")[2]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"space: [", "params.yaml cannot be read"),
        (b"\xff\xfe", "params.yaml cannot be read"),
        (b"- 1", "params.yaml holds a list"),
        (None, "nothing in dvc.yaml uses the key 'spce'. Did you mean 'space'?"),
    ],
)
def test_a_damaged_params_file_is_told_by_every_command_in_one_sentence(ask, project, content, message):
    params = project / "params.yaml"
    params.write_bytes(params.read_bytes() + b"spce: toy_cell\n" if content is None else content)
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and message in problem
    for command in (["pool", "build", "pool.csv"], ["latency", "build", "autoformer_nano", "t.json"]):
        result = CliRunner().invoke(main, command)
        assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output, result.exception
        assert result.exit_code == 2 and message in result.output


def test_a_folder_without_a_project_is_no_problem(ask, project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, found = ask()
    assert status == 0 and "tanglenas init DIR" in those(found, "note")[0]


@pytest.mark.parametrize(
    "variable, value, message",
    [("TANGLENAS_DEVICE", "cpuu", "Did you mean 'cpu'?"), ("TANGLENAS_PLUGINS", "vti", "Did you mean 'vit'?")],
)
def test_an_environment_variable_that_is_wrong_is_a_problem(ask, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and message in problem


@pytest.fixture
def git(project):
    """Run git in the project, a repository with one commit."""

    def call(*arguments: str) -> None:
        person = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org")
        subprocess.run(["git", *person, *arguments], cwd=project, check=True, capture_output=True)

    (project / ".git").rmdir()
    call("init", "--quiet")
    call("add", ".")
    call("commit", "-qm", "new")
    return call


def test_outputs_that_git_tracks_are_a_problem_which_its_remedy_solves(ask, project, git):
    assert ask()[0] == 0
    for name in ("out/inputs/search.json", "out/recipe.json", "out/.gitignore", "metrics/search.json"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("{}\n")
    git("add", "--force", ".")
    git("commit", "-qm", "all")
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and "git tracks out/inputs, out/recipe.json, so that" in problem
    remedy = problem.partition(" -> ")[2]
    assert remedy.startswith("git rm -r --quiet --cached out/inputs out/recipe.json && git commit")
    git(*shlex.split(remedy.partition(" && ")[0])[1:])
    assert ask()[0] == 0 and (project / "out" / "recipe.json").exists()


@pytest.mark.parametrize("rules", ["__pycache__/\n", "/out/\n!/out/", "# /out/"])
def test_outputs_that_git_would_add_are_noted_with_a_remedy_that_solves_it(ask, project, git, rules):
    (project / "out").mkdir()
    (project / ".gitignore").write_text(rules)
    (project / "out" / ".gitignore").write_text("/inputs\n/recipe.json\n/search\n")  # as DVC writes it
    status, found = ask()
    (note,) = those(found, "note")
    assert status == 0 and "git does not ignore out/search.run.json, out/discretize, " in note
    remedy = note.partition(" -> ")[2]
    assert remedy == f"printf '%s\\n' '' /out/ >> {project}/.gitignore"
    subprocess.run(remedy, shell=True, check=True)
    assert not those(ask()[1], "note")
    assert (project / ".gitignore").read_text().startswith(rules)


def test_outputs_of_own_stages_are_noted_where_they_are_and_those_elsewhere_are_none_of_git(
    ask, project, git, tmp_path
):
    (tmp_path / "disk").mkdir()
    (project / "far").symlink_to(tmp_path / "disk")
    outs = f"['große Datei.txt', ../beside.txt, ../../outside.txt, {tmp_path}/absolute.txt, ../far/linked.txt]"
    mine = f"  mine:\n    cmd: make\n    wdir: sub\n    outs: {outs}\n"
    each = "  each:\n    foreach: [1, 2]\n    do:\n      cmd: make\n      outs: ['part-${item}.txt']\n"
    pipeline = project / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("\nstages:\n", f"\nstages:\n{mine}{each}"))
    status, found = ask()
    (note,) = those(found, "note")
    assert status == 0 and "git does not ignore sub/große Datei.txt, beside.txt, part-*.txt, which DVC keeps" in note
    subprocess.run(note.partition(" -> ")[2], shell=True, check=True)
    assert not those(ask()[1], "note")
    (project / "beside.txt").write_text("large")
    git("add", "--force", "beside.txt")
    assert "git tracks beside.txt, so that" in those(ask()[1], "problem")[0]


def test_a_new_study_is_in_order(ask, tmp_path, monkeypatch):
    assert CliRunner().invoke(main, ["study", "ranking", "--no-run", "--out", "new"]).exit_code == 0
    monkeypatch.chdir("new")
    for step in ("init -q", "add .", "-c user.name=T -c user.email=t@example.org commit -qm new"):
        subprocess.run(["git", *step.split()], check=True)
    status, found = ask()
    assert (status, those(found, "note")) == (0, [])


def test_a_store_that_cannot_be_opened_is_a_problem(ask, project, monkeypatch):
    (project / ".tanglenas" / "runs" / ("0" * 32)).mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/none/mlflow.db")
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and "/proc/none/mlflow.db cannot be used" in problem


def test_the_python_that_stages_run_with_is_the_one_that_has_the_library(ask, tmp_path, monkeypatch):
    other = tmp_path / "bin" / "python"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho /somewhere/else\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:{os.environ['PATH']}")
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and "that of /somewhere/else" in problem and "/activate" in problem


def test_a_broken_plugin_is_a_problem_with_its_remedy(ask, tmp_path, monkeypatch):
    info = tmp_path / "site" / "tanglenas_broken-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tanglenas-broken\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[tanglenas]\nbroken = nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and "tanglenas-broken 0.3" in problem
    assert problem.endswith("-> Reinstall, upgrade or uninstall it.")


def test_a_stage_that_runs_is_told_with_its_process_and_a_dead_one_is_not(ask, project):
    locks = project / ".tanglenas" / "locks"
    (locks / "retrain-0123456789ab").mkdir(parents=True)
    with exclusive(locks / "search-0123456789ab"):
        (locks / "retrain-0123456789ab" / "owner.json").write_text(
            (locks / "search-0123456789ab/owner.json").read_text()
        )
        status, found = ask()
    (note,) = those(found, "note")
    assert status == 0 and f"search is running, as process {os.getpid()}" in note


def test_a_stage_that_was_cut_off_can_go_on(ask, project):
    with CheckpointFolder(project / ".tanglenas" / "resume" / "retrain-0123456789abcdef", "config") as checkpoints:
        checkpoints.save({"step": 3})
        assert not those(ask()[1], "note")  # its process lives
    (note,) = those(ask()[1], "note")
    assert "retrain was cut off, and can go on" in note and "run the same command again" in note


@pytest.fixture
def cut_off(project, monkeypatch):
    """The checkpoint of a search that the pipeline itself was stopped in; its folder."""
    from pipelines import search

    monkeypatch.setenv("TANGLENAS_TRACKING", "off")
    monkeypatch.setenv("INTERRUPT", f"{interruptions.calls + 3}:SIGTERM")
    names = ['SPACE = "autoformer_nano"', 'OPTIMIZER = "spos"', 'DATASET = "digits"', "SEED = 0", "search.epochs = 2"]
    names.append("search.loss = @interruptions.loss")
    with pytest.raises(SystemExit):
        search.main(["gin/stages/search.gin", *names])
    gin.clear_config()
    monkeypatch.delenv("TANGLENAS_TRACKING")
    monkeypatch.delenv("INTERRUPT")
    (folder,) = (project / ".tanglenas" / "resume").iterdir()
    return folder


def test_a_checkpoint_that_the_pipeline_left_can_go_on(ask, cut_off):
    (note,) = those(ask()[1], "note")
    assert "search was cut off, and can go on" in note and re.search(
        r"search-[0-9a-f]{16}, [\d.]+ [kM]B, saved 20", note
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"torch": "1.0"}, "torch has changed"),
        ({"code": {"tanglenas_engine": "0"}}, "tanglenas_engine has changed"),
        ({"code": {"tanglenas_gone": "0"}, "torch": "1.0"}, "tanglenas_gone and torch have changed"),
    ],
)
@pytest.mark.exhaustive
def test_a_checkpoint_of_other_code_is_of_no_use(ask, cut_off, change, message):
    file = cut_off / "made-by.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (note,) = those(ask()[1], "note")
    assert f"search was cut off, and cannot go on: {message} (" in note and f"rm -r {cut_off}" in note


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"code": 3, "torch": "1"}', '{"code": {"../x": 1}, "torch": 1}'])
@pytest.mark.exhaustive
def test_a_damaged_note_about_the_code_disturbs_nobody(ask, cut_off, text):
    (cut_off / "made-by.json").write_text(text)
    (note,) = those(ask()[1], "note")
    assert "search was cut off" in note


def test_a_checkpoint_of_a_stage_that_has_finished_since_is_told_apart(ask, cut_off, project):
    (project / "out").mkdir(exist_ok=True)
    (project / "out" / "search.run.json").write_text("{}")
    os.utime(project / "out" / "search.run.json", (2**31, 2**31))
    (note,) = those(ask()[1], "note")
    assert "search was cut off, and has run with other settings since" in note and f"rm -r {cut_off}" in note
    os.utime(project / "out" / "search.run.json", (1, 1))
    assert "can go on" in those(ask()[1], "note")[0]


@pytest.mark.exhaustive
def test_a_run_whose_process_was_killed_is_found_and_marked(ask, project):
    run_id = Forked(DIES, project).finished(-signal.SIGKILL).splitlines()[-1]
    assert len(run_id) == 32
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project / 'mlflow.db'}")
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and run_id in problem and "tanglenas doctor --fix" in problem
    assert client.get_run(run_id).info.status == "RUNNING"  # looking changes nothing
    status, found = ask("--fix")
    assert status == 0 and f"run {run_id} (search) is marked KILLED" in those(found, "ok")
    assert client.get_run(run_id).info.status == "KILLED"
    assert ask()[0] == 0


def test_little_room_on_the_disk_is_a_problem(ask, monkeypatch):
    usage = doctor.shutil.disk_usage("/")._replace(free=10**8)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    status, found = ask()
    (problem,) = those(found, "problem")
    assert status == 1 and problem.startswith("100 MB free")


def test_tracking_that_is_off_is_told_and_nothing_is_opened(ask, project, monkeypatch):
    monkeypatch.setenv("TANGLENAS_TRACKING", "off")
    status, found = ask()
    assert status == 0 and "TANGLENAS_TRACKING=off" in those(found, "note")[0]
    assert not (project / "mlflow.db").exists()
