"""What a hostile or damaged file, process, plugin or address can do: nothing but have a sentence printed about it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
import torch
from click.testing import CliRunner

from tanglenas_engine.cli import doctor as cli_doctor
from tanglenas_engine.cli import main
from tanglenas_engine.errors import TangleNASError, closest, quoted, shown, unknown
from tanglenas_engine.pipeline.report import _scatter, page
from tanglenas_engine.pipeline.tracking.moved_project import old_place
from tanglenas_engine.pipeline.tracking.redaction import address, reason, redacted
from tanglenas_engine.pipeline.tracking.store import Store
from tanglenas_engine.pipeline.tracking.tracker import MlflowTracker, spooled_runs, upload_spool
from tanglenas_engine.plugins import PluginManager, PluginWarning, create_optimizer, create_space
from tanglenas_engine.runtime.checkpoint import CheckpointFolder
from tanglenas_engine.runtime.files import exclusive, holder
from tanglenas_engine.runtime.progress import ConsoleProgress
from tanglenas_engine.stages.search import search
from tanglenas_engine.testing import random_data
from tanglenas_engine.testing.optimizers import CutAfter, CutOff

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    """A project in order."""
    folder = tmp_path_factory.mktemp("laid-out") / "project"
    assert CliRunner().invoke(main, ["init", str(folder)]).exit_code == 0
    (folder / ".git").mkdir()
    return folder


@pytest.fixture
def project(laid_out, tmp_path, monkeypatch):
    """A copy of `laid_out`; the current folder."""
    for name in [name for name in os.environ if name.startswith(("TANGLENAS_", "MLFLOW_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    shutil.copytree(laid_out, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory) -> Path:
    """A store without experiments: making one takes seconds."""
    root = tmp_path_factory.mktemp("store")
    Store.of(root).connect()
    return root / "mlflow.db"


def stages(project: Path) -> str:
    """What doctor says about the stages of a project."""
    return "\n".join(f"{found.what} -> {found.remedy}" for found in cli_doctor._stages(project))


# The process to end


OWN = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2026-01-01", "started": 0.0}
CLAIMS = [
    {"pid": -1}, {"pid": 0}, {"pid": 1}, {"pid": True}, {"pid": 1.5}, {"pid": "7"}, {"pid": None}, {"pid": 10**30},
    {"pid": os.getppid()}, {"pid": 1, "started": psutil.Process(1).create_time()}, {}, {"started": "now"},
    {"started": None}, {"started": psutil.Process().create_time() - 3600}, {"host": 3}, {"host": None},
]  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=range(len(CLAIMS)))
@pytest.mark.part(4)
def test_nobody_is_told_to_end_a_stranger(project, claim):
    folder = project / ".tanglenas" / "locks" / "search-0123456789ab"
    with exclusive(folder):
        (folder / "owner.json").write_text(json.dumps({**OWN, **claim}))
        text = stages(project)
        assert "search is running -> wait" in text and "kill" not in text
        with pytest.raises(TangleNASError, match="another process is still running") as error, exclusive(folder):
            pass
        assert "kill" not in str(error.value)
    (folder / "owner.json").parent.mkdir(exist_ok=True)
    (folder / "owner.json").write_text(json.dumps({**OWN, "started": psutil.Process().create_time()}))
    assert "nothing is running" in stages(project)  # the lock is free


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 50_000, "\xff", '{"pid": 1e999}'], ids=lambda text: text[:9])
def test_a_claim_without_sense_names_nobody(tmp_path, text):
    with exclusive(tmp_path / "held"):
        (tmp_path / "held" / "owner.json").write_text(text, encoding="latin-1")
        assert holder(tmp_path / "held").pid is None


def test_a_claim_that_is_a_pipe_or_huge_names_nobody(tmp_path):
    with exclusive(tmp_path / "held"):
        owner = tmp_path / "held" / "owner.json"
        owner.write_bytes(b" " * 10**7 + b"{}")
        assert holder(tmp_path / "held").pid is None
        owner.unlink()
        os.mkfifo(owner)
        assert holder(tmp_path / "held").pid is None


def test_a_claim_of_another_machine_is_shown_without_its_escape_codes(project):
    folder = project / ".tanglenas" / "locks" / "search-0123456789ab"
    with exclusive(folder):
        (folder / "owner.json").write_text(json.dumps({**OWN, "host": "\x1b[2Jelsewhere", "since": "\x1b[31m" * 999}))
        with pytest.raises(TangleNASError, match=f"pid {os.getpid()} on .*elsewhere") as error, exclusive(folder):
            pass
        assert "\x1b" not in str(error.value) and len(str(error.value)) < 500
        assert re.search(r"process \d+ on .*elsewhere -> wait for it, or end it there", stages(project))


# Links in what waits for the store


@pytest.fixture
def waiting(project, migrated, monkeypatch):
    """The folder of a run that waits with one folder of files."""
    shutil.copy(migrated, project / "mlflow.db")
    (project / "out").mkdir()
    (project / "out" / "history.csv").write_text("1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(UserWarning, match="cannot be used"), MlflowTracker.open(stage="search", root=project) as tracker:
        tracker.log_artifact("out")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (run,) = spooled_runs(project)
    return run.folder


def link_file(kept, private):
    (kept / "more.csv").symlink_to(private / "key.txt")


def link_folder(kept, private):
    (kept / "more").symlink_to(private)


def link_itself(kept, private):
    kept.rename(kept.with_name("elsewhere"))
    kept.symlink_to(private)


def link_above(kept, private):
    (private / "out").mkdir()
    (private / "out" / "key.txt").write_text("secret")
    kept.parent.rename(kept.parent.with_name("elsewhere"))
    kept.parent.symlink_to(private)


def pipe(kept, private):
    os.mkfifo(kept / "more.csv")


@pytest.mark.parametrize("forge", [link_file, link_folder, link_itself, link_above, pipe])
@pytest.mark.exhaustive
def test_fix_follows_no_link_out_of_what_waits(project, waiting, tmp_path, forge):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text("secret")
    (kept,) = waiting.glob("artifacts/*/out")
    forge(kept, tmp_path / "private")
    (upload,) = upload_spool(project)
    assert not list((project / "mlartifacts").rglob("key.txt")) + list((project / "mlartifacts").rglob("more*"))
    assert "artifact" in upload.problem or forge in (link_itself, link_above)


@pytest.mark.exhaustive
def test_a_run_s_folder_that_is_a_link_is_none(project, waiting, tmp_path):
    waiting.rename(tmp_path / "moved")
    waiting.symlink_to(tmp_path / "moved")
    assert spooled_runs(project) == []


# Passwords


ADDRESSES = [
    "http://someone:S3CRET@127.0.0.1:9",
    "http://S3CRET@127.0.0.1:9",
    "postgresql://someone:S3C@S3CRET@127.0.0.1/db",
    "postgresql://someone:S3CRET/S3CRET@127.0.0.1/db",
    "postgresql://someone:S3CRET?S3CRET@127.0.0.1/db",
    "postgresql://someone:S3CRET#S3CRET@127.0.0.1/db",
    "postgresql://someone:S3CRET%40%2F@127.0.0.1/db",
    "postgresql://127.0.0.1/db?user=someone&password=S3CRET",
    "postgresql://127.0.0.1/db?password=S3CRET@S3CRET&sslmode=disable",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BUID%3Dsa%3BPWD%3DS3CRET",
    "mssql+pyodbc://?odbc_connect=DRIVER={ODBC};UID=sa;PWD=S3CRET",
    "http://127.0.0.1:9/?token=S3CRET",
    "http://127.0.0.1:9#token=S3CRET",
    "http://127.0.0.1:9/;token=S3CRET",
    "sqlite:///nowhere/mlflow.db?key=S3CRET",
    "nonsense?token=S3CRET",
]


@pytest.mark.parametrize("uri", ADDRESSES)
def test_no_message_has_a_secret_of_the_address(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    password = uri.partition("someone:")[2].partition("@127")[0] or "S3CRET"
    texts = [
        Store.of(tmp_path).name,
        redacted(f"cannot reach {uri}: no such host"),
        redacted(f"cannot reach {uri!r}"),
        redacted(f"login failed for {password}"),
        redacted(f"login failed for {quote(password)} and {password!r}"),
        reason(ValueError(f"{uri}\nand more")),
        reason(ValueError("x" * 290 + uri)),
        reason(ValueError("x" * 19_995 + uri)),
    ]
    for text in texts:
        assert "S3C" not in text, text


def test_secrets_of_the_environment_are_hidden_too(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "T0KEN")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass word")
    assert reason(ValueError("T0KEN or 'pass word' or pass%20word")) == "ValueError: *** or '***' or ***"


def test_an_address_without_a_secret_is_told_as_it_is():
    for uri in ("sqlite:////home/a@b/mlflow.db", "http://127.0.0.1:5000", "databricks", "postgresql://host:5432/db"):
        assert address(uri) == uri
    assert redacted("see https://sqlalche.me/e/20/4xp6)") == "see https://sqlalche.me/e/20/4xp6)"


@pytest.mark.parametrize("uri", [uri for uri in ADDRESSES if not uri.startswith("sqlite")])
@pytest.mark.part(3)
def test_doctor_prints_no_secret_of_the_address(project, monkeypatch, uri):
    (project / ".tanglenas" / "runs" / ("0" * 32)).mkdir(parents=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = list(cli_doctor._runs(project, fix=True))
    assert found and all("S3C" not in f"{it.what} {it.remedy}" for it in found)


# Plugins


PLUGIN = """
import sys
import tanglenas_engine

