"""The facts with which a report begins: the test metric, costs in the range of the space, and whether alpha decided."""

import json
import math
from pathlib import Path

import pytest
import torch
from spaces import vit

from tanglenas_engine import Architecture, Cost, create_space
from tanglenas_engine.pipeline import outputs
from tanglenas_engine.pipeline.files import read_splits
from tanglenas_engine.pipeline.headline import Fact, headline, metric_texts
from tanglenas_engine.stages.discretize import DiscretizeResult, discretize
from tanglenas_engine.stages.evaluate import EvaluateResult
from tanglenas_engine.testing import random_data

EVALUATED = {
    "test_accuracy": 97.214, "test_loss": 0.12345, "test_samples": 359, "digest": "a",
    "params": 52762, "largest_params": 154826, "smallest_params": 21322,
    "macs": 1300000, "largest_macs": 2600000, "smallest_macs": 1300000,
}  # fmt: skip


def test_accuracy_comes_first_and_costs_are_placed_in_the_range_of_the_space():
    found = headline({"evaluate": EVALUATED})
    assert [fact.name for fact in found] == ["test accuracy", "parameters", "MACs"]
    accuracy, params, macs = found
    assert (accuracy.value, accuracy.detail) == ("97.21 %", "of 359 test samples, mean cross-entropy 0.123 nats")
    assert params.value == "52,762 parameters"
    assert params.detail == "34 % of the space's largest network (154,826); its smallest has 21,322"
    assert params.share == pytest.approx((52762 - 21322) / (154826 - 21322))
    assert macs.value == "1,300,000 MACs" and macs.share == 0
    assert macs.detail.startswith("multiply-accumulates for one input; ")


@pytest.mark.parametrize(
    "derived, detail",
    [
        ({"macs": 1300000, "limit_macs": 1300000, "digest": "a"}, ""),
        ({"macs": 900000, "limit_macs": 950000.0, "digest": "a"},
         "exceeds the limit of 950,000, which the architecture keeps at the sizes of the search, with 900,000; "),
        ({"macs": 900000, "limit_macs": 950000, "digest": "b"}, "exceeds the limit of 950,000; "),  # changed by hand
        ({"macs": 900000, "limit_macs": 950000}, "exceeds the limit of 950,000; "),
        ({"macs": 900000, "limit_macs": 1299999.7}, "exceeds the limit of 1,299,999; "),
    ],
)  # fmt: skip
def test_a_network_beyond_a_limit_of_discretize_is_told(derived, detail):
    evaluated = {key: value for key, value in EVALUATED.items() if key in derived or key != "digest"}
    found = headline({"evaluate": evaluated, "discretize": derived})
    (macs,) = (fact for fact in found if fact.name == "MACs")
    assert macs.detail.startswith(f"{detail}multiply-accumulates for one input; ")


LATENCY = {"latency": 0.5832, "limit_latency": 0.5972334, "unit_latency": "ms"}


def test_a_cost_of_an_objective_has_its_unit_and_its_limit():
    derived = {**LATENCY, "expected_latency": 0.5414, "penalty_latency": 0.0, "params": 52762, "limit_params": 60000}
    assert metric_texts(derived) == {
        "latency": "0.583 ms (limit 0.597 ms)",
        "expected_latency": "0.541 ms",
        "penalty_latency": "0.00 in alpha's loss",
        "params": "52,762 parameters (limit 60,000 parameters)",
    }
    assert metric_texts({"limit_latency": 0.5}) == {"limit_latency": "0.50"}


def test_a_cost_of_an_objective_is_a_fact_where_discretize_and_evaluate_are_about_one_network():
    found = headline({"discretize": {**LATENCY, "digest": "a"}, "evaluate": EVALUATED})
    assert Fact("latency", "0.583 ms", "limit 0.597 ms") in found
    found = headline({"discretize": {**LATENCY, "digest": "b"}, "evaluate": EVALUATED})
    assert "latency" not in [fact.name for fact in found]


