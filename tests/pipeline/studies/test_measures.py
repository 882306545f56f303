"""What the studies measure, on a run that is finished, and on made-up ones."""

import json
import math
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tanglenas_engine import TangleNASError, create_space
from tanglenas_engine.pipeline import studies
from tanglenas_engine.pipeline.comparison.estimates import Estimate
from tanglenas_engine.pipeline.files import WEIGHTS
from tanglenas_engine.pipeline.pools import COLUMNS, Identity, Record
from tanglenas_engine.pipeline.studies import fractions, insights, ranking, sharing, stability
from tanglenas_engine.pipeline.studies.methods import moved
from tanglenas_engine.pipeline.studies.ranking import compared
from tanglenas_engine.pipeline.studies.run import Run
from tanglenas_engine.pipeline.studies.run_folder import read_measured, take_supernet, write_measured
from tanglenas_engine.pipeline.studies.sentences import verdict
from tanglenas_engine.pipeline.studies.sharing import sized
from tanglenas_engine.pipeline.studies.study import Curve, Measured
from tanglenas_engine.plugins import manager
from tanglenas_engine.spaces.cells import CellSpace
from tanglenas_engine.stages.evaluate import RankCorrelation
from tanglenas_engine.tables import Table


def run_of(study: str, done, **options: object) -> Run:
    table, beside = options.pop("table", None), options.pop("beside", None)
    return Run(study, done, "arm", 0, {}, options, table, "test_acc", beside)


@pytest.mark.parametrize("name", ["anytime", "stages", "fractions", "inheritance", "insights", "stability"])
@pytest.mark.exhaustive
def test_a_finished_run_is_measured_by_every_study(done, name):
    run, study = run_of(name, done), studies.load(name)
    measured = study.measure(run)
    assert {*measured.values} <= {*study.metrics}
    assert "variance" not in measured.values  # alpha of one epoch, the second half of two, has none
    write_measured(run, measured)
    again = read_measured(done / "measured" / "arm-0.json")
    assert {*again.values} == {name for name, value in measured.values.items() if math.isfinite(value)} and again.values
    tested = json.loads((done / "metrics" / "evaluate.json").read_text())
    if "test_accuracy" in measured.values:
        assert measured.values["test_accuracy"] == tested["test_accuracy"]
    drawn = {panel.name for panel in study.panels if panel.kind == "matrices"} - {"cka_retrained"}
    assert drawn <= {*measured.matrices}


def test_inherited_and_final_layers_are_compared(done):
    measured = studies.load("inheritance").measure(run_of("inheritance", done))
    grid = measured.matrices["cka"]
    assert grid.rows == grid.columns and "blocks.0" in grid.rows and len(grid.values) == len(grid.rows)
    assert measured.values["cka"] < 0.999


