"""`tanglenas compare`: what is comparable, and what seeds say about it."""

import csv
import io
import itertools
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from paths import ROOT
from scipy import stats
from stores import add_pipeline

from tanglenas_engine.cli import main
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import finished_runs
from tanglenas_engine.pipeline.comparison.curves import Curve, Curves, _curves
from tanglenas_engine.pipeline.comparison.estimates import METRICS, Estimate, metric_of, seeds_needed
from tanglenas_engine.pipeline.comparison.figure import draw
from tanglenas_engine.pipeline.comparison.groups import Comparison, compare, compare_rows
from tanglenas_engine.pipeline.comparison.settings import in_order
from tanglenas_engine.pipeline.comparison.tables import format_estimate, latex, markdown, table_csv
from tanglenas_engine.pipeline.finished_runs import Records, names_of_params
from tanglenas_engine.pipeline.tracking.store import PARENT, Store
from tanglenas_engine.pipeline.tracking.tracker import AFTER

# MLflow's own models, on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

NAMES = names_of_params(ROOT)


def row(optimizer: str, seed: int | None, accuracy: float, space: str = "toy_cell", **settings: object) -> dict:
    """The record of an evaluation."""
    return {
        "name": f"{optimizer} s{seed}", "search_id": f"{optimizer}{seed}", "optimizer": optimizer, "space": space,
        "dataset": "digits", "seed": None if seed is None else str(seed),
        "settings": {name: str(value) for name, value in settings.items()},
        "metrics": {"test_accuracy": accuracy, "macs": 2e6},
    }  # fmt: skip


def compared(*rows: dict, unfinished: tuple[str, ...] = (), **options: object) -> Comparison:
    return compare_rows(Records(list(rows), list(unfinished)), NAMES, **options)


THREE = {"drnas": (90.0, 92.0, 94.0), "spos": (89.0, 90.0, 93.0)}
RUNS = [row(name, seed, value) for name, values in THREE.items() for seed, value in enumerate(values)]


def test_names_of_bindings_are_those_of_params_yaml():
    assert NAMES["target.share"] == "search.target_share"
    assert NAMES["OPTIMIZER"] == "optimizer" and NAMES["create_space.relaxation"] == "search.relaxation"


def test_a_group_has_mean_deviation_and_the_bootstrap_interval_of_its_seeds():
    (table,) = compared(*RUNS).tables
    found = table.estimates["test_accuracy", "spos"]
    low, high = stats.bootstrap(
        (THREE["spos"],), np.mean, method="percentile", n_resamples=9999, random_state=np.random.default_rng(0)
    ).confidence_interval
    assert (found.count, found.mean) == (3, statistics.fmean(THREE["spos"]))
    assert found.deviation == statistics.stdev(THREE["spos"]) and found.interval == pytest.approx((low, high))


def test_differences_are_paired_by_seed():
    table = compared(*RUNS, row("drnas", 7, 10.0), against="drnas", metrics=["test_accuracy"]).tables[0]
    (found,) = table.differences
    assert (found.group, found.against, found.estimate.count) == ("spos", "drnas", 3)
    assert found.estimate == Estimate.of([-1.0, -2.0, -1.0])
    swapped = compared(*RUNS, against="spos", metrics=["test_accuracy"]).tables[0].differences[0]
    assert swapped.estimate.mean == -found.estimate.mean


@pytest.mark.parametrize("effect, needed", [(0.5, 34), (1.0, 10)])  # as G*Power has them
def test_the_seeds_of_a_claim_are_those_of_a_paired_t_test(effect, needed):
    assert seeds_needed(effect, 1.0) == needed == seeds_needed(-10 * effect, 10.0)
    assert seeds_needed(0.0, 1.0) is None and seeds_needed(1.0, 0.0) is None
    assert seeds_needed(1e-6, 1.0) == 10000 and seeds_needed(1e6, 1.0) == 2
    needed = [seeds_needed(0.1 * tenths, 1.0) for tenths in range(10, 200)]
    assert needed == sorted(needed, reverse=True)


@pytest.mark.parametrize("effect", [5.5, 7.0, 10.0])
def test_two_seeds_are_too_few_where_their_test_mostly_fails(effect):
    # The power with two seeds is the chance of |mean| > t deviation / sqrt(2).
    draws = np.random.default_rng(0).standard_normal((200_000, 2)) + effect
    edge = stats.t.ppf(0.975, 1)
    power = np.mean(np.abs(draws.mean(1)) > edge * draws.std(1, ddof=1) / math.sqrt(2))
    assert power < 0.79 and seeds_needed(effect, 1.0) == 3


def test_a_setting_called_none_is_another_one_than_none_and_than_no_setting():
    name = "create_optimizer.regularizer"
    runs = [row("drnas", 0, 90.0), row("drnas", 0, 80.0, **{name: "none"}), row("drnas", 0, 85.0, **{name: None})]
    (table,) = compared(*runs).tables
    assert [group.label for group in table.groups] == [f"{name}={value}" for value in ("None", "none", "not set")]


