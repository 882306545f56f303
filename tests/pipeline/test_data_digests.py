"""Data that change make `dvc repro` run the stages again, and data that do not are not read again."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import gin
import pytest
from project import lay_out, set_params
from ruamel.yaml import YAML
from stages import forget_settings

from tanglenas_datasets.text import StdlibText
from tanglenas_engine import Dataset
from tanglenas_engine.data import make_splits
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import write_environment
from tanglenas_engine.pipeline.files import STAGES
from tanglenas_engine.pipeline.inputs import data_digests
from tanglenas_engine.pipeline.inputs.data_digests import DataDigests

MEMORY = Path(".tanglenas", "data-digests.json")


def images(folder: Path, *names: str) -> Path:
    """A folder of files in the place of images: no digest decodes them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the content of {name}")
    return folder


def settle(folder: Path) -> None:
    """Let the files of a folder look as if nobody had touched them for long, but for the time of their change."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(0, 0))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose dataset is a folder of images; the current folder."""
    folder = lay_out(tmp_path / "project", code=False)
    forget_settings(monkeypatch)
    monkeypatch.chdir(folder)
    set_params(folder, dataset="image_folder")
    images(folder / "data" / "images", "cat/1.png", "cat/2.png", "dog/1.png")
    yield folder
    gin.clear_config()


@pytest.fixture
def reads(monkeypatch):
    """The files whose contents are read."""
    found: list[str] = []
    content = data_digests.file_digest
    monkeypatch.setattr(data_digests, "file_digest", lambda file: found.append(Path(file).name) or content(file))
    return found


def inputs(dataset: str = "image_folder") -> dict:
    write_environment(["autoformer_nano", "drnas", dataset])
    return {stage: json.loads(Path(f"out/inputs/{stage}.json").read_text()).get("data", {}) for stage in STAGES}


def test_every_stage_depends_on_the_names_and_the_contents_of_its_images(project):
    first = inputs()
    assert first["search"].keys() == {"root"} and len({json.dumps(data) for data in first.values()}) == 1
    assert inputs() == first
    images(project / "data" / "images", "dog/2.png")
    more = inputs()
    (project / "data/images/dog/2.png").write_text("the content of dog/3.png")  # of equal size
    changed = inputs()
    (project / "data/images/dog/2.png").unlink()
    assert inputs() == first
    (project / "data/images/dog/1.png").rename(project / "data/images/cat/3.png")
    moved = inputs()
    assert len({json.dumps(it) for it in (first, more, changed, moved)}) == 4


def test_files_that_start_with_a_dot_do_not_count(project):
    first = inputs()
    images(project / "data" / "images", ".DS_Store", ".cache/x.png")
    assert inputs() == first


def test_equal_data_have_equal_digests_wherever_and_whenever_they_were_written(project, tmp_path):
    first = inputs()
    shutil.copytree(project / "data", tmp_path / "elsewhere")  # with other times
    settle(tmp_path / "elsewhere")
    with open("gin/datasets/image_folder.gin", "a") as file:
        file.write(f'create_dataset.root = "{tmp_path}/elsewhere/images"\n')
    assert inputs() == first
    assert str(tmp_path) not in json.dumps(first)


def test_contents_that_did_not_change_are_read_once(project, reads, monkeypatch):
    monkeypatch.setattr(data_digests, "SETTLED", -(10**12))  # as if the files were old
    first = inputs()
    assert sorted(reads) == ["1.png", "1.png", "2.png"] and MEMORY.exists()
    assert inputs() == first and len(reads) == 3
    MEMORY.write_text("damaged")
    assert inputs() == first and len(reads) == 6
    shutil.move("data/images", "data/other")
    assert inputs()["search"] == {}
    with open("gin/datasets/image_folder.gin", "a") as file:
        file.write('create_dataset.root = "data/other"\n')
    assert inputs() == first and list(json.loads(MEMORY.read_text())) == [str(project / "data" / "other")]


def test_young_files_are_read_again_as_they_may_change_within_the_tick_of_their_clock(project, reads):
    first = inputs()
    assert len(reads) == 3 and not MEMORY.exists()
    assert inputs() == first and len(reads) == 6


def test_of_a_large_folder_names_and_sizes_count(project, reads, monkeypatch):
    monkeypatch.setattr(data_digests, "MOST_READ", 10)
    first = inputs()
    (project / "data/images/dog/1.png").write_text("the content of dog/3.png")  # of equal size
    assert inputs() == first and not reads
    (project / "data/images/dog/1.png").write_text("longer than the content of dog/1.png")
    assert inputs() != first


