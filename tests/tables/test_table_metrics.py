"""Which direction of a table's metric is better: from its name, from what someone says, and never guessed."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from tanglenas_engine.cli import main
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.tables import Table, kendall_tau, load_table
from tanglenas_engine.tables.metrics import kind_of

KINDS = {
    "test_acc": "accuracy",
    "test-accuracy": "accuracy",
    "testAccuracy": "accuracy",
    "x-valid-accuracy": "accuracy",
    "Top-1": "accuracy",
    "c10_test200": "accuracy",
    "in16_val12": "accuracy",
    "train_acc": "accuracy",
    "test-loss": "less",
    "test_err": "less",
    "test.error": "less",
    "Test Error": "less",
    "top1_err": "less",
    "accuracy_drop": "less",
    "testLoss": "less",
    "edgegpu_energy": "less",
    "raspi4_latency": "less",
    "latency(ms)": "less",
    "train_time": "less",
    "params_c10": "less",
    "FLOPs": "less",
    "#params": "less",
    "perplexity": "less",
    "peak/memory": "less",
    "seconds_per_epoch": "less",
    "energy per image": "less",
    "latency_per_image_ms": "less",
    "time per image (ms)": "less",
    "mAP": "more",
    "val_mAP50": "more",
    "miou": "more",
    "test_mIoU": "more",
    "IoU": "more",
    "acc_inherited_weights": None,  # an accuracy with a cost's word
    "test_acc_60_sec": None,
    "acc_at_224_size": None,
    "time_to_accuracy": None,
    "co_training_acc": None,
    "bleu": "more",
    "f1_score": "more",
    "throughput": "more",
    "images_per_second": None,
    "ops_per_second": None,
    "gflops_per_watt": None,
    "gflops_per_ms": None,
    "ops_per_clock_cycle": None,
    "flops_per_byte": None,
    "energy_efficiency": None,
    "error_reduction": None,
    "params_saved": None,
    "robustness_reduction": None,  # of something good
    "accuracy_reduction": None,
    "val_saved": None,
    "latency_speedup": None,
    "speedup": "more",
    "accuracy_gain": "more",
    "throughput_images_per_second": "more",
    "inverse_latency": None,
    "inv_ms": None,
    "negative_loss": None,
    "neg_loss": None,
    "negative accuracy": None,
    "one_minus_error": None,
    "reciprocal_time": None,
    "zero_cost_score": None,
    "zero_cost": None,
    "zero-costs": None,
    "zero_shot_accuracy": "accuracy",
    "zero_shot_loss": "less",
    "zero_noise_loss": "less",
    "non_zero_params": "less",
    "zero_padding_macs": "less",
    "size_compression": None,
    "seed": None,
    "test_acc_std": None,
    "std_test_loss": None,
    "best_acc_epoch": None,
    "val_acc_rank": None,
    "accuracy_gap": None,
    "epoch": None,
    "n_train": None,
    "num_val": None,
    "NumTest": None,
    "n_params": "less",
    "n_test_acc": "accuracy",
    "lossless": None,
    "terror": None,
    "42": None,
}


@pytest.mark.parametrize("metric", KINDS)
def test_the_words_of_a_name_say_which_direction_is_better(metric):
    assert kind_of(metric) == KINDS[metric]
    kind = KINDS[metric]
    assert Table(["a"], {metric: [1]}, None).higher_is_better(metric) is (None if kind is None else kind != "less")


@pytest.mark.parametrize("metric", ["test-loss", "test_err", "edgegpu_energy", "latency(ms)"])
def test_the_least_of_a_cost_is_the_best(metric):
    found = Table(["a", "b", "c"], {metric: [2.0, 1.0, 3.0]}, None)
    assert found.best(metric) == "b" and found.worst(metric) == "c"
    assert [found.rank(key, metric) for key in "abc"] == [2, 1, 3]
    assert found.regret("c", metric) == 2
    assert kendall_tau({"a": 0.5, "b": 0.9, "c": 0.1}, found, metric) == pytest.approx(1)


def test_an_unknown_metric_has_values_but_no_ranks_until_someone_says_so():
    columns = {"seed": [777.0, -3.0]}
    found = Table(["a", "b"], columns, None)
    assert found.value("a", "seed") == 777 and found.median("seed") == 387
    for question in (found.best, found.worst, lambda metric: found.rank("a", metric)):
        with pytest.raises(
            TangleNASError, match=r"'seed' does not say whether more or less of it is better: .*--lower"
        ):
            question("seed")
    assert Table(["a", "b"], columns, None, {"seed": True}).best("seed") == "a"
    assert Table(["a", "b"], columns, None, {"seed": False}).best("seed") == "b"
    with pytest.raises(TangleNASError, match=r"unknown metric 'sed'. Did you mean 'seed'"):
        Table(["a", "b"], columns, None, {"sed": False})


def test_what_someone_says_outweighs_the_name_and_is_kept_in_the_file(tmp_path):
    found = Table(
        ["a", "b"], {"depth": [1, 2], "loss": [1, 2], "test_acc": [10, 20]}, "here", {"depth": False, "loss": True}
    )
    found.write(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines()[0] == (
        "architecture of here,depth (less is better),loss (more is better),test_acc"
    )
    again = load_table(tmp_path / "t.csv")
    assert again.metrics == ("depth", "loss", "test_acc")
    assert [again.best(metric) for metric in again.metrics] == ["a", "b", "b"]
    assert load_table(tmp_path / "t.csv", higher_is_better={"loss": False}).best("loss") == "a"
    (tmp_path / "t.csv").write_text("arch,x,x (more is better)\na,1,1\n")
    with pytest.raises(TangleNASError, match=r"columns 'x' and 'x .more is better.' are of one metric"):
        load_table(tmp_path / "t.csv")


def test_small_percentages_stay_what_they_are_where_the_table_was_written_here(tmp_path):
    table = Table(["a", "b"], {"test_acc": [0.2, 0.9]}, "somewhere")
    table.write(tmp_path / "table.csv")
    assert load_table(tmp_path / "table.csv").columns["test_acc"].tolist() == [0.2, 0.9]


def test_fractions_are_no_percentages(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arch,test_acc,test_err\na,0.94,0.06\nb,0.5,0.5\nc,1,0\n")
    found = load_table(path)
    assert [found.value(key, "test_acc") for key in "abc"] == [94, 50, 100]
    assert found.fractions == ("test_acc",)
    assert found.value("a", "test_err") == 0.06  # a cost has the table's own unit: 0.06 % is possible too
    path.write_text("arch,test_acc\na,0.94\nb,1.5\n")
    assert load_table(path).value("a", "test_acc") == 0.94 and load_table(path).fractions == ()


def test_fractions_are_of_a_whole_file(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arch,test_acc,train_acc,test_acc_std,loss_std\na,0.94,1,0.004,0.1\nb,0.5,1.0,0.01,0.2\n")
    found = load_table(path)
    assert found.fractions == ("test_acc", "train_acc", "test_acc_std")
    assert [found.value("a", metric) for metric in found.metrics] == [94, 100, 0.4, 0.1]
    path.write_text("arch,test_acc,test_acc_std\na,0.94,1.2\nb,0.5,0.9\n")  # these deviations are in % already
    assert load_table(path).fractions == ("test_acc",)
    path.write_text("arch,test_acc,valid_acc,test_acc_std\na,0.94,94,0.4\nb,0.5,50,1.0\n")
    assert load_table(path).fractions == ("test_acc",)


def invoke(*arguments):
    result = CliRunner().invoke(main, ["tables", *map(str, arguments)], catch_exceptions=False)
    return result.output


def test_the_commands_show_the_direction_and_what_is_unknown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(
        "arch,test_acc,test-loss,seed\n"
        "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,0.81,0.9,777\n"
        "|none~0|+|none~0|none~1|+|none~0|none~1|skip_connect~2|,0.73,0.4,778\n"
    )
    shown = invoke("show", "t.csv")
    rows = {line.split()[0]: line.split()[1:5] for line in shown.splitlines() if line.strip()}
    assert rows["test_acc"] == ["more", "81", "77", "73"]
    assert rows["test-loss"] == ["less", "0.4", "0.65", "0.9"]
    assert rows["seed"] == ["unknown", "-", "777.5", "-"]
    assert "Read as fractions of 1, shown in %: test_acc" in shown
    assert "Nothing says whether more or less is better of: seed" in shown
    asked = invoke("query", "t.csv", "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|")
    assert [line.split() for line in asked.splitlines()[1:]] == [
        ["test_acc", "81", "1", "of", "2", "0"],
        ["test-loss", "0.9", "2", "of", "2", "0.5"],
        ["seed", "777", "-", "-"],
    ]


@pytest.mark.slow
def test_import_shows_directions_and_takes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("arch,test_acc,depth\n|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,0.81,7\n")
    assert "test_acc (more), depth (unknown)" in invoke("import", "t.csv", "--space", "nb201", "--out", "o.csv")
    said = invoke("import", "t.csv", "--space", "nb201", "--out", "o.csv", "--lower", "depth")
    assert "test_acc (more), depth (less)" in said and "Nothing says" not in said
    assert load_table("o.csv").higher_is_better("depth") is False
    both = invoke("import", "t.csv", "--space", "nb201", "--lower", "depth", "--higher", "depth")
    assert "--higher and --lower both name 'depth'" in both
    assert "unknown metric 'deth'. Did you mean 'depth'" in invoke(
        "import", "t.csv", "--space", "nb201", "--lower", "deth"
    )
