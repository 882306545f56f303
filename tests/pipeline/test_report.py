"""`tanglenas report`: one page from what the stages wrote and what MLflow knows."""

import json
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from project import set_params

from tanglenas_engine import create_space
from tanglenas_engine.cli import main
from tanglenas_engine.pipeline import figures
from tanglenas_engine.pipeline.report import _scatter
from tanglenas_engine.pipeline.tracking.tracker import MlflowTracker

# MLflow's own models, on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


class Page(HTMLParser):
    """The text of a page by element, and what it would load."""

    def __init__(self, html: str):
        super().__init__()
        self.loads: list[str] = []
        self.elements: list[str] = []
        self.open: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.text.append((self.open[-1], data.strip()))

    def cells(self) -> list[str]:
        return [text for tag, text in self.text if tag in ("td", "th", "code")]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project after a run, as far as the report reads it; the current folder."""
    for name in [name for name in os.environ if name.startswith(("TANGLENAS_", "MLFLOW_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["init", "project"]).exit_code == 0
    monkeypatch.chdir("project")
    space = create_space("autoformer_nano")
    architecture = space.architecture(embed_dim=48, depth=2, num_heads=[2, 3], mlp_ratio=[4, 2])
    for name in ("search", "discretize", "evaluate"):
        Path("out", name).mkdir(parents=True)
    Path("out/discretize/architecture.json").write_text(architecture.to_json())
    figures.architecture(space, architecture, "out/evaluate/architecture.png")
    Path("out/evaluate/sample.txt").write_text("<script>alert('text')</script>")
    Path("metrics").mkdir()
    found = {"test_accuracy": 91.234, "params": 52762, "smallest_params": 21322, "largest_params": 154826}
    Path("metrics/evaluate.json").write_text(json.dumps(found))
    return tmp_path / "project"


def track(stage: str, pipeline: str, status: str = "", seed: int = 7, settings=None, **numbers: float) -> None:
    """A run in the project's store."""
    optimizer = {"OPTIMIZER": f"by-{pipeline.partition('-')[0]}"} if stage == "search" else {}
    try:
        with MlflowTracker.open(stage=stage, root=".", pipeline_id=pipeline, tags={"space": "autoformer_nano"}) as run:
            run.log_params({"SEED": seed, **optimizer, **(settings or {})})
            run.log_metrics({f"final/{name}": value for name, value in numbers.items()}, 0)
            if status:
                raise RuntimeError(status)
    except RuntimeError:
        assert status


def report() -> tuple[Page, str]:
    result = CliRunner().invoke(main, ["report"])
    assert result.exit_code == 0, result.output
    return Page(Path("report.html").read_text()), result.stdout


def test_the_page_tells_what_was_found_and_loads_nothing_from_elsewhere(project):
    page, said = report()
    assert page.open == [] and page.loads
    assert all(address.startswith("data:image/") for address in page.loads)
    assert not {"script", "link", "iframe"} & set(page.elements)  # and the sample's markup is text
    assert ("pre", "<script>alert('text')</script>") in page.text
    assert {"embed_dim", "48", "num_heads", "2, 3", "91.23 %", "52,762 parameters"} <= set(page.cells())
    assert ("title", "drnas on autoformer_nano") in page.text
    assert "0 evaluated runs" in said
    assert "MLflow knows no evaluated run" in dict(page.text)["p"]


def test_the_page_is_about_the_network_of_the_front_that_was_picked(project):
    other = create_space("autoformer_nano").architecture(
        embed_dim=32, depth=3, num_heads=[4, 3, 2], mlp_ratio=[3, 2, 4]
    )
    Path("out/discretize/pareto").mkdir()
    Path("out/discretize/pareto", f"{other.digest}.json").write_text(other.to_json())
    found = json.loads(Path("metrics/evaluate.json").read_text())
    Path("metrics/evaluate.json").write_text(json.dumps({**found, "digest": other.digest}))
    page, said = report()
    assert {"32", "4, 3, 2", "3, 2, 4", other.digest} <= {*page.cells(), *(text for _, text in page.text)}
    assert "mixes two runs" not in said and "48" not in page.cells()


def test_the_page_begins_with_the_test_accuracy_and_the_cost_in_the_range_of_the_space(project):
    page, _ = report()
    facts = [text for tag, text in page.text if tag in ("dt", "span", "dd")]
    assert facts[:2] == ["test accuracy", "91.23"]
    assert any("of the space's largest network (154,826)" in text for text in facts)
    html = Path("report.html").read_text()
    assert "width: 23.5%" in html and "prefers-color-scheme: dark" in html and "max-width: 40rem" in html
    assert html.index("91.23") < html.index("<h2>")


