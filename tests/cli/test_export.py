"""`tanglenas export`: what is written computes what the network computes, and loads without this project."""

import functools
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from paths import ROOT
from PIL import Image
from tiny import TINY, tiny
from torch import nn

from tanglenas_engine import create_dataset, create_space, make_splits, open_splits, retrain
from tanglenas_engine.cli import export, main
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.weights import load_weights, save_weights

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


def written(name: str):
    """Write a network of a space here, as retrain does, and return it with the space and the arguments to export it."""
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


@pytest.fixture
def found(tmp_path, monkeypatch):
    """The function `written`, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return written


@dataclass
class Exported:
    folder: Path
    output: str  # what the command printed


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A function that exports a network of a space in a format, once."""

    @functools.cache
    def export_once(name: str, format_: str) -> Exported:
        folder = tmp_path_factory.mktemp(f"{name}-{format_}")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            torch.manual_seed(0)
            _, _, arguments = written(name)
            return Exported(folder, run(arguments, "--weights", "model.safetensors", "--format", format_))

    return export_once


def run(arguments: list[str], *more: str) -> str:
    result = CliRunner().invoke(main, [*arguments, *more])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(arguments: list[str], *more: str) -> str:
    """Return the error of an export that is refused."""
    result = CliRunner().invoke(main, [*arguments, *more])
    assert result.exit_code == 2, (result.output, result.exception)
    return result.stderr


