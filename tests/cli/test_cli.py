"""The command `tanglenas`: called in this process, and in one of its own where start-up is what matters."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError

import pytest
from click.testing import CliRunner

from tanglenas_engine.cli import COMMANDS, main
from tanglenas_engine.errors import TangleNASError

TANGLENAS = Path(sys.executable).with_name("tanglenas")
HEAVY = {"torch", "timm", "mlflow", "dvc", "gin", "sklearn", "matplotlib"}
EVERY_HELP = [["--help"], *([name, "--help"] for name in COMMANDS)]


@pytest.fixture
def call(monkeypatch):
    monkeypatch.delenv("TANGLENAS_PLUGINS", raising=False)
    monkeypatch.delenv("TANGLENAS_STRICT_PLUGINS", raising=False)
    return lambda *arguments: CliRunner().invoke(main, arguments)


@pytest.fixture
def broken_plugin(tmp_path, monkeypatch):
    info = tmp_path / "tanglenas_broken-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tanglenas-broken\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[tanglenas]\nbroken = tanglenas_broken\n")
    (tmp_path / "tanglenas_broken.py").write_text("raise RuntimeError('see [docs] and [/docs]')")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("tanglenas_broken", None)


@pytest.mark.parametrize("calls", [EVERY_HELP, [["plugins", "--json"], ["plugins"]]])
@pytest.mark.slow
def test_start_up_is_light(calls):
    code = f"""
import sys
from tanglenas_engine.cli import main
for arguments in {calls!r}:
    main(arguments, standalone_mode=False)
