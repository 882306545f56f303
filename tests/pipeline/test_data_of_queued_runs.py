"""Data that git ignores are found from the copies of a project in which DVC runs queued experiments."""

from pathlib import Path

import gin
import pytest
from dataset_files import write_cifar
from PIL import Image
from project import dvc, execute, git, lay_out, set_params

from tanglenas_datasets.cifar import CIFAR10
from tanglenas_datasets.image_folder import ImageFolder
from tanglenas_datasets.text import Text
from tanglenas_engine import TangleNASError, create_objective, create_space, data_path
from tanglenas_engine.pipeline.config import configurables
from tanglenas_engine.pipeline.config.reader import configure


def write_images(folder: Path, count: int = 12) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 100 * number + i).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder of a copy without data, whose project is beside it, as DVC has them for a stage."""
    copy = tmp_path / "project" / ".dvc" / "tmp" / "exps" / "copy"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    monkeypatch.delenv("TANGLENAS_DATA", raising=False)
    yield copy
    gin.clear_config()


def test_a_relative_path_is_one_of_the_copy_and_else_of_the_project(copy: Path, tmp_path: Path, monkeypatch) -> None:
    project = tmp_path / "project"
    assert data_path("data/images") == project / "data" / "images"
    (project / "data" / "images").mkdir(parents=True)
    assert data_path("data/images") == project / "data" / "images"
    (copy / "data" / "images").mkdir(parents=True)
    assert data_path("data/images") == Path("data/images")
    assert data_path(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    monkeypatch.delenv("DVC_ROOT")
    assert data_path("nowhere/else") == Path("nowhere/else")


def test_a_folder_of_images_is_found_in_the_project(copy: Path, tmp_path: Path) -> None:
    there = write_images(tmp_path / "project" / "data" / "images")
    assert ImageFolder("data/images").fingerprint == ImageFolder(there).fingerprint
    with pytest.raises(TangleNASError, match=r"there is no folder \S*project/data/other"):
        ImageFolder("data/other")


def test_a_text_and_its_tokenizer_are_found_in_the_project(copy: Path, tmp_path: Path) -> None:
    there = tmp_path / "project" / "data" / "text"
    there.mkdir(parents=True)
    (there / "1.txt").write_text("What is read here has a few words. " * 200)
    text = Text("data/text", block_size=8)
    text.tokenizer.save(str(there / "tokenizer.json"))
    again = Text("data/text", block_size=8, tokenizer="data/text/tokenizer.json")
    assert len(again) == len(text) and again.fingerprint == text.fingerprint


@pytest.mark.parametrize("variable", [None, "data", "my/data"])
def test_downloaded_data_are_found_in_the_project(copy: Path, tmp_path: Path, monkeypatch, variable) -> None:
    write_cifar(tmp_path / "project" / (variable or "data"), CIFAR10)
    if variable:
        monkeypatch.setenv("TANGLENAS_DATA", variable)
    assert len(CIFAR10(download=False)) == 27
    assert len(CIFAR10(root=f"{variable or 'data'}/cifar-10-batches-bin")) == 27


def test_a_download_goes_to_the_project_and_not_to_the_copy(copy: Path, tmp_path: Path, monkeypatch) -> None:
    asked: list[Path] = []

    def fetch(self, base: Path) -> None:
        asked.append(base)
        write_cifar(base, CIFAR10)

    monkeypatch.setattr(CIFAR10, "_fetch", fetch)
    assert len(CIFAR10()) == 27 and asked == [tmp_path / "project" / "data"]


def test_tables_of_benchmarks_and_latencies_are_found_in_the_project(copy: Path, tmp_path: Path) -> None:
    tables = tmp_path / "project" / "tables"
    tables.mkdir()
    (tables / "table.csv").write_text("arch,test_acc\nnone,90\n")
    configure(["SPACE = 'toy_cell'", "benchmark.path = 'tables/table.csv'"])
    assert list(configurables.tables()) == ["tables/table.csv"]
    with pytest.raises(TangleNASError, match=r"table \S*project/tables/table\.csv"):  # found, and of another space
        configurables.benchmark(create_space("toy_cell"))
    (tables / "latency.json").write_text("{}")
    with pytest.raises(TangleNASError, match=r"project/tables/latency\.json is no latency table"):
        create_objective("latency", table="tables/latency.json")


def test_a_benchmark_of_another_size_of_the_space_is_told(copy: Path, tmp_path: Path, capsys) -> None:
    space = create_space("toy_cell_nano")
    table = f'architecture of toy_cell,test_acc\n"{space.to_string(space.largest())}",90\n'
    (tmp_path / "project" / "table.csv").write_text(table)
    configure(["SPACE = 'toy_cell_nano'", "benchmark.path = 'table.csv'"])
    assert configurables.benchmark(space) is not None
    assert capsys.readouterr().err.startswith("table.csv: the table is of toy_cell: its values")


@pytest.mark.exhaustive
def test_a_run_in_a_temporary_copy_searches_own_images(tmp_path: Path) -> None:
    project = lay_out(tmp_path / "project")
    (project / ".gitignore").write_text("/data/\n/.tanglenas/\n/mlflow.db*\n/mlartifacts/\n__pycache__/\n")
    small = {"epochs": 1, "batch_size": 4}
    set_params(project, dataset="image_folder", search={**small, "warmup_epochs": 0}, retrain=small)
    gin_file = project / "gin" / "datasets" / "image_folder.gin"
    gin_file.write_text("create_dataset.root = 'data/images'\ncreate_dataset.image_size = 8\n")
    write_images(project / "data" / "images")
    git(project, "init", "-q")
    dvc(project, "init", "-q")
    git(project, "add", "-A")
    git(project, "commit", "-qm", "a project")
    output = dvc(project, "exp", "run", "--temp", "search", TANGLENAS_TRACKING="off")
    assert "image_folder" in output and "data/images" in output
    assert "dog (12)" in output
    assert execute(project, "git", "status", "--porcelain") == ""
