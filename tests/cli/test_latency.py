"""`tanglenas latency`: what a person reads of a table and of its mistakes."""

import pytest
from click.testing import CliRunner

from tanglenas_engine import create_space
from tanglenas_engine.cli import main
from tanglenas_objectives import latency_measurement


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency_measurement, "_timed", lambda *rest: lambda: 2.0)
    return lambda *arguments: CliRunner().invoke(main, ["latency", *arguments])


@pytest.mark.parametrize("networks", ["0", "1", "2"])
def test_networks_that_were_measured_are_told(run, networks):
    build = run("build", "toy_conv_macro_nano", "t.json", "--networks", networks, "--threads", "1", "--repeats", "1")
    assert build.exit_code == 0, build.output
    assert (f"{networks} other network" in build.output) is (networks != "0")
    assert ("Spearman" in build.output) is (networks == "2")


def test_a_table_of_another_space_is_told_by_its_path(run, tmp_path):
    run("build", "toy_conv_macro_nano", "t.json", "--networks", "0", "--threads", "1", "--repeats", "1")
    (tmp_path / "a.json").write_text(create_space("autoformer_nano").smallest().to_json())
    said = run("predict", "a.json", "t.json")
    assert said.exit_code == 2
    assert said.stderr.startswith("Error: t.json: the latency table was measured for the space 'toy_conv_macro_nano'")
    assert "objective" not in said.stderr and "num_classes" not in said.stderr
