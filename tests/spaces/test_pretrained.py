"""A space starts from a trained network: its largest network then computes what that network computes."""

import hashlib
import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from spaces import vit
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny

from tanglenas_engine import elasticize
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.runtime.weights import INDEX, OtherWeightsError, load_into, save_weights, weights_digest
from tanglenas_engine.spaces.pretrained import load_pretrained

SHAPE = dict(embed_dim=(8, 16), depth=(1, 3), num_heads=(2, 4), mlp_ratio=(4, 2), head_dim=4, image_size=8)
MODEL = dict(
    img_size=8, patch_size=2, in_chans=1, num_classes=3, embed_dim=16, depth=3, num_heads=4, mlp_ratio=4,
    global_pool="token",
)  # fmt: skip


def folder_of_timm(folder, **changes):
    """A folder as timm writes it, of one of timm's own networks with random weights."""
    options = {**MODEL, **changes}
    classes, pool = options.pop("num_classes"), options.pop("global_pool")
    torch.manual_seed(1)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=classes, global_pool=pool, **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(network, folder, model_args=options, safe_serialization=True)
    return network.eval()


def space(**options):
    return vit(**{**SHAPE, "global_pool": "token", **options})


def test_the_largest_network_is_the_one_of_a_folder_that_timm_wrote(tmp_path):
    network, found = folder_of_timm(tmp_path), space()
    (note,) = load_pretrained(found, tmp_path)
    assert "outputs equal those of the network" in note
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(found.eval()(x), network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "theirs, ours, reason",
    [
        ({}, {"global_pool": "avg"}, "global_pool is 'token' there and 'avg' here. Correct"),
        ({"act_layer": "silu"}, {}, "blocks.0.mlp.act is SiLU there and GELU here"),
        ({"num_heads": 2}, {}, "blocks.0.attn.num_heads is 2 there and 4 here"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_differs_is_named_after_the_outputs_differed(tmp_path, theirs, ours, reason, training):
    """A search loads weights into a space in train mode, which is no difference between the networks."""
    folder_of_timm(tmp_path, **theirs)
    with pytest.raises(OtherWeightsError, match=f"The likely reason is {re.escape(reason)}"):
        load_pretrained(space(**ours).train(training), tmp_path)


def test_a_head_of_other_classes_is_left_out_and_the_rest_is_compared(tmp_path):
    network, found = folder_of_timm(tmp_path, num_classes=7), space()
    head = found.head.weight.clone()
    first, second = load_pretrained(found, tmp_path)
    assert "head.weight" in first and "another number of classes" in first and "equal" in second
    assert torch.equal(found.head.weight, head)
    assert torch.equal(found.norm.weight, network.norm.weight)


def test_a_head_of_other_classes_is_left_out_of_a_model_s_space_too(tmp_path):
    def model(classes):
        return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, classes))

    save_file(model(7).state_dict(), tmp_path / "w.safetensors")
    note, _ = load_pretrained(elasticize(model(3), torch.randn(2, 8)), tmp_path / "w.safetensors")
    assert note == "the head (2.weight, 2.bias) has another number of classes, so it was left out and starts untrained"


def test_a_head_that_is_missing_is_told_and_a_part_of_one_is_refused(tmp_path):
    folder_of_timm(tmp_path, num_classes=0)
    first, second = load_pretrained(space(), tmp_path)
    assert first == "the head (head.weight, head.bias) is not among the weights, so it starts untrained"
    assert "equal" in second
    folder_of_timm(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != "head.bias"}, file)
    with pytest.raises(OtherWeightsError, match=r"it lacks head\.bias\."):
        load_pretrained(space(), tmp_path)


def test_positions_of_another_grid_are_resampled(tmp_path):
    folder_of_timm(tmp_path, img_size=12)
    found = space()
    assert "equal those" in load_pretrained(found, tmp_path)[-1]
    assert found.pos_embed.shape == (1, 17, 16)