def test_one_seed_has_no_interval_and_the_table_says_so():
    comparison = compared(row("drnas", 0, 90.0), row("spos", 0, 91.0))
    assert comparison.tables[0].estimates["test_accuracy", "drnas"] == Estimate(1, 90.0)
    text = markdown(comparison)
    assert "One seed gives no interval, and shows nothing of chance: drnas, spos." in text and "one seed" in text


def test_two_seeds_have_their_values_as_the_interval_and_the_table_says_that_it_is_no_evidence():
    comparison = compared(row("drnas", 0, 61.0), row("drnas", 1, 60.0), *RUNS[3:])
    (table,) = comparison.tables
    assert table.estimates["test_accuracy", "drnas"].interval == (60.0, 61.0)
    assert "has the true mean in half of all cases, and is no evidence: drnas." in markdown(comparison)
    assert "no evidence" not in markdown(compared(*RUNS))


def test_by_default_groups_are_told_apart_by_the_fewest_settings():
    tuned = [row("drnas", seed, 95.0, **{"drnas.x": 1, "create_space.relaxation": "gated"}) for seed in range(2)]
    plain = [row(name, s, 90.0, **{f"{name}.x": 1, "create_space.relaxation": "exact"})
             for name in ("drnas", "spos") for s in range(2)]  # fmt: skip
    comparison = compared(*tuned, *plain)
    assert comparison.by == ["optimizer", "search.relaxation"]
    assert [group.label for group in comparison.tables[0].groups] == [
        "drnas, search.relaxation=exact", "drnas, search.relaxation=gated", "spos, search.relaxation=exact",
    ]  # fmt: skip


def test_other_spaces_and_budgets_have_tables_of_their_own_unless_asked_for():
    rows = [*RUNS, row("drnas", 0, 60.0, space="gpt_nano"), row("spos", 1, 50.0, **{"search.epochs": 3})]
    comparison = compared(*rows)
    assert [table.title for table in comparison.tables] == [
        "gpt_nano, search.epochs=not set", "toy_cell, search.epochs=3", "toy_cell, search.epochs=not set",
    ]  # fmt: skip
    assert comparison.notes[0].startswith("The runs differ in space, search.epochs: there is a table for each")
    assert "the only group here" in comparison.tables[0].notes[-1]
    asked = compared(*RUNS, row("spos", 1, 50.0, **{"search.epochs": 3}), by=["search.epochs", "optimizer"])
    assert asked.tables[0].groups[0].label == "search.epochs=3, spos"


def test_tables_groups_and_seeds_are_in_the_order_of_their_numbers():
    rows = [row("drnas", seed, 60.0, **{"search.epochs": n}) for n in (12, 3, 2) for seed in (10, 2)]
    assert [table.title for table in compared(*rows, by=["optimizer"]).tables] == [
        "search.epochs=2", "search.epochs=3", "search.epochs=12",
    ]  # fmt: skip
    asked = compared(*rows, by=["search.epochs"])
    assert [group.label for group in asked.tables[0].groups] == [
        "search.epochs=2",
        "search.epochs=3",
        "search.epochs=12",
    ]
    texts = ["a=1e-3", "a=-2", "a=0.5", "a=-10", "a", "vit_b16", "vit_b4", "12e999"]
    assert sorted(texts, key=in_order) == ["12e999", "a", "a=-10", "a=-2", "a=1e-3", "a=0.5", "vit_b4", "vit_b16"]


def test_seeds_with_seconds_of_their_own_are_one_group_where_seconds_are_joined():
    rows = [row("drnas", seed, 90.0 + seed, **{"search.seconds": 41.7 + seed}) for seed in range(3)]
    rows += [row("spos", seed, 89.0, **{"search.seconds": 36.0}) for seed in range(3)]
    apart = compared(*rows)
    assert len(apart.tables) == 4 and "or in --join to take its values for equal" in apart.notes[0]
    together = compared(*rows, joined=["search.seconds"])
    (table,) = together.tables
    assert together.by == ["optimizer"] and [len(group.runs) for group in table.groups] == [3, 3]
    assert table.differences[0].estimate == Estimate.of([-1.0, -2.0, -3.0])
    assert together.notes == ["The runs differ in search.seconds, which --join takes for equal."]
    assert compared(*rows, by=["optimizer"], joined=["search.seconds"]).tables[0].groups == table.groups
    twice = compared(*rows, row("drnas", 0, 70.0, **{"search.seconds": 10}), joined=["search.seconds"])
    assert "drnas mixes runs that differ in search.seconds, and has the latest of each seed." in twice.tables[0].notes


def test_other_data_of_one_name_have_tables_of_their_own():
    other = [row("drnas", seed, 60.0, **{"create_dataset.root": "other"}) for seed in range(2)]
    comparison = compared(*RUNS, *other)
    assert [table.title for table in comparison.tables] == ["create_dataset.root=not set", "create_dataset.root=other"]
    assert comparison.by == ["optimizer"]
    asked = compared(*RUNS, *other, by=["create_dataset.root", "optimizer"])
    assert len(asked.tables) == 1 and len(asked.tables[0].groups) == 3


@pytest.mark.parametrize("name", ["search.seconds", "target.share", "size/target.share", "size/target.share (search)"])
def test_a_setting_that_is_none_is_one_that_an_older_run_lacks(name):
    comparison = compared(row("spos", 0, 90.0), row("spos", 1, 91.0, **{name: None}))
    assert [len(group.runs) for group in comparison.tables[0].groups] == [2]


