"""The files of a project that the code behind an @ imports."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tanglenas_engine.cli import doctor
from tanglenas_engine.pipeline.inputs import own_code as module
from tanglenas_engine.pipeline.inputs.own_code import own_code


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


def test_files_have_their_path_from_the_root_wherever_python_finds_them(project, tmp_path, monkeypatch):
    Path("src").mkdir()
    Path("src/placed.py").write_text("import beside\n")
    Path("src/beside.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(project / "src"))
    __import__("placed")
    monkeypatch.setattr(module, "referred", lambda: {"placed.train"})
    found = own_code()
    sys.modules.pop("placed")
    assert list(found) == ["src/beside.py"]
    assert doctor._version_of("src/beside.py", project) == found["src/beside.py"]
    Path("src/beside.py").unlink()
    assert doctor._version_of("src/beside.py", project) is None


def test_a_package_in_several_folders_counts_where_it_is_of_the_project(project, tmp_path_factory, monkeypatch):
    outside = tmp_path_factory.mktemp("outside")
    for folder in (outside, project):
        (folder / "spread").mkdir()
        monkeypatch.syspath_prepend(str(folder))
    (outside / "spread" / "far.py").write_text("import alone\n")
    (project / "spread" / "near.py").write_text("import helper_two\n")
    spread = __import__("spread")
    sys.modules.pop("spread")
    for folders in (list(spread.__path__), list(spread.__path__)[::-1]):
        monkeypatch.setitem(sys.modules, "spread", SimpleNamespace(__path__=folders))
        monkeypatch.setattr(module, "referred", lambda: {"spread.near.train"})
        assert list(own_code()) == ["helper_two.py"]


def test_a_linked_module_imports_what_lies_beside_the_link(project, tmp_path_factory, monkeypatch):
    real = tmp_path_factory.mktemp("real") / "linked.py"
    real.write_text("import helper_two\n")
    Path("linked.py").symlink_to(real)
    __import__("linked")
    sys_module = sys.modules.pop("linked")
    monkeypatch.setitem(sys.modules, "linked", sys_module)
    monkeypatch.setattr(module, "referred", lambda: {"linked.train"})
    assert list(own_code()) == ["helper_two.py"]


def test_doctor_takes_a_module_of_the_project_before_an_installed_one(project, tmp_path_factory, monkeypatch):
    installed = tmp_path_factory.mktemp("installed")
    (installed / "alone.py").write_text("x = 2\n")
    monkeypatch.setattr(sys, "path", [str(installed), *sys.path, str(project)])
    before = doctor._version_of("alone", project)
    Path("alone.py").write_text("x = 3\n")
    assert doctor._version_of("alone", project) != before and sys.path[0] == str(installed)
