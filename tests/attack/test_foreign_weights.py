"""Weights of other people, of other networks and of no network: each is taken rightly, or refused by name."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import TINY, tiny
from torch import nn

from tanglenas_engine import Architecture
from tanglenas_engine.cli import main
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import files
from tanglenas_engine.runtime import strict_json
from tanglenas_engine.runtime.weights import PREFIXES, OtherWeightsError, load_into, load_weights, save_weights


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def written(path, change):
    state = network().state_dict()
    change(state)
    save_weights(path, state)
    return path


def put(name, value):
    """A change that sets one value of a tensor."""

    def change(state):
        state[name].view(-1)[-1] = value

    return change


def cast(name, dtype):
    def change(state):
        state[name] = state[name].to(dtype)

    return change


FOREIGN = {
    "nan": (put("3.weight", math.nan), r"3\.weight has 1 of 24 values that are not finite in float32"),
    "inf": (put("0.bias", math.inf), r"0\.bias has 1 of 3 values that are not finite"),
    "nan statistics": (put("1.running_var", math.nan), r"1\.running_var has 1 of 3 values that are not finite"),
    "all nan": (
        lambda state: [t.fill_(math.nan) for t in state.values() if t.is_floating_point()],
        r"0\.weight has 27 of 27 values that are not finite",
    ),
    "int8": (cast("3.weight", torch.int8), r"3\.weight is of type int8, expected float32"),
    "int32": (cast("0.weight", torch.int32), r"0\.weight is of type int32, expected float32"),
    "bool": (cast("0.bias", torch.bool), r"0\.bias is of type bool, expected float32"),
    "8-bit floats": (cast("3.weight", torch.float8_e4m3fn), r"3\.weight is of type float8_e4m3fn, expected float32"),
    "a counter of floats": (cast("1.num_batches_tracked", torch.float32), r"tracked is of type float32, expected int"),
    "too large": (
        lambda state: state.update({"0.bias": torch.full((3,), 1e300, dtype=torch.float64)}),
        r"0\.bias has 3 of 3 values that are not finite in float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_weights_that_no_network_can_have_are_refused_by_the_tensors_name(tmp_path, case):
    change, message = FOREIGN[case]
    path = written(tmp_path / "model.safetensors", change)
    for load in (load_into, files.load_into):
        with pytest.raises(TangleNASError, match=message) as caught:
            load(network(), path)
        assert str(path) in str(caught.value)


def test_the_largest_network_refuses_them_too(tmp_path):
    space = tiny("toy_conv_macro")
    state = space.state_dict()
    next(iter(state.values())).view(-1)[0] = math.nan
    save_weights(tmp_path / "supernet.safetensors", state)
    with pytest.raises(TangleNASError, match="not finite"):
        files.load_into(space, tmp_path / "supernet.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken(tmp_path, dtype):
    def change(state):
        for name, tensor in state.items():
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor

    found = network()
    assert load_into(found, written(tmp_path / "w.safetensors", change)) == ""
    torch.testing.assert_close(found[3].weight, network()[3].weight, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("prefix", [*PREFIXES, "module._orig_mod.", "model.module."])
def test_the_prefixes_of_wrappers_are_cut_and_named(tmp_path, prefix, capsys):
    path = tmp_path / "w.safetensors"
    save_weights(path, {prefix + name: tensor for name, tensor in network().state_dict().items()})
    found = network()
    nn.init.zeros_(found[3].weight)
    assert load_into(found, path) == prefix
    assert torch.equal(found[3].weight, network()[3].weight)
    files.load_into(network(), path)
    assert f"{path}: all names begin with {prefix!r}, which was left out" in capsys.readouterr().err


def test_a_network_whose_names_have_such_a_prefix_keeps_it(tmp_path):
    inner = nn.ModuleDict({"model": network()})
    save_weights(tmp_path / "w.safetensors", inner.state_dict())
    assert load_into(inner, tmp_path / "w.safetensors") == ""


def test_other_names_are_another_network(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, {f"backbone.{name}": tensor for name, tensor in network().state_dict().items()})
    with pytest.raises(OtherWeightsError, match=r"another network .*backbone"):
        load_into(network(), path)
    with pytest.raises(TangleNASError, match=r"another network than the config and architecture.json say \(.*backbone"):
        files.load_into(network(), path)


def test_the_first_names_that_differ_are_told_whole(tmp_path):
    path, found = tmp_path / "w.safetensors", nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    save_weights(path, {f"blocks.{number}.weight": torch.zeros(2) for number in range(4)} | {"0.bias": torch.zeros(3)})
    with pytest.raises(OtherWeightsError) as refusal:
        load_into(found, path)
    assert str(refusal.value).partition(" (")[2] == (
        "it lacks 0.weight, 1.weight, 1.bias and 36 more; the network has no blocks.0.weight, blocks.1.weight, "
        "blocks.2.weight and 1 more; the shapes differ: 0.bias is (3,) there and (2,) here)"
    )


def safetensors(header: bytes, data: bytes = b"1234") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
DAMAGED = {
    "a shape of 2^63": safetensors(b'{"a":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]}}'),
    "an empty one of 2^63": safetensors(
        b'{"a":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}', b""
    ),
    "a shape of 2^64": safetensors(b'{"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,4]}}'),
    "a name that is not UTF-8": safetensors(b'{"a\xff":' + ENTRY + b"}"),
    "a name of half a character": safetensors(b'{"\\ud800":' + ENTRY + b"}"),
    "a name twice": safetensors(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}"),
    "a deep header": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "no header": b"abc",
    "nothing": b"",
    "a long header": struct.pack("<Q", 2**63) + b"{}",
    "text": b"these are no weights at all, but a text",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_sentence_and_nobody_is_told_to_delete_it(tmp_path, case):
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(TangleNASError, match=r"cannot read .*as a safetensors file") as caught:
        load_weights(path)
    assert "delete" not in str(caught.value).lower() and "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_is_told_how_to_convert(tmp_path, zipped):
    torch.save(network().state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(TangleNASError, match=r"a file of torch\.save.*weights_only=True"):
        load_weights(tmp_path / "w.pt")


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A function that exports what it is given as weights, and returns the command's result."""
    monkeypatch.chdir(tmp_path)
    space = tiny("toy_conv_macro")
    architecture = space.smallest()
    Path("architecture.json").write_text(architecture.to_json())

    def run(change):
        state = space.extract(architecture).state_dict()
        save_weights("w.safetensors", change(state))
        options = [word for key, value in TINY["toy_conv_macro"].items() for word in ("-o", f"{key}={value!r}")]
        options += ["--format", "torch", "--output", "exported", "--weights", "w.safetensors"]
        return CliRunner().invoke(main, ["export", "architecture.json", *options])

    return run


