"""`tanglenas export`: what is written computes what the network computes, and loads without this project."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from paths import ROOT
from tiny import TINY, tiny

from tanglenas_engine.cli import export, main
from tanglenas_engine.runtime.weights import save_weights

# One of each library: timm's transformer and MobileNetV3, cells, language models, convolutions.
SPACES = ["autoformer_nano", "mobilenetv3_nano", "nb201", "gpt_nano", "toy_conv_macro"]
IN_TIMM = {"autoformer_nano", "mobilenetv3_nano"}
BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("tanglenas", "timm")):
            raise ImportError(name)

sys.meta_path.insert(0, Block())
"""


@pytest.fixture
def found(tmp_path, monkeypatch):
    """A function that writes a network of a space, as retrain does, and returns it with the arguments to export it."""
    monkeypatch.chdir(tmp_path)

    def make(name: str):
        space = tiny(name)
        architecture = space.sample(torch.Generator().manual_seed(1))
        network = space.extract(architecture).eval()
        Path("architecture.json").write_text(architecture.to_json())
        save_weights("model.safetensors", network.state_dict())
        save_weights("supernet.safetensors", space.state_dict())
        options = [word for key, value in TINY.get(name, {}).items() for word in ("-o", f"{key}={value!r}")]
        arguments = ["export", "architecture.json", "--output", "exported", *options]
        inputs = space.example_input(5)
        torch.save({"inputs": inputs, "outputs": network(inputs).detach()}, "expected.pt")
        return space, network, arguments

    return make


def run(arguments: list[str], *more: str) -> str:
    result = CliRunner().invoke(main, [*arguments, *more])
    assert result.exit_code == 0, result.output
    return result.stdout


def load_elsewhere(code: str, blocked: str, call: str = "model(inputs)") -> None:
    """Run the code that the command printed in a process of its own, and compare what the model gives."""
    check = f"""
import torch
expected = torch.load("expected.pt", weights_only=True)
inputs = expected["inputs"]
with torch.no_grad():
    outputs = {call}
torch.testing.assert_close(outputs, expected["outputs"])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"{blocked}{code}{check}"], check=True)


def printed_code(output: str) -> str:
    return output.split("\n\n", 1)[1]


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("format_", ["torch", "torch-export", "timm"])
def test_the_file_read_again_computes_what_the_network_computes(found, name, format_):
    _, _, arguments = found(name)
    arguments += ["--weights", "model.safetensors", "--format", format_]
    if format_ == "timm" and name not in IN_TIMM:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and "has no form in timm" in result.stderr
        assert not Path("exported").exists()
    else:
        assert "largest difference from the network: 0 " in run(arguments)


@pytest.mark.parametrize(
    "name, format_, blocked",
    [
        ("autoformer_nano", "timm", ""),
        ("autoformer_nano", "torch", ""),
        ("autoformer_nano", "torch-export", BLOCKED),
        ("gpt_nano", "torch-export", BLOCKED),
    ],
)
def test_the_code_that_is_printed_loads_it_elsewhere(found, name, format_, blocked):
    _, _, arguments = found(name)
    output = run(arguments, "--weights", "model.safetensors", "--format", format_)
    load_elsewhere(printed_code(output), blocked)


@pytest.mark.parametrize("name", ["autoformer_nano", "nb201"])
def test_onnxruntime_runs_the_exported_graph(found, name):
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason=f"{module} comes with the extra 'onnx'")
    _, _, arguments = found(name)
    output = run(arguments, "--weights", "model.safetensors", "--format", "onnx")
    run_it = 'torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])'
    load_elsewhere(printed_code(output), BLOCKED, run_it)
    assert bytes(ROOT) not in Path("exported/model.onnx").read_bytes()


def test_onnx_without_its_extra_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _, _, arguments = found("autoformer_nano")
    result = CliRunner().invoke(main, [*arguments, "--weights", "model.safetensors", "--format", "onnx"])
    assert result.exit_code == 2 and "pip install 'tanglenas[onnx]'" in result.stderr


def test_an_archive_holds_no_path_of_this_machine(found):
    _, _, arguments = found("autoformer_nano")
    run(arguments, "--weights", "model.safetensors", "--format", "torch-export")
    with zipfile.ZipFile("exported/model.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert bytes(ROOT) not in content and sys.prefix.encode() not in content, name


def test_weights_of_the_supernet_are_sliced(found):
    _, network, arguments = found("autoformer_nano")
    run(arguments, "--weights", "supernet.safetensors", "--format", "torch")
    assert Path("exported/model.safetensors").stat().st_size < Path("supernet.safetensors").stat().st_size
    exported = export._network(tiny("autoformer_nano"), *_read("exported/model.safetensors"))
    for key, value in network.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[key], value)


def _read(weights: str):
    from tanglenas_engine import Architecture

    return Architecture.from_json(Path("architecture.json").read_text()), Path(weights)


def test_weights_of_another_network_are_refused(found):
    space, _, arguments = found("autoformer_nano")
    other = space.extract(space.largest())
    state = {name: tensor for name, tensor in other.state_dict().items() if name != "head.bias"}
    save_weights("other.safetensors", state)
    result = CliRunner().invoke(main, [*arguments, "--weights", "other.safetensors", "--format", "torch"])
    assert result.exit_code == 2 and "other.safetensors holds the weights of another network" in result.stderr


@pytest.mark.parametrize("wrong", [lambda y: y + 1e-2, lambda y: y * float("nan")])
def test_an_export_that_computes_something_else_is_refused_and_not_written(found, monkeypatch, wrong):
    _, _, arguments = found("autoformer_nano")

    def format_(exported):
        forward, code = export._torch(exported)
        return lambda x: wrong(forward(x)), code

    monkeypatch.setitem(export.FORMATS, "torch", format_)
    result = CliRunner().invoke(main, [*arguments, "--weights", "model.safetensors", "--format", "torch"])
    assert result.exit_code == 2 and "the export as torch is wrong" in result.stderr
    assert not Path("exported").exists()
    assert json.loads(Path("architecture.json").read_text())["space"] == "autoformer_nano"