@pytest.mark.parametrize("limits, detail", [({}, ""), ({"branches": 4.0, "params": 70}, "limit 4")])
def test_a_cost_without_a_unit_is_a_fact_as_well(limits, detail):
    space = vit()
    architecture = space.smallest()
    result = DiscretizeResult(
        architecture, Cost(50, 20), 90.0, 0.5, costs={"branches": 3.0}, limits=limits, units={"branches": ""}
    )
    metrics = outputs.discretize_metrics(result)
    assert metric_texts(metrics)["branches"] == f"3 ({detail})" if detail else "3"
    found = headline({"discretize": metrics, "evaluate": {**EVALUATED, "digest": architecture.digest}})
    assert Fact("branches", "3", detail) in found
    assert [fact.name for fact in found] == ["test accuracy", "parameters", "MACs", "branches", "alpha"]


@pytest.mark.parametrize("damage", [{"unit_latency": ["ms"]}, {"latency": "fast"}, {"limit_latency": None}])
def test_damaged_metrics_of_an_objective_are_told_as_they_are(damage):
    damaged = {**LATENCY, **damage, "digest": "a"}
    assert set(metric_texts(damaged)) == {"latency", "digest"}
    headline({"discretize": damaged, "evaluate": EVALUATED})


def test_a_text_has_a_perplexity():
    (fact,) = headline(
        {"evaluate": {"test_accuracy": 41.0, "test_loss": 2.0, "test_samples": 1200, "test_perplexity": math.exp(2)}}
    )
    assert fact == Fact(
        "test perplexity",
        "7.389",
        "of 1,200 test windows, mean cross-entropy 2.000 nats, 41.00 % of the next tokens are right",
    )


HEAVIEST, PROJECTED = {"most_probable": True, "exact": True}, {"most_probable": False, "exact": True}


@pytest.mark.parametrize(
    ("entropy", "derived", "value", "detail"),
    [
        (0.96, {"candidates": 100}, "undecided (entropy 0.96 of 1)", "comes from judging 100 candidates"),
        (0.96, {"candidates": 1, **HEAVIEST}, "undecided (entropy 0.96 of 1)",
         "has each choice's heaviest option, which weighs little more than the others"),
        (0.7, {"candidates": 1, **HEAVIEST}, "partly decided (entropy 0.70 of 1)", "has each choice's heaviest option"),
        (0.1, {"candidates": 1, **HEAVIEST}, "decided (entropy 0.10 of 1)", "has each choice's heaviest option"),
        (0.1, {"candidates": 1, **PROJECTED}, "decided (entropy 0.10 of 1)",
         "is the most probable one within the budget"),
        (0.1, {"candidates": 1, "most_probable": False, "exact": False}, "decided (entropy 0.10 of 1)",
         "is the most probable one within the budget that a local search found"),
        (0.96, {"candidates": 1, "most_probable": False}, "undecided (entropy 0.96 of 1)",
         "is the one candidate that was judged"),
        (None, {"candidates": 1}, "none", "is the one candidate that was judged"),
        (None, {"candidates": 1000}, "none", "comes from judging 1,000 candidates"),
    ],
)  # fmt: skip
def test_alpha_is_decided_or_not(entropy, derived, value, detail):
    searched = {} if entropy is None else {"entropy": entropy}
    (fact,) = headline({"search": searched, "discretize": derived})
    sampled = "a sampled search: " if entropy is None else ""
    assert (fact.value, fact.detail) == (value, f"{sampled}the architecture {detail}")


@pytest.mark.parametrize("method", ["argmax", "both", "random", None])
@pytest.mark.parametrize("budget", [False, True])
def test_one_candidate_is_told_for_what_it_is(method, budget):
    """The depth of alpha's heaviest options is the largest, which is beyond the budget; None is a sampled search."""
    space = vit()
    likely, smallest, largest = space.largest(), space.cost(space.smallest()).macs, space.cost(space.largest()).macs
    even = {name: torch.full_like(one, 1 / one.shape[-1]) for name, one in space.one_hot(likely).items()}
    mixture = {name: 0.5 * even[name] + 0.5 * one for name, one in space.one_hot(likely).items()} if method else None
    result = discretize(
        space, random_data(space, ("weights", "architecture", "validation"), samples=40), mixture,
        method=method or "both", candidates=1, max_macs=(smallest + largest) // 2 if budget else None,
    )  # fmt: skip
    metrics = outputs.discretize_metrics(result)
    (fact,) = headline({"discretize": metrics})
    if method in ("argmax", "both"):
        assert metrics["most_probable"] is not budget and metrics["exact"] is True
        assert fact.detail.endswith(
            "most probable one within the budget" if budget else "each choice's heaviest option"
        )
    else:
        assert metrics.get("most_probable") is (False if method else None) and "exact" not in metrics
        assert fact.detail.endswith("the architecture is the one candidate that was judged")