def test_export_takes_prefixed_weights_and_refuses_those_that_are_none(exported):
    result = exported(lambda state: {f"module.{name}": tensor for name, tensor in state.items()})
    assert result.exit_code == 0, result.output
    assert "all names begin with 'module.', which was left out" in result.stderr
    result = exported(lambda state: {name: torch.full_like(tensor, math.nan) for name, tensor in state.items()})
    assert result.exit_code == 2 and "values that are not finite in float32" in result.stderr
    result = exported(lambda state: {name: tensor.to(torch.int8) for name, tensor in state.items()})
    assert result.exit_code == 2 and "is of type int8, expected float32" in result.stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_json_cannot_hold_is_named(value):
    with pytest.raises(TangleNASError, match=r"test_loss is (nan|inf|-inf), which is no number that a file of metrics"):
        strict_json.dumps({"test_accuracy": 9.75, "test_loss": value})
    assert json.loads(strict_json.dumps({"test_accuracy": 9.75})) == {"test_accuracy": 9.75}


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        ('{"a": NaN}', "NaN is no number in JSON"),
        ('{"a": -Infinity}', "-Infinity is no number in JSON"),
        ('{"a": 1e999}', "1e999 is no number in JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "integer string conversion"),
    ],
)
def test_json_that_is_none_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        strict_json.loads(text)
    with pytest.raises(TangleNASError, match="not an architecture file"):
        Architecture.from_json(text)