@pytest.mark.exhaustive
def test_all_finished_runs_are_compared_with_the_optimizer_that_led_to_them(project):
    for pipeline, accuracy in (("one", 90.5), ("two", 80.25)):
        track("search", pipeline)
        track("evaluate", pipeline, params=1000, macs=2000, test_accuracy=accuracy)
    track("evaluate", "one", status="it failed", params=3, test_accuracy=12.5)
    page, said = report()
    assert "2 evaluated runs" in said
    cells = page.cells()
    assert [cells[i - 1] for i, cell in enumerate(cells) if cell == "autoformer_nano"] == ["by-two", "by-one"]
    assert {"90.50 %", "80.25 %"} <= set(cells) and "12.50 %" not in cells
    assert sum(address.startswith("data:image/svg") for address in page.loads) == 1


@pytest.mark.exhaustive
def test_runs_that_differ_by_seed_alone_have_a_mean_and_a_spread(project):
    made = [("one-0", 0, 5, 90.0), ("one-1", 1, 5, 94.0), ("one-2", 0, 6, 60.0), ("two-0", 0, 5, 70.0)]
    for pipeline, seed, budget, accuracy in [*made, ("one-1", 1, 5, 92.0)]:  # a seed that ran again counts once
        track("search", pipeline, seed=seed)
        track("discretize", pipeline, seed=seed, settings={"discretize.max_params": budget})
        track("evaluate", pipeline, seed=seed, test_accuracy=accuracy, macs=1000)
    page, _ = report()
    rows = [[text for tag, text in page.text if tag == "td"][i : i + 6] for i in range(0, 12, 6)]
    assert rows[0] == ["test accuracy (%)", "by-one", "2", "91.00", "1.41", "90.00 to 92.00"]
    assert rows[1] == ["test accuracy (%)", "by-two", "1", "70.00", "-", "one seed"]
    assert [text for tag, text in page.text if tag == "h3"] == [
        "discretize.max_params=5", "discretize.max_params=6",
    ]  # fmt: skip
    assert any("the only group here" in text for tag, text in page.text if tag == "p")


@pytest.mark.exhaustive
def test_a_text_is_compared_by_perplexity(project):
    for pipeline, perplexity in (("one", 9.0), ("two", 7.5)):
        track("search", pipeline)
        track("evaluate", pipeline, test_accuracy=50.0, test_perplexity=perplexity)
    page, _ = report()
    cells = page.cells()
    assert [cells[i + 3] for i, cell in enumerate(cells) if cell == "test perplexity"] == ["9.000", "7.500", "1"]


@pytest.mark.exhaustive
def test_a_project_in_which_only_queued_experiments_ran_has_a_page(project):
    shutil.rmtree("out")
    shutil.rmtree("metrics")
    track("search", "one")
    track("evaluate", "one", params=1000, macs=2000, test_accuracy=90.5)
    page, said = report()
    assert "1 evaluated run," in said and ("h1", "1 run of project") in page.text
    assert "90.50 %" in page.cells() and any("dvc exp apply NAME" in text for _, text in page.text)
    assert not [text for tag, text in page.text if tag in ("h2", "pre") and text != "All runs"]


def test_the_scatter_names_every_group_and_is_the_same_for_the_same_runs():
    run = {"space": "s", "dataset": "d", "params": 10.0, "accuracy": 50.0}
    runs = [{**run, "optimizer": name} for name in ("drnas", "spos")]
    picture = _scatter([*runs, {**run, "optimizer": "untold", "accuracy": None}])
    assert b"s, drnas, d" in picture and b"s, spos, d" in picture and b"untold" not in picture
    assert picture == _scatter([*runs, {**run, "optimizer": "untold", "accuracy": None}])


def test_groups_of_the_scatter_differ_by_colour_or_marker():
    run = {"space": "s", "dataset": "d", "params": 10.0, "accuracy": 50.0}
    runs = [{**run, "optimizer": f"o{number}", "params": 10.0 + number} for number in range(13)]
    drawn = re.findall(rb'<use xlink:href="#(\w+)"[^>]*style="([^"]*)"', _scatter(runs))
    assert len({*drawn}) >= 13


@pytest.mark.parametrize("count, name", [(2, "o"), (22, "o"), (2, "a_method_with_a_rather_long_name_of_a_plugin")])
def test_names_of_the_groups_leave_the_scatter_its_room(count, name):
    run = {"space": "a_space_of_somebody", "dataset": "image_folder", "accuracy": 50.0}
    runs = [{**run, "optimizer": f"{name}{number}", "params": 10.0 + number} for number in range(count)]
    picture = _scatter(runs).decode()
    axes = float(re.search(r'<clipPath.*? height="([\d.]+)"', picture, re.DOTALL)[1])  # points
    below = float(re.search(r' y="([\d.]+)"[^>]*>parameters<', picture)[1])
    names = [float(y) for y in re.findall(r' ([\d.]+)\)">a_space', picture)]
    assert axes > 130 and len(names) == count and min(names) > below


def commands() -> list[list[str]]:
    page, _ = report()
    lines = [line for tag, text in page.text if tag == "pre" for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(("dvc", "git"))]