def test_a_seed_that_ran_again_counts_once_and_mixed_settings_are_told():
    rows = [*RUNS, row("spos", 2, 99.0, **{"search.batch_size": 8})]
    comparison = compared(*rows, by=["optimizer"])
    assert comparison.tables[0].groups[1].values("test_accuracy") == {"0": 89.0, "1": 90.0, "2": 99.0}
    assert "spos mixes runs that differ in search.batch_size" in comparison.tables[0].notes[0]


def test_damaged_and_unfinished_runs_are_named_and_left_out():
    comparison = compared(
        *RUNS, row("gdas", 0, math.nan), row("darts", None, 90.0), unfinished=("drnas toy s4 [ab] (search: failed)",)
    )
    assert [group.label for group in comparison.tables[0].groups] == ["drnas", "spos"]
    text = markdown(comparison)
    assert "1 run left out, because they did not reach the end of evaluate: drnas toy s4 [ab] (search: failed)." in text
    assert "no finite test metric: gdas s0." in text and "seed is unknown: darts sNone." in text


def test_a_metric_that_is_not_finite_in_some_runs_is_told():
    rows = [
        {**one, "metrics": {**one["metrics"], "test_loss": math.nan if one["seed"] == "1" else 0.5}} for one in RUNS
    ]
    (table,) = compared(*rows).tables
    assert table.estimates["test_loss", "spos"].count == 2
    assert "2 runs without a finite test_loss: drnas s1, spos s1." in table.notes


def test_a_metric_that_a_whole_group_lacks_is_told():
    rows = [{**one, "metrics": {**one["metrics"], "test_loss": 0.5}} for one in RUNS if one["optimizer"] == "drnas"]
    (table,) = compared(*rows, *(one for one in RUNS if one["optimizer"] == "spos")).tables
    assert any("without a finite test_loss: spos s" in note for note in table.notes)


def test_groups_without_a_common_seed_have_no_difference():
    (table,) = compared(row("drnas", 0, 90.0), row("spos", 1, 91.0)).tables
    assert not table.differences
    assert any("spos (seeds 1) and drnas (seeds 0) have no seed in common" in note for note in table.notes)


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, "there is no finished run to compare: run `dvc repro`"),
        ([row("a", 0, math.nan)], {}, "no finite test metric: a s0"),
        (RUNS, {"by": ["optimiser"]}, "no run has a parameter 'optimiser'. Did you mean 'optimizer'?"),
        (RUNS, {"by": ["seed"]}, "a group is what differs by seed alone"),
        (RUNS, {"joined": ["search.secnds"]}, "--join: no run has a parameter 'search.secnds'"),
        (RUNS, {"by": ["space"], "joined": ["space"]}, "--by and --join both have space: leave it out of one"),
        (RUNS, {"metrics": ["test_acuracy"]}, "no run has a finite 'test_acuracy'. Did you mean 'test_accuracy'?"),
        (RUNS, {"against": "drna"}, "unknown group 'drna'. Did you mean 'drnas'?"),
        (
            [*RUNS[:3], row("spos", 0, 1.0, **{"search.clip": 2.0})],
            {"against": "spos", "by": ["optimizer", "search.clip"]},
            "unknown group 'spos'. Choose one of: 'drnas, search.clip=not set', 'spos, search.clip=2.0'",
        ),
        (RUNS[:3], {"against": "all runs"}, "it is the only group"),
    ],
)
def test_bad_input_is_told_in_a_sentence(rows, options, message):
    with pytest.raises(TangleNASError) as refusal:
        compared(*rows, **options)
    assert message in str(refusal.value)


def test_the_csv_has_every_number_in_its_own_unit():
    rows = list(csv.DictReader(io.StringIO(table_csv(compared(*RUNS)))))
    macs = next(one for one in rows if (one["metric"], one["group"], one["minus"]) == ("macs", "spos", ""))
    assert (macs["mean"], macs["standard_deviation"], macs["seeds"]) == ("2000000.0", "0.0", "3")
    assert [one["seeds_for_a_claim"] for one in rows if one["minus"]] == ["4", ""]


def test_latex_has_the_number_of_seeds_of_a_cell_that_has_fewer_than_its_row():
    rows = [row(name, seed, 90.0 + seed) for name in ("a", "b") for seed in range(3)]
    del rows[2]["metrics"]["macs"]
    text = latex(compared(*rows, metrics=["test_accuracy", "macs"]))
    (means,) = [line for line in text.splitlines() if line.startswith("a & 3")]
    assert "($n=2$)" in means and means.count("n=") == 1
    assert text.count("($n=2$)") == 2  # the other one is of the difference


def test_latex_escapes_what_people_call_their_runs():
    text = latex(compared(row("a_b%&", 0, 1234.0), row("a_b%&", 1, 1235.0), row("c", 0, 3.0)))
    assert r"a\_b\%\& & 2 & $1{,}234.50 \pm 0.71$" in text and text.count(r"\begin{tabular}") == 2
    assert text.count("{") == text.count("}")


