"""The comparison of compressed networks: budgets are met, results are kept, and peers that are missing say so."""

import sys
from dataclasses import replace
from functools import partial

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import compress, peers
from tanglenas_engine import TangleNASError, create_space

pytestmark = pytest.mark.slow

TINY = compress.Task(
    "autoformer_nano", "digits", {"weight_init": "jax"}, None, (256, 64, 64, 64), epochs=(1, 1, 1), budgets=(0.5,)
)


def compressed(folder, methods, monkeypatch):
    monkeypatch.setattr(compress, "CANDIDATES", {"search": 4, "direct": 4})
    monkeypatch.setattr(compress, "TASKS", {"tiny": TINY})
    study = compress.Study("tiny", folder / "compress_tiny.jsonl")
    return {m: study.once(f"{m}/0.5/0", partial(study.compress, m, 0.5, 0)) for m in methods}


@pytest.mark.exhaustive
def test_compressed_networks_are_within_the_budget_and_results_are_kept(tmp_path, monkeypatch):
    rows = compressed(tmp_path, ["ours, search", "ours, direct", "uniform", "scratch"], monkeypatch)
    for method, row in rows.items():
        assert "failed" not in row, row
        assert 0 < row["share"] <= 0.5, method
        assert row["test_loss"] < 3 and row["epochs"] == 1, method
    assert rows["ours, search"]["permuted"] <= compress.PERMUTED
    assert rows["scratch"]["cost"] == rows["ours, search"]["cost"]
    monkeypatch.setattr(compress.Study, "compress", lambda *_: pytest.fail("the result is in the file"))
    assert compressed(tmp_path, rows, monkeypatch) == rows
    printed = CliRunner().invoke(compress.main, ["table", str(tmp_path / "compress_tiny.jsonl")])
    assert printed.exit_code == 0, printed.output
    assert "| uniform |" in printed.output and "ours ahead in" in printed.output


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("method", ["torch-pruning, magnitude", "torch-pruning, taylor", "fastnas"])
def test_a_peer_compresses_within_the_budget(method, tmp_path, monkeypatch):
    for name in ("torch_pruning",) if "torch" in method else ("modelopt", "torchprofile"):
        pytest.importorskip(name, reason="the peers of the benchmark are not installed")
    row = compressed(tmp_path, [method], monkeypatch)[method]
    assert "failed" not in row, row
    assert 0.3 < row["share"] <= 0.5


@pytest.mark.parametrize(
    ("method", "module"), [("torch-pruning, taylor", "torch_pruning"), ("fastnas", "modelopt.torch.prune")]
)
def test_a_peer_that_is_missing_names_the_command_that_installs_it(method, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(peers.MissingError, match="pip install"):
        compressed(tmp_path, [method], monkeypatch)


@pytest.mark.exhaustive
def test_what_a_method_cannot_do_is_a_result(tmp_path, monkeypatch):
    def fails(study, most, seed):
        raise ValueError("no such network")

    monkeypatch.setitem(compress.METHODS, "theirs", fails)
    compressed(tmp_path, ["ours, direct", "theirs"], monkeypatch)
    printed = CliRunner().invoke(compress.main, ["table", str(tmp_path / "compress_tiny.jsonl")])
    assert "ValueError: no such network" in printed.output


def test_tasks_may_keep_their_networks_in_one_folder(tmp_path, monkeypatch):
    narrow = replace(TINY, options={**TINY.options, "embed_dim": (8, 16), "head_dim": 4})
    monkeypatch.setattr(compress, "TASKS", {"tiny": TINY, "narrow": narrow})
    largest = {}
    for name in ("tiny", "narrow"):
        study = compress.Study(name, tmp_path / f"{name}.jsonl", weights=tmp_path / "kept")
        assert study.cost(study.network(0)) == study.largest
        largest[name] = study.done["largest/0"]
    assert largest["tiny"]["cost"] > largest["narrow"]["cost"]
    monkeypatch.setattr(compress.Study, "train", lambda *_: pytest.fail("the weights are kept"))
    again = compress.Study("tiny", tmp_path / "again.jsonl", weights=tmp_path / "kept")
    again.trained(0)
    assert again.done["largest/0"] == largest["tiny"]


def test_weights_that_do_not_load_are_no_result_of_a_method(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "TASKS", {"tiny": TINY})
    study = compress.Study("tiny", tmp_path / "tiny.jsonl", weights=tmp_path)
    study.trained(0).write_bytes(b"cut off")
    with pytest.raises(TangleNASError, match=r"tiny-0\.safetensors"):
        study.compress("uniform", 0.5, 0)


def test_fastnas_is_charged_for_the_scores_of_a_budget_that_it_could_not_meet(tmp_path, monkeypatch):
    failing = iter([True])

    def prune(network, example, cost, most, constraint, score, statistics, sensitivities):
        if next(failing, False):
            score(network), score(network)
            raise ValueError("NOT all constraints can be satisfied")
        return network, {"asked": 1.0, "choices": 1}  # the library reads its sensitivities from a file

    monkeypatch.setattr(peers, "fastnas", prune)
    monkeypatch.setattr(compress, "TASKS", {"tiny": TINY})
    study = compress.Study("tiny", tmp_path / "tiny.jsonl")
    rows = [study.compress("fastnas", share, 0) for share in (0.3, 0.5, 0.7)]
    assert "failed" in rows[0] and [row["scored"] for row in rows[1:]] == [2, 2]
    assert all(row["compress_seconds"] >= row["scoring_seconds"] == study.scored[0][1] for row in rows[1:])


def test_a_table_of_no_largest_network_says_what_is_missing(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"key": "uniform/0.5/0", "failed": "OtherWeightsError"}\n')
    printed = CliRunner().invoke(compress.main, ["table", str(tmp_path / "results.jsonl")])
    assert printed.exit_code == 2 and "has no largest network" in printed.output


def test_norms_without_activations_compute_the_same():
    space = create_space("mobilenetv3_nano")
    network = space.standalone(space.largest()).eval()
    x = space.example_input(2)
    before = network(x)
    peers.separate_activations(network)
    assert network(x).equal(before)


def test_a_part_of_a_folder_has_every_class(tmp_path, monkeypatch):
    for part, number in (("train", 40), ("test", 20)):
        for value, name in enumerate(("dark", "grey", "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (8, 8), (80 * value, i, 0)).save(tmp_path / part / name / f"{i}.png")
    task = compress.Task("autoformer_nano", "image_folder", {}, "root", (24, 6, 6, 12), by_class=True)
    monkeypatch.setitem(compress.TASKS, "folder", task)
    data = compress.Study("folder", tmp_path / "out.jsonl", str(tmp_path)).data
    assert {len(set(getattr(data, name).labels.tolist())) for name in ("weights", "training", "test")} == {3}
