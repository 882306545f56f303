"""The benchmark measures what it says: the same numbers by pad-and-sum, every byte once, and one JSON object."""

import importlib.metadata
import json
import math
import os
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from spaces import SPACES, inputs, make, random_mixture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tanglenas_engine
from benchmarks import device, elasticize, finding, profile
from benchmarks.candidates import compared
from benchmarks.options_figure import options
from benchmarks.pad_and_sum import pad_and_sum
from benchmarks.search_step import Bench, computation, main
from tanglenas_engine import create_space, elastic
from tanglenas_engine.testing import random_data


@pytest.mark.parametrize("relaxation", ["exact", "paper"])
@pytest.mark.parametrize("name", [*SPACES, "autoformer_nano", "gpt_nano", "mobilenetv3_nano"])
def test_pad_and_sum_computes_what_masks_do(name, relaxation):
    space = make(name, relaxation=relaxation).eval()
    alphas, mixture = random_mixture(space)
    x, leaves = inputs(space, 2), [*alphas.values(), *space.parameters()]
    outcomes = []
    for form in (None, pad_and_sum()):
        space.relax(mixture)
        with form or torch.enable_grad():
            y = space(x)
        gradients = torch.autograd.grad(
            y.square().sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        outcomes.append([y, *gradients])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_pad_and_sum_ends_with_its_block():
    space = make("vit")
    space.relax(random_mixture(space)[1])
    before = type(space).current, type(space.head).forward
    with pytest.raises(RuntimeError), pad_and_sum():
        assert type(space).current is not before[0]
        raise RuntimeError
    assert (type(space).current, type(space.head).forward) == before


def test_a_search_keeps_hardly_more_for_backward_than_training():
    for relaxation, most in (("exact", 1.10), ("gated", 1.05)):
        space = create_space("gpt_nano", relaxation=relaxation)
        saved = Bench(space, 4, naive=False, sampled=False).saved()
        assert max(saved["weight"], saved["arch"]) / saved["plain"] < most, relaxation


@pytest.mark.parametrize("name", ["gpt_nano", "autoformer_nano"])
def test_an_architecture_step_with_gates_multiplies_as_often_as_forward_and_input_gradients_do(name):
    products = {}
    bench = Bench(create_space(name, relaxation="gated"), 2, naive=False, sampled=False)
    for kind, step in bench.steps.items():
        with FlopCounterMode(display=False) as counter:
            step(0)
        products[kind] = counter.get_total_flops()
    assert products["weight"] < 1.01 * products["plain"]
    assert products["arch"] < 0.68 * products["plain"]


def test_an_architecture_step_leaves_the_weights_alone():
    bench = Bench(create_space("gpt_nano"), 2, naive=False, sampled=False)
    before = {name: parameter.clone() for name, parameter in bench.space.named_parameters()}
    alphas = [alpha.clone() for alpha in bench.optimizer.alphas.values()]
    bench.steps["arch"](0)
    for name, parameter in bench.space.named_parameters():
        assert parameter.grad is None and parameter.requires_grad, name
        assert parameter.equal(before[name]), name
    assert not any(a.equal(b) for a, b in zip(alphas, bench.optimizer.alphas.values(), strict=True))


def test_every_kind_of_step_but_the_architecture_s_trains_weights():
    bench = Bench(create_space("gpt_nano"), 2)
    for name, step in bench.steps.items():
        if name not in ("arch", "naive_arch"):
            bench.prepare.get(name, lambda _: None)(0)
            network = {"plain": bench.plain, "standalone": getattr(bench, "network", None)}.get(name, bench.space)
            before = next(network.parameters()).clone()
            step(0)
            assert not next(network.parameters()).equal(before), name
    assert bench.space.relaxation == "exact"


def test_more_options_leave_the_largest_network_as_it_is():
    largest = []
    for count in (2, 3, 6, 12):
        with torch.device("meta"):
            space = create_space("gpt", **options(count))
        for name in ("embed_dim", "num_heads", "mlp_ratio"):
            assert len(set(space.choices[name].options)) == count
        largest.append([p.shape for p in space.parameters()])
    assert all(shapes == largest[0] for shapes in largest)


@pytest.mark.exhaustive
def test_the_command_prints_one_json_object():
    arguments = ["--space", "autoformer_nano", "--image-size", "16", "--batch", "2", "--rounds", "1", "--json"]
    threads = torch.get_num_threads()
    result = CliRunner().invoke(main, [*arguments, "--relaxation", "gated", "--threads", str(threads)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    for name in ("plain", "weight", "arch", "naive", "spos", "standalone", "peak_memory_over_plain"):
        assert found[name] > 0, name
    assert found["search_over_plain"] == pytest.approx((found["weight"] + found["arch"]) / found["plain"])
    assert found["naive_over_search"] == pytest.approx(found["naive"] / (found["weight"] + found["arch"]))
    assert found["saved_over_plain"] == max(found["saved_weight"], found["saved_arch"]) / found["saved_plain"]
    assert found["options"] == {"image_size": 16} and found["batch"] == 2 and found["relaxation"] == "gated"


def test_a_precision_is_that_of_the_stages():
    bench = Bench(create_space("gpt_nano"), 2, sampled=False, computation=computation("bfloat16", False))
    types = set()
    bench.space.blocks[0].fc1.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    bench.plain.blocks[0].fc1.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    for step in bench.steps.values():
        step(0)
    assert types == {torch.bfloat16}
    assert {p.dtype for p in bench.space.parameters()} == {torch.float32}
    assert bench.space.execute is None


def test_parts_of_the_figures_of_a_gpu_run_on_a_cpu():
    names = [part.name for part in device.all_parts()]
    assert len(set(names)) == len(names)
    found = {}
    for name in ("search/gpt/bfloat16", "host/gpt", "half"):
        found[name] = json.loads(json.dumps(device.prepare(name, "tiny", "cpu")()))
    search, host, half = found.values()
    assert search["search_over_plain"] > 0 and search["naive_over_search"] > 0 and search["peak_memory_over_plain"] > 0
    assert host["waits"] == host["reads"] == 0  # on a GPU, such a read would wait for the device
    assert 0 < host["host_share"] <= 1 and host["by_function"] and host["by_operator"]
    assert half["precision"] == "bfloat16" and half["largest_difference"] < 0.1


@pytest.mark.exhaustive
def test_a_part_that_fails_or_overruns_leaves_the_others(tmp_path):
    script = (
        "import pathlib, sys, time; _, name, stem = sys.argv[-3:]; time.sleep(60 * (name == 'stuck'));"
        "pathlib.Path(stem + '.ready').touch();"
        "sys.stdin.readline(); sys.exit('no such card') if name == 'bad' else time.sleep(60 * (name == 'slow'));"
        "pathlib.Path(stem + '.json').write_text('{\"plain\": 1}')"
    )
    parts = [
        device.Part("good", 30, "first"),
        device.Part("bad", 30, "first"),
        device.Part("stuck", 1, "first"),
        device.Part("slow", 1, "first", clock=False),
        device.Part("late", 30, "second"),
    ]
    deadline = time.monotonic() + device.GRACE + 5
    ran = device.run_parts(parts, [sys.executable, "-c", script], dict(os.environ), deadline, tmp_path)
    found = {}
    for part, figures in ran:
        found[part.name] = figures
        if part.name == "slow":
            time.sleep(max(0.0, deadline - device.GRACE - time.monotonic()))
    assert found["good"]["status"] == "ok" and found["good"]["plain"] == 1
    assert found["bad"]["status"] == "failed: 1" and found["bad"]["log"] == ["no such card"]
    assert found["stuck"]["status"] == found["slow"]["status"] == "overran"
    assert found["late"]["status"].startswith("skipped")


def test_the_plugins_of_a_checkout_are_found_without_an_installation(tmp_path):
    (info,) = device._metadata(tmp_path).iterdir()
    distribution = importlib.metadata.PathDistribution(info)
    ours = importlib.metadata.distribution("tanglenas")
    assert (distribution.name, distribution.version) == (ours.name, ours.version)
    one, other = ({e.name: e.value for e in d.entry_points if e.group == "tanglenas"} for d in (distribution, ours))
    assert one == other


def test_candidates_are_worth_what_the_networks_are_that_a_loop_builds():
    space = create_space("nb201_nano")
    data = random_data(space, ("weights", "architecture"), samples=24)
    found = compared(space, data, count=2, repeats=2, batch_size=8, recalibration_batches=2, clock="processor")
    assert (found["candidates"], found["distinct"], found["samples"]) == (6, 2, 24)
    assert found["largest_difference"] == 0
    assert found["median_engine"] < found["median_naive"] / 5  # four are looked up
    assert found["engine_over_naive"] == pytest.approx(found["engine"] / found["naive"])


def test_errors_of_spaces_of_models_are_no_number_where_outputs_are_none(monkeypatch):
    space = tanglenas_engine.elasticize(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 6))
    in_eval, in_training, exact = elasticize._corners(space)
    assert in_eval < 1e-12 and in_training < 1e-12 and exact
    monkeypatch.setattr(torch, "randn_like", lambda tensor: torch.full_like(tensor, math.nan))  # the noise on weights
    assert all(math.isnan(error) for error in elasticize._corners(space)[:2])


@pytest.mark.parametrize("relaxation", ["exact", "gated"])
@pytest.mark.exhaustive
def test_a_profile_tells_the_products_of_a_step_apart(relaxation):
    before = elastic.Attention.forward
    small = {"layers": (1, 2), "embed_dim": (32, 64), "num_heads": (1, 2), "mlp_ratio": (1, 2), "block_size": 16}
    kinds, operators = profile.measure(create_space("gpt_nano", relaxation=relaxation, **small), 3, rounds=1)
    assert elastic.Attention.forward is before
    for name, total in kinds.items():
        assert set(total) <= set(profile.KINDS)
        assert total[profile.FORWARD] > 0 and total[profile.INPUTS] > 0 and total[profile.ATTENTION] > 0, name
        assert (total[profile.MASKS] > 0) == (name != "plain")
        assert sum(operators[name].values()) == pytest.approx(total.total() - total[profile.PYTHON])
    assert kinds["plain"][profile.WEIGHTS] > 0 and kinds["weight"][profile.WEIGHTS] > 0
    assert kinds["naive_arch"][profile.WEIGHTS] > 0


@pytest.mark.parametrize(
    ("learns", "expected"),
    [
        ("xw", {"products forward: addmm", "input gradients: mm", "weight gradients: mm"}),
        ("x", {"products forward: addmm", "input gradients: mm"}),
        ("w", {"products forward: addmm", "weight gradients: mm"}),
    ],
)
def test_gradients_of_inputs_and_weights_are_told_by_their_shapes(learns, expected):
    layer, x = nn.Linear(8, 4), torch.randn(6, 8, requires_grad="x" in learns)
    layer.weight.requires_grad_("w" in learns)
    _, operators = profile.profiled(lambda: layer(x).sum().backward(), positions=6)
    assert {name for name in operators if name.endswith("mm")} == expected


@pytest.mark.exhaustive
def test_convolutions_are_told_by_the_gradients_asked_for():
    space = create_space("toy_conv_macro_nano")
    kinds, _ = profile.measure(space, 2, rounds=1, naive=False)
    assert kinds["plain"][profile.BOTH] > 0
    assert kinds["weight"][profile.INPUTS] > 0 and kinds["weight"][profile.WEIGHTS] > 0


# --- does a search find ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """A study of two networks and of trainings of two epochs on a short text."""
    monkeypatch.setitem(
        finding.TASKS, "gpt_nano", finding.Task("gpt_nano", "stdlib_text", {"characters": 30_000}, {}, epochs=2, pool=2)
    )
    monkeypatch.setattr(finding, "FRONT", (0.4, 1.0))
    monkeypatch.setattr(finding, "REPEATED", 1)
    for derivation in finding.DERIVATIONS.values():
        monkeypatch.setitem(derivation, "candidates", 3)


@pytest.mark.exhaustive
def test_a_study_of_what_searches_find_goes_on_and_has_a_table(tiny, tmp_path):
    def said(*arguments):
        result = CliRunner().invoke(finding.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    study = ["run", "gpt_nano", "--out", str(tmp_path), "--seeds", "0", "--halving", "1", "--methods", "drnas target"]
    said(*study)
    rows = (tmp_path / "gpt_nano.jsonl").read_text().splitlines()
    keys = {json.loads(row)["key"] for row in rows}
    assert {"pool/0/0", "pool/1/0", "pool/0/2", "most params/1", "found/drnas target, best race/0"} <= keys
    assert "found/drnas target, both/0" in keys  # what the race judged best
    (tmp_path / "gpt_nano.jsonl").write_text("\n".join(rows[:-3]) + "\n")  # cut off
    said(*study)
    again = (tmp_path / "gpt_nano.jsonl").read_text().splitlines()
    assert [json.loads(row)["key"] for row in again] == [json.loads(row)["key"] for row in rows]
    table = said("table", str(tmp_path / "gpt_nano.jsonl"))
    assert "| drnas target, best race |" in table and "| random, successive halving of 1 trainings |" in table
    assert "| best of" not in table  # of two networks


def told(path, rows, status=0):
    """Return what `table` says of rows by key."""
    path.write_text("".join(json.dumps({"key": key, **row}) + "\n" for key, row in rows.items()))
    result = CliRunner().invoke(finding.main, ["table", str(path)])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def test_each_training_of_a_network_counts_once(tmp_path):
    losses = {"a": 6.0, "b": 8.0, "c": 10.0}
    pool = {
        f"pool/{i}/0": {"digest": digest, "test_loss": loss, "validation_loss": loss, "seconds": 1}
        for i, (digest, loss) in enumerate(losses.items())
    }
    searched = {"digest": "a", "search_seconds": 1, "derive_seconds": 1, "pool_losses": [1, 2, 3]}
    rows = {
        **pool,
        "found/spos band, random/0": searched,
        "ablation/spos/judged/0": searched,
        "trained/a/0": pool["pool/0/0"],  # the same training
        "trained/a/1": {**pool["pool/0/0"], "test_loss": 7.0},
        "alone/1/0": {**pool["pool/1/0"], "test_loss": 0.7},  # a loss, where a table has errors in %
    }
    lines = told(tmp_path / "task.jsonl", rows).splitlines()
    assert lines[0].startswith("pool of 3: test loss 6.5000 best, 8.0000 median, 10.0000 worst")
    assert "between seeds 0.7071 (1 networks)" in lines[0]
    assert lines[-1].startswith("| spos band, random | 6.5000 | 6.0000 | 6.500 |")  # one seed has no interval


def test_fronts_need_no_random_networks_and_files_without_results_say_so(tmp_path):
    points = {
        f"front/spos whole space/{share}/0": {"digest": "a", "test_loss": 2 - share, "macs": 100 * share}
        for share in finding.FRONT
    }
    lines = told(tmp_path / "task_front.jsonl", points).splitlines()
    assert len(lines) == 3 and lines[-1].startswith("| spos whole space | 0.") and " |  | " in lines[-1]
    points.popitem()
    assert "there is no whole front" in told(tmp_path / "task_front.jsonl", points, status=2)
    assert "has no training of the pool" in told(tmp_path / "task.jsonl", {"begun/a/3": {"seconds": 1}}, status=2)


@pytest.mark.exhaustive
def test_fronts_are_compared_over_budgets(tiny, tmp_path):
    options = ["front", "gpt_nano", "--out", str(tmp_path), "--seeds", "0,1", "--methods", "spos whole space"]
    result = CliRunner().invoke(finding.main, options, catch_exceptions=False)
    lines = [line for line in result.output.splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0] for line in lines[2:]]
    assert names == [
        "| spos whole space", "| random", "| another random", "| most params", "| the better random one by validation"
    ]  # fmt: skip
    assert all("nan" not in line for line in lines)


@pytest.mark.exhaustive
def test_ablations_change_one_thing_and_rank_the_pool(tiny, tmp_path, monkeypatch):
    names = ["spos", "drnas, architecture split from elsewhere", "drnas, gated"]
    monkeypatch.setattr(finding, "ABLATIONS", {name: finding.ABLATIONS[name] for name in names})
    options = ["ablate", "gpt_nano", "--out", str(tmp_path), "--seeds", "0"]
    result = CliRunner().invoke(finding.main, options, catch_exceptions=False)
    lines = [line for line in result.output.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == [
        "spos",
        names[1],
        names[1],
        names[2],
        names[2],
    ]
    assert all(line.split(" | ")[1] in ("1.00", "-1.00") for line in lines[2:])  # two networks; accuracies may tie
    with finding.Study("gpt_nano", tmp_path / "gpt_nano.jsonl") as study:
        splits = study.split_for(finding.ABLATIONS[names[1]]).splits
        assert int(splits.weights.max()) < int(splits.architecture.min())
        assert splits.training.tolist() == study.splits.training.tolist()
        assert splits.weights.tolist() != study.splits.weights.tolist()


@pytest.mark.exhaustive
def test_networks_of_the_pool_are_trained_for_longer_and_from_the_weights_of_a_search(tiny, tmp_path):
    options = ["run", "gpt_nano", "--out", str(tmp_path), "--methods", "", "--seeds", "0", "--halving", "2"]
    assert CliRunner().invoke(finding.main, options, catch_exceptions=False).exit_code == 0
    options = ["lengths", "gpt_nano", "--out", str(tmp_path), "--networks", "1,0", "--epochs", "3"]
    result = CliRunner().invoke(finding.main, [*options, "--methods", "short spos band"], catch_exceptions=False)
    table = [line.split(" | ") for line in result.output.splitlines() if line.startswith("| ")][2:]
    assert [line[:3] for line in table] == [["| scratch", "3", "1, 0"], ["| short spos band", "2", "1, 0"]]
    assert table[0][3] != table[0][4] != table[1][3]  # others than the pool's own trainings
    done = [json.loads(line) for line in (tmp_path / "gpt_nano.jsonl").read_text("utf-8").splitlines()]
    curves = {row["key"]: len(row["curve"]) for row in done if "curve" in row}
    assert curves["lengths/scratch/3/1"] == 3 and curves["lengths/short spos band/2/0"] == 2