def test_the_commands_set_what_differs_from_a_new_project(project):
    assert commands() == [["dvc", "exp", "run"]]
    set_params(project, seed=3, search={"epochs": 3}, discretize={"max_params": None})
    assert commands() == [["dvc", "exp", "run", "-S", "seed=3", "-S", "search.epochs=3"]]
    weights = f"runs/lr=0.1/my model's{'/deep' * 80}.safetensors"
    set_params(project, seed=0, search={"epochs": None, "weights": weights}, retrain={"pick": "12e45"})
    ((*_, given, picked),) = ([one for one in line if one != "-S"] for line in commands())
    quoted = weights.replace("'", "\\'")
    assert (given, picked) == (f"search.weights='{quoted}'", "retrain.pick='12e45'")


@pytest.mark.exhaustive
def test_the_commands_set_what_differs_from_the_commit_of_the_run(project, monkeypatch):
    for name, value in (("NAME", "Tester"), ("EMAIL", "tester@example.org")):
        monkeypatch.setenv(f"GIT_AUTHOR_{name}", value)
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", value)
    set_params(project, seed=3, search={"epochs": 3})
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "seed 3"]):
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    digest = json.loads(Path("out/discretize/architecture.json").read_text())["digest"]
    with MlflowTracker.open(stage="evaluate", root=".", tags={"architecture.digest": digest}):
        pass
    set_params(project, seed=0)
    assert commands() == [["git", "checkout", commit], ["dvc", "exp", "run", "-S", "seed=0"]]


def test_a_store_that_is_down_costs_the_comparison_only(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/none/mlflow.db")
    page, _ = report()
    assert any("The MLflow store could not be read" in text for _, text in page.text)
    assert "91.23 %" in page.cells()


def test_an_architecture_that_a_person_changed_needs_no_digest(project):
    path = Path("out/discretize/architecture.json")
    content = json.loads(path.read_text())
    digest = content.pop("digest")
    path.write_text(json.dumps(content))
    assert CliRunner().invoke(main, ["report"]).exit_code == 0
    assert digest in Page(Path("report.html").read_text()).cells()


def test_an_architecture_that_was_changed_by_hand_and_trained_is_no_mix_of_two_runs(project):
    digest = json.loads(Path("out/discretize/architecture.json").read_text())["digest"]
    Path("metrics/discretize.json").write_text(json.dumps({"digest": "0" * 16}))
    Path("metrics/evaluate.json").write_text(json.dumps({"digest": digest, "test_accuracy": 91.2}))
    result = CliRunner().invoke(main, ["report"])
    assert f"The architecture {digest} was changed by hand: discretize derived {'0' * 16}" in result.output
    assert "mixes" not in result.output and "changed by hand" in Path("report.html").read_text()


def test_a_params_yaml_that_was_edited_after_the_run_changes_nothing_of_the_page_and_is_told(project):
    stages = {"search": "OPTIMIZER = 'spos'\nSEED = 4", "evaluate": "SPACE = 'autoformer_nano'\nSEED = 4"}
    for stage, macros in stages.items():
        Path(f"out/{stage}/operative.gin").write_text(f"{macros}\nsearch.epochs = 5\nsearch.batch_size = 32\n")
    set_params(project, optimizer="spos", seed=4, search={"epochs": 5})
    assert "params.yaml" not in CliRunner().invoke(main, ["report"]).output
    (expected,) = commands()
    set_params(project, optimizer="darts", seed=7, search={"epochs": 9})
    result = CliRunner().invoke(main, ["report"])
    assert "differs from the run in out, which had optimizer spos, seed 4, search.epochs 5" in " ".join(
        result.stderr.split()
    )
    assert commands() == [expected]
    text = Path("report.html").read_text()
    assert "<h1>spos on autoformer_nano" in text and "seed 4" in text and "differs from the run" in text


def test_stages_of_two_runs_are_told_and_no_settings_are_called_those_of_the_run(project):
    Path("out/search/operative.gin").write_text("OPTIMIZER = 'darts'\nSEED = 1\n")
    Path("out/evaluate/operative.gin").write_text("SEED = 0\n")
    set_params(project, optimizer="darts", seed=1)
    said = " ".join(CliRunner().invoke(main, ["report"]).stderr.split())
    assert "mixes two runs: the stage evaluate had seed 0, and one before it 1. " in said
    assert "are those of params.yaml" in said and "those of the run" not in said
    (command,) = commands()
    assert {"optimizer=darts", "seed=1"} <= {*command}


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda: Path("out/discretize/architecture.json").unlink(), "run `dvc repro` first"),
        (
            lambda: Path("out/discretize/architecture.json").write_text('{"of": "another project"}'),
            "not an architecture",
        ),
        (lambda: Path("metrics/evaluate.json").write_text("{"), "metrics/evaluate.json cannot be read"),
    ],
)
def test_what_is_missing_or_broken_is_named(project, break_it, message):
    break_it()
    result = CliRunner().invoke(main, ["report"])
    assert result.exit_code == 2 and message in result.stderr
    assert not Path("report.html").exists()