def test_a_text_is_read_by_its_bytes_and_a_word_that_names_no_file_is_none(project):
    set_params(project, dataset="text", space="gpt_nano")
    Path("data/text").write_text("a\nb\n")
    first = inputs("text")["search"]
    assert first.keys() == {"root"}
    Path("data/text").write_text("a\rb\n")
    assert inputs("text")["search"] != first
    with open("gin/datasets/text.gin", "a") as file:
        file.write('create_dataset.tokenizer = "data/tokenizer.json"\n')
    Path("data/tokenizer.json").write_text("{}")
    assert inputs("text")["search"].keys() == {"root", "tokenizer"}


def files_of_search() -> dict:
    inputs()
    return json.loads(Path("out/inputs/search.json").read_text())["files"]


@pytest.mark.parametrize("command", ["python -m pipelines.search", "./mine.sh -m pipelines.searching", "OUTSIDE"])
def test_a_changed_gin_file_counts_whatever_command_runs_the_search(project, command):
    pipeline = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(pipeline.replace("python -m pipelines.search", f"OMP_NUM_THREADS=1 {command}"))
    if command == "OUTSIDE":  # the command finds a module that the stage environment does not
        Path("dvc.yaml").write_text(pipeline)
        with open("gin/stages/search.gin", "a") as file:
            file.write("search.scheduler = @module_of_the_command.schedule\n")
    first = files_of_search()
    with open("gin/optimizers/drnas.gin", "a") as file:
        file.write("# changed\n")
    assert "gin/optimizers/drnas.gin" in first and files_of_search() != first


def test_missing_data_do_not_stop_the_environment(project):
    shutil.rmtree("data")
    assert inputs()["search"] == {}


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is unreadable here")
def test_data_that_cannot_be_read_do_not_stop_the_environment(project):
    Path("data/images/cat/1.png").chmod(0)
    assert inputs()["search"].keys() == {"root"}


def test_an_entry_that_cannot_be_read_hides_no_other(project, monkeypatch):
    def denied(file):
        raise PermissionError(file)

    content, scan = data_digests.file_digest, os.scandir
    monkeypatch.setattr(data_digests, "file_digest", lambda file: denied(file) if "cat/1" in file else content(file))
    first = inputs()["search"]
    (project / "data/images/dog/1.png").write_text("other")
    other = inputs()["search"]
    monkeypatch.setattr(os, "scandir", lambda path: denied(path) if str(path).endswith("cat") else scan(path))
    without = inputs()["search"]
    (project / "data/images/dog/1.png").write_text("another")
    assert len({json.dumps(it) for it in ({}, first, other, without, inputs()["search"])}) == 5
    assert not MEMORY.exists()


def test_folders_that_link_to_each_other_are_walked_once(project, tmp_path, reads):
    folders = [tmp_path / "many" / str(number) for number in range(9)]
    for folder in folders:
        images(folder, "x.png")
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    (tmp_path / "many" / "again").symlink_to(tmp_path / "many" / "1")
    first = DataDigests(MEMORY, project).of(tmp_path / "many")
    assert len(reads) == 9
    (tmp_path / "many" / "again").unlink()
    assert DataDigests(MEMORY, project).of(tmp_path / "many") != first


def test_a_project_that_cannot_be_written_has_digests(project, monkeypatch):
    def full(*_):
        raise OSError("read-only")

    monkeypatch.setattr(data_digests, "SETTLED", -(10**12))
    monkeypatch.setattr(data_digests, "write_atomic", full)
    assert inputs()["search"]


def test_links_in_a_circle_end_and_the_project_itself_is_no_data(project):
    images(project, "text/one.txt")
    (project / "text" / "up").symlink_to("..")
    (project / "text" / "own").symlink_to(".")
    digests = DataDigests(MEMORY, project)
    first = digests.of(Path("text"))
    Path("out").mkdir(exist_ok=True)
    Path("out", "sample.txt").write_text("an output")
    assert DataDigests(MEMORY, project).of(Path("text")) == first
    assert DataDigests(MEMORY, project).of(Path(".")) == DataDigests(MEMORY, project).of(Path("..", project.name))


def test_data_of_a_package_have_an_edition(project, monkeypatch):
    assert Dataset.edition() == ""
    set_params(project, dataset="stdlib_text", space="gpt_nano")
    assert inputs("stdlib_text")["search"] == {"edition": StdlibText.edition()}
    set_params(project, dataset="digits", space="autoformer_nano")
    assert inputs("digits")["search"] == {}