def load_elsewhere(exported: list[Exported], blocked: str) -> None:
    """Run the code that the command printed for each in one process, and compare what the models give."""
    check = """
expected = torch.load("expected.pt", weights_only=True)
inputs = expected["inputs"]
with torch.no_grad():
    outputs = model(inputs) if "model" in globals() else run_session(session, inputs)
torch.testing.assert_close(outputs, expected["outputs"])
"""
    code = f"""{blocked}
import os
import torch

def run_session(session, inputs):
    return torch.from_numpy(session.run(None, {{"input": inputs.numpy()}})[0])

for folder, code in {[(str(it.folder), printed_code(it.output) + check) for it in exported]!r}:
    os.chdir(folder)
    exec(code, {{"torch": torch, "run_session": run_session}})
    print(folder)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [str(it.folder) for it in exported], done.stderr


def printed_code(output: str) -> str:
    return output.split("\n\n", 1)[1]


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("format_", ["torch", "torch-export"])
@pytest.mark.part(3)
def test_the_file_read_again_computes_what_the_network_computes(exports, name, format_):
    assert "largest difference from the network: 0 " in exports(name, format_).output


@pytest.mark.parametrize("name", SPACES)
def test_only_networks_of_timm_are_exported_for_it(exports, found, name):
    if name in IN_TIMM:
        assert "largest difference from the network: 0 " in exports(name, "timm").output
    else:
        _, _, arguments = found(name)
        result = CliRunner().invoke(main, [*arguments, "--weights", "model.safetensors", "--format", "timm"])
        assert result.exit_code == 2 and "has no form in timm" in result.stderr
        assert not Path("exported").exists()


@pytest.mark.exhaustive
def test_the_code_that_is_printed_loads_it_elsewhere(exports):
    load_elsewhere([exports("autoformer_nano", format_) for format_ in ("timm", "torch")], "")


@pytest.mark.exhaustive
def test_archives_load_where_neither_timm_nor_this_project_is(exports):
    load_elsewhere([exports(name, "torch-export") for name in ("autoformer_nano", "gpt_nano")], BLOCKED)


@pytest.mark.exhaustive
def test_onnxruntime_runs_the_exported_graphs(exports):
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason=f"{module} comes with the extra 'onnx'")
    graphs = [exports(name, "onnx") for name in ("autoformer_nano", "nb201")]
    load_elsewhere(graphs, BLOCKED)
    for graph in graphs:
        assert bytes(ROOT) not in (graph.folder / "exported/model.onnx").read_bytes()


def test_onnx_without_its_extra_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _, _, arguments = found("autoformer_nano")
    result = CliRunner().invoke(main, [*arguments, "--weights", "model.safetensors", "--format", "onnx"])
    assert result.exit_code == 2 and "pip install 'tanglenas[onnx]'" in result.stderr


def test_an_archive_holds_no_path_of_this_machine(exports):
    with zipfile.ZipFile(exports("autoformer_nano", "torch-export").folder / "exported/model.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert bytes(ROOT) not in content and sys.prefix.encode() not in content, name


def test_weights_of_the_supernet_are_sliced(found):
    _, network, arguments = found("autoformer_nano")
    run(arguments, "--weights", "supernet.safetensors", "--format", "torch")
    assert Path("exported/model.safetensors").stat().st_size < Path("supernet.safetensors").stat().st_size
    exported = export._network(tiny("autoformer_nano"), *_read("exported/model.safetensors"), None, None, "")
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


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """A run on digits whose supernet has batch norms: its space, data, and a function that writes its files."""
    monkeypatch.chdir(tmp_path)
    dataset = create_dataset("digits", image_size=28)
    splits = make_splits(dataset, seed=3)
    options = {**TINY["mobilenetv3_nano"], **dataset.space_options()}
    space = create_space("mobilenetv3_nano", **options)
    data = open_splits(dataset, splits, ("training", "validation"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):  # statistics of other architectures than the one that is exported
        space.select(space.sample(generator))
        space.train()(data.training.batch(torch.arange(32))[0])
    Path("splits.json").write_text(splits.to_json())
    save_weights("supernet.safetensors", space.release().state_dict(), {"space": space.name, "optimizer": "spos"})
    bound = [f"create_space.{name} = {value!r}" for name, value in options.items()]
    config = ["DATASET = 'digits'", "create_dataset.image_size = 28", *bound]
    Path("operative.gin").write_text("\n".join(config) + "\n")
    return space, data


@pytest.mark.parametrize("which", ["smallest", "largest"])
def test_a_network_of_the_supernet_gets_statistics_of_its_own_as_inherit_sets_them(searched, which):
    space, data = searched
    architecture = getattr(space, which)()
    Path("architecture.json").write_text(architecture.to_json())
    arguments = ["export", "architecture.json", "--weights", "supernet.safetensors", "--format", "torch"]
    run(arguments, "--output", "exported")
    expected = retrain(space, architecture, data, mode="inherit", seed=3, device="cpu").network.state_dict()
    written = load_weights("exported/model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.mark.parametrize(
    ("divisor", "message"),
    [
        ("4", "holds the supernet's weights, but the search trained the supernet with 1/4 of the channels"),
        ("3", "its metadata has the channel_divisor '3', expected a whole number that divides the channels of 'nb201'"),
        ("0", "its metadata has the channel_divisor '0'"),
    ],
)
def test_weights_of_a_supernet_with_untrained_channels_are_refused(tmp_path, monkeypatch, divisor, message):
    monkeypatch.chdir(tmp_path)
    space = create_space("nb201", channels=4, cells=1)
    Path("architecture.json").write_text(space.largest().to_json())
    save_weights("supernet.safetensors", space.state_dict(), {"optimizer": "pc_darts", "channel_divisor": divisor})
    arguments = ["export", "architecture.json", "--weights", "supernet.safetensors", "--format", "torch"]
    result = CliRunner().invoke(main, [*arguments, "--output", "exported", "-o", "channels=4", "-o", "cells=1"])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_a_run_is_exported_alike_from_every_folder(tmp_path, monkeypatch):
    for kind in ("project/images/a", "project/images/b", "elsewhere/images/a"):
        (tmp_path / kind).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), (20 * number, 0, 10 * len(kind))).save(tmp_path / kind / f"{number}.png")
    monkeypatch.chdir(tmp_path / "project")
    Path("dvc.yaml").touch()
    Path("operative.gin").write_text(
        "SPACE = 'toy_conv_macro_nano'\nDATASET = 'image_folder'\ncreate_dataset.root = 'images'\n"
        "create_dataset.image_size = 16\n"
    )
    dataset = create_dataset("image_folder", root="images", image_size=16)
    space = create_space("toy_conv_macro_nano", **dataset.space_options())
    Path("architecture.json").write_text(space.smallest().to_json())
    Path("splits.json").write_text(make_splits(dataset, seed=0).to_json())
    save_weights("supernet.safetensors", space.state_dict(), {"optimizer": "spos"})
    for here in ("project", "elsewhere"):
        monkeypatch.chdir(tmp_path / here)
        run(["export", "../project/architecture.json", "--weights", "../project/supernet.safetensors"],
            "--format", "torch", "--output", "exported")  # fmt: skip
    for name in ("config.json", "model.safetensors"):
        one, other = ((tmp_path / here / "exported" / name).read_bytes() for here in ("project", "elsewhere"))
        assert one == other


def test_without_the_data_a_network_of_the_supernet_with_batch_norms_is_refused(searched):
    space, _ = searched
    Path("architecture.json").write_text(space.smallest().to_json())
    arguments = ["export", "architecture.json", "--weights", "supernet.safetensors", "--format", "torch"]
    arguments += ["--output", "exported"]
    options = [word for key, value in space.created_with.items() for word in ("-o", f"{key}={value!r}")]
    config = Path("operative.gin").read_text()
    cases = [
        ("operative.gin", "", options, "beside its operative.gin"),
        ("operative.gin", config.replace("digits", "digts"), [], "cannot be opened (unknown dataset 'digts'"),
        ("splits.json", "", [], "beside its splits.json"),
    ]
    for file, content, more, missing in cases:
        Path("operative.gin").write_text(config)
        Path(file).write_text(content) if content else Path(file).unlink()
        said = refused(arguments, *more)
        assert missing in said and "retrain.mode=inherit" in said
        assert not Path("exported").exists()


DIGITS = {"DATASET": "digits", "create_space.image_size": 8, "create_space.in_channels": 1}
TEXT = {"DATASET": "text", "create_dataset.root": "text.txt", "create_dataset.tokenizer": "char",
        "create_dataset.block_size": 16, "create_space.block_size": 16}  # fmt: skip


@pytest.mark.parametrize(
    "space, config, options, other",
    [
        ("autoformer_nano", {**DIGITS, "create_space.num_classes": 10}, {}, ""),
        ("autoformer_nano", {**DIGITS, "create_space.num_classes": 10}, {"num_classes": 5}, "num_classes"),
        ("autoformer_nano", {**DIGITS, "create_space.num_classes": 9}, {}, "num_classes"),  # the data changed
        ("gpt_nano", {**TEXT, "create_space.vocab_size": 64}, {}, ""),
        ("gpt_nano", {**TEXT, "create_space.vocab_size": 64}, {"vocab_size": 65}, "vocab_size"),
        ("gpt_nano", {**TEXT, "create_space.vocab_size": 2}, {}, "vocab_size"),
    ],
)
def test_what_the_dataset_says_is_stored_if_its_sizes_are_those_of_the_network(
    tmp_path, monkeypatch, space, config, options, other
):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abc" * 400)
    Path("operative.gin").write_text("".join(f"{name} = {value!r}\n" for name, value in config.items()))
    bound = {name.removeprefix("create_space."): value for name, value in config.items() if "create_space" in name}
    made = create_space(space, **{**bound, **options})
    Path("architecture.json").write_text(made.smallest().to_json())
    save_weights("model.safetensors", made.standalone(made.smallest()).state_dict())
    arguments = ["export", "architecture.json", "--weights", "model.safetensors", "--format", "torch"]
    given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    result = CliRunner().invoke(main, [*arguments, "--output", "exported", *given])
    assert result.exit_code == 0, result.output
    names = json.loads(Path("exported/config.json").read_text())["pretrained_cfg"]
    stored = names or Path("exported/tokenizer.json").exists()
    assert bool(stored) is not bool(other)
    assert f"the dataset of the run has the {other} " in result.stderr if other else not result.stderr


@pytest.mark.parametrize("given, size", [((), 16), (("-o", "image_size=16"), 16), (("-o", "image_size=24"), 24)])
@pytest.mark.parametrize("name", ["resnet_nano", "nb201", "autoformer_nano"])  # the form of timm, and that of spaces
def test_a_network_that_was_retrained_on_larger_images_is_exported_for_these(tmp_path, monkeypatch, name, given, size):
    monkeypatch.chdir(tmp_path)
    dataset = create_dataset("digits", image_size=16)
    options = {**TINY.get(name, {}), **dataset.space_options()}
    if name == "autoformer_nano":
        options["patch_size"] = 2  # position embeddings are resampled where the patches stay as large
    space = create_space(name, **options)
    architecture = space.smallest()
    Path("architecture.json").write_text(architecture.to_json())
    searched = {**options, "image_size": 8}
    bound = "".join(f"create_space.{option} = {value!r}\n" for option, value in searched.items())
    Path("operative.gin").write_text(f"SPACE = {name!r}\nDATASET = 'digits'\n{bound}")
    space.export(space.extract(architecture), architecture, Path("model"), dataset)
    run(["export", "architecture.json", "--weights", "model/model.safetensors", "--format", "torch"],
        "--output", "exported", *given)  # fmt: skip
    config = json.loads(Path("exported/config.json").read_text())
    made_with = {option: config["options"][option] for option in dataset.space_options()}
    assert made_with == {**dataset.space_options(), "image_size": size}
    assert config["pretrained_cfg"] == {**dataset.input_config(), "input_size": [1, size, size]}


@pytest.mark.parametrize(
    "config, told",
    [
        ({"options": {"image_size": "x"}}, "the image_size of the network is 'x'"),
        ({"input_size": [1, 8.5, 8.5]}, "the image_size of the network is 8.5"),
        ({"input_size": [True, 8, 8]}, "the in_channels of the network is True"),
        ({"input_size": [1, 8, 8], "num_classes": 0}, "the num_classes of the network is 0"),
    ],
)
def test_sizes_beside_the_weights_that_are_none_are_refused(tmp_path, monkeypatch, config, told):
    monkeypatch.chdir(tmp_path)
    space = create_space("nb201_nano")
    space.export(space.extract(space.smallest()), space.smallest(), Path("model"))
    Path("architecture.json").write_text(space.smallest().to_json())
    Path("model/config.json").write_text(json.dumps(config))
    said = refused(["export", "architecture.json", "--weights", "model/model.safetensors", "--format", "torch"],
                   "--output", "exported")  # fmt: skip
    assert f"config.json is damaged: {told}, expected a positive whole number" in said


@pytest.mark.parametrize("told_by", ["metadata", "architecture.json"])
def test_weights_of_another_architecture_with_equal_shapes_are_refused(tmp_path, monkeypatch, told_by):
    monkeypatch.chdir(tmp_path)
    space = create_space("nb201_nano")
    one, other = (space.architecture(operation=[name] * 6) for name in ("skip_connect", "avg_pool_3x3"))
    space.export(space.extract(one), one, Path("model"))
    weights = Path("model/model.safetensors")
    if told_by == "metadata":
        weights = weights.rename("copied.safetensors")
    else:
        save_weights(weights, load_weights(weights))
    for name, architecture in (("one", one), ("other", other)):
        Path(f"{name}.json").write_text(architecture.to_json())
    more = ["--weights", str(weights), "--format", "torch", "--output", "exported"]
    said = refused(["export", "other.json"], *more)
    assert "holds the weights of another architecture" in said and one.digest in said and other.digest in said
    run(["export", "one.json"], *more)


def test_a_folder_with_another_export_is_refused_and_one_with_the_same_is_written_anew(found):
    _, _, arguments = found("autoformer_nano")
    arguments += ["--weights", "model.safetensors"]
    run(arguments, "--format", "timm")
    Path("exported/README.md").write_text("a person's own")
    before = {path.name: path.read_bytes() for path in Path("exported").iterdir()}
    said = refused(arguments, "--format", "torch-export")
    assert "exported has config.json, model.safetensors of another network or format" in said
    run(arguments, "--format", "timm")
    assert {path.name: path.read_bytes() for path in Path("exported").iterdir()} == before


def test_a_space_that_needs_a_function_has_no_form_that_this_project_reads(tmp_path):
    options = {"model": mlp, "num_classes": 10, "image_size": 8}
    space = create_space("elasticized", **options)
    network = space.standalone(space.smallest()).eval()
    made = export.Export(space, space.smallest(), options, network, tmp_path, None)
    with pytest.raises(TangleNASError, match=r"the option model=<function mlp .* Choose torch-export"):
        export._torch(made)


def mlp(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, num_classes))


NAN = float("nan")


@pytest.mark.parametrize(
    "wrong", [lambda y: y + 1e-2, lambda y: y * NAN, lambda y: y if y.shape[1] == 6 else y * NAN],
    ids=["larger", "no numbers", "no numbers for a shorter text"],
)  # fmt: skip
def test_an_export_that_computes_something_else_is_refused_and_not_written(found, monkeypatch, wrong):
    _, _, arguments = found("gpt_nano")

    def format_(exported):
        forward, code = export._torch(exported)
        return lambda x: wrong(forward(x)), code

    monkeypatch.setitem(export.FORMATS, "torch", format_)
    result = CliRunner().invoke(main, [*arguments, "--weights", "model.safetensors", "--format", "torch"])
    assert result.exit_code == 2 and "the export as torch is wrong" in result.stderr
    assert not Path("exported").exists()
    assert json.loads(Path("architecture.json").read_text())["space"] == "gpt_nano"
