"""Who may know the pipeline and its tools: the commands, and the scripts of a project."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

TOOLS = {"gin", "dvc", "mlflow", "jinja2", "matplotlib"}
ENGINE = ROOT / "tanglenas_engine"
SCRIPTS = sorted([*(ROOT / "pipelines").glob("*.py"), *(ENGINE / "template" / "study").glob("*.py")])
PEOPLE = {"tanglenas_engine", "tanglenas_engine.pipeline"}
"""What a script of a project may import of the library: names that stay where they are."""


def imported(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, wherever in it, and of what it imports from them."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def below(folder: Path, *others: str) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if path.relative_to(folder).parts[0] not in others]


def test_the_walk_sees_imports_of_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "c.py"
    file.write_text("import gin\nfrom . import d\nfrom ..pipeline import e\ndef f():\n from mlflow.x import y")
    assert set(imported(file)) == {"gin", "a.b.d", "a.pipeline.e", "mlflow.x.y"}


@pytest.mark.parametrize(
    "path", below(ENGINE, "pipeline", "cli", "template"), ids=lambda path: path.relative_to(ENGINE).as_posix()
)
def test_the_engine_imports_neither_the_pipeline_nor_its_tools(path):
    names = set(imported(path))
    assert not TOOLS & {name.split(".")[0] for name in names}
    assert not [name for name in names if name.startswith(("tanglenas_engine.pipeline", "tanglenas_engine.cli"))]


@pytest.mark.parametrize("path", below(ENGINE / "pipeline"), ids=lambda path: path.name)
def test_the_pipeline_imports_no_command_and_no_script(path):
    assert not [name for name in imported(path) if name.startswith(("tanglenas_engine.cli", "pipelines"))]


@pytest.mark.slow
def test_the_engine_loads_without_the_tools():
    code = """
import importlib, pkgutil, sys, tanglenas_engine
names = [m.name for m in pkgutil.walk_packages(tanglenas_engine.__path__, "tanglenas_engine.")]
names = [name for name in names if name.split(".")[1] != "pipeline"]
for name in names: importlib.import_module(name)
assert "tanglenas_engine.elastic.linear" in names, names
print(*sorted({name.split(".")[0] for name in sys.modules} & {"gin", "dvc", "mlflow", "jinja2", "timm"}))
"""
    environment = {**os.environ, "TANGLENAS_PLUGINS": ""}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_calls_what_stays_where_it_is(path):
    assert len(path.read_text("utf-8").splitlines()) <= 60
    ours = [name.rpartition(".")[0] for name in imported(path) if name.startswith("tanglenas")]
    assert set(ours) <= PEOPLE


def test_the_names_for_scripts_are_there():
    from tanglenas_engine import pipeline
    from tanglenas_engine.pipeline import figures, files

    assert all(getattr(pipeline, name) for name in pipeline.__all__) and figures.anytime and files.OUT
    assert set(pipeline.__all__) == set(dir(pipeline))
    with pytest.raises(AttributeError, match="no attribute 'retrian'"):
        _ = pipeline.retrian
