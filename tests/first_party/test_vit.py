"""AutoFormer is timm's vision transformer at its largest, and every architecture exports as a timm model."""

import copy
import json

import pytest
import timm
import torch
from spaces import SPACES, vit
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from tanglenas_engine import create_space
from tanglenas_engine.errors import TangleNASError
from tanglenas_vit.network import RelativePosition2D, tanglenas_vit

SHAPE = dict(embed_dim=(8, 16), depth=(1, 3), num_heads=(2, 4), mlp_ratio=(4, 2), head_dim=4)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_timm_checkpoint_of_the_largest_network_is_the_supernet(pool):
    theirs = VisionTransformer(
        img_size=8, patch_size=4, in_chans=3, num_classes=5, embed_dim=16, depth=3, num_heads=4, mlp_ratio=4,
        global_pool=pool, fc_norm=False,
    )  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    space = vit(**SHAPE, image_size=8, patch_size=4, in_channels=3, num_classes=5, global_pool=pool)
    assert [n for n, _ in space.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    space.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 3, 8, 8)
    space.eval(), theirs.eval()
    torch.testing.assert_close(space(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(space.select(space.largest())(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_an_extracted_network_is_timm_s_class_with_the_chosen_blocks():
    space = vit()
    architecture = space.architecture(embed_dim=8, depth=2, num_heads=[3, 1], mlp_ratio=[1.5, 2])
    network = space.extract(architecture)
    assert type(network) is VisionTransformer
    assert [block.attn.num_heads for block in network.blocks] == [3, 1]
    assert [tuple(block.attn.qkv.weight.shape) for block in network.blocks] == [(36, 8), (12, 8)]
    assert [block.mlp.fc1.out_features for block in network.blocks] == [12, 16]


def test_fresh_positions_are_not_drowned_by_the_patches():
    """Without positions, the mean over patches knows which patches there are, not where. A head of 0 learns late."""
    space = create_space("autoformer_nano")
    images = torch.randn(64, 1, 8, 8)
    for network in (space, space.standalone(space.largest()), space.standalone(space.smallest())):
        assert network.pos_embed.std().item() == pytest.approx(0.5, rel=0.1)
        assert network.pos_embed.std() > network.patch_embed(images).std() / 4
        assert network.head.weight.std().item() == pytest.approx(network.head.in_features**-0.5, rel=0.2)
    published = create_space("autoformer_nano", weight_init="jax")
    for network in (published, published.standalone(published.largest())):
        assert network.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
        assert not network.head.weight.any()
    with pytest.raises(TangleNASError, match="unknown weight_init 'wide'"):
        create_space("autoformer_nano", weight_init="wide")


@pytest.mark.parametrize("relative_position", [False, True])
def test_an_exported_folder_is_a_timm_model(tmp_path, relative_position):
    space = vit(relative_position=relative_position).eval()
    architecture = space.sample(torch.Generator().manual_seed(5))
    network = space.extract(architecture)
    space.export(network, architecture, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == tanglenas_vit.__name__
    assert config["model_args"]["num_heads"] == list(architecture.choices["num_heads"])

    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(loaded(x), network(x))
    torch.testing.assert_close(space.select(architecture)(x), loaded(x), rtol=1e-5, atol=1e-5)
    assert loaded.pretrained_cfg["input_size"] == (1, 4, 4)


def test_an_exported_model_can_be_given_a_new_head(tmp_path):
    space = vit()
    architecture = space.smallest()
    network = space.extract(architecture)
    space.export(network, architecture, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert loaded(torch.randn(2, 1, 4, 4)).shape == (2, 7)
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("class_token", [True, False])
def test_relative_positions_one_pair_of_tokens_at_a_time(class_token):
    rows, columns, D, furthest = 2, 4, 3, 2
    position = RelativePosition2D(D, (rows, columns), class_token, max_distance=furthest).double()
    places = [None] * class_token + [(r, c) for r in range(rows) for c in range(columns)]
    q, k, v = (torch.randn(1, 1, len(places), D, dtype=torch.float64) for _ in range(3))

    def index(here, there, axis):
        if here is None or there is None:
            return 0
        return max(-furthest, min(furthest, there[axis] - here[axis])) + furthest + 1

    def embedding(kind, here, there):
        vertical, horizontal = (getattr(position, f"{kind}_{d}") for d in ("vertical", "horizontal"))
        return vertical[index(here, there, 0)] + horizontal[index(here, there, 1)]

    expected = torch.zeros(len(places), D, dtype=torch.float64)
    for i, here in enumerate(places):
        logits = torch.stack(
            [q[0, 0, i] @ (k[0, 0, j] + embedding("key", here, there)) for j, there in enumerate(places)]
        )
        for j, weight in enumerate((logits / D**0.5).softmax(0)):
            expected[i] += weight * (v[0, 0, j] + embedding("value", here, places[j]))
    torch.testing.assert_close(position(q, k, v)[0, 0], expected)
    assert all(index(a, b, 1) != 0 for a in places for b in places if a and b)


def test_the_tables_of_relative_positions_are_not_part_of_an_architecture():
    space = SPACES["vit_relative"]()
    for network in (space.extract(space.smallest()), space.extract(space.largest())):
        assert network.blocks[0].attn.relative_position.key_vertical.shape == (30, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 5}, "images of 5 pixels do not divide into patches of 2: choose a patch_size"),
        ({"global_pool": "max"}, "global_pool is 'max', expected 'avg' or 'token'"),
        ({"sharing": "separate"}, "AutoFormer cannot do sharing 'separate'"),
    ],
)
def test_options_that_make_no_network_are_refused(options, message):
    with pytest.raises(TangleNASError, match=message):
        vit(**options)


def test_the_network_is_registered_with_timm():
    assert timm.is_model("tanglenas_vit")


@pytest.mark.parametrize("relative_position", [False, True])
def test_an_exported_folder_takes_images_of_another_size(tmp_path, relative_position):
    space = vit(relative_position=relative_position).eval()
    architecture = space.sample(torch.Generator().manual_seed(5))
    network = space.extract(architecture)
    space.export(network, architecture, tmp_path)
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(8, 6)).eval()
    assert torch.equal(larger.pos_embed, resample_abs_pos_embed(network.pos_embed, (4, 3), (2, 2)))
    x = torch.randn(2, 1, 8, 6)
    changed = copy.deepcopy(network)
    changed.set_input_size((8, 6))
    torch.testing.assert_close(changed(x), larger(x))


def test_an_exported_folder_resamples_for_each_image(tmp_path):
    space = vit().eval()
    network = space.extract(space.largest())
    space.export(network, space.largest(), tmp_path)
    dynamic = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, dynamic_img_size=True).eval()
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(dynamic(x), network(x))
    assert dynamic(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    relative = vit(relative_position=True)
    relative.export(relative.extract(relative.largest()), relative.largest(), tmp_path / "relative")
    with pytest.raises(ValueError, match="takes images of one size"):
        timm.create_model(f"local-dir:{tmp_path / 'relative'}", dynamic_img_size=True)


@pytest.mark.parametrize("relative_position", [False, True])
def test_an_exported_folder_gives_features(tmp_path, relative_position):
    space = vit(relative_position=relative_position).eval()
    network = space.extract(space.largest())
    space.export(network, space.largest(), tmp_path)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0, 1))
    x = torch.randn(2, 1, 4, 4)
    _, expected = network.forward_intermediates(x, indices=(0, 1))
    found = features.eval()(x)
    assert [tuple(one.shape) for one in found] == [(2, width, 2, 2) for width in features.feature_info.channels()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
