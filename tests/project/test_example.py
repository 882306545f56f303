"""The example plugin, and what `tanglenas new-plugin` makes of it: distributions of their own, as pip installs them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from paths import ROOT

from tanglenas_engine.cli import main

EXAMPLE = ROOT / "examples" / "tanglenas-example"


def install(project: Path, site: Path) -> dict[str, str]:
    """Make a plugin's folder known as an editable installation does; the environment in which it is."""
    described = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    name = re.sub(r"[-.]+", "_", described["name"])
    info = site / f"{name}-{described['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {described['name']}\nVersion: {described['version']}\n"
    )
    points = "".join(f"{key} = {value}\n" for key, value in described["entry-points"]["tanglenas"].items())
    (info / "entry_points.txt").write_text(f"[tanglenas]\n{points}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TANGLENAS_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, (site, project))), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], folder: Path, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def tanglenas(*arguments: str) -> list[str]:
    return ["-c", f"from tanglenas_engine.cli import main; main({list(arguments)!r})"]


@pytest.fixture
def new_plugin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["new-plugin", *arguments])


@pytest.mark.exhaustive
def test_the_example_keeps_the_contract_and_can_be_searched(tmp_path):
    environment = install(EXAMPLE, tmp_path / "site")
    report = run(environment, tmp_path, *tanglenas("plugins", "check", "tanglenas-example"))
    assert "space example\n  ok  " in report and "optimizer example\n  ok  " in report
    assert report.endswith("Every check passed.\n") and "FAIL" not in report
    run(environment, tmp_path, *tanglenas("init", "project", "--space", "example", "--optimizer", "example"))
    assert "space: example\noptimizer: example\n" in (tmp_path / "project" / "params.yaml").read_text()


@pytest.mark.exhaustive
def test_a_new_plugin_passes_its_own_tests(new_plugin, tmp_path):
    assert new_plugin("my_ladder").exit_code == 0
    project = tmp_path / "tanglenas-my_ladder"
    left = [path for path in project.rglob("*") if "example" in path.name.lower()]
    assert not left
    environment = install(project, tmp_path / "site")
    said = run(environment, project, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "tests")
    assert "3 passed" in said
    listed = run(environment, tmp_path, *tanglenas("plugins"))
    assert [line.split()[:2] for line in listed.splitlines() if "tanglenas-my_ladder" in line] == [
        ["my_ladder", "space"],
        ["my_ladder", "optimizer"],
    ]


def test_only_names_are_replaced_in_a_new_plugin(new_plugin, tmp_path):
    new_plugin("ladder", "--output", "here")
    written = {path.relative_to(tmp_path / "here").as_posix() for path in (tmp_path / "here").rglob("*.*")}
    assert {"pyproject.toml", "README.md", "tanglenas_ladder/space.py", "tests/test_contract.py"} <= written
    space = (tmp_path / "here" / "tanglenas_ladder" / "space.py").read_text()
    assert "class LadderSpace(SearchSpace)" in space and "def example_input(self" in space
    everything = "".join(path.read_text() for path in (tmp_path / "here").rglob("*.*") if path.is_file())
    assert not re.search(r"example(?!_input)", everything, re.IGNORECASE)


@pytest.mark.parametrize(
    "name, message",
    [
        ("Tanglenas-Ladder", "such as 'ladder'"),
        ("9lives", "lower-case letters"),
        ("example", "cannot be called 'example'"),
        ("drnas", "there is optimizer 'drnas' of tanglenas"),
    ],
)
def test_a_name_that_would_not_work_is_refused(new_plugin, tmp_path, name, message):
    result = new_plugin(name)
    assert result.exit_code == 2 and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(new_plugin, tmp_path):
    (tmp_path / "tanglenas-ladder").mkdir()
    assert new_plugin("ladder").exit_code == 2
    assert not list((tmp_path / "tanglenas-ladder").iterdir())


def test_the_python_files_of_the_example_are_short():
    lines = sum(len(path.read_text().splitlines()) for path in (EXAMPLE / "tanglenas_example").glob("*.py"))
    assert lines <= 110  # it is there to be read in one go