def test_the_figure_is_the_same_for_the_same_runs():
    comparison = compared(*RUNS, row("a very long name of $ome method", 0, 91.0))
    moments = np.linspace(1.0, 400.0, 200)
    curve = Curve("spos", moments, moments / 4, (moments / 5, moments / 3), derived=False, spread=False)
    curves = [Curves("validation_accuracy", [curve])]
    assert draw(comparison, curves) == draw(comparison, curves)
    assert draw(comparison, [Curves("validation_accuracy", [])]).startswith(b"\x89PNG")


@pytest.mark.parametrize("count, more", [(2, ""), (22, ""), (4, ", search.warmup_epochs=1, retrain.mode=finetune")])
def test_names_of_groups_are_whole_and_apart_and_leave_the_panels_their_room(count, more, monkeypatch):
    monkeypatch.setattr("tanglenas_engine.pipeline.comparison.figure.png", lambda figure: figure)
    methods = [f"spos, discretize.method=evolution{more}, relaxation={n}" if more else f"m{n}" for n in range(count)]
    comparison = compared(*(row(name, seed, 80.0 + seed) for name in methods for seed in range(2)))
    moments = np.linspace(1.0, 400.0, 200)
    curves = [Curve(group.label, moments, moments, None, False, False) for group in comparison.tables[0].groups]
    figure = draw(comparison, [Curves("validation_accuracy", curves)])
    figure.draw_without_rendering()
    means, anytime, names = figure.axes
    assert min(axes.bbox.width for axes in (means, anytime)) > 0.7 * figure.bbox.width
    above = means.get_yticklabels() if not more else means.texts
    legend = names.get_legend().get_texts()
    for texts in (above, legend):
        boxes = [text.get_window_extent() for text in texts]
        assert len({text.get_text() for text in texts}) == len(texts) == count
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert names.get_legend().get_window_extent().y1 < anytime.xaxis.get_tightbbox().y0


@pytest.mark.exhaustive
def test_the_command_reads_the_store_of_the_project(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    for written, message in (
        ([], "is no project, as it has no dvc.yaml"),
        (["dvc.yaml"], "no finished run to compare"),
    ):
        for name in written:
            (tmp_path / name).touch()
        nothing = CliRunner().invoke(main, ["compare"])
        assert nothing.exit_code == 2 and message in nothing.output
    for name, offset in (("drnas", 0.0), ("spos", 1.0)):
        for seed in range(2):
            curve = {"validation_accuracy": [50.0, 60.0 + seed], "processor_seconds": [10.0, 20.0 + offset]}
            if name == "spos":
                del curve["processor_seconds"]  # a run of an earlier release
            add_pipeline(tmp_path, name, seed, curve=curve, settings={"target.value": 5e5}, test_accuracy=90 + offset)
    add_pipeline(tmp_path, "gdas", 0, status="FAILED", test_accuracy=1.0)
    found = CliRunner().invoke(main, ["compare", "--out", "result", "--against", "spos"])
    assert found.exit_code == 0, found.output
    assert "gdas toy_cell s0" in found.stdout and "(evaluate: failed)" in found.stdout
    assert Path("result/compare.md").read_text() == found.stdout
    assert "Searches of spos logged no time by epoch" in found.stderr
    assert {path.name for path in Path("result").iterdir()} == {f"compare.{end}" for end in ("md", "csv", "tex", "png")}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.stdout.splitlines()]
    assert ["search, processor time (s)", "drnas", "2", "40.0", "0.0", "40.0 to 40.0"] in lines
    assert ["test accuracy (%)", "drnas", "spos", "2", "-1.00", "0.00", "-1.00 to -1.00", "-"] in lines


def use(monkeypatch, runs):
    """Let the project's store have these runs."""
    monkeypatch.setattr(finished_runs, "_runs", lambda client, experiment: runs)
    store = SimpleNamespace(own=False, name="a server", connect=lambda: None)
    monkeypatch.setattr(finished_runs.Store, "of", lambda root: store)


def test_an_evaluation_has_the_stages_that_it_followed_also_where_dvc_skipped_them(monkeypatch, tmp_path):
    """The same search, derived in two ways, and then trained longer after the first one."""
    found: list[SimpleNamespace] = []

    def add(stage, parent, params, run=None, **after):
        tags = {"tanglenas.stage": stage, "tanglenas.pipeline_id": "same", PARENT: parent}
        tags |= {f"{AFTER}{name}": before for name, before in after.items()}
        run = run or f"{stage} {len(found)}"
        info = SimpleNamespace(run_id=run, run_name=stage, status="FINISHED", start_time=len(found))
        found.append(SimpleNamespace(info=info, data=SimpleNamespace(tags=tags, params=params, metrics={})))
        return run

    search = add("search", "one", {"OPTIMIZER": "spos"})
    evolution = add("discretize", "one", {"discretize.method": "evolution"}, search=search)
    short = add("retrain", "one", {"retrain.epochs": "50"}, search=search, discretize=evolution)
    add("evaluate", "one", {}, search=search, discretize=evolution, retrain=short)
    sampled = add("discretize", "two", {"discretize.method": "random"}, search=search)
    again = add("retrain", "two", {"retrain.epochs": "50"}, search=search, discretize=sampled)
    add("evaluate", "two", {}, search=search, discretize=sampled, retrain=again)
    long = add("retrain", "three", {"retrain.epochs": "100"}, search=search, discretize=evolution)
    add("evaluate", "three", {}, search=search, discretize=evolution, retrain=long)
    for name in ("one", "two", "three"):
        add("pipeline", None, {}, run=name)
    use(monkeypatch, found)
    settings = [row["settings"] for row in finished_runs.read(tmp_path).evaluated]
    assert [one["discretize.method"] for one in settings] == ["evolution", "random", "evolution"]
    assert [one["retrain.epochs"] for one in settings] == ["50", "50", "100"]


