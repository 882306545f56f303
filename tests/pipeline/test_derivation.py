"""Derivation as stages run it: methods and their options from gin, the front, a point of it retrained, a table."""

import csv
import json
import shutil
from pathlib import Path

import gin
import pytest
from project import lay_out, set_params
from ruamel.yaml import YAML
from stages import forget_settings

from pipelines import discretize, evaluate, retrain, search
from tanglenas_engine import Architecture, create_space
from tanglenas_engine.derivation.candidates import Candidates
from tanglenas_engine.derivation.pareto import undominated
from tanglenas_engine.pipeline import trainings, write_environment
from tanglenas_engine.pipeline.files import SUPERNET, load_into
from tanglenas_engine.runtime.weights import save_weights, weights_metadata
from tanglenas_engine.superposition.size import combinations
from tanglenas_engine.tables import Table
from tanglenas_engine.training.loop import Interrupted
from tanglenas_objectives.latency_measurement import measure_latency

# MLflow's own models, on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

MACROS = ['SPACE = "toy_cell"', 'OPTIMIZER = "spos"', 'DATASET = "digits"', "SEED = 0", "create_space.channels = 2"]

SMALL_EVOLUTION = (
    "evolution.population = 6", "evolution.parents = 2", "evolution.crossovers = 2", "evolution.mutations = 2",
)  # fmt: skip


