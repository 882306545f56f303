"""Projects with small parameters, as they are laid out and as the stages leave them."""

import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo
from project import STAGES, lay_out
from stages import MAIN, arguments, forget_settings


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which nothing ran yet."""
    folder = tmp_path_factory.mktemp("template")
    Repo.init(folder, no_scm=True).close()
    return lay_out(folder, code=False)


@pytest.fixture(scope="session")
def finished(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which all four stages ran, without tracking."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(template, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        forget_settings(patch)
        for stage in STAGES:
            MAIN[stage](arguments(folder, stage))
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished`, to break; the current folder."""
    shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run a stage that must end with status 2 and one line on stderr, and return that line."""

    def run(stage: str, *bindings: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            MAIN[stage]([*arguments(Path.cwd(), stage), *bindings])
        err = capsys.readouterr().err
        assert ending.value.code == 2, err
        assert err.startswith(f"{stage}: ") and err.count("\n") == 1, err
        return err

    return run
