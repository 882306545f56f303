"""The page of a study, from made-up measurements: each sentence that data can support, the table and the figure."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tanglenas_engine import TangleNASError
from tanglenas_engine.pipeline import studies
from tanglenas_engine.pipeline.comparison.estimates import Estimate, Metric
from tanglenas_engine.pipeline.comparison.figure import looks
from tanglenas_engine.pipeline.studies.figure import curves, draw, matrices
from tanglenas_engine.pipeline.studies.page import Results, compared, text, with_metric, write_page
from tanglenas_engine.pipeline.studies.plan import plan
from tanglenas_engine.pipeline.studies.run_folder import read_measured
from tanglenas_engine.pipeline.studies.sentences import sentences, verdict
from tanglenas_engine.pipeline.studies.study import Arm, Claim, Curve, Matrix, Measured, Panel, Study
from tanglenas_engine.pipeline.studies.yaml_text import yaml_text

STUDY = Study(
    question="Is a better than b?",
    paper="It is.",
    arms={"a": Arm(), "b": Arm(series="both"), "c": Arm(series="both")},
    stages=(),
    measure=lambda run: Measured(),
    metrics={"accuracy": Metric("accuracy", "%", 1), "loss": Metric("loss", "nats", 3)},
    claims=(Claim("accuracy", "b", "a", True, "ahead"),),
    panels=(Panel("means", "accuracy"), Panel("curves", "line", "epoch", "y"), Panel("matrices", "grid", "x", "y")),
    limits="Much.",
    scales={},
)


def results(**values: list[float]) -> Results:
    """Measurements of arms, one number for each seed."""
    count = max(map(len, values.values()))
    params = {
        "study": "made-up", "command": "tanglenas study made-up", "scale": "cpu",
        "space": "s", "dataset": "d", "recipe": "cpu", "table": None, "metric": "m",
        "seeds": list(range(count)), "arms": {arm: {"optimizer": "drnas", "bindings": []} for arm in values},
    }  # fmt: skip
    runs = {arm: {seed: Measured({"accuracy": one}) for seed, one in enumerate(own)} for arm, own in values.items()}
    return Results(params, runs, [])


def said(claim: Claim, **values: list[float]) -> str:
    comparison = compared(STUDY, results(**values))
    (found,) = sentences((claim,), comparison, comparison.tables[0])
    return found


@pytest.mark.parametrize(
    "b, higher, start, end",
    [
        (
            [92.5, 93.4, 94.6],
            True,
            "**b is ahead of a** in accuracy: the difference is +2.5 points (95 % interval ",
            "The paper sees it ahead, too.",
        ),
        (
            [92.5, 93.4, 94.6],
            False,
            "**b is behind a** in accuracy",
            "This contradicts the paper, which sees it ahead.",
        ),
        (
            [88.0, 89.1, 89.9],
            True,
            "**b is behind a** in accuracy: the difference is -2.0 points (95 % interval ",
            "which sees it ahead.",
        ),
        ([89.0, 93.0, 91.0], True, "b and a are **not told apart** in accuracy", "these data do not decide that."),
        ([90.0, 91.0, 92.0], True, "b against a: accuracy is equal with every seed, which has no interval.", ""),
    ],
)
def test_the_interval_of_the_difference_chooses_the_sentence(b, higher, start, end):
    found = said(Claim("accuracy", "b", "a", higher, "ahead"), a=[90.0, 91.0, 92.0], b=b)
    assert found.startswith(start) and found.endswith(end), found
    if "not told apart" in found:
        assert re.search(r"is 0\.0 points \(95 % interval -4\.3 to \+4\.3, 3 seeds\)", found)


def test_one_seed_claims_nothing():
    assert said(Claim("accuracy", "b", "a"), a=[90.0], b=[99.0]) == (
        "b against a: accuracy differs by +9.0 points with the one seed that both have, so nothing follows."
    )
    assert "one seed, which shows nothing of chance" in said(Claim("accuracy", "a", 0.0), a=[90.0])


@pytest.mark.parametrize(
    "values, start",
    [
        ([1.9, 2.0, 2.1], "**a: accuracy is above 0**: 2.0 % (95 % interval 1.8 to 2.2, 3 seeds)"),
        ([-1.9, -2.0, -2.1], "**a: accuracy is below 0**: -2.0 %"),
        ([-1.0, 1.0, 2.0], "a: accuracy is **not told apart from 0**: 0.7 %"),
        ([0.0, 0.0], "a: accuracy is 0.0 % with every seed, which has no interval."),
    ],
)
def test_a_mean_is_compared_with_a_number(values, start):
    assert said(Claim("accuracy", "a", 0.0), a=values).startswith(start)


def test_verdicts_follow_the_interval_and_the_direction():
    assert verdict(Estimate(3, 1.0, 0.1, (0.9, 1.1))) == "ahead"
    assert verdict(Estimate(3, 1.0, 0.1, (0.9, 1.1)), higher=False) == "behind"
    assert verdict(Estimate(3, 1.0, 0.1, (0.9, 1.1)), value=2.0) == "behind"
    assert verdict(Estimate(3, 1.0, 1.0, (0.5, 1.5))) == "not told apart"
    assert verdict(Estimate(1, 1.0)) == "one seed"


def test_equal_differences_are_no_claim():
    a, b = ([100 * right / 359 for right in counts] for counts in ((349, 345, 350), (350, 346, 351)))
    (sentence,) = sentences(STUDY.claims, found := compared(STUDY, results(a=a, b=b)), found.tables[0])
    assert sentence == "b against a: accuracy differs by +0.3 points with every seed, which has no interval."
    (difference,) = found.tables[0].differences
    assert difference.seeds_needed is None and difference.estimate.deviation == 0


def test_seeds_that_only_one_arm_has_do_not_count():
    found = results(a=[90.0, 91.0, 92.0], b=[91.0, 92.5])
    comparison = compared(STUDY, found)
    (sentence,) = sentences(STUDY.claims, comparison, comparison.tables[0])
    assert "2 seeds" in sentence
    page = text(STUDY, Results(found.params, found.runs, ["b-2"]), comparison)
    assert "**Incomplete**: 1 runs are not measured yet: b-2. Run `dvc repro`." in page


def test_the_page_has_the_question_the_answer_the_numbers_and_the_commands():
    found = results(a=[90.0, 91.0, 92.0], b=[92.5, 93.4, 94.6])
    page = text(STUDY, found, compared(STUDY, found))
    headings = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    assert headings == [
        "Is a better than b?", "What the data say", "Numbers", "What this does not show", "The arms", "Run it again",
    ]  # fmt: skip
    assert "| accuracy (%) | a     |     3 | 91.0 |" in page and "**b is ahead of a**" in page
    assert "    tanglenas study made-up\n" in page
    assert "2 seeds cover the true mean in 50 %, 3 in 75 %" in page and "| a   | `optimizer=drnas`" in page


def test_notes_follow_what_the_data_say():
    found = results(a=[90.0, 91.0], b=[92.5, 93.4])
    noted = replace(STUDY, notes=lambda runs: [f"There are {len(runs)} arms."])
    page = text(noted, found, compared(noted, found))
    assert page.index("## What the data say") < page.index("\n\nThere are 2 arms.\n\n") < page.index("In the paper")


def test_arms_of_different_tables_are_not_compared():
    arms = {"a": Arm(table="Cells"), "b": Arm(table="Cells"), "c": Arm(table="Sizes"), "d": Arm(table="Sizes")}
    apart = replace(STUDY, arms=arms, on=lambda params: "cells and sizes")
    found = results(a=[1.0, 2.0], b=[2.0, 3.5], c=[9.0, 9.5], d=[7.0, 7.0])
    comparison = compared(apart, found)
    pairs = [(one.group, one.against) for table in comparison.tables for one in table.differences]
    assert pairs == [("b", "a"), ("d", "c")]
    page = text(apart, found, comparison)
    assert page.index("### Cells") < page.index("### Sizes")
    assert "The study `made-up` on cells and sizes, 2 seeds" in page


def test_a_page_without_a_statement_says_why():
    for found, sentence in (
        (results(a=[90.0, 91.0]), "The study has no statement about these arms alone."),
        (Results(results(a=[1.0]).params, {}, ["a-0"]), "Nothing was measured yet."),
    ):
        assert f"## What the data say\n\n{sentence}\n" in text(STUDY, found, compared(STUDY, found))


def test_a_page_of_one_seed_says_that_there_is_no_interval():
    found = results(a=[90.0], b=[92.0])
    page = text(STUDY, found, compared(STUDY, found))
    assert "One seed gives no interval, and shows nothing of chance: a, b." in page and "ahead" not in page
    assert "Student's t" not in page


def test_a_sentence_about_one_common_seed_agrees_with_the_table():
    found = results(a=[90.0, 91.0, 92.0], b=[95.0])
    page = text(STUDY, found, compared(STUDY, found))
    assert re.search(r"b against a: .* differs by \+5\.0 points with the one seed that both have", page), page
    assert "Student's t" not in page  # a single statement has an interval, if any


def measured(folder: Path, arm: str, seed: int, **content: object) -> None:
    folder.mkdir(exist_ok=True)
    whole = {"arm": arm, "seed": seed, "values": {}, "curves": {}, "matrices": {}, "choices": {}, **content}
    (folder / f"{arm}-{seed}.json").write_text(json.dumps(whole))


@pytest.fixture
def folder(tmp_path):
    """The folder of a study of ranking, of which two arms are measured."""
    template = {"space": "autoformer_nano", "dataset": "digits", "search": {}, "discretize": {}, "retrain": {}}
    made = plan("ranking", template, command="tanglenas study ranking", seeds=[0, 1])
    (tmp_path / "params.yaml").write_text(yaml_text(made.params))
    for arm, values in {"spos": (0.5, 0.6), "drnas": (0.2, None)}.items():
        for seed, value in enumerate(values):
            measured(tmp_path / "measured", arm, seed, values={"spearman": value, "kendall_tau": 0.1})
    return tmp_path


def test_a_page_is_written_from_what_is_there(folder):
    assert write_page(folder) == "page: page/ranking.md, .csv, .tex and .png"
    page = (folder / "page" / "ranking.md").read_text("utf-8")
    assert (
        "spos: Spearman's correlation is **not told apart from 0**: 0.550" in page
        and "14 runs are not measured yet" in page
    )
    rows = list(csv.DictReader((folder / "page" / "ranking.csv").read_text("utf-8").splitlines()))
    assert {row["group"]: row["mean"] for row in rows if row["metric"] == "spearman" and not row["minus"]} == {
        "spos": "0.55", "drnas": "0.2",
    }  # fmt: skip
    assert (folder / "page" / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_measurement_is_named(folder):
    (folder / "measured" / "spos-0.json").write_text("{")
    with pytest.raises(TangleNASError, match=r"spos-0\.json is not what a run of a study writes"):
        write_page(folder)


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(TangleNASError, match="is not the folder of a study"):
        write_page(tmp_path)


def test_points_of_a_series_are_one_curve_and_bands_need_two_seeds():
    runs = {
        "b": {0: Measured(curves={"line": Curve([1.0], [5.0])}), 1: Measured(curves={"line": Curve([1.5], [7.0])})},
        "c": {0: Measured(curves={"line": Curve([2.0], [6.0])}), 1: Measured(curves={"line": Curve([2.5], [8.0])})},
        "a": {0: Measured(curves={"line": Curve([1.0, 2.0, 3.0], [0.0, None, 2.0])})},
    }
    found = curves(STUDY.arms, runs, "line")
    assert set(found) == {"both", "a"}
    x, mean, band = found["both"]
    assert x.tolist() == [1.25, 2.25] and mean.tolist() == [6.0, 7.0] and band is not None
    assert found["a"][0].tolist() == [1.0, 3.0] and found["a"][2] is None
    apart = {
        "b": {0: Measured(curves={"line": Curve([1.0], [5.0])}), 1: Measured(curves={"line": Curve([1.0], [7.0])})},
        "c": {0: Measured(curves={"line": Curve([3.0], [6.0])}), 1: Measured(curves={"line": Curve([], [])})},
        "d": {1: Measured(curves={"line": Curve([9.0], [9.0])})},
    }
    x, mean, _ = curves({**STUDY.arms, "d": Arm(series="both")}, apart, "line", holding=True)["both"]
    assert (x[0], x[-1], mean[0]) == (1.0, 9.0, 6.0) and 6.0 not in x  # arms that not all seeds have are no point
    long = [Curve(list(range(start, start + 20)), [float(start)] * 20) for start in (0, 5)]
    x, mean, band = curves(
        STUDY.arms, {"a": {seed: Measured(curves={"line": one}) for seed, one in enumerate(long)}}, "line"
    )["a"]
    assert (x[0], x[-1]) == (5, 19) and set(mean) == {2.5} and band is not None
    held = curves(
        STUDY.arms, {"a": {seed: Measured(curves={"line": one}) for seed, one in enumerate(long)}}, "line", holding=True
    )
    assert held["a"][0][-1] == 24  # over time the last value holds


def test_whole_curves_of_a_series_are_lines_of_their_own():
    ways = {"b": [(1.0, 80.0), (2.0, 90.0)], "c": [(1.0, 52.0), (2.0, 58.0), (4.0, 82.0)]}
    runs = {
        arm: {0: Measured(curves={"line": Curve([x for x, _ in points], [y for _, y in points])})}
        for arm, points in ways.items()
    }
    assert STUDY.arms["b"].series == STUDY.arms["c"].series
    found = curves(STUDY.arms, runs, "line")
    assert {arm: [*zip(x.tolist(), y.tolist(), strict=True)] for arm, (x, y, _) in found.items()} == ways


@pytest.mark.parametrize("xs", [(3.0, 3.0), (1.0, 1.5)])
def test_a_single_point_has_an_error_bar_for_a_band(monkeypatch, xs):
    monkeypatch.setattr("tanglenas_engine.pipeline.studies.figure.png", lambda figure: figure)
    seeds = {seed: Measured(curves={"line": Curve([x], [4.0 + 2 * seed])}) for seed, x in enumerate(xs)}
    figure = draw(STUDY, {"a": seeds}, compared(STUDY, results(a=[1.0])))
    bars = [bar for axes in figure.axes for bar in axes.containers]
    ((bar,),) = [bar.lines[2] for bar in bars]
    assert bar.get_segments()[0].tolist() == [[sum(xs) / 2, 4.0], [sum(xs) / 2, 6.0]]
    alone = draw(STUDY, {"a": {0: seeds[0]}}, compared(STUDY, results(a=[1.0])))
    assert not [bar for axes in alone.axes for bar in axes.containers]


def test_matrices_of_other_names_are_not_averaged_and_the_panel_says_of_how_many_seeds_it_is(monkeypatch):
    other, one = Matrix(["z"], ["y"], [[9.0]]), Matrix(["x"], ["y"], [[1.0]])
    grids = [other, one, replace(one, values=[[0.0]])]
    runs = {"a": {seed: Measured(matrices={"grid": grid}) for seed, grid in enumerate(grids)},
            "b": {0: Measured(matrices={"grid": one})}}  # fmt: skip
    found = matrices(runs, "grid")
    rows, columns, values, _ = found["a"]
    assert (rows, columns, values.tolist()) == (["x"], ["y"], [[0.5]])
    monkeypatch.setattr("tanglenas_engine.pipeline.studies.figure.png", lambda figure: figure)
    figure = draw(STUDY, runs, compared(STUDY, results(a=[1.0])))
    assert {"a\n(2 of 3 seeds)", "b"} <= {axes.get_title("left") for axes in figure.axes}


def test_a_layer_that_some_seeds_lack_has_the_mean_of_the_others():
    values = ([[1.0, None]], [[0.0, 0.5]], [[0.5, None]])
    runs = {"a": {seed: Measured(matrices={"grid": Matrix(["x"], ["1", "2"], v)}) for seed, v in enumerate(values)}}
    assert matrices(runs, "grid")["a"][2].tolist() == [[0.5, 0.5]]


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    measured(tmp_path, "a", 0, values={"x": None, "y": 1.0})
    assert read_measured(tmp_path / "a-0.json").values == {"y": 1.0}


@pytest.mark.parametrize("name", studies.NAMES)
def test_every_study_draws_what_its_runs_measure(name):
    """The names that panels and claims rely on, with made-up numbers of all kinds."""
    study = studies.load(name)
    runs = {
        arm: {
            seed: Measured(
                {metric: 1.0 + seed + number for metric in study.metrics},
                {panel.name: Curve([1.0, 2.0], [seed, number]) for panel in study.panels if panel.kind == "curves"},
                {
                    panel.name: Matrix(["a", "b"], ["c"], [[0.5], [None]])
                    for panel in study.panels
                    if panel.kind == "matrices"
                },
            )
            for seed in range(2)
        }
        for number, arm in enumerate(study.arms)
    }
    params = {
        **results(a=[1.0]).params,
        "study": name,
        "arms": {arm: {"bindings": []} for arm in study.arms},
        "seeds": [0, 1],
    }
    comparison = compared(replace(study, across=None), Results(params, runs, []))
    assert draw(study, runs, comparison).startswith(b"\x89PNG")
    assert len(sentences(study.claims, comparison, comparison.tables[0])) >= 2


@pytest.mark.parametrize("metric, told", [
    ("test_loss", "table value (test_loss, less is better)"),
    ("test_acc", "table value (test_acc, more is better)"),
    ("seed", "table value (seed)"),
])  # fmt: skip
def test_a_table_s_value_has_its_metric_and_its_direction(metric, told):
    study = with_metric(studies.load("anytime"), {"table": "t.csv", "metric": metric})
    assert study.metrics["table_value"].title == told and study.metrics["seconds"].unit == "s"
    assert [panel.y for panel in study.panels][:3] == [f"{told}, within a search", told, "test accuracy (%)"]
    assert with_metric(studies.load("anytime"), {"table": None, "metric": metric}) is studies.load("anytime")


def test_series_have_the_colours_that_are_easiest_to_tell_apart(monkeypatch):
    taken = []
    monkeypatch.setattr(
        "tanglenas_engine.pipeline.studies.figure.looks", lambda labels: taken.extend(labels) or looks(labels)
    )
    measured = results(a=[1.0], b=[2.0], c=[3.0])
    draw(STUDY, measured.runs, compared(STUDY, measured))
    assert taken == ["a", "both", "b", "c"]