class Panic(BaseException): pass
class Unprintable(Exception):
    def __str__(self): raise SystemExit(0)
class Endless(Exception):
    def __str__(self): return "\\x1b[2J" + "x" * 10**7
def fail(): {fail}
{at_import}

@tanglenas_engine.hookimpl
def tanglenas_register_spaces(register):
    register("hostile", make, summary="\\x1b[2J" + "y" * 10**6)
    {in_hook}

def make(): fail()
"""
FAILURES = ["sys.exit(0)", "raise Panic('at the disco')", "raise Unprintable", "raise Endless", "raise GeneratorExit",
            "raise KeyError(3)"]  # fmt: skip


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a plugin with some code."""

    def install(code: str) -> None:
        site = tmp_path / "site"
        info = site / "tanglenas_hostile-0.3.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tanglenas-hostile\nVersion: 0.3\n")
        (info / "entry_points.txt").write_text("[tanglenas]\nhostile = hostile_plugin\n")
        (site / "hostile_plugin.py").write_text(code)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "hostile_plugin", raising=False)

    return install


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("place", ["at_import", "in_hook"])
def test_a_plugin_that_fails_is_named_and_the_others_load(plugin, place, fail):
    plugin(PLUGIN.format(**{"at_import": "", "in_hook": "", "fail": fail, place: "fail()"}))
    with pytest.warns(PluginWarning, match=r"tanglenas-hostile 0\.3") as warned:
        manager = PluginManager()
    assert "drnas" in manager.names("optimizer")
    text = "".join(str(warning.message) for warning in warned)
    assert "\x1b" not in text and len(text) < 2000