def test_an_architecture_that_was_changed_by_hand_is_no_result_of_its_method():
    changed = {**row("drnas", 2, 10.0), "by_hand": True}
    for by in ([], ["optimizer"]):
        (table,) = compared(*RUNS, changed, by=by).tables
        assert [group.label for group in table.groups] == ["drnas", "drnas, architecture changed by hand", "spos"]
        assert table.estimates["test_accuracy", "drnas"].mean == 92.0
    (table,) = compared(*RUNS[:3], changed).tables
    assert [group.label for group in table.groups] == ["all runs", "architecture changed by hand"]


@pytest.mark.parametrize(
    "pick, found, changed", [("best", "a", False), ("best", "b", True), ("b12", "b", False), ("best", None, False)]
)
def test_an_evaluation_knows_whether_its_architecture_is_that_of_discretize(
    monkeypatch, tmp_path, pick, found, changed
):
    def run(stage, digest, params, **tags):
        tags |= {"tanglenas.stage": stage} | ({"architecture.digest": digest} if digest else {})
        info = SimpleNamespace(run_id=stage, run_name=stage, status="FINISHED", start_time=0)
        return SimpleNamespace(info=info, data=SimpleNamespace(tags=tags, params=params, metrics={}))

    after = {f"{AFTER}discretize": "discretize"}
    runs = [run("discretize", "a", {}), run("evaluate", found, {"read_architecture.pick": pick}, **after)]
    use(monkeypatch, runs)
    assert [one["by_hand"] for one in finished_runs.read(tmp_path).evaluated] == [changed]


def test_what_no_result_depends_on_makes_no_groups():
    own = {"benchmark.path": "pool.csv", "search.checkpoint_every": 5}
    comparison = compared(*RUNS[:2], row("drnas", 2, 94.0, **own), row("spos", 0, 89.0))
    assert [group.label for group in comparison.tables[0].groups] == ["drnas", "spos"]
    assert not [note for note in comparison.tables[0].notes if "mixes" in note]


@pytest.mark.parametrize(
    ("metric", "by", "name", "groups"),
    [
        ("test_accuracy", [], "search.num_workers", 2),  # within a time, processes that load data are free
        ("test_accuracy", [], "benchmark.metric", 1),
        ("test_accuracy", ["benchmark.metric"], "benchmark.metric", 2),
        ("table_regret", [], "benchmark.metric", 2),
        ("table_regret", ["benchmark.metric"], "benchmark.metric", 2),
    ],
)
def test_options_of_a_table_make_groups_for_its_metrics_and_by_name(metric, by, name, groups):
    rows = [row("drnas", seed, 90.0 + seed, **{name: value}) for seed in range(2) for value in ("1", "2")]
    for one in rows:
        one["metrics"]["table_regret"] = 0.5
    comparison = compared(*rows, by=by, metrics=[metric])
    assert len(comparison.tables[0].groups) == groups
    mixes = [note for note in comparison.tables[0].notes if "mixes" in note]
    assert not mixes and all(name in group.label for group in comparison.tables[0].groups if groups == 2)


def test_options_of_a_table_make_groups_for_the_metrics_of_a_pool():
    rows = [row("drnas", seed, 90.0, **{"benchmark.path": path}) for seed in range(2) for path in ("a.csv", "b.csv")]
    for one in rows:
        one["metrics"] |= dict.fromkeys(METRICS_OF_A_POOL, 0.5)
    for metric in METRICS_OF_A_POOL:
        labels = [group.label for group in compared(*rows, metrics=[metric]).tables[0].groups]
        assert labels == ["benchmark.path=a.csv", "benchmark.path=b.csv"], metric


METRICS_OF_A_POOL = ("pool_percentile", "pool_percentile_low", "kendall_tau", "spearman", "spearman_params",
                     "ranked_architectures")  # fmt: skip