class Mine(Dataset):
    """A dataset whose place is the default of an option."""

    def __init__(self, root: str = "data/images", labels: str = ""):
        """Nothing here makes it: only its signature is read."""


@pytest.fixture
def mine(project, monkeypatch):
    """The dataset `Mine` in the place of image_folder."""
    monkeypatch.setattr("tanglenas_datasets.image_folder.ImageFolder", Mine, raising=True)
    return Mine


def test_an_option_that_names_a_file_hides_neither_defaults_nor_the_edition(project, mine, monkeypatch):
    Path("labels.csv").write_text("cat")
    Path("gin/datasets/image_folder.gin").write_text('create_dataset.labels = "labels.csv"\n')
    monkeypatch.setattr(Mine, "edition", lambda: 7, raising=False)
    assert inputs()["search"].keys() == {"root", "labels", "edition"} and inputs()["search"]["edition"] == "7"


def test_macros_of_macros_and_in_lists_name_data(project, mine):
    text = 'A = "data/images"\nROOT = %A\ncreate_dataset.root = %ROOT\ncreate_dataset.labels = [%ROOT, %LOOP]\n'
    Path("gin/datasets/image_folder.gin").write_text(text + "LOOP = %ROUND\nROUND = %LOOP\n")
    found = inputs()["search"]
    assert found.keys() == {"root", "labels"} and found["labels"] == [found["root"]]


@pytest.mark.parametrize("edition", ["second", 2, property(lambda self: "2"), lambda self: "2", lambda: None])
def test_an_attribute_that_is_no_edition_does_not_count(project, mine, monkeypatch, edition):
    monkeypatch.setattr(Mine, "edition", edition)
    Path("gin/datasets/image_folder.gin").write_text("")
    assert inputs()["search"].keys() == {"root"}


def test_an_edition_that_fails_is_told_in_a_sentence(project, mine, monkeypatch, capsys):
    monkeypatch.setattr(Mine, "edition", lambda: 1 / 0)
    Path("gin/datasets/image_folder.gin").write_text("")
    with pytest.raises(SystemExit):
        inputs()
    told = "environment: the dataset 'image_folder' cannot tell its edition: ZeroDivisionError: division by zero\n"
    assert capsys.readouterr().err == told


def test_the_runs_of_a_study_depend_on_their_data(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from tanglenas_engine.cli import main

    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(main, ["study", "stability", "--no-run", "--out", "here", "--dataset", "image_folder"])
    assert made.exit_code == 0, made.output
    monkeypatch.chdir(tmp_path / "here")

    def data() -> dict:
        write_environment(["autoformer_nano", "drnas", "image_folder"])
        return json.loads(Path("environment.json").read_text()).get("data", {})

    shutil.rmtree("runs")
    assert data() == {}
    images(Path("data/images"), "cat/1.png", "dog/1.png")
    first = data()
    images(Path("data/images"), "dog/2.png")
    assert first.keys() == {"root"} and data() != first
    params = Path("params.yaml").read_text()
    arm = next(iter(YAML(typ="safe").load(params)["arms"]))
    content = YAML(typ="safe").load(params)
    content["arms"][arm]["bindings"] = ["search: create_dataset.root = 'data/other'"]
    Path("params.yaml").write_text(json.dumps(content))
    images(Path("data/other"), "cat/1.png", "dog/1.png")
    before = data()
    images(Path("data/other"), "dog/3.png")
    after = data()
    assert [name for name in after if after[name] != before[name]] == [f"{arm}: search"]
    assert not Path("runs").exists()  # a run may be under way there


def test_splits_of_other_data_say_what_makes_them_anew(project):
    from tanglenas_engine import create_dataset

    forced = r"`dvc repro --force-downstream search` where no option names the data"
    digits, stdlib = create_dataset("digits"), create_dataset("stdlib_text", characters=20_000)
    with pytest.raises(TangleNASError, match=rf"do not fit .* `dvc repro` runs the search again, or {forced}"):
        make_splits(digits, seed=0).check(stdlib)


def test_five_thousand_files_are_looked_through_in_no_time(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(data_digests, "SETTLED", -(10**12))
    images(tmp_path / "images", *(f"{number % 10}/{number}.png" for number in range(5000)))
    first = DataDigests(tmp_path / "memory.json", tmp_path)
    digest = first.of(tmp_path / "images")
    first.save()
    reads.clear()
    start = time.process_time()
    assert DataDigests(tmp_path / "memory.json", tmp_path).of(tmp_path / "images") == digest and not reads
    assert time.process_time() - start < 2  # 0.1 s on an idle core
