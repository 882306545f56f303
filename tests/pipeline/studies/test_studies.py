"""Studies: their folders as DVC reads them, and what people type wrong."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from paths import ROOT

from tanglenas_engine import TangleNASError, create_space
from tanglenas_engine.cli import main
from tanglenas_engine.pipeline import studies
from tanglenas_engine.pipeline.config.params import parsed
from tanglenas_engine.pipeline.config.reader import configured
from tanglenas_engine.pipeline.studies import run_folder, scripts
from tanglenas_engine.pipeline.studies.memory_estimate import Need, check, estimate
from tanglenas_engine.pipeline.studies.plan import plan
from tanglenas_engine.pipeline.studies.run import arguments_of
from tanglenas_engine.pipeline.studies.run_folder import GROUPS
from tanglenas_engine.pipeline.studies.study import SCALES, Claim
from tanglenas_engine.plugins import manager


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Run the command for a study in the folder `here`, without running the study."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["study", *arguments, "--no-run", "--out", "here"])


def stages(folder: Path) -> dict:
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    with Repo(folder) as repo:  # it checks the graph, too
        return {stage.name: stage for stage in repo.index.stages}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", studies.NAMES)
@pytest.mark.part(6)
def test_dvc_reads_the_pipeline_of_every_study(study, tmp_path, name, scale):
    space = ("--space", "toy_cell") if scale == "paper" else ()
    assert study(name, "--scale", scale, *space, "--seeds", "3,5").exit_code == 0
    folder, described = tmp_path / "here", studies.load(name)
    found = stages(folder)
    arms = parsed((folder / "params.yaml").read_text("utf-8"))
    arms = list(dict.fromkeys(key.split(".")[1] for key in arms if key.startswith("arms.")))
    for arm in arms:
        for seed in (3, 5):
            assert {f"{stage}@{arm}-{seed}" for stage in described.stages if stage != "search"} <= found.keys()
            assert (f"measure@{arm}-{seed}" in found) != (f"measure-of-{arm}@{seed}" in found)
            trained = f"search@{arm}-{seed}" in found or f"search-of-{arm}@{seed}" in found
            assert trained == ("search" in described.stages)
    written = [Path(out.fs_path) for stage in found.values() for out in stage.outs]
    for stage in found.values():
        for dep in stage.deps:
            path = Path(dep.fs_path)
            if dep.def_path != "params.yaml":
                made = any(path == out or out in path.parents or path in out.parents for out in written)
                assert made or path.exists(), f"{stage.name} depends on {dep.def_path}, which nothing makes"
    assert "page" in found


@pytest.mark.parametrize("name", studies.NAMES)
def test_every_part_of_a_study_is_about_another_that_exists(name):
    described = studies.load(name)
    assert described.question.endswith("?") and described.limits and set(described.scales) == set(SCALES)
    for claim in described.claims:
        assert claim.metric in described.metrics
        assert claim.arm in ("", *described.arms)
        assert isinstance(claim.against, float) or claim.against in described.arms
    for panel in described.panels:
        assert panel.kind != "means" or panel.name in described.metrics
    assert not [name for name in described.arms if not re.fullmatch(r"[a-z0-9-]+", name)]  # DVC reads dots as groups
    for arm in described.arms.values():
        assert {arm.supernet, arm.as_long_as, arm.beside} <= {"", *described.arms}
        manager().resolve("optimizer", str(arm.params.get("optimizer", "drnas")))
    for scale in described.scales.values():
        assert {*scale.arms, *scale.without} <= {*described.arms}


def test_a_run_is_laid_out_as_a_project_with_the_values_of_its_arm(study, tmp_path, monkeypatch):
    given = (
        "--bind",
        "search.clip = 1.0",
        "--bind",
        "retrain: retrain.clip = 2.0",
        "-S",
        "search.epochs=4",
        "--seeds",
        "7",
    )
    assert study("stability", *given).exit_code == 0
    monkeypatch.chdir(tmp_path / "here")
    before = dict(os.environ)
    with run_folder.in_run_folder("warm-up", "7") as run:
        assert Path.cwd() == tmp_path / "here" / "runs" / "warm-up-7"
        arguments = arguments_of("search")
        assert {'OPTIMIZER = "drnas"', "SEED = 7", "search.epochs = 4", "search.warmup_epochs = 4"} <= {*arguments}
        own = ['create_optimizer.regularizer = "none"', "architecture/torch.optim.Adam.weight_decay = 0.0"]
        assert arguments[-3:] == ["search.clip = 1.0", *own]
        assert run.params["search"]["epochs"] == 4
        assert "retrain.clip = 2.0" in arguments_of("retrain") and "retrain.clip = 2.0" not in arguments
        assert os.environ["DVC_EXP_NAME"].endswith("warm-up-7")
    # What the command starts afterwards, such as `dvc repro`, has the environment of before.
    assert Path.cwd() == tmp_path / "here" and dict(os.environ) == before


@pytest.mark.parametrize("name", studies.NAMES)
def test_the_config_of_every_arm_is_read_by_every_stage(study, tmp_path, monkeypatch, name):
    assert study(name, "--seeds", "0").exit_code == 0
    monkeypatch.chdir(tmp_path / "here")
    for arm in studies.load(name).arms:
        if arm in run_folder.read_params(tmp_path / "here")["arms"]:
            with run_folder.in_run_folder(arm, "0"):
                for stage in studies.load(name).stages:
                    with configured(arguments_of(stage)):
                        pass


def test_a_search_takes_as_long_as_another_arm_did(study, tmp_path, monkeypatch):
    assert study("stages", "--seeds", "0").exit_code == 0
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "here" / "runs" / "spos-evolution-0" / "out"
    out.mkdir(parents=True)
    (out / "search.run.json").write_text('{"used": {"processor_seconds": 99, "work_processor_seconds": 30.5}}')
    (out / "discretize.run.json").write_text('{"used": {"work_processor_seconds": 11.2}}')
    with run_folder.in_run_folder("drnas", "0"):
        assert "search.seconds = 41.7" in arguments_of("search")
    (out / "discretize.run.json").write_text("{}")
    with pytest.raises(Exception, match="has no times, as its stages ran with TANGLENAS_TRACKING=off"):
        run_folder.in_run_folder("drnas", "0").__enter__()


def test_a_fine_tuned_network_is_measured_beside_the_one_from_scratch(study, tmp_path, monkeypatch):
    assert study("inheritance", "--arms", "spos-finetune", "--seeds", "7").exit_code == 0
    found = stages(tmp_path / "here")["measure-of-spos-finetune@7"]
    theirs = {dep.def_path for dep in found.deps if "spos-scratch-7" in dep.def_path}
    assert {"runs/spos-scratch-7/out/retrain/model", "runs/spos-scratch-7/out/discretize"} <= theirs
    monkeypatch.chdir(tmp_path / "here")
    with run_folder.in_run_folder("spos-finetune", "7") as run:
        assert run.beside == tmp_path / "here" / "runs" / "spos-scratch-7"
    with run_folder.in_run_folder("spos-scratch", "7") as run:
        assert run.beside is None


def test_the_paper_gives_methods_epochs_of_their_own():
    template = layout_template()
    made = plan("fractions", template, command="", scale="paper", space="toy_cell")
    assert made.params["recipe"] == "paper/toy_cell" and made.params["dataset"] == "fashion_mnist"
    assert made.params["seeds"] == [9001, 9002, 9003, 9004]
    epochs = {arm: own["search"]["epochs"] for arm, own in made.params["arms"].items()}
    assert (epochs["drnas-50"], epochs["spos-80"]) == (100, 250)


def test_epochs_of_a_person_are_those_of_all_arms_that_have_none_of_their_own():
    template = layout_template()
    made = plan("stability", template, command="", scale="paper", space="nb201", changes={"search.epochs": 5})
    assert {own["search"].get("epochs", made.params["search"]["epochs"]) for own in made.params["arms"].values()} == {5}
    assert not made.notes
    made = plan("ranking", template, command="", changes={"search.epochs": 5})
    assert made.notes == [
        "search.epochs is not for spos-short (3), spos-long (30), which have their own. "
        "-S arms.spos-short.search.epochs=VALUE changes it."
    ]
    changes = {"arms.spos-short.search.epochs": 2, "arms.drnas.bindings": ["search.clip = 1.0"], "measure.budget": None}
    made = plan("ranking", template, command="", changes=changes)
    assert made.params["arms"]["spos-short"]["search"]["epochs"] == 2 and made.params["measure"]["budget"] is None
    assert made.params["arms"]["drnas"]["bindings"] == ["search.clip = 1.0"]


def test_a_table_that_grew_is_copied_again(study, tmp_path):
    table = tmp_path / "table.csv"
    for text in ("architecture,test_acc\na,1\n", "architecture,test_acc\na,1\nb,2\n"):
        table.write_text(text)
        assert study("ranking", "--table", str(table)).exit_code == 0
        assert (tmp_path / "here" / "table.csv").read_text() == text


def test_an_arm_has_no_space_of_its_own(study, tmp_path, monkeypatch):
    assert study("stability", "--seeds", "0").exit_code == 0
    monkeypatch.chdir(tmp_path / "here")
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("  plain:\n", "  plain:\n    recipe: demo\n", 1))
    with pytest.raises(TangleNASError, match="has 'recipe', which is the same for all arms of a study"):
        run_folder.in_run_folder("plain", "0").__enter__()


def test_a_pool_of_other_code_or_of_another_recipe_is_trained_anew(study, tmp_path, monkeypatch):
    assert study("ranking", "--seeds", "0").exit_code == 0
    monkeypatch.chdir(tmp_path / "here")
    built = []

    def build(path: Path, **options: object) -> None:
        built.append(path.parent.name)
        for file in (path, path.with_suffix(".json")):
            file.write_text("")

    monkeypatch.setattr(scripts, "build", build)
    recipe, environment = Path("gin", "cpu", "retrain.gin"), Path("environment.json")
    for change in (environment, None, environment, recipe):
        if change is not None:
            change.write_text((change.read_text() if change.exists() else "") + "\n# changed: 1\n")
        if change is recipe:
            recipe.write_text(recipe.read_text() + "retrain.clip = 3.25\n")
        scripts.build_pool(4, 0.6)
    assert built[0] == built[1] and len(set(built)) == 3


def layout_template() -> dict:
    template: dict = {}
    for key, value in parsed((ROOT / "params.yaml").read_text("utf-8")).items():
        group, _, name = key.rpartition(".")
        (template.setdefault(group, {}) if group else template)[name] = value
    return template


def test_some_arms_bring_those_that_they_need():
    made = plan("stages", layout_template(), command="", arms=["drnas-evolution"])
    assert list(made.params["arms"]) == ["drnas", "spos-evolution", "drnas-evolution"]
    with pytest.raises(Exception, match="Did you mean 'drnas-evolution'"):
        plan("stages", layout_template(), command="", arms=["drnas-evolutoin"])


def test_the_band_of_an_arm_is_that_of_the_budget():
    def band(**changes: object) -> object:
        return plan("ranking", layout_template(), command="", changes=changes).params["arms"]["spos-band"]["search"]

    assert band() == {"target_share": 0.6} and band(**{"measure.budget": 0.8}) == {"target_share": 0.8}
    made = plan("ranking", layout_template(), command="", changes={"search.target_share": 0.5, "measure.budget": None})
    assert "search.target_share is not for spos-band (None), which have their own" in made.notes[0]
    assert made.notes[1:] == ["measure.budget is none, so spos-band has no band and draws from the whole space"]


def test_a_pool_is_no_table_of_the_whole_space(study, tmp_path, monkeypatch):
    space = create_space("autoformer_nano")
    pool = Path("pool.csv")
    pool.write_text(f'architecture,test_loss\n"{space.to_string(space.smallest())}",2.5\n')
    result = CliRunner().invoke(main, ["study", "stages", "--table", "pool.csv", "--metric", "test_loss"])
    assert result.exit_code == 2 and "pool.csv is a pool, which has few architectures" in result.stderr
    assert not Path("study-stages").exists()


@pytest.mark.parametrize("name, longest", [("anytime", "drnas-full"), ("stages", "spos-evolution")])
def test_searches_take_longer_in_proportion(name, longest):
    def seconds(**given: float) -> list[float]:
        params = plan(name, layout_template(), command="", **given).params
        own = params["arms"][longest]
        assert sum(own[group].get("seconds") or 0 for group in GROUPS) == pytest.approx(
            given.get("seconds") or studies.load(name).scales["cpu"].seconds
        )
        named = [own[group].get("seconds") for own in params["arms"].values() for group in GROUPS]
        races = re.findall(r"race.seconds = ([\d.]+)", str(params["arms"]))
        return [float(one) for one in [*named, *races] if one is not None]

    usual = seconds()
    assert len(usual) >= 4
    assert seconds(seconds=10 * studies.load(name).scales["cpu"].seconds) == pytest.approx([10 * one for one in usual])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["rankin"], "unknown study 'rankin'. Did you mean 'ranking'?"),
        (["ranking", "--space", "gpt_nan"], "Did you mean 'gpt_nano'?"),
        (["ranking", "--dataset", "digit"], "Did you mean 'digits'?"),
        (["ranking", "--space", "gpt_nano"], "the space 'gpt_nano' is not for data such as 'digits'"),
        (["ranking", "--scale", "gpu"], "unknown scale 'gpu'"),
        (
            ["ranking", "--scale", "paper", "--space", "gpt_nano"],
            "--scale paper has no recipe for the space 'gpt_nano'",
        ),
        (["ranking", "--table", "none.csv"], "--table none.csv: there is no such file"),
        (
            ["ranking", "--seconds", "60"],
            "--seconds 60: searches of ranking count epochs at --scale cpu",
        ),
        (["stages", "--seconds", "60", "--scale", "paper"], "searches of stages count epochs at --scale paper"),
        (["anytime", "--seconds", "0"], "--seconds is 0.0, expected a positive number"),
        (["anytime", "-S", "seconds=5"], "-S seconds: a study has no such value to change. --seconds gives it."),
        (["ranking", "--seeds", "0,0"], "--seeds has a number twice"),
        (["ranking", "--seeds", "a"], "expected whole numbers with commas"),
        (["ranking", "--seeds", ","], "--seeds is empty"),
        (["ranking", "-S", "search.epcohs=3"], "Did you mean 'search.epochs'?"),
        (["ranking", "-S", "search.epochs"], "expected KEY=VALUE"),
        (["ranking", "-S", "search.epochs=[1"], "'[1' is no value of YAML"),
        (["ranking", "-S", "seeds=5"], "-S seeds: a study has no such value to change. --seeds gives it."),
        (["ranking", "-S", "measure=5"], "-S measure: a study has no such value to change."),
        (["ranking", "-S", "measure.architecture=5"], "Did you mean 'measure.architectures'?"),
        (["ranking", "-S", "arms.extra=3"], "-S arms.extra: a study has no such value to change."),
        (["ranking", "-S", "arms.drnas.optimiser=darts"], "Did you mean 'arms.drnas.optimizer'?"),
        (["ranking", "-S", "arms.drnas.search=3"], "-S arms.drnas.search: a study has no such value to change."),
        (
            ["stages", "-S", "arms.spos-random.search.epochs=3"],
            "spos-random takes the supernet of spos-evolution, so it has no search of its own. Change "
            "arms.spos-evolution.search.epochs",
        ),
        (["stages", "-S", "arms.drnas-evolution.optimizer=gdas"], "drnas-evolution takes the supernet of drnas"),
        (["stages", "-S", "arms.drnas.search.epochs=7"], "drnas searches for as long as spos-evolution took"),
        (["ranking", "--arms", "spso"], "unknown arm of the study 'spso'. Did you mean 'spos'?"),
        (["ranking", "--bind", "search.acumulate = 2"], "search has no parameter 'acumulate'"),
    ],
)
def test_what_is_typed_wrong_is_told_in_a_sentence(study, tmp_path, arguments, message):
    result = study(*arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "here").exists()


def test_a_folder_with_something_else_is_left_alone(study, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "params.yaml").write_text("space: gpt_nano\n")
    assert "here is not an empty folder" in study("ranking").stderr
    (tmp_path / "here" / "params.yaml").unlink()
    assert study("ranking").exit_code == 0
    before = (tmp_path / "here" / "params.yaml").read_bytes()
    assert study("ranking").exit_code == 0  # the same study goes on
    assert "holds the study 'ranking' with other settings" in study("ranking", "--seeds", "1").stderr
    assert (tmp_path / "here" / "params.yaml").read_bytes() == before


def test_without_a_name_the_studies_are_listed():
    said = CliRunner().invoke(main, ["study"]).stdout
    assert [line.split()[0] for line in said.splitlines()] == list(studies.NAMES)


def test_a_search_that_memory_cannot_hold_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(
        "tanglenas_engine.pipeline.studies.memory_estimate.available", lambda: (4 * 2**30, "this machine")
    )
    assert "keeps; this machine has 4.0 GiB free" in check(Need(2**20, 2**30, 64))
    with pytest.raises(
        Exception, match=r"about 9\.9 GiB.*512 samples at a time keeps\. this machine has 4\.0 GiB free\. Take"
    ):
        check(Need(2**30, 8 * 2**30, 512))


def test_a_step_that_is_cut_into_pieces_needs_the_memory_of_a_piece(study, tmp_path, monkeypatch):
    kept = {}
    for pieces in (1, 8):
        (tmp_path / str(pieces)).mkdir()
        monkeypatch.chdir(tmp_path / str(pieces))
        bindings = ("BATCH = 32", "search.batch_size = %BATCH", f"search.accumulate = {pieces}")
        given = [part for binding in bindings for part in ("--bind", binding)]
        assert study("stability", *given).exit_code == 0
        monkeypatch.chdir("here")
        with run_folder.in_run_folder("plain", "0"):
            kept[pieces] = estimate()
    assert kept[1].samples == 32 and kept[8].samples == 4
    assert kept[8].kept == pytest.approx(kept[1].kept / 8, rel=0.01)


def test_a_measurement_that_memory_cannot_hold_is_refused_and_leaves_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "tanglenas_engine.pipeline.studies.memory_estimate.available", lambda: (2 * 2**30, "this machine")
    )
    given = ["study", "sharing", "--arms", "superposed", "--out", "here", "-S", "measure.cells=[toy_cell_nano]"]
    result = CliRunner().invoke(main, [*given, "-S", "measure.batch=100000"])
    assert result.exit_code == 2 and "a smaller measure.batch with -S, or --scale cpu" in result.stderr
    assert not (tmp_path / "here").exists()
    monkeypatch.setattr("tanglenas_engine.cli.study._repro", lambda folder: None)
    result = CliRunner().invoke(main, [*given, "-S", "measure.batch=2"])
    assert result.exit_code == 0 and "this machine has 2.0 GiB free" in result.stdout
    with pytest.raises(Exception, match="holds the study"):
        CliRunner().invoke(main, [*given, "-S", "measure.batch=100000"], standalone_mode=False, catch_exceptions=False)
    assert (tmp_path / "here" / "dvc.yaml").exists()


def test_claims_against_numbers_and_arms_are_told_apart():
    assert Claim("x", against=0.0).against == 0.0 and Claim("x").against == ""