def test_a_folder_that_was_exported_starts_a_search_again(tmp_path):
    found = space()
    found.export(found.extract(found.largest()), found.largest(), tmp_path)
    assert "equal those" in load_pretrained(space(), tmp_path)[-1]
    gpt = tiny("gpt_nano")
    gpt.export(gpt.extract(gpt.largest()), gpt.largest(), tmp_path / "gpt")
    assert "equal those" in load_pretrained(tiny("gpt_nano"), tmp_path / "gpt")[-1]


@pytest.mark.parametrize("name", ["toy_conv_macro", "gpt_nano", "mobilenetv3_nano", "nb201_nano"])
@pytest.mark.slow
def test_a_supernet_starts_from_another_s_file(tmp_path, name):
    there, here = tiny(name), tiny(name)
    save_weights(tmp_path / "supernet.safetensors", {f"module.{k}": v for k, v in there.state_dict().items()})
    prefix, alone = load_pretrained(here, tmp_path / "supernet.safetensors")
    assert "'module.'" in prefix and "a file alone" in alone
    assert all(torch.equal(a, b) for a, b in zip(there.state_dict().values(), here.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_weights_of_a_wrapper_are_compared_too(tmp_path, prefix):
    """timm knows some prefixes and not others."""
    folder_of_timm(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    first, second = load_pretrained(space(), tmp_path)
    assert repr(prefix) in first and f"outputs equal those of the network in {tmp_path}" in second
    with pytest.raises(OtherWeightsError, match=re.escape(f"the weights of {tmp_path} fit, but the outputs")):
        load_pretrained(space(global_pool="avg"), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_converted_and_it_is_said(tmp_path, dtype):
    folder_of_timm(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    found = space()
    first, second = load_pretrained(found, tmp_path)
    assert f"weights in {str(dtype)[6:]} were converted to float32" in first and "equal" in second
    assert found.head.weight.dtype == torch.float32


@pytest.mark.parametrize("load", [load_pretrained, load_into])
def test_tied_tensors_that_differ_are_refused(tmp_path, load):
    found = tiny("gpt_nano")
    state = found.state_dict()
    save_weights(tmp_path / "w.safetensors", {**state, "lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(OtherWeightsError, match=r"other numbers in wte\.weight than in lm_head\.weight.*without tied"):
        load(found, tmp_path / "w.safetensors")


@pytest.mark.parametrize("load", [load_pretrained, load_into])
def test_tied_tensors_may_have_their_numbers_in_two_types_or_zeros_of_two_signs(tmp_path, load):
    found = tiny("gpt_nano")
    state = found.state_dict()
    half = state["lm_head.weight"].half()
    save_weights(tmp_path / "w.safetensors", {**state, "wte.weight": half.float(), "lm_head.weight": half})
    load(found, tmp_path / "w.safetensors")
    save_weights(tmp_path / "w.safetensors", {**state, "wte.weight": 0 * half, "lm_head.weight": -0.0 * half})
    load(found, tmp_path / "w.safetensors")
    assert not found.wte.weight.any()


def test_a_tied_head_without_a_name_in_the_file_is_not_said_to_be_missing(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up = torch.nn.Embedding(20, 16), torch.nn.Linear(16, 32)
            self.down, self.head = torch.nn.Linear(32, 16), torch.nn.Linear(16, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x):
            return self.head(self.down(self.up(self.table(x)).relu()))

    found = elasticize(Model(), torch.randint(20, (2, 6)))
    state = {name: tensor for name, tensor in Model().state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "w.safetensors")
    (note,) = load_pretrained(found, tmp_path / "w.safetensors")
    assert "outputs were not compared" in note and torch.equal(found.head.weight, state["table.weight"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 2}, r"lacks blocks\.2\.norm1\.weight and \d+ more\. The largest options .* depth 3"),
        ({"depth": 4}, r"the space has no blocks\.3\.\S+ and \d+ more"),
        ({"embed_dim": 24}, r"cls_token is \(1, 1, 24\) there and \(1, 1, 16\) here and \d+ more"),
        ({"in_chans": 3}, r"proj\.weight is \(16, 3, 2, 2\) there and \(16, 1, 2, 2\) here\."),
    ],
)
def test_another_network_is_refused_with_what_would_fit(tmp_path, changes, message):
    folder_of_timm(tmp_path, **changes)
    with pytest.raises(OtherWeightsError, match=message + r".*create_space\.OPTION"):
        load_pretrained(space(), tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_weights(tmp_path / "w.safetensors", tiny("toy_conv_macro").state_dict())
    with pytest.raises(OtherWeightsError, match=r"lacks cls_token and \d+ more; the space has no conv1\.\w+"):
        load_pretrained(space(), tmp_path / "w.safetensors")


@pytest.fixture
def shards(tmp_path):
    """A folder with weights in two files."""
    folder_of_timm(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(names.values()):
        save_file({name: state[name] for name in state if names[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    return tmp_path


def test_a_folder_of_several_files(shards):
    found = space()
    assert "equal those" in load_pretrained(found, shards)[-1]
    with pytest.raises(OtherWeightsError, match="global_pool is 'token' there"):
        load_pretrained(space(global_pool="avg"), shards)
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TangleNASError, match=r"lacks 1 of the 2 files .* model-00002-of-00002\.safetensors"):
        load_pretrained(found, shards)


def test_several_files_without_their_index_are_refused(shards):
    (shards / INDEX).unlink()
    with pytest.raises(TangleNASError, match=rf"has model-00001-of-00002\.safetensors, but lacks {re.escape(INDEX)}"):
        load_pretrained(space(), shards)


def test_the_digest_is_that_of_the_file_as_sha256sum_says(tmp_path, shards):
    file = tmp_path / "alone" / "model.safetensors"
    save_weights(file, space().state_dict())
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights_digest(file) == weights_digest(file.parent) == expected
    both = weights_digest(shards)
    (shards / "model-00002-of-00002.safetensors").write_bytes(file.read_bytes())
    assert weights_digest(shards) != both != expected


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "../../w.safetensors"}}', "[]", "{}", "nothing"])
def test_an_index_that_is_none_is_refused(shards, text):
    (shards / INDEX).write_text(text)
    with pytest.raises(TangleNASError, match="no weight_map of tensors to files beside it"):
        load_pretrained(space(), shards)


def test_a_tensor_that_no_file_has_is_refused(shards):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(TangleNASError, match="names 'lost', which no file has"):
        load_pretrained(space(), shards)


def test_pickles_are_refused_with_how_to_convert_them(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(TangleNASError, match=r"safetensors\.torch\.save_file\(torch\.load"):
            load_pretrained(space(), path)
    with pytest.raises(TangleNASError, match=re.escape(f"no weights at {tmp_path / 'missing'}")):
        load_pretrained(space(), tmp_path / "missing")


def test_loading_draws_no_random_numbers(tmp_path):
    folder_of_timm(tmp_path)
    found = space()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_pretrained(found, tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert isinstance(found.standalone(found.largest()), VisionTransformer)


@pytest.mark.parametrize("content", ["[]", '{"architecture": null}', '"x"'])
def test_a_strange_config_is_told(tmp_path, content):
    space = tiny("resnet_nano")
    save_file({name: tensor.clone() for name, tensor in space.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    assert any("were not compared" in sentence for sentence in load_pretrained(space, tmp_path))


def test_a_head_of_no_shape_is_one_of_other_classes(tmp_path):
    space = tiny("resnet_nano")
    state = {name: tensor.clone() for name, tensor in space.state_dict().items()}
    before = space.get_submodule("fc").weight.clone()
    save_file({**state, "fc.bias": torch.tensor(1.0), "fc.weight": state["fc.weight"] + 1}, tmp_path / "a.safetensors")
    told = load_pretrained(space, tmp_path / "a.safetensors")
    assert any("fc.bias" in sentence for sentence in told)
    assert torch.equal(space.get_submodule("fc").weight, before)