def run(stage, *bindings):
    """Run a stage; a derivation takes one batch for statistics, where most of its time would go."""
    name = stage.__name__.split(".")[-1]
    small = ["discretize.recalibration_batches = 1"] if name == "discretize" else []
    stage.main([f"gin/stages/{name}.gin", *MACROS, *small, *bindings])


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A project with a supernet that was trained on sampled paths, and a table of the space."""
    folder = lay_out(tmp_path_factory.mktemp("searched") / "project", code=False)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        run(search, "search.epochs = 2", "search.batch_size = 64", "search.warmup_epochs = 0")
        space = create_space("toy_cell", channels=2, image_size=8)
        keys = [space.to_string(space.architecture_of(picks)) for picks in combinations(space.rows)]
        worth = {key: 50 + 5 * key.count("sep") + key.count("5x5") for key in keys}
        Table(worth, {"test_acc": list(worth.values())}, "toy_cell").write("toy.csv")
    return folder


def enter(patch, folder):
    forget_settings(patch)
    patch.chdir(folder)


@pytest.fixture
def project(searched, tmp_path, monkeypatch):
    """A copy of `searched`; the current folder."""
    shutil.copytree(searched, tmp_path / "project")
    enter(monkeypatch, tmp_path / "project")
    yield tmp_path / "project"
    gin.clear_config()


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def numbers(path):
    return [
        {**row, "loss": float(row["loss"]), "params": int(row["params"]), "samples": int(row["samples"])}
        for row in rows(path)
    ]


def refused(capsys, stage, *bindings):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        run(stage, *bindings)
    assert ending.value.code == 2
    return capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_method_is_named_and_its_options_are_bound_by_its_name(project):
    run(discretize, 'discretize.method = "evolution"', "discretize.candidates = 16", *SMALL_EVOLUTION)
    generations = sorted(int(row["generation"]) for row in rows("out/discretize/candidates.csv"))
    assert generations == [0] * 6 + [1] * 6 + [2] * 4
    first = {path.name: path.read_bytes() for path in Path("out/discretize").rglob("*") if path.is_file()}
    operative = Path("out/discretize/operative.gin").read_text()
    assert "evolution.population = 6" in operative and 'discretize.method = "evolution"' in operative.replace("'", '"')
    run(discretize, "out/discretize/operative.gin")
    again = {path.name: path.read_bytes() for path in Path("out/discretize").rglob("*") if path.is_file()}
    assert {k: v for k, v in again.items() if k != "operative.gin"} == {
        k: v for k, v in first.items() if k != "operative.gin"
    }


@pytest.mark.exhaustive
def test_a_stage_that_was_stopped_goes_on_and_ends_with_the_same_bytes(project, monkeypatch, capsys):
    no_race = "discretize.batch_size = 600"
    bindings = ('discretize.method = "evolution"', "discretize.candidates = 12", no_race, *SMALL_EVOLUTION)
    run(discretize, *bindings)
    whole = {path.name: path.read_bytes() for path in Path("out/discretize").rglob("*") if path.is_file()}
    measured, calls = Candidates.measured, []

    def stopping(self, *given):
        calls.append(given)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return measured(self, *given)

    monkeypatch.setattr(Candidates, "measured", stopping)
    with pytest.raises(SystemExit) as ending:
        run(discretize, *bindings)
    assert ending.value.code == 130 and not Path("out/discretize/architecture.json").exists()
    assert "Run the same command again to continue" in capsys.readouterr().err
    run(discretize, *bindings)
    assert len(calls) == 9 + 12 - 8 + 1
    assert "8 candidates were judged before" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("out/discretize").rglob("*") if path.is_file()} == whole


@pytest.mark.exhaustive
def test_a_race_trains_by_the_recipe_of_retrain_and_says_how_it_went(project, capsys):
    set_params(project, retrain={"epochs": 2, "batch_size": 128})
    small = ["create_space.channels = 2", "retrain.scheduler = None"]
    Path("gin/demo/retrain.gin").write_text("\n".join(small))
    run(discretize, 'discretize.method = "race"', "discretize.candidates = 6", "race.entrants = 4", "race.eta = 2")
    said = capsys.readouterr().out
    assert "a race of 4 networks for 1 epoch, the best 2 on to 2: 3.0 trainings of 2 epochs" in said
    found = rows("out/discretize/race.csv")
    assert [row["epochs"] for row in found] == ["2", "2", "1", "1"] and "seconds" not in found[0]
    assert [row["place"] for row in found] == ["1", "2", "3", "4"]
    winner = json.loads(Path("out/discretize/architecture.json").read_text())["digest"]
    assert winner == found[0]["digest"] and len(rows("out/discretize/candidates.csv")) == 6
    metrics = json.loads(Path("metrics/discretize.json").read_text())
    assert (
        metrics["race_loss"] == float(found[0]["loss"]) == pytest.approx(float(found[1]["loss"]) - metrics["race_lead"])
    )
    assert (metrics["race_networks"], metrics["race_trainings"]) == (4, 3.0)
    times = json.loads(Path("out/discretize.run.json").read_text())["times"]
    assert [*times] == [f"race_seconds_{place}" for place in range(1, 5)] and all(0 < one for one in times.values())
    assert not any(Path(".tanglenas/trainings").iterdir())
    assert "race.entrants = 4" in Path("out/discretize/operative.gin").read_text()

    run(retrain, *small, "retrain.epochs = 2", "retrain.batch_size = 128")
    last = rows("out/retrain/history.csv")[-1]
    assert (last["validation_loss"], last["validation_accuracy"]) == (found[0]["loss"], found[0]["accuracy"])


def test_a_race_fine_tunes_where_retrain_does(project, capsys):
    epoch = {"epochs": 1, "batch_size": 128}
    set_params(project, retrain={**epoch, "mode": "inherit"})
    bindings = ('discretize.method = "race"', "discretize.candidates = 3", "race.entrants = 2")
    said = refused(capsys, discretize, *bindings)
    assert "retrain.mode is 'inherit', which trains nothing" in said and "candidate" not in capsys.readouterr().out
    set_params(project, retrain={**epoch, "mode": "finetune"})
    Path("gin/demo/retrain.gin").write_text("create_space.channels = 3")
    assert "create the space as there, or use 'scratch'" in refused(capsys, discretize, *bindings)
    assert "candidate" not in capsys.readouterr().out  # it is refused before any is judged
    Path("gin/demo/retrain.gin").write_text("create_space.channels = 2")
    run(discretize, *bindings)
    tuned = rows("out/discretize/race.csv")[0]
    run(retrain, "retrain.epochs = 1", "retrain.batch_size = 128", 'retrain.mode = "finetune"')
    last = rows("out/retrain/history.csv")[-1]
    assert (last["validation_loss"], last["validation_accuracy"]) == (tuned["loss"], tuned["accuracy"])
    set_params(project, retrain={**epoch, "mode": "scratch"})
    run(discretize, *bindings)
    assert rows("out/discretize/race.csv")[0]["loss"] != tuned["loss"]


def test_a_race_that_was_stopped_goes_on_with_its_trainings(project, monkeypatch, capsys):
    set_params(project, retrain={"epochs": 1, "batch_size": 128})
    Path("gin/demo/retrain.gin").write_text("create_space.channels = 2")
    bindings = ('discretize.method = "race"', "discretize.candidates = 4", "race.entrants = 3")
    train, calls = trainings.Bench.train, []

    def stopping(self, *given, **options):
        calls.append(given)
        if len(calls) == 3:
            raise Interrupted("retrain stopped at step 1 of 9, but it had nowhere to save")
        return train(self, *given, **options)

    monkeypatch.setattr(trainings.Bench, "train", stopping)
    with pytest.raises(SystemExit) as ending:
        run(discretize, *bindings)
    assert ending.value.code == 130 and not Path("out/discretize/architecture.json").exists()
    assert "discretize stopped. Run the same command again to continue" in capsys.readouterr().err
    run(discretize, *bindings)
    assert len(calls) == 4 and "2 trainings were done before" in capsys.readouterr().out


def test_dvc_is_told_when_the_recipe_of_a_race_changes(project):
    def recipe(**changes):
        set_params(project, **changes)
        write_environment(["toy_cell", "spos", "digits"])
        return json.loads(Path("out/recipe.json").read_text())

    assert recipe(retrain={"epochs": 3}) == {}
    first = recipe(discretize={"method": "race"})
    assert first != recipe(retrain={"epochs": 4}) != recipe(retrain={"epochs": 4}, recipe="cpu")
    assert first == recipe(retrain={"epochs": 3, "pick": "12"}, recipe="demo")
    assert first != recipe(retrain={"mode": "finetune"})
    assert first == recipe(retrain={"mode": "scratch"})
    with open("dvc.yaml", "a+") as file:
        file.seek(0)
        text = file.read().replace("'retrain.mode =", "'retrain.checkpoint_every = 3' 'retrain.mode =")
    Path("dvc.yaml").write_text(text)
    assert recipe() == first
    Path("gin/demo/retrain.gin").write_text("create_space.channels = 2")
    assert first != recipe()


def test_a_gin_file_that_no_stage_reads_runs_no_stage_again(project):
    write_environment(["toy_cell", "spos", "digits"])
    before = {path.name: path.read_text() for path in Path("out/inputs").iterdir()}
    for unread in ("gin/spaces/darts.gin", "gin/optimizers/spos.gin", "gin/datasets/cifar10.gin"):
        with open(unread, "a") as file:
            file.write("# changed\n")
    write_environment(["toy_cell", "spos", "digits"])
    assert {path.name: path.read_text() for path in Path("out/inputs").iterdir()} == before
    stages = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]
    assert not [
        dep for stage in stages.values() for dep in stage["deps"] if dep.startswith("gin") and Path(dep).is_dir()
    ]


def test_dvc_is_told_when_a_table_an_included_file_or_the_code_behind_a_reference_changes(project, monkeypatch):
    def inputs():
        write_environment(["toy_cell", "spos", "digits"])
        return {stage: Path(f"out/inputs/{stage}.json").read_text() for stage in ("search", "retrain", "evaluate")}

    def changed(before, after):
        return [stage for stage in before if before[stage] != after[stage]]

    monkeypatch.syspath_prepend(str(project))
    Path("table.csv").write_text("architecture,test_acc\na,1\n")
    Path("my_losses.py").write_text("import torch\n\ndef loss(outputs, targets):\n    return outputs.sum()\n")
    Path("gin/common.gin").write_text("retrain.clip = 1.0\n")
    with open("gin/stages/evaluate.gin", "a") as file:
        file.write('benchmark.path = "table.csv"\n')
    with open("gin/stages/retrain.gin", "a") as file:
        file.write('include "gin/common.gin"\nretrain.loss = @my_losses.loss\n')
    first = inputs()
    assert "table.csv" in first["evaluate"] and "gin/common.gin" in first["retrain"] and "my_losses" in first["retrain"]
    Path("table.csv").write_text("architecture,test_acc\na,1\nb,2\n")
    second = inputs()
    assert changed(first, second) == ["evaluate"]
    Path("gin/common.gin").write_text("retrain.clip = 2.0\n")
    third = inputs()
    assert changed(second, third) == ["retrain"]
    set_params(project, discretize={"method": "race"})
    before = (inputs(), Path("out/recipe.json").read_text())
    Path("gin/common.gin").write_text("retrain.clip = 3.0\n")
    after = (inputs(), Path("out/recipe.json").read_text())
    assert changed(before[0], after[0]) == ["retrain"] and before[1] != after[1]  # a race trains by that recipe
    Path("my_losses.py").write_text("import torch\nimport helper\n\ndef loss(outputs, targets):\n    return 0\n")
    first = inputs()
    Path("helper.py").write_text("SIZE = 1\n")
    second = inputs()
    assert changed(first, second) == ["retrain"] and "helper.py" in second["retrain"]
    Path("gin/common.gin").write_text("retrain.clp = 2.0\n")  # the stage itself says what is wrong
    files = {path.as_posix() for path in Path("gin").rglob("*.gin")}
    assert (
        json.loads(inputs()["retrain"]).keys() == {"files"} and files <= json.loads(inputs()["retrain"])["files"].keys()
    )


def test_a_race_needs_a_recipe(project, capsys):
    Path("dvc.yaml").unlink()
    message = refused(capsys, discretize, 'discretize.method = "race"', "discretize.candidates = 2")
    assert "'race' trains by the recipe of the retrain stage, and this folder has none" in message


@pytest.mark.exhaustive
def test_any_point_of_the_front_can_be_retrained(project, capsys):
    run(discretize, 'discretize.method = "nsga2"', "discretize.candidates = 24", "nsga2.population = 8")
    candidates, points = numbers("out/discretize/candidates.csv"), numbers("out/discretize/pareto.csv")
    assert len(candidates) == 24 and points == undominated(candidates) and len(points) > 1
    assert Path("out/discretize/pareto.png").stat().st_size > 0
    files = {path.stem: Architecture.from_json(path.read_text()) for path in Path("out/discretize/pareto").iterdir()}
    assert {digest: str(found) for digest, found in files.items()} == {p["digest"]: p["architecture"] for p in points}
    best = json.loads(Path("out/discretize/architecture.json").read_text())["digest"]
    assert best == points[-1]["digest"]

    training = ("retrain.epochs = 1", "retrain.batch_size = 64")
    cheapest = points[0]["digest"]
    run(retrain, *training, f'read_architecture.pick = "{cheapest}"')
    run(evaluate, f'read_architecture.pick = "{cheapest[:10]}"')
    metrics = json.loads(Path("metrics/evaluate.json").read_text())
    assert metrics["digest"] == cheapest and metrics["params"] == points[0]["params"]
    assert "another network" in refused(capsys, evaluate)

    message = refused(capsys, retrain, *training, 'read_architecture.pick = "xyz"')
    assert "read_architecture.pick is 'xyz', expected 'best' or the digest of one architecture in" in message
    assert all(point["digest"] in message for point in points)


def test_one_candidate_has_no_front_to_pick_from(project, capsys):
    run(discretize, 'discretize.method = "random"', "discretize.candidates = 1")
    assert not Path("out/discretize/pareto.csv").exists()
    assert "it has none, since only one was judged" in refused(capsys, retrain, 'read_architecture.pick = "0"')


@pytest.mark.parametrize(
    "bindings, message",
    [
        (['discretize.method = "evolutoin"'], "unknown discretize.method 'evolutoin'. Did you mean 'evolution'?"),
        (["evolution.populations = 3"], "evolution has no parameter 'populations'. Did you mean 'population'?"),
        (["evolution.population = 'x'"], "evolution.population is 'x', expected a whole number"),
        (
            ['discretize.method = "evolution"', "evolution.population = 3"],
            "evolution.parents is 5, more than the 3 of a population",
        ),
        (['discretize.cost = "latencies"'], "unknown objective 'latencies'. Did you mean 'latency'?"),
        (["discretize.limits = {'flop': 3}"], "unknown objective 'flop'. Did you mean 'flops'?"),
        (["discretize.limits = 3"], "discretize.limits is 3, expected numbers by name"),
        (["discretize.limits = {'macs': 3}"], "no architecture of 'toy_cell' has at most 3 MACs"),
        (['discretize.prior = "mixture"'], "needs the mixture of a gradient search"),
        (['discretize.method = "race"', "race.trainings = 0.5"], "race.trainings is 0.5, expected at least 1"),
        (["race.train = 3"], "race.train is what the stage itself sets"),
        (['discretize.prior = "alphas"'], "discretize.prior is 'alphas', expected 'uniform' or 'mixture'"),
    ],
)
def test_settings_that_cannot_be_end_in_one_sentence(project, capsys, bindings, message):
    error = refused(capsys, discretize, "discretize.candidates = 5", *bindings)
    assert message in error and error.count("\n") == 1


def test_a_table_tells_how_well_the_supernet_ranks(project, capsys):
    run(discretize, 'discretize.method = "random"', "discretize.candidates = 3")
    run(retrain, "retrain.epochs = 1", "retrain.batch_size = 64")
    assert "there is no table" in refused(capsys, evaluate, "rank_correlation.architectures = 20")
    table = 'benchmark.path = "toy.csv"'
    run(evaluate, table)
    assert "kendall_tau" not in json.loads(Path("metrics/evaluate.json").read_text())
    run(evaluate, table, "rank_correlation.architectures = 12")
    metrics = json.loads(Path("metrics/evaluate.json").read_text())
    assert metrics["ranked_architectures"] == 12 and -1 <= metrics["kendall_tau"] <= 1 and "table_rank" in metrics
    assert {"spearman_params", "spearman_macs", "spearman_before_search"} <= {*metrics}
    assert metrics["spearman_before_search"] != metrics["spearman"]
    found = rows("out/evaluate/rank_correlation.csv")
    assert len({row["digest"] for row in found}) == 12
    for row in found:
        assert float(row["table_value"]) == 50 + 5 * row["architecture"].count("sep") + row["architecture"].count("5x5")
    assert Path("out/evaluate/rank_correlation.png").stat().st_size > 0


@pytest.mark.exhaustive
def test_a_plugins_objective_can_be_the_budget_and_the_cost_of_the_front(project):
    space = create_space("toy_cell", channels=2, image_size=8)
    table = measure_latency(space, fitted=2, validated=2, repeats=1)
    table.save("latency.json")
    low, high = (table.terms(space).cost(space.assignment_of(a)) for a in (space.smallest(), space.largest()))
    limit = (low + high) / 2
    run(discretize, 'discretize.method = "nsga2"', "discretize.candidates = 25", 'discretize.cost = "latency"',
        f"discretize.limits = {{'latency': {limit}}}", 'create_objective.table = "latency.json"')  # fmt: skip
    found = [{**row, "latency": float(row["latency"])} for row in numbers("out/discretize/candidates.csv")]
    assert all(0 < row["latency"] <= limit for row in found)
    assert [row["digest"] for row in rows("out/discretize/pareto.csv")] == [
        row["digest"] for row in undominated(found, "latency")
    ]


def test_params_name_the_method_and_the_point(project):
    from tanglenas_engine.pipeline.config.params import check_params

    set_params(project, discretize={"method": "nsga2"}, retrain={"pick": "0123456789abcdef"})
    check_params()
    text = Path("dvc.yaml").read_text()
    assert text.count('read_architecture.pick = "${retrain.pick}"') == 2


def test_a_supernet_of_partial_channels_is_judged_with_these_in_later_stages(project):
    partial = ("OPTIMIZER = 'pc_darts'", "create_space.channels = 8")
    run(search, *partial, "search.epochs = 1", "search.warmup_epochs = 0", "search.recalibration_batches = 1")
    assert weights_metadata(SUPERNET)["channel_divisor"] == "4"
    run(discretize, *partial, "discretize.method = 'argmax'")
    searched, derived = (json.loads(Path(f"metrics/{stage}.json").read_text()) for stage in ("search", "discretize"))
    assert derived["validation_loss"] == pytest.approx(searched["validation_loss"], rel=1e-5)
    space = create_space("toy_cell", channels=8, image_size=8)
    load_into(space, SUPERNET)
    assert space.superposition.trained_divisor == 4
    save_weights(SUPERNET, space.state_dict())  # as it was written before
    load_into(space, SUPERNET)
    assert space.superposition.trained_divisor == 1


def test_inheriting_untrained_channels_is_refused_before_the_search(project, capsys):
    set_params(project, space="toy_cell", dataset="digits", optimizer="pc_darts", retrain={"mode": "inherit"})
    partial = ("OPTIMIZER = 'pc_darts'", "create_space.channels = 8")
    with open("gin/stages/retrain.gin", "a") as file:
        file.write("\ncreate_space.channels = 8\n")
    with pytest.raises(SystemExit):
        run(search, *partial, "search.epochs = 2", "search.warmup_epochs = 0")
    assert "after the search, retrain would fail: retrain.mode is 'inherit', but the search" in capsys.readouterr().err
    run(search, *partial, "search.epochs = 2", "search.warmup_epochs = 0", "search.path_epochs = 1")
    assert "channel_divisor" not in weights_metadata(SUPERNET)