def test_a_race_is_told():
    (fact,) = headline({"discretize": {"candidates": 100, "race_networks": 8}})
    assert fact.detail.endswith("the architecture comes from judging 100 candidates, and from training 8 of them")


def test_another_architecture_than_the_best_was_picked():
    metrics = {"discretize": {"candidates": 100, "digest": "b"}, "evaluate": {"digest": "a"}}
    assert headline(metrics)[0].detail.endswith("than discretize took: picked from its front, or changed by hand")


@pytest.mark.parametrize("value", ["97", None, True, float("nan"), float("inf"), 10**400, [1], {}])
def test_what_is_no_number_gives_no_fact(value):
    forged = {stage: dict.fromkeys([*EVALUATED, "entropy", "candidates"], value) for stage in ("search", "evaluate")}
    assert headline(forged) == []
    (fact,) = headline({"evaluate": {"params": 5, "largest_params": value, "smallest_params": value}})
    assert fact == Fact("parameters", "5 parameters")


def test_evaluate_gives_a_perplexity_where_there_are_no_classes():
    space, cost = vit(), Cost(10, 20)
    judged = [
        outputs.evaluate_metrics(
            EvaluateResult(41.0, loss, 12, cost, cost, cost, confusion), space.smallest(), {}, None
        )
        for loss, confusion in ((2.0, None), (800.0, None), (2.0, ((1,),)))
    ]
    assert [found.get("test_perplexity") for found in judged] == [math.exp(2), None, None]
    assert headline({"evaluate": judged[0]})[0].value == "7.389"


@pytest.mark.parametrize("picked", [False, True])
def test_the_choices_stand_beside_the_stage_that_found_them(tmp_path, monkeypatch, capsys, picked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    architecture = create_space("toy_conv_macro_nano").smallest()
    Path("metrics").mkdir()
    digest = "0123456789abcdef" if picked else architecture.digest
    Path("metrics/discretize.json").write_text(json.dumps({"digest": digest}))
    outputs.print_summary(architecture, "")
    rows = [line for line in capsys.readouterr().out.splitlines() if "discretize" in line or "retrain" in line]
    assert ["=" in row for row in rows] == [not picked, picked]


def test_evaluate_ends_with_the_facts_first_and_a_unit_for_every_number(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    metrics = {stage: json.loads((finished / f"metrics/{stage}.json").read_text()) for stage in ("search", "evaluate")}
    evaluated = metrics["evaluate"]
    for cost in ("params", "macs"):
        assert evaluated[f"smallest_{cost}"] <= evaluated[cost] <= evaluated[f"largest_{cost}"]
    assert evaluated["test_samples"] == len(read_splits().test) and "test_perplexity" not in evaluated
    assert not [name for name in (*evaluated, *metrics["search"]) if "flops" in name]

    monkeypatch.setenv("COLUMNS", "120")
    architecture = Architecture.from_json((finished / "out/discretize/architecture.json").read_text())
    outputs.print_summary(architecture, "autoformer_nano on digits")
    said = capsys.readouterr().out
    lines = [line.strip() for line in said.splitlines()]
    assert lines[0] == "autoformer_nano on digits"
    assert lines[1].split("  ")[0] == "test accuracy" and lines[1].endswith(f"{evaluated['test_accuracy']:.2f} %")
    assert f"entropy {metrics['search']['entropy']:.2f} of 1" in said and "decided" in said
    assert f"{evaluated['macs']:,} multiply-accumulates" in said and f"{evaluated['params']:,} parameters" in said
    assert f"test loss {evaluated['test_loss']:.4f} nats" in said