@pytest.mark.parametrize("fail", FAILURES[:2])
def test_a_plugin_that_ends_the_process_where_it_is_made_is_told(plugin, fail):
    plugin(PLUGIN.format(at_import="", in_hook="", fail=fail))
    manager = PluginManager()
    assert len(manager.resolve("space", "hostile").summary) <= 300
    with pytest.raises(TangleNASError, match=r"hostile.* cannot be made: (SystemExit|Panic)"):
        manager.create("space", "hostile")


def test_a_plugin_that_is_imported_for_long_is_named():
    code = "import time\nfrom tanglenas_engine.plugins.types import contained\n"
    code += "with contained('plugin slow 1.0', 0.05):\n    time.sleep(0.5)\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.startswith("importing plugin slow 1.0 ...")


# What files say, on terminals and in figures


ESCAPES = "\x1b[2J\x1b]0;title\x07\u202e\x9b31m"


@pytest.mark.parametrize("value", [ESCAPES, "x" * 10**7, ["y"] * 10**6, {ESCAPES: ESCAPES}, b"\x1b" * 9], ids=type)
def test_what_is_shown_is_short_and_printable(value):
    for text in (shown(value), quoted(value), str(unknown("space", str(value), [str(value), "drnas"]))):
        assert text.isprintable() and len(text) < 3000