@pytest.mark.parametrize("finals, labels", [
    ({"search": "0.5", "retrain": "0.02"}, ["cosine.final (search)=0.01", "cosine.final (search)=0.5"]),
    ({"search": "0.02", "retrain": "0.02"}, ["cosine.final (search)=0.01", "cosine.final (search)=0.02"]),
    ({"search": "0.01", "retrain": "0.02"}, ["all runs"]),
])  # fmt: skip
def test_stages_that_bind_one_name_differently_do_not_hide_each_other(monkeypatch, tmp_path, finals, labels):
    runs = []
    for number, settings in enumerate(({"search": "0.01", "retrain": "0.02"}, finals)):
        pipeline = f"pipeline {number}"
        for place, stage in enumerate(("pipeline", "search", "retrain", "evaluate")):
            tags = {"tanglenas.stage": stage, "space": "toy_cell"} | ({PARENT: pipeline} if place else {})
            params = {"SEED": str(number), "cosine.warmup": "2"}
            params |= {"cosine.final": settings[stage]} if stage in settings else {}
            info = SimpleNamespace(run_id=f"{stage} {number}", run_name=stage, status="FINISHED", start_time=place)
            data = SimpleNamespace(tags=tags, params=params, metrics={"final/test_accuracy": 90.0})
            runs.append(SimpleNamespace(info=info, data=data))
    use(monkeypatch, runs)
    comparison = compare_rows(finished_runs.read(tmp_path), NAMES)
    assert [group.label for group in comparison.tables[0].groups] == labels
    assert all("cosine.warmup" in one["settings"] for one in finished_runs.read(tmp_path).evaluated)


def test_a_condition_that_stages_bind_differently_stays_one():
    rows = [row("drnas", 0, 90.0, **{"create_dataset.size (retrain)": size}) for size in (1, 2)]
    assert [table.title for table in compared(*rows).tables] == [
        "create_dataset.size (retrain)=1", "create_dataset.size (retrain)=2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [
    "make_splits.test_portion", "dataset.fingerprint",
    "search.targets", "size/target.share", "size/target.value", "time/target.objective", "time/create_objective.table",
    "create_objective.fingerprint",
])  # fmt: skip
def test_runs_with_other_test_data_or_budgets_have_tables_of_their_own(name):
    comparison = compared(*(row("drnas", seed, 90.0, **{name: value}) for seed in range(2) for value in ("a", "b")))
    assert [table.title for table in comparison.tables] == [f"{name}=a", f"{name}=b"]


def test_the_fingerprint_of_the_data_says_nothing_where_another_setting_does_or_only_older_runs_lack_it():
    own = {"create_dataset.root": "mine", "dataset.fingerprint": "a"}
    other = {"create_dataset.root": "other", "dataset.fingerprint": "b"}
    comparison = compared(row("drnas", 0, 90.0, **own), row("drnas", 0, 80.0, **other))
    assert [table.title for table in comparison.tables] == ["create_dataset.root=mine", "create_dataset.root=other"]
    asked = compared(row("drnas", 0, 90.0, **own), row("drnas", 0, 80.0, **other), by=["create_dataset.root"])
    assert len(asked.tables) == 1
    (table,) = compared(row("drnas", 0, 90.0, **own), row("drnas", 1, 80.0, **{"create_dataset.root": "mine"})).tables
    assert len(table.groups) == 1 and not [note for note in table.notes if "fingerprint" in note]


def test_a_table_of_another_content_under_one_path_makes_a_group():
    contents = ({"benchmark.fingerprint": "a"}, {"benchmark.fingerprint": "b"})
    rows = [row("drnas", 0, 90.0, **{"benchmark.path": "pool.csv", **content}) for content in contents]
    for one in rows:
        one["metrics"]["spearman"] = 0.5
    labels = [group.label for group in compared(*rows, metrics=["spearman"]).tables[0].groups]
    assert labels == ["benchmark.fingerprint=a", "benchmark.fingerprint=b"]


@pytest.mark.parametrize("options", [{}, {"by": ["optimizer"]}, {"joined": ["search.clip"]}])
def test_data_of_another_content_have_a_table_of_their_own_also_where_methods_tell_them_apart(options):
    runs = {"drnas": "a", "spos": "a", "random": "b"}
    rows = [row(name, seed, 90.0, **{"dataset.fingerprint": data, "search.clip": 1})
            for name, data in runs.items() for seed in range(2)]  # fmt: skip
    comparison = compared(*rows, **options)
    assert [table.title for table in comparison.tables] == ["dataset.fingerprint=a", "dataset.fingerprint=b"]
    assert [group.label for table in comparison.tables for group in table.groups] == ["drnas", "spos", "random"]


@pytest.mark.parametrize("name", ["dataset", "create_dataset.root", "dataset.fingerprint"])
def test_data_of_another_content_are_in_one_table_where_a_person_names_them(name):
    rows = [row("drnas", 0, 90.0, **{"dataset.fingerprint": text, name: text}) for text in ("a", "b")]
    assert len(compared(*rows, by=[name]).tables) == 1
    (table,) = compared(*rows, joined=[name]).tables
    assert len(table.groups) == 1


def test_starts_from_weights_of_another_content_under_one_path_are_groups():
    rows = [row("drnas", 0, 90.0, **{"search.weights": "mine.safetensors", "weights.fingerprint": content})
            for content in ("a", "b")]  # fmt: skip
    (table,) = compared(*rows).tables
    assert [group.label for group in table.groups] == ["weights.fingerprint=a", "weights.fingerprint=b"]


def test_a_latency_table_of_another_content_says_nothing_more_where_its_path_differs():
    rows = [row("drnas", 0, 90.0, **{"create_objective.table": path, "create_objective.fingerprint": path[0]})
            for path in ("a.json", "b.json")]  # fmt: skip
    assert [table.title for table in compared(*rows).tables] == [
        "create_objective.table=a.json", "create_objective.table=b.json",
    ]  # fmt: skip