print(*({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout
    assert run.stderr.split() == []


@pytest.mark.slow
def test_help_is_fast():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([TANGLENAS, "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.5  # 0.15 s on an idle machine; the bound forgives a busy one


def test_version_is_that_of_the_distribution(call):
    assert importlib.metadata.version("tanglenas") in call("--version").stdout


def test_plugins_as_json_is_a_stable_list(call):
    rows = json.loads(call("plugins", "--json").stdout)
    by_name = {row["name"]: row for row in rows}
    assert by_name["autoformer_nano"] == {
        "name": "autoformer_nano",
        "kind": "space",
        "summary": "AutoFormer for images of 8 to 32 pixels, small enough for a CPU",
        "distribution": "tanglenas",
        "version": importlib.metadata.version("tanglenas"),
        "entry_point": "vit",
        "status": "ok",
        "detail": "",
    }
    assert len({frozenset(row) for row in rows}) == 1
    assert rows == json.loads(call("plugins", "--json").stdout)


def test_plugins_can_be_narrowed_to_one_kind(call):
    rows = json.loads(call("plugins", "--json", "--kind", "optimizer").stdout)
    assert {row["kind"] for row in rows} == {"optimizer"}
    assert {"darts", "drnas", "spos"} <= {row["name"] for row in rows}
    assert call("plugins", "--kind", "optimiser").exit_code == 2


def test_plugins_for_people_has_one_line_for_each_name(call):
    result = call("plugins")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["name", "kind", "summary", "distribution", "version", "status"]
    assert next(line for line in lines if line[0] == "autoformer_t")[-1] == "ok"
    assert "AutoFormer for images of 8 to 32 pixels, small enough for a CPU" in result.stdout


def test_a_broken_plugin_is_listed_with_its_cause_and_what_to_do(call, broken_plugin, recwarn):
    row = json.loads(call("plugins", "--json", "--kind", "space").stdout)[-1]
    assert (row["distribution"], row["version"], row["entry_point"]) == ("tanglenas-broken", "0.3", "broken")
    assert (row["name"], row["kind"], row["status"]) == (None, None, "broken")
    shown = call("plugins")
    assert shown.exit_code == 0
    assert "RuntimeError: see [docs] and [/docs]. Reinstall, upgrade or uninstall it." in shown.stdout
    assert shown.stderr == "" and not recwarn.list


def test_plugins_that_the_environment_keeps_out_are_shown_as_blocked(call, monkeypatch):
    monkeypatch.setenv("TANGLENAS_PLUGINS", "vit")
    rows = json.loads(call("plugins", "--json").stdout)
    assert {row["status"] for row in rows if row["entry_point"] == "vit"} == {"ok"}
    assert {row["status"] for row in rows if row["entry_point"] != "vit"} == {"blocked"}
    assert "TANGLENAS_PLUGINS does not name it" in call("plugins").stdout


def test_a_name_claimed_twice_is_shown_as_a_conflict(call, tmp_path, broken_plugin):
    (tmp_path / "tanglenas_broken.py").write_text(
        "from tanglenas_engine import hookimpl\n@hookimpl\n"
        "def tanglenas_register_spaces(register):\n register('autoformer_t', 'm:C', summary='a [bold] one')"
    )
    rows = json.loads(call("plugins", "--json").stdout)
    claims = [row for row in rows if row["status"] == "conflict"]
    assert [(row["name"], row["distribution"]) for row in claims] == [
        ("autoformer_t", "tanglenas"),
        ("autoformer_t", "tanglenas-broken"),
    ]
    assert "a [bold] one" in call("plugins").stdout


def test_wrong_input_is_one_line_and_no_traceback():
    environment = {**os.environ, "TANGLENAS_PLUGINS": "vti"}
    run = subprocess.run(
        [TANGLENAS, "plugins"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "'vti'. Did you mean 'vit'?" in run.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", "file/project"], ["new-plugin", "mine", "--output", "file/plugin"], ["init", "/proc/nowhere/project"],
        ["init", "a" * 300], ["predict", "a" * 300, "x.png"],
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_one_line(call, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = call(*arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "Name another file or folder" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["latency", "build", "toy_cell", "t.json", "-o", "channels=a"], "cannot be made with channels='a'"),
        (["latency", "build", "toy_cell", "t.json", "-o", "channels=-1"], "cannot be made with channels=-1"),
        (["latency", "build", "toy_cell", "t.json", "--networks", "1", "--figure", "f.png"], "at least --networks 2"),
        (["latency", "build", "toy_cell", "t.json", "--networks", "-1"], "Invalid value for '--networks'"),
        (["latency", "build", "no_space", "/proc/nowhere/t.json"], "cannot write /proc/nowhere/t.json"),
        (["latency", "build", "no_space", "t.json", "--figure", "/proc"], "cannot write /proc"),
        (["latency", "build", "no_space", "."], "cannot write ."),
        (["latency", "build", "no_space", ""], "cannot write ."),
        (["latency", "build", "no_space", f"{'a' * 300}/t.json"], "File name too long"),
        (["latency", "build", "no_space", "new/folder/t.json"], "unknown space 'no_space'"),
        (["new-plugin", "engine"], "there is a package tanglenas_engine already"),
        (["new-plugin", "toy"], "there is a package tanglenas_toy already"),
        (["new-plugin", "a_"], "cannot be called 'a_'"),
        (
            ["study", "stages", "--metric", "foo", "--no-run"],
            "--metric foo is a column of a table, but stages has none",
        ),
    ],
)
def test_input_that_would_do_nothing_or_harm_is_refused(call, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not [*tmp_path.iterdir()]


def test_a_bug_is_not_dressed_up_as_wrong_input(call, monkeypatch):
    class Bug(Exception): ...

    def fail(error):
        raise error

    command = main.get_command(None, "doctor")
    monkeypatch.setattr(command, "callback", lambda fix: fail(Bug()))
    assert isinstance(call("doctor").exception, Bug)
    monkeypatch.setattr(command, "callback", lambda fix: fail(TangleNASError("x")))
    result = call("doctor")
    assert (result.exit_code, result.stderr) == (2, "Error: x\n")
    answer = HTTPError("https://x.org/d.tar", 503, "Unavailable", Message(), None)
    monkeypatch.setattr(command, "callback", lambda fix: fail(answer))
    assert "https://x.org/d.tar: HTTP Error 503: Unavailable" in call("doctor").stderr


@pytest.mark.parametrize("given, closest", [("plugin", "plugins"), ("docter", "doctor"), ("exprot", "export")])
def test_an_unknown_command_names_the_closest(call, given, closest):
    result = call(given)
    assert result.exit_code == 2
    assert f"'{closest}'" in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_listed_with_what_it_does(call, name):
    command = main.get_command(None, name)
    listed = next(line for line in call("--help").stdout.splitlines() if line.split()[:1] == [name])
    assert listed.split(maxsplit=1)[1] == command.get_short_help_str()
