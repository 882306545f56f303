"""A study as people run it: cut off, gone on with, and read."""

import json

import pytest
from paths import ROOT
from project import contents, dvc, execute

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    # MLflow's own models, on SQLAlchemy 2.1.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

PATHS = f"{ROOT}:{ROOT / 'plugins'}"


def test_a_study_goes_on_where_it_was_cut_off_and_ends_in_a_page(tmp_path):
    """Two arms, of which one takes the supernet of the other, through all stages."""

    def study(*more: str, status: int = 0) -> str:
        return execute(
            tmp_path, "tanglenas", "study", "inheritance", "--arms", "spos-inherit", "--seeds", "0", "--out", "here",
            "-S", "search.epochs=1", "-S", "search.warmup_epochs=0", "-S", "retrain.epochs=1",
            "-S", "discretize.candidates=2", *more, status=status, PYTHONPATH=PATHS,
        )  # fmt: skip

    said = study("--no-run")
    assert "here: inheritance, 2 runs (spos-scratch, spos-inherit; seeds [0])" in said
    folder = tmp_path / "here"
    script = folder / "pipelines" / "retrain.py"
    working = script.read_text("utf-8")
    script.write_text("raise SystemExit('the power is gone')\n")
    said = study(status=2)
    assert "a search needs about" in said and "the power is gone" in said and "Run the same command again" in said
    searched = contents(folder / "runs" / "spos-scratch-0" / "out" / "search")
    script.write_text(working)
    said = study()
    assert "It is there already, and goes on." in said and "Running stage 'search@spos-scratch-0'" not in said
    assert contents(folder / "runs" / "spos-inherit-0" / "out" / "search") == searched
    modes = {
        arm: (folder / "runs" / f"{arm}-0" / "params.yaml").read_text("utf-8")
        for arm in ("spos-scratch", "spos-inherit")
    }
    assert "mode: scratch" in modes["spos-scratch"] and "mode: inherit" in modes["spos-inherit"]
    measured = json.loads((folder / "measured" / "spos-inherit-0.json").read_text("utf-8"))
    assert measured["values"]["cka"] == pytest.approx(1, abs=1e-3)
    page = (folder / "page" / "inheritance.md").read_text("utf-8")
    assert "with the one seed that both have, so nothing follows." in page and "ahead of" not in page
    assert (folder / "page" / "inheritance.png").exists()
    again = dvc(folder, "repro", PYTHONPATH=PATHS)
    assert "Running stage 'environment'" in again and again.count("Running stage") == 1
    compared = execute(folder, "tanglenas", "compare", "--metric", "test_accuracy", PYTHONPATH=PATHS)
    assert "test accuracy (%)" in compared


def test_a_stage_of_a_study_runs_in_several_processes(tmp_path):
    def study(folder: str, *more: str, **options: object) -> str:
        return execute(
            tmp_path, "tanglenas", "study", "stability", "--arms", "plain", "--seeds", "0", "--out", folder,
            "-S", "search.epochs=2", "-S", "measure.warmup_epochs=0", *more, PYTHONPATH=PATHS, TANGLENAS_NPROC="2",
            **options,
        )  # fmt: skip

    said = study("odd", "--bind", "search.batch_size = 33", status=2)
    assert "search.batch_size is 33, expected a multiple of 2: every batch is shared by 2 process" in said, said
    said = study("even")
    assert said.count("search of plain, seed 0") == said.count("search 2/2 ") == 1, said
    run = tmp_path / "even" / "runs" / "plain-0"
    assert json.loads((run / "out" / "search.run.json").read_text())["used"]["processor_seconds"] > 0
    assert (tmp_path / "even" / "page" / "stability.md").exists()