def test_fine_tuned_layers_are_compared_with_retrained_ones(done, tmp_path):
    beside = tmp_path / "runs" / "scratch-0"
    shutil.copytree(done / "out", beside / "out")
    weights = beside / WEIGHTS
    torch.manual_seed(0)
    save_file({name: torch.randn_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    measured = studies.load("inheritance").measure(run_of("inheritance", done, beside=beside))
    grid = measured.matrices["cka_retrained"]
    assert grid.rows == grid.columns == measured.matrices["cka"].rows
    diagonal = [row[number] for number, row in enumerate(grid.values)]
    assert measured.values["cka_retrained"] == pytest.approx(sum(diagonal) / len(diagonal)) and min(diagonal) < 0.9
    shutil.copy(done / WEIGHTS, weights)
    measured = studies.load("inheritance").measure(run_of("inheritance", done, beside=beside))
    assert measured.values["cka_retrained"] == pytest.approx(1)


def test_a_supernet_is_compared_with_a_pool_or_a_table(done):
    space = create_space("autoformer_nano", num_classes=10, image_size=8, in_channels=1)
    generator = torch.Generator().manual_seed(0)
    keys = list(dict.fromkeys(space.to_string(space.sample(generator)) for _ in range(6)))
    table = done / "pool.csv"
    Table(keys, {"test_acc": [float(number) for number in range(len(keys))]}, space.name).write(table)
    measured = studies.load("ranking").measure(run_of("ranking", done, table=table))
    assert -1 <= measured.values["spearman"] <= 1 and -1 <= measured.values["kendall_tau"] <= 1
    assert {"before", "gain"} <= {*measured.values}
    assert "ceiling" not in measured.values  # a table without a record says nothing about its trainings
    with pytest.raises(TangleNASError, match="give --table, or keep the stage `pool`"):
        studies.load("ranking").measure(run_of("ranking", done))
    with pytest.raises(
        TangleNASError,
        match=r"is a pool, which has few architectures of .*: give a table of the whole space, or leave --table out",
    ):
        studies.load("stages").measure(run_of("stages", done, table=table))


def test_what_the_search_adds_is_beside_what_the_supernet_ranked_before(done, monkeypatch):
    space = create_space("autoformer_nano", num_classes=10, image_size=8, in_channels=1)
    keys = [space.to_string(one) for one in (space.smallest(), space.largest())]
    Table(keys, {"test_acc": [1.0, 2.0]}, space.name).write(done / "two.csv")

    def ranked(space, *_, before, **options):
        assert before["head.bias"].shape == (10,) and not before["head.bias"].any()  # not what the search trained
        assert dict(space.named_parameters())["head.bias"].any()
        return RankCorrelation(0.5, 0.75, {"before_search": 0.25}, [])

    monkeypatch.setattr(ranking, "rank_correlation", ranked)
    measured = studies.load("ranking").measure(run_of("ranking", done, table=done / "two.csv"))
    assert (measured.values["before"], measured.values["gain"]) == (0.25, 0.5)


def test_the_ceiling_is_that_of_the_pools_own_trainings(done):
    space = create_space("autoformer_nano", num_classes=10, image_size=8, in_channels=1)
    generator = torch.Generator().manual_seed(1)
    keys = list(dict.fromkeys(space.to_string(space.sample(generator)) for _ in range(6)))
    columns = [dict.fromkeys(COLUMNS, float(number)) for number in range(len(keys))]
    rows = {key: {"0": columns[place], "1": columns[(place + 1) % len(keys)]} for place, key in enumerate(keys)}
    record = Record(Identity(space.name, "d", "s", "t", "r", 0, {}), rows)
    record.write(done / "trained.csv", keys)
    measured = studies.load("ranking").measure(run_of("ranking", done, table=done / "trained.csv"))
    found = record.reliability("test_acc", keys)
    assert 0 < found.correlation < found.ceiling < 1
    assert measured.values["agreement"] == found.correlation and measured.values["ceiling"] == found.ceiling
    (sentence,) = ranking.reliable({"spos": {0: measured}})
    assert f"{found.correlation:.2f}" in sentence and f"about {found.ceiling:.2f} with this pool" in sentence
    assert ranking.reliable({"spos": {0: Measured({"spearman": 0.1})}}) == []


def test_compared_architectures_are_in_the_band_and_the_same_every_time():
    space = create_space("autoformer_nano")
    chosen = compared(space, {"architectures": 20, "budget": 0.6})
    shares = [space.cost(one).macs / space.cost(space.largest()).macs for one in chosen]
    assert len({one.digest for one in chosen}) == 20 and 0.95 * 0.599 <= min(shares) and max(shares) <= 0.6
    assert chosen == compared(space, {"architectures": 20, "budget": 0.6})
    assert len(compared(space, {"architectures": 30, "budget": None})) == 30


def test_a_supernet_of_another_arm_is_copied(done, monkeypatch):
    folder = done / "runs" / "own-0"
    folder.mkdir(parents=True)
    (done / "runs" / "other-0").mkdir()
    for name in ("out", "metrics"):
        (done / name).rename(done / "runs" / "other-0" / name)
    monkeypatch.chdir(folder)
    for _ in range(2):
        take_supernet("other", "0")
    copied = {path.name for path in (folder / "out" / "search").iterdir()}
    assert {"supernet.safetensors", "splits.json", "mixture.safetensors"} <= copied
    assert (folder / "metrics" / "search.json").exists() and (folder / "out" / "search.run.json").exists()


def test_epochs_whose_architecture_a_table_lacks_are_no_points_of_a_curve(monkeypatch):
    history = [{"epoch": str(epoch), "table_value": value} for epoch, value in enumerate(("80", "", "82"), start=1)]
    monkeypatch.setattr(Run, "history", lambda self: history)
    monkeypatch.setattr(Run, "seconds", lambda self, *stages: 6.0)
    monkeypatch.setattr("tanglenas_engine.pipeline.studies.anytime.worth", lambda run: {"table_value": 82.0})
    found = studies.load("anytime").measure(run_of("anytime", Path()))
    assert found.curves["within"] == Curve([2.0, 6.0], [80.0, 82.0])


def test_rows_that_change_and_weights_that_move():
    before = {("a", "0"): [0.6, 0.4], ("b", "0"): [0.5, 0.3, 0.2]}
    after = {("a", "0"): [0.4, 0.6], ("b", "0"): [0.5, 0.2, 0.3]}
    assert stability.changed(before, after) == 50
    assert stability.movement(before, after) == pytest.approx(100 * (0.2 + 0.1) / 2)
    assert stability.variance([before]) is None
    third = {row: [*weights[:-1], 0.0] for row, weights in after.items()}
    assert stability.dropped(after, third) and not stability.dropped(before, after)
    assert stability.variance([before, after, third, third]) == pytest.approx(stability.variance([before, after]) / 2)
    assert stability.variance([before, after]) == pytest.approx((0.01 * 2 + 0.0 + 0.0025 * 2) / 5)


def test_alpha_has_learned_for_as_long_where_arms_are_compared(monkeypatch):
    def measured(warmup: int, weights: list[float], rest: int = 0) -> Measured:
        rows = [
            {"epoch": str(epoch), "choice": "kernel", "layer": "1", "weight": str(value)}
            for epoch, first in enumerate([0.5] * warmup + weights + weights[-1:] * rest, start=1)
            for value in (first, 1 - first)
        ]
        monkeypatch.setattr(Run, "mixtures", lambda self: rows)
        monkeypatch.setattr(Run, "history", lambda self: [{"epoch": rows[-1]["epoch"], "entropy": "1.0"}])
        params = {"search": {"warmup_epochs": warmup, "path_epochs": rest}}
        return stability.measure(Run("stability", Path(), "arm", 0, params, {"warmup_epochs": 3}, None, ""))

    course = [0.7, 0.7, 0.6, 0.4]
    late, early = measured(3, course), measured(0, [*course, 0.9, 0.1, 0.9])
    assert late.values == early.values
    assert late.values["turnover"] == 50 and late.values["variance"] == pytest.approx(0.01)
    assert late.curves["turnover"].x == [5, 6, 7]
    rested = measured(3, course, rest=4)
    assert (rested.values, rested.curves) == (late.values, late.curves)
    with pytest.raises(TangleNASError, match=r"alpha learns for 4 epochs in the arm 'arm'.*Set it to 5 in params.yaml"):
        measured(5, course)


def test_decisions_that_differ_are_a_share_of_all():
    one = {"width": 3, "ratio": (1, 2, 3)}
    assert moved(one, dict(one)) == 0
    assert moved(one, {"width": 4, "ratio": [1, 2, 3]}) == 25
    assert moved(one, {"width": 3, "ratio": (1, 2)}) == 25  # a layer that only one of them has
    assert moved(one, {"width": 4, "ratio": (2, 3, 1, 1)}) == 100


def test_runs_are_compared_with_those_of_the_same_method_and_seed_at_half():
    def one(accuracy: float, width: int) -> Measured:
        return Measured({"test_accuracy": accuracy}, choices={"width": width})

    found = fractions.across({"drnas-50": {0: one(90, 1), 1: one(91, 2)}, "drnas-80": {0: one(92, 2), 2: one(95, 9)}})
    assert found == {"drnas-80": {0: {"moved": 100.0, "shift": 2.0}}}


def test_seeds_of_an_arm_are_compared_with_each_other():
    runs = {"a": {seed: Measured(choices={"width": width}) for seed, width in enumerate((1, 1, 2))}}
    found = [one["between_seeds"] for one in insights.across(runs)["a"].values()]
    assert statistics.fmean(found) == pytest.approx(100 * 2 / 3)  # of three pairs, one is alike
    assert insights.across({"a": {0: Measured(choices={"width": 1})}}) == {}
    two = {seed: Measured(choices={"width": seed}) for seed in (3, 4)}
    assert insights.across({"a": two}) == {"a": {3: {"between_seeds": 100.0}}}  # one pair has no interval


def test_arms_whose_seeds_differ_alike_are_rarely_told_apart():
    """Of 200 pairs of arms that do the same, about 5 % may differ by their intervals; by the seeds' means 20 % do."""
    generator, told = np.random.default_rng(0), 0
    for _ in range(200):
        values = {}
        for arm in "ab":
            runs = {seed: Measured(choices={"kernel": generator.integers(3, size=8).tolist()}) for seed in range(5)}
            values[arm] = insights.across({arm: runs})[arm]
        differences = [values["a"][seed]["between_seeds"] - values["b"][seed]["between_seeds"] for seed in range(5)]
        mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
        told += verdict(Estimate(5, mean, deviation, None)) != "not told apart"
    assert told <= 16


def test_no_claim_takes_more_of_a_tables_metric_for_better():
    assert not [claim for name in studies.NAMES for claim in studies.load(name).claims if claim.metric == "table_value"]


def test_a_hand_made_network_has_equal_layers_and_costs_most_within_the_budget():
    space = create_space("autoformer_nano")
    most = int(0.6 * space.cost(space.largest()).macs)
    found = space.architecture_of(insights.uniform(space, most))
    cost = space.cost(found).macs
    assert 0.4 * most < cost <= most
    assert all(len(set(value)) == 1 for value in found.choices.values() if isinstance(value, tuple))
    assert insights.uniform(space, 1) is None
    assert insights.uniform(create_space("darts_nano"), most) is None  # a node keeps two edges
    assert insights.early_over_late(space, space.assignment_of(found)) == 0


def test_sizes_are_places_among_the_options_and_missing_layers_are_left_out():
    space = create_space("autoformer_nano")
    small, large = (insights.sizes(space, space.assignment_of(a)) for a in (space.smallest(), space.largest()))
    assert {value for row in large.values for value in row if not math.isnan(value)} == {1.0}
    assert {value for row in small.values for value in row if not math.isnan(value)} == {0.0}
    missing = [sum(math.isnan(value) for row in one.values for value in row) for one in (small, large)]
    assert missing[0] > missing[1]


def test_a_size_has_its_place_whatever_the_order_in_which_options_were_given():
    space = create_space("toy_conv_macro_nano", kernel_size=(7, 3, 5))
    kernel = space.choices["kernel_size"]
    assert [insights.place(kernel, pick) for pick in range(3)] == [1.0, 0.0, 0.5]
    large = insights.sizes(space, space.assignment_of(space.largest()))
    assert {value for row in large.values for value in row if not math.isnan(value)} == {1.0}


def test_operations_of_a_cell_have_no_size():
    space = create_space("toy_cell_nano")
    assert insights.sized(space) == [] and math.isnan(insights.early_over_late(space, dict.fromkeys(space.rows, 0)))
    assert insights.sized(create_space("autoformer_nano"))


def test_the_frequencies_of_the_options_of_a_layer_are_on_the_page():
    space = create_space("autoformer_nano")
    assert "frequency" in {panel.name for panel in studies.load("insights").panels}
    for found in (space.smallest(), space.largest()):
        grid = insights.frequency(space, space.assignment_of(found))
        rows = dict(zip(grid.rows, grid.values, strict=True))
        ratios = [rows[f"mlp_ratio {option}"] for option in space.choices["mlp_ratio"].options]
        layers = len(found.choices["mlp_ratio"])
        assert [sum(layer) for layer in zip(*ratios, strict=True)][:layers] == [1.0] * layers
        depth = [rows[f"depth {option}"][0] for option in space.choices["depth"].options]
        assert sum(depth) == 1 and all(math.isnan(value) for value in rows[grid.rows[0]][1:])


@pytest.mark.parametrize("name", ["autoformer_nano", "gpt_nano", "toy_cell_nano"])
def test_a_space_has_fewer_options_with_the_largest_network_left(name):
    cells = name.startswith("toy")
    parts = sized(name, cells)
    assert [number for number, _ in parts] == ([4] if cells else list(range(1, len(parts) + 1)))
    largest = {create_space(name, **given).cost(create_space(name, **given).largest()).params for _, given in parts}
    assert len(largest) == 1


def test_every_small_space_is_measured():
    measured = studies.load("sharing").scales["cpu"].params["measure"]
    small = {name for name in manager().names("space") if name.endswith("_nano")} - {"elasticized_nano"}
    cells = {name for name in small if isinstance(create_space(name), CellSpace)}
    assert ({*measured["cells"]}, {*measured["macro"]}) == (cells, small - cells)


def test_a_curve_has_the_numbers_of_options_that_all_spaces_have(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing.Cost, "of", lambda *_: sharing.Cost(1.0, 1, 1, 1))
    options = {"kind": "macro", "mode": "gated", "macro": ["gpt_nano", "convnext_nano"], "batch": 2, "rounds": 1}
    assert [number for number, _ in sized("convnext_nano", False)] == [1, 2, 3, 4]
    assert studies.load("sharing").measure(run_of("sharing", tmp_path, **options)).curves["macro kept"].x == [1, 2, 3]


@pytest.mark.exhaustive
def test_a_step_is_measured_for_every_kind_of_sharing(tmp_path):
    study = studies.load("sharing")
    for mode in ("superposed", "separate"):
        options = {"kind": "cells", "mode": mode, "cells": ["toy_cell_nano"], "batch": 2, "rounds": 1}
        measured = study.measure(run_of("sharing", tmp_path, **options))
        assert all(value > 0 for value in measured.values.values()) and {*measured.values} == {*study.metrics}
        if mode == "superposed":
            least = measured
    assert measured.values["weights"] > least.values["weights"] and measured.values["kept"] > least.values["kept"]
    options = {"kind": "macro", "mode": "gated", "macro": ["gpt_nano"], "batch": 2, "rounds": 1}
    measured = study.measure(run_of("sharing", tmp_path, **options))
    assert {*measured.curves} == {"macro seconds", "macro kept", "macro peak"}
    assert list(measured.curves["macro kept"].x) == [1, 2, 3]
