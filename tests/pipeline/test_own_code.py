"""The files of a project that the code behind an @ imports."""

import sys
from pathlib import Path

import pytest

from tanglenas_engine.cli import doctor
from tanglenas_engine.pipeline import own_code as module
from tanglenas_engine.pipeline.own_code import own_code


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a module behind an @, its helpers, and a module that nothing imports; the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {
        "behind_it.py": "import torch\nimport helper_one\nfrom kit.inner import SIZE\n",
        "helper_one.py": "def late():\n    import helper_two\n",
        "helper_two.py": "",
        "kit/__init__.py": "",
        "kit/inner.py": "from . import sister\nfrom .sister import SIZE\n",
        "kit/sister.py": "SIZE = 3\n",
        "kit/other.py": "",
        "alone.py": "",
    }
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    __import__("behind_it")
    monkeypatch.setattr(module, "referred", lambda: {"behind_it.train"})
    yield tmp_path
    for name in ("behind_it", "helper_one", "kit", "kit.inner", "kit.sister"):
        sys.modules.pop(name, None)


def test_every_file_counts_that_the_module_imports_through_others_too(project):
    first = own_code()
    assert list(first) == ["helper_one.py", "helper_two.py", "kit/__init__.py", "kit/inner.py", "kit/sister.py"]
    for name in ("alone.py", "kit/other.py"):
        Path(name).write_text("x = 1\n")
    assert own_code() == first
    Path("helper_two.py").write_text("x = 1\n")
    assert [name for name in first if own_code()[name] != first[name]] == ["helper_two.py"]
    assert doctor._version_of("helper_two.py", project) == own_code()["helper_two.py"] != first["helper_two.py"]


def test_a_package_counts_by_itself_and_what_it_imports_beside(project, monkeypatch):
    Path("kit/other.py").write_text("import alone\n")
    import kit  # noqa: F401

    monkeypatch.setattr(module, "referred", lambda: {"kit.sister.SIZE"})
    assert list(own_code()) == ["alone.py"]


def test_installed_code_counts_by_its_version_and_a_study_by_the_folder_above(project, monkeypatch):
    run = project / "runs" / "arm-0"
    run.mkdir(parents=True)
    monkeypatch.chdir(run)
    assert "helper_one.py" in own_code()
    monkeypatch.chdir("/")
    monkeypatch.setattr(module, "INSTALLED", (project.name,))
    assert own_code() == {}


def test_a_helper_that_python_cannot_read_counts_all_the_same(project):
    Path("helper_two.py").write_text("def (\n")
    assert "helper_two.py" in own_code()