@pytest.mark.parametrize("path, told", [
    ("pool.csv", "benchmark.fingerprint (a in drnas, b in spos)."),
    ("grown.csv", "benchmark.path (pool.csv in drnas, grown.csv in spos)."),
])  # fmt: skip
def test_a_table_of_another_content_is_told_where_the_labels_do_not_tell_it(path, told):
    rows = [row(name, 0, 90.0, **{"benchmark.path": file, "benchmark.fingerprint": content})
            for name, file, content in (("drnas", "pool.csv", "a"), ("spos", path, "b"))]  # fmt: skip
    for one in rows:
        one["metrics"]["spearman"] = 0.5
    notes = compared(*rows, metrics=["spearman"]).tables[0].notes
    assert f"The groups also differ in settings that their labels do not name: {told}" in notes


def test_an_older_run_has_the_fingerprint_of_runs_with_the_same_options_of_the_data():
    def text(size: str, **content: str) -> dict:
        return {"create_dataset.block_size": size, **{f"dataset.{name}": value for name, value in content.items()}}

    rows = [row("drnas", 0, 90.0, **text("64")), row("spos", 0, 80.0, **text("64", fingerprint="a"))]
    comparison = compared(*rows, row("spos", 0, 70.0, **text("128", fingerprint="b")))
    assert [(table.title, len(table.groups)) for table in comparison.tables] == [
        ("create_dataset.block_size=64", 2), ("create_dataset.block_size=128", 1),
    ]  # fmt: skip


def test_an_older_run_has_the_fingerprints_of_the_tables_of_its_stages():
    paths = {"benchmark.path (search)": "table.csv", "benchmark.path (evaluate)": "pool.csv"}
    contents = {"benchmark.fingerprint (search)": "a", "benchmark.fingerprint (evaluate)": "b"}
    rows = [row("drnas", 0, 90.0, **paths), row("drnas", 1, 90.0, **paths, **contents)]
    for one in rows:
        one["metrics"]["spearman"] = 0.5
    (group,) = compared(*rows, metrics=["spearman"]).tables[0].groups
    assert len(group.runs) == 2


def test_the_name_of_a_setting_that_stages_bind_differently_stands_for_it_in_each():
    picks = {"read_architecture.pick (retrain)": "a", "read_architecture.pick (evaluate)": "a"}
    rows = [row("drnas", 0, 90.0, **picks), row("drnas", 1, 80.0, **dict.fromkeys(picks, "b"))]
    for name in ("retrain.pick", "read_architecture.pick"):
        comparison = compared(*rows, by=[name])
        assert comparison.by == ["retrain.pick (evaluate)", "retrain.pick (retrain)"]
        assert len(comparison.tables[0].groups) == 2
        assert len(compared(*rows, joined=[name]).tables[0].groups) == 1


def test_settings_that_labels_leave_out_are_told_with_their_values():
    spos, drnas = ({"retrain.batch_size": size, f"{name}.x": 1, "search.clip": 1.0} for name, size in
                   (("spos", 32), ("drnas", 256)))  # fmt: skip
    rows = [row(name, seed, 90.0, **own) for name, own in (("spos", spos), ("drnas", drnas)) for seed in range(2)]
    told = "The groups also differ in settings that their labels do not name: retrain.batch_size (256 in drnas, 32 in "
    assert f"{told}spos)." in compared(*rows).tables[0].notes
    alike = [row(name, 0, 90.0, **{f"{name}.x": 1, "search.clip": 1.0}) for name in ("spos", "drnas")]
    assert "also differ" not in markdown(compared(*alike))
    assert "also differ" not in markdown(compared(*rows, joined=["retrain.batch_size"]))


def test_values_of_other_tables_are_not_averaged_as_a_curve():
    rows = [row("drnas", seed, 90.0, **{"benchmark.metric": "test_acc"}) for seed in range(2)]
    history = {"search/table_value": {1: 91.0, 2: 92.0}, "search/processor_seconds": {1: 10.0, 2: 20.0}}
    found = {one["search_id"]: history for one in rows}
    assert _curves(compared(*rows).tables[0], found).value == "table_value"
    rows[1]["settings"]["benchmark.metric"] = "latency_ms"
    assert _curves(compared(*rows).tables[0], found).value == "validation_accuracy"


@pytest.mark.parametrize("name, values, shown", [
    ("benchmark.fingerprint", (None, "a"), "table_value"),  # an older run
    ("benchmark.fingerprint", ("a", "b"), "validation_accuracy"),
    ("benchmark.path (search)", ("a", "b"), "validation_accuracy"),
    ("benchmark.path (evaluate)", ("a", "b"), "table_value"),
])  # fmt: skip
def test_curves_have_the_values_of_a_table_where_all_searches_used_it(name, values, shown):
    rows = [row("drnas", seed, 90.0, **({name: value} if value else {})) for seed, value in enumerate(values)]
    history = {"search/table_value": {1: 91.0}, "search/processor_seconds": {1: 10.0}}
    table = compared(*rows, by=["optimizer"], joined=["benchmark.path"] * ("path" in name)).tables[0]
    assert _curves(table, {one["search_id"]: history for one in rows}).value == shown