def test_the_closest_name_is_found_in_bounded_time():
    began = time.monotonic()
    assert closest("ab" * 10**6, ["ba" * 10**6, "drnas"]) == ""
    assert time.monotonic() - began < 2
    assert closest("drna", ["drnas", "x" * 10**6]) == " Did you mean 'drnas'?"


@pytest.mark.parametrize("command", [["show", "x" * 10**6 + ESCAPES], ["init", "d", "--space", ESCAPES + "x" * 10**6]])
def test_commands_print_no_escape_codes_and_little(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and "\x1b" not in result.output and len(result.output) < 10_000


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    path.symlink_to("nowhere")


def _bytes(path: Path) -> None:
    path.write_bytes(b"\xff\x1b[2J\0" * 999)


def _deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def _late(path: Path) -> None:
    path.write_text("{}")
    os.utime(path, (2**40, 2**40))


@pytest.mark.parametrize("damage", [_pipe, _folder, _link, _bytes, _deep, _late])
@pytest.mark.parametrize(
    "place",
    [
        ".dvcignore", ".tanglenas/resume/search-0/state-000001.pt", ".tanglenas/resume/search-0/made-by.json",
        ".tanglenas/resume/search-0/run", ".tanglenas/runs/abc/spool.jsonl", ".tanglenas/locks/search-0/owner.json",
        ".tanglenas/locks/search-0/lock", ".tanglenas/locks", ".tanglenas/runs", "out/search.run.json", "params.yaml",
        "dvc.yaml",
    ],
)  # fmt: skip
@pytest.mark.part(4)
def test_doctor_survives_damaged_state(project, migrated, place, damage):
    path = project / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if "made-by" in place or place.endswith("/run"):
        (path.parent / "state-000001.pt").write_text("")
    damage(path)
    checks = [cli_doctor._project(project), cli_doctor._stages(project), cli_doctor._disk(project)]
    if "/run" in place:
        shutil.copy(migrated, project / "mlflow.db")
        checks.append(cli_doctor._runs(project, fix=False))
    for check in checks:
        for found in check:
            assert found.what


STARTS = [
    {}, {"time": None}, {"time": "now"}, {"time": 10**30}, {"time": -1}, {"name": 3}, {"tags": []}, {"tags": {"a": 1}},
    {"experiment": None}, {"run_id": "../../x"}, {"run_id": 3}, {"run_id": ""},
]  # fmt: skip


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_a_start_of_a_run_without_sense_waits_for_nothing(project, start):
    sound = {"what": "start", "time": 1, "experiment": "e", "name": "search", "tags": {}, "run_id": None}
    folder = project / ".tanglenas" / "runs" / "abc"
    folder.mkdir(parents=True)
    (folder / "spool.jsonl").write_text(json.dumps({**sound, **start}) + "\n")
    assert [run.stage for run in spooled_runs(project)] == (["search"] if start == {} else [])


@pytest.fixture
def finished(project, migrated):
    """A project after a run, as far as the report reads it."""
    shutil.copy(migrated, project / "mlflow.db")
    architecture = create_space("autoformer_nano").smallest()
    (project / "out" / "discretize").mkdir(parents=True)
    (project / "out" / "discretize" / "architecture.json").write_text(architecture.to_json())
    (project / "metrics").mkdir()
    for stage in ("discretize", "evaluate"):
        (project / "metrics" / f"{stage}.json").write_text(json.dumps({"digest": architecture.digest, "params": 3}))
    return project


def test_hostile_tags_do_not_end_the_report(finished):
    rows = [
        {"space": text, "optimizer": text, "dataset": "$" + text, "params": 3.0, "accuracy": 5.0}
        for text in (r"$\frac{$", r"$\frac{$ $", "a$b$c$", "<script>", "x" * 10**5, ESCAPES, "_hidden", "")
    ]
    assert b"<script" not in _scatter(rows)


def test_hostile_runs_of_the_store_do_not_end_the_report(finished):
    for value in (1e300, float("inf"), float("nan"), 2.0):
        with MlflowTracker.open(
            stage="evaluate", root=finished, tags={"space": r"$\frac{$", "dataset": ESCAPES}
        ) as run:
            run.log_metrics({"final/params": value, "final/test_accuracy": value}, 0)
    html, runs, mixed = page(finished)
    assert runs == 4 and "\x1b" not in html and mixed == ""


REPORTED = ["params.yaml", "metrics/evaluate.json", "environment.json", "out/discretize/architecture.json"]
CONTENTS = ["", "[]", "3", "[" * 10**5, "\xff\x1b[2J", '{"versions": 3}', '{"digest": {"x": []}, "params": {}}',
            '{"params": ' + "9" * 4000 + "}", "{" * 9]  # fmt: skip


@pytest.mark.parametrize("text", CONTENTS, ids=lambda text: text[:12])
@pytest.mark.parametrize("name", REPORTED)
@pytest.mark.part(3)
def test_the_report_survives_damaged_files(finished, name, text):
    (finished / name).write_text(text, encoding="latin-1")
    result = CliRunner().invoke(main, ["report"])
    assert result.exit_code in (0, 2), result.exception
    assert "\x1b" not in result.output and len(result.output) < 9000


# Two runs on one page


@pytest.mark.parametrize("stages", [["evaluate"], ["discretize", "evaluate"]], ids="+".join)
def test_metrics_of_another_run_are_told(finished, stages):
    for stage in stages:
        (finished / "metrics" / f"{stage}.json").write_text(json.dumps({"digest": "0" * 16}))
    result = CliRunner().invoke(main, ["report"])
    assert f"mixes two runs: metrics/{stages[0]}.json is about architecture {'0' * 16}" in result.output
    assert "mixes two runs" in (finished / "report.html").read_text()


def test_another_point_of_the_front_is_no_other_run(finished):
    (finished / "out" / "discretize" / "pareto").mkdir()
    found = finished / "out" / "discretize"
    shutil.copy(found / "architecture.json", found / "pareto" / f"{'0' * 16}.json")
    (finished / "metrics" / "evaluate.json").write_text(json.dumps({"digest": "0" * 16}))
    assert page(finished)[2] == ""


# A project that was moved or copied


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
@pytest.mark.part(2)
@pytest.mark.exhaustive
def test_a_moved_project_writes_nothing_into_the_old_place_and_is_mended(project, tmp_path, monkeypatch, how):
    (project / "note.txt").write_text("1")
    with MlflowTracker.open(stage="search", root=project) as tracker:
        tracker.log_artifact("note.txt")
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other place"
    how(project, other)
    before = sorted(project.rglob("note.txt"))
    monkeypatch.chdir(other)
    with pytest.warns(UserWarning, match=r"tanglenas doctor --fix"), MlflowTracker.open(stage="search") as second:
        second.log_artifact("note.txt")
    assert sorted(project.rglob("note.txt")) == before
    (told, *_) = cli_doctor._runs(other, fix=False)
    assert told.state == "problem" and f"the place of another project (tanglenas in {project}" in told.what
    assert all(found.state == "ok" for found in cli_doctor._runs(other, fix=True))
    client = Store.of(other).connect()
    runs = client.search_runs([client.get_experiment_by_name("tanglenas").experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert run.info.artifact_uri.startswith((other / "mlartifacts").as_uri())
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["note.txt"]
    assert sorted(project.rglob("note.txt")) == before


@pytest.mark.parametrize(
    "location, moved",
    [("s3://bucket/mlartifacts", False), ("mlflow-artifacts:/1", False), ("file:///a/mlartifacts", True),
     ("/a/mlartifacts/1/artifacts", True), ("file:///a/elsewhere", False), ("", False), ("./mlruns/0", False)],
)  # fmt: skip
def test_only_another_project_s_folder_is_an_old_place(tmp_path, location, moved):
    assert (old_place(location, tmp_path) is not None) == moved


# A deleted experiment, and an answer that was lost


def test_what_waits_for_a_deleted_experiment_is_sent(project, waiting):
    client = Store.of(project).connect()
    made = client.create_experiment("tanglenas", artifact_location=(project / "mlartifacts").as_uri())
    client.delete_experiment(made)
    (upload,) = upload_spool(project)
    assert upload.problem == "" and upload.run_id and spooled_runs(project) == []


@pytest.mark.exhaustive
def test_a_run_whose_id_was_lost_on_the_way_is_made_once(project, monkeypatch):
    from mlflow import MlflowClient

    create = MlflowClient.create_run

    def lose(*args, **kwargs):
        create(*args, **kwargs)
        raise TimeoutError("no answer")

    monkeypatch.setattr(MlflowClient, "create_run", lose)
    with pytest.warns(UserWarning, match="no answer"), MlflowTracker.open(stage="search", root=project) as tracker:
        tracker.log_metrics({"loss": 1.0}, 0)
    assert all(upload.problem == "" for upload in upload_spool(project))
    client = Store.of(project).connect()
    (run,) = client.search_runs([client.get_experiment_by_name("tanglenas").experiment_id])
    assert run.data.metrics == {"loss": 1.0} and run.info.status == "FINISHED"


# A new project


@pytest.mark.exhaustive
def test_a_new_project_tells_nobody_and_runs_experiments_after_the_commands_that_init_prints(tmp_path, monkeypatch):
    person = {f"GIT_{role}_{key}": "x@example.org" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    for name, value in {**person, "GIT_CONFIG_GLOBAL": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    for kind in ("GLOBAL_CONFIG", "SITE_CACHE"):
        monkeypatch.setenv(f"DVC_{kind}_DIR", str(tmp_path / kind))
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(main, ["init", "project"]).output
    *prepare, last = said.splitlines()[-1].strip().split(" && ")
    assert last == "dvc repro" and any("git commit" in command for command in prepare)
    monkeypatch.chdir("project")

    def dvc(*arguments: str) -> str:
        run = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    assert dvc("config", "core.analytics") == dvc("config", "core.check_update") == "false"
    subprocess.run(["git", "init", "--quiet"], check=True)
    assert any("has no commit" in found.what for found in cli_doctor._project(Path.cwd()))
    for command in prepare:
        subprocess.run(command, shell=True, check=True, capture_output=True)
    assert not any("commit" in found.what for found in cli_doctor._project(Path.cwd()))
    assert not subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    dvc("exp", "run", "--queue")  # it needs a commit


def test_what_people_start_does_not_phone_home():
    root = Path(__file__).resolve().parents[2]
    config = (root / ".dvc" / "config").read_text()
    assert "analytics = false" in config and "check_update = false" in config
    assert "export MLFLOW_DISABLE_TELEMETRY := true" in (root / "Makefile").read_text()
    texts = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("tanglenas_engine/template/**/*.md")]
    for path in texts:
        for line in path.read_text().splitlines():
            assert "mlflow ui --" not in line or "MLFLOW_DISABLE_TELEMETRY=true mlflow ui" in line, path


# Threads and processes


@pytest.mark.exhaustive
def test_a_resume_with_another_number_of_threads_says_so(tmp_path, capsys):
    torch.manual_seed(0)
    space = create_space("toy_conv_macro_nano")
    data = random_data(space, ("weights", "architecture", "validation"))

    def searched(progress):
        with CheckpointFolder(tmp_path / "checkpoints", "search") as checkpoints:
            search(space, create_optimizer("spos"), data, epochs=3, batch_size=4, checkpoints=checkpoints,
                   checkpoint_every=1, progress=progress)  # fmt: skip

    with pytest.raises(CutOff):
        searched(CutAfter(3))
    torch.set_num_threads(2)
    try:
        searched(ConsoleProgress())
    finally:
        torch.set_num_threads(1)
    assert "taken with 1 thread, and these have 2" in (said := capsys.readouterr().out) and "OMP_NUM_THREADS=1" in said


DIES = """
import os, signal, sys
from tanglenas_engine.runtime import distributed
distributed.relaunch("dies", [])
if os.environ["RANK"] == os.environ["DYING"]:
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.exhaustive
def test_the_launcher_says_what_to_do_after_a_process_was_killed(tmp_path, rank):
    (tmp_path / "dies.py").write_text(DIES)
    environment = {**os.environ, "TANGLENAS_NPROC": "2", "DYING": str(rank)}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-m", "dies"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert (
        f"dies: process {rank} of 2 was ended by SIGKILL" in run.stderr and "Run the same command again" in run.stderr
    )
