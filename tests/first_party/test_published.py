"""The largest network of a preset is the published one: with its weights, it computes what timm's or GPT-2 computes."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny import tiny
from torch import nn

from tanglenas_engine import create_space, load_pretrained
from tanglenas_engine.errors import TangleNASError
from tanglenas_gpt.network import to_hugging_face


def randomised(network):
    torch.manual_seed(2)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(
                torch.randn_like(tensor).mul_(0.05).abs_() if "var" in name else 0.05 * torch.randn_like(tensor)
            )
    return network.eval()


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.slow
def test_a_vit_is_timm_s_deit(size):
    """At reduced depth and image size, which change neither names nor widths."""
    theirs = randomised(timm.create_model(f"deit_{size}_patch16_224", depth=2, img_size=32, num_classes=7))
    space = create_space(f"vit_{size}", depth=(1, 2), image_size=32, num_classes=7).eval()
    assert [n for n, _ in space.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    space.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(space(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(space.extract(space.largest())(x), theirs(x))


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.slow
def test_a_mobilenet_is_timm_s(size):
    theirs = randomised(timm.create_model(f"mobilenetv3_{size}_100", num_classes=7))
    space = create_space(f"mobilenetv3_{size}", num_classes=7, image_size=96).eval()
    assert [n for n, _ in space.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    space.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(space(x), theirs(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(space.extract(space.largest())(x), theirs(x))


@pytest.mark.parametrize("name, depths", [("resnet18", "layers"), ("resnet50", "layers"), ("convnext_tiny", "depths")])
def test_a_convolutional_network_computes_the_bits_of_timm_s(name, depths):
    """At reduced depth and image size, which change neither names nor widths. New weights have timm's spread, too."""
    theirs = timm.create_model(name, num_classes=7, **{depths: (1, 1, 2, 1)})
    options = {"kernel_size": (7,)} if name == "convnext_tiny" else {}
    space = create_space(name, num_classes=7, image_size=64, depth=((1,), (1,), (1, 2), (1,)), **options).eval()
    assert [n for n, _ in space.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for key, parameter in theirs.named_parameters():
        if parameter.numel() > 5000 or parameter.std() == 0:
            torch.testing.assert_close(space.get_parameter(key).std(), parameter.std(), rtol=0.1, atol=0)
            torch.testing.assert_close(space.get_parameter(key).mean(), parameter.mean(), rtol=1e-5, atol=0.01)
    space.load_state_dict(randomised(theirs).state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(space(x), theirs(x))
        assert torch.equal(space.extract(space.largest())(x), theirs(x))


@pytest.mark.parametrize("name", ["mobilenetv3_large", "resnet18", "resnet50", "convnext_tiny"])
def test_architectures_inside_a_network_export_as_timm_s(tmp_path, name):
    space = randomised(tiny(name))
    for seed in range(3):
        architecture = space.sample(torch.Generator().manual_seed(seed))
        network = space.extract(architecture)
        space.export(network, architecture, tmp_path / str(seed))
        x = space.example_input(2)
        loaded = timm.create_model(f"local-dir:{tmp_path / str(seed)}", pretrained=True).eval()
        assert torch.equal(loaded(x), network(x))
        torch.testing.assert_close(space.select(architecture)(x), network(x), rtol=1e-5, atol=1e-5)
        space.release()


@pytest.mark.slow
def test_features_of_an_exported_resnet_have_its_channels(tmp_path):
    space = randomised(tiny("resnet50"))
    architecture = space.smallest()
    space.export(space.extract(architecture), architecture, tmp_path)
    backbone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    assert backbone.feature_info.channels() == [it.shape[1] for it in backbone(space.example_input(1))]


@pytest.mark.slow
def test_a_resnet_starts_from_a_folder_that_timm_wrote(tmp_path):
    theirs = randomised(timm.create_model("resnet18", num_classes=7, in_chans=1))
    save_for_hf(theirs, tmp_path, model_args={"in_chans": 1}, safe_serialization=True)
    space = create_space("resnet18", num_classes=10, in_channels=1, image_size=32)
    left_out, equal = load_pretrained(space, tmp_path)
    assert "fc.weight" in left_out and "outputs equal" in equal


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet18", {"block": "bottle"}, "unknown block 'bottle'. Did you mean 'bottleneck'"),
        ("resnet18", {"hidden_share": (0.25, 0.5)}, "hidden_share has the options .* 1, the network itself"),
        ("resnet50", {"channels": (8, 16, 32)}, "depth has 4 stages and channels 3: expected 4 of each"),
        ("convnext_tiny", {"patch_size": 2}, "patch_size is 2, expected 4 or"),
        ("convnext_tiny", {"kernel_size": (4, 7)}, "only odd kernels"),
        ("convnext_tiny", {"image_size": 16}, "shrink to 2 in the last stage.*use at least 24 pixels"),
    ],
)
def test_options_that_make_no_convolutional_network_are_refused(name, options, message):
    with pytest.raises(TangleNASError, match=message):
        tiny(name, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"expand_share": (0.5, 0.75)}, "1, the network itself, is the largest"),
        (
            {"blocks": ("ds_r1_k3_s1_e1_c8_nre", "er_r1_k3_s2_e4_c8", "cn_r1_k1_s1_c16")},
            "block 'er_r1_.* cannot be read",
        ),
    ],
)
def test_options_that_make_no_published_network_are_refused(options, message):
    with pytest.raises(TangleNASError, match=message):
        tiny("mobilenetv3_large", **options)


@pytest.mark.parametrize("named", ["head", "body"])
@pytest.mark.slow
def test_gpt_2_starts_from_a_file_of_transformers(tmp_path, named):
    """The published files hold the body alone, with causal masks among the weights."""
    options = dict(embed_dim=(8, 16), num_heads=(1, 2), layers=(1, 2), vocab_size=11, block_size=6)
    theirs = randomised(create_space("gpt2", **{**options, "block_size": 9}))
    weights, settings = to_hugging_face(theirs.state_dict(), theirs.standalone(theirs.largest()).config)
    assert settings["activation_function"] == "gelu_new"
    state = {name: tensor.contiguous() for name, tensor in weights.items()}
    if named == "body":
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, 9, 9)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    space = create_space("gpt2", **options).eval()
    note = load_pretrained(space, tmp_path)[-1]
    ids = torch.randint(11, (3, 6))
    torch.testing.assert_close(space(ids), theirs(ids), rtol=1e-5, atol=1e-5)
    assert "not compared" in note, note
    assert isinstance(space.blocks[0].act, nn.GELU)