def test_a_curve_says_how_many_of_the_seeds_it_is_of_and_shows_what_they_ended_with(monkeypatch):
    monkeypatch.setattr("tanglenas_engine.pipeline.comparison.figure.png", lambda figure: figure)
    history = {"search/validation_accuracy": {1: 80.0, 2: 90.0}, "search/processor_seconds": {1: 10.0, 2: 20.0},
               "search/entropy": {1: 0.5, 2: 0.4}}  # fmt: skip
    comparison = compared(*RUNS[:3])
    drawn = _curves(comparison.tables[0], {one["search_id"]: history for one in RUNS[:2]})
    _, anytime, names = draw(comparison, [drawn]).axes
    assert [text.get_text() for text in names.get_legend().get_texts()] == ["all runs (2 of 3 seeds)"]
    (line,) = anytime.get_lines()
    assert line.get_xdata()[-1] > line.get_xdata()[-2] == 20.0 and list(line.get_ydata()[-2:]) == [90.0, 90.0]


def test_a_run_that_someone_deleted_in_mlflow_does_not_count(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    add_pipeline(tmp_path, "drnas", 2, test_accuracy=92.0)
    Store.of(tmp_path).connect().delete_run(add_pipeline(tmp_path, "drnas", 2, test_accuracy=10.0))
    assert [one["accuracy"] for one in finished_runs.read(tmp_path).evaluated] == [92.0]


def test_a_server_of_several_projects_has_the_runs_of_the_experiment_that_stages_write_to(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'shared.db').as_posix()}")
    (tmp_path / "mine").mkdir()
    for name, accuracy in (("mine", 90.0), ("theirs", 50.0)):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
        add_pipeline(tmp_path / name, "drnas", 0, test_accuracy=accuracy)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    found = compare(tmp_path / "mine")
    assert found.tables[0].estimates["test_accuracy", "all runs"].mean == 90.0
    assert any("all of the experiment 'mine' in sqlite:///" in note for note in found.notes)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    (tmp_path / "mine" / "dvc.yaml").touch()
    with pytest.raises(TangleNASError, match=r"no finished run to compare.* experiment 'tanglenas' in"):
        compare(tmp_path / "mine")


def test_a_search_that_ran_in_another_experiment_keeps_its_settings_and_one_out_of_reach_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{(tmp_path / 'shared.db').as_posix()}")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    client, searches = Store.of(tmp_path).connect(), []
    for epochs in (100, 5):
        add_pipeline(tmp_path, "drnas", 0, settings={"search.epochs": epochs}, test_accuracy=10.0)
        experiment = client.get_experiment_by_name("tanglenas").experiment_id
        searches.append(client.search_runs([experiment], "tags.`tanglenas.stage` = 'search'")[0].info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "paper")
    experiment = client.create_experiment("paper")
    client.delete_run(searches[0])
    for search in [*searches, "0" * 32]:
        tags = {"tanglenas.stage": "evaluate", "optimizer": "drnas", f"{AFTER}search": search}
        run = client.create_run(experiment, tags=tags).info.run_id
        client.log_param(run, "SEED", 0)
        client.log_metric(run, "final/test_accuracy", 90.0)
        client.set_terminated(run)
    rows = finished_runs.read(tmp_path).evaluated
    assert sorted(str(one["settings"].get("search.epochs")) for one in rows) == ["100", "5", "None"]
    assert {one["search_id"] for one in rows} == {*searches, None} and {one["optimizer"] for one in rows} == {"drnas"}
    assert "1 run whose search is out of reach" in markdown(compare_rows(finished_runs.read(tmp_path), NAMES))


@pytest.mark.parametrize("name, values, told", [
    ("table_value", (2.1001, 2.1004, 2.1007), ["3", "2.10040", "0.00030", "2.10010 to 2.10070"]),
    ("table_value", (2e-5, 2.1e-5), ["2", "0.00002050", "0.00000071", "0.00002000 to 0.00002100"]),
    ("table_value", (91.0, 91.0), ["2", "91.0000", "0.0000", "91.0000 to 91.0000"]),
    ("test_loss", (0.123456,), ["1", "0.1235", "-", "one seed"]),
    ("spearman", (0.0, 2.2e-16), ["2", "0.0000", "0.0000", "0.0000 to 0.0000"]),
    ("table_value", (1e-5, 1e-5 + 2e-14), ["2", "0.000010", "0.000000", "0.000010 to 0.000010"]),
])  # fmt: skip
def test_numbers_without_a_unit_have_the_decimals_that_their_deviation_needs(name, values, told):
    assert format_estimate(metric_of(name), Estimate.of(values)) == told


def test_a_difference_keeps_its_sign_and_nothing_has_none():
    assert format_estimate(metric_of("x"), Estimate.of([-0.0000016, -0.0000012]), signed=True)[1] == "-0.00000140"
    assert format_estimate(METRICS["test_accuracy"], Estimate.of([-0.001, -0.001]), signed=True)[1] == "0.00"


def test_the_interval_of_three_seeds_is_from_the_lowest_value_to_the_highest():
    assert Estimate.of([3.0, 1.0, 7.0]).interval == (1.0, 7.0)
