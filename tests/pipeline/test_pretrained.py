"""The weights that a search starts from: by a path or by a name on a hub, and in the lineage of what was found."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gin
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from project import set_params
from spaces import vit
from stages import arguments, forget_settings
from torch import nn

from pipelines import search
from tanglenas_engine import create_dataset, create_space
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline import write_environment
from tanglenas_engine.pipeline.config.configurables import create
from tanglenas_engine.pipeline.config.reader import configure
from tanglenas_engine.pipeline.files import SUPERNET, state_before_search
from tanglenas_engine.pipeline.inputs.pretrained import located, pretrained
from tanglenas_engine.runtime.weights import OtherWeightsError, save_weights, weights_digest, weights_metadata

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
"""MLflow's own models, on SQLAlchemy 2.1."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    forget_settings(monkeypatch)
    yield
    gin.clear_config()


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The repositories that are asked for; a folder of the hub's cache stands for each."""
    found = []

    def snapshot_download(repository, allow_patterns):
        found.append(repository)
        space = vit()
        space.export(space.extract(space.largest()), space.largest(), tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


@pytest.mark.parametrize(
    "weights, repository",
    [
        ("timm:deit_tiny_patch16_224", "timm/deit_tiny_patch16_224.fb_in1k"),
        ("timm:mobilenetv3_large_100.ra_in1k", "timm/mobilenetv3_large_100.ra_in1k"),
        ("hf:someone/their-vit", "someone/their-vit"),
    ],
)
def test_a_name_on_a_hub_is_a_folder_in_the_cache(asked, weights, repository, tmp_path, capsys):
    assert located(weights) == tmp_path / "cache" and asked == [repository]
    space = vit()
    assert pretrained(space, create_dataset("digits"), weights) == weights_digest(tmp_path / "cache")
    assert f"{weights}: the largest network's outputs equal" in capsys.readouterr().err


def test_a_repository_without_safetensors_is_refused(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(TangleNASError, match="only weights that may run code"):
        located("hf:someone/pickled")


@pytest.mark.parametrize(
    "weights, message",
    [
        ("timm:deit_tinny_patch16_224", "timm has no network 'deit_tinny_patch16_224'. Did you mean 'deit_tiny_patch"),
        ("timm:deit_tiny_patch16_224.mine", "timm has no weights 'deit_tiny_patch16_224.mine' to download: .*fb_in1k"),
        ("hf:not a name", "cannot download hf:not a name"),
        ("elsewhere/model.safetensors", "no weights at elsewhere/model.safetensors"),
    ],
)
def test_a_source_that_is_none_is_one_sentence(weights, message):
    with pytest.raises(TangleNASError, match=message):
        pretrained(vit(), create_dataset("digits"), weights)


def test_without_a_network_it_is_said_how_to_bring_the_weights(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        TangleNASError, match=r"hf download timm/deit_tiny_patch16_224\.fb_in1k --local-dir FOLDER"
    ) as it:
        located("timm:deit_tiny_patch16_224")
    assert LocalEntryNotFoundError.__name__ in str(it.value) and "\n" not in str(it.value)


@pytest.mark.parametrize("same", [True, False])
def test_images_that_were_normalised_otherwise_are_told(tmp_path, capsys, same):
    """The digits have a mean of 0.305."""
    digits, space = create_dataset("digits"), vit()
    others = SimpleNamespace(
        input_config=lambda: {**digits.input_config(), "mean": [0.5], "std": [0.5]}, files=digits.files
    )
    space.export(space.extract(space.largest()), space.largest(), tmp_path, digits if same else others)
    pretrained(space, digits, str(tmp_path))
    told = capsys.readouterr().err
    assert "outputs equal" in told
    assert ("normalised with mean [0.5] and std [0.5], and the dataset digits has mean [0.305" in told) is not same


def of_a_size(image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, 32), nn.ReLU(), nn.Linear(32, 10))


def of_a_model(image_size, in_channels, trained=False, mean=(0.5,)):
    """A model with timm's attribute, which untrained models have, too."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * image_size**2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    )
    if trained:
        nn.init.uniform_(network[2].weight)
        nn.init.uniform_(network[2].bias)
    network.pretrained_cfg = {"mean": mean, "std": (0.5,) * len(mean)}
    return network


@pytest.mark.parametrize(
    "arguments, mean",
    [
        ({"trained": True}, "[0.5]"),
        ({"trained": True, "mean": (0.4, 0.6, 0.8)}, "[0.6]"),
        ({"trained": True, "mean": "unknown"}, ""),
        ({}, ""),
    ],
)
def test_images_that_were_normalised_otherwise_for_the_weights_of_a_model_are_told(arguments, mean, capsys):
    digits = create_dataset("digits")
    space = create_space("elasticized", model=of_a_model, arguments=arguments, **digits.space_options())
    assert pretrained(space, digits) == ""
    told = capsys.readouterr().err
    expected = f"elasticized: the network was trained on images normalised with mean {mean} and std [0.5]"
    assert told.startswith(expected) if mean else not told


PATCHES = dict(embed_dim=(8, 16), depth=(1,), num_heads=(2, 4), mlp_ratio=(2,), head_dim=4, patch_size=2)
GPT = dict(layers=(1,), embed_dim=(8, 16), num_heads=(2,), mlp_ratio=(2,))
OPTION = r"The largest options of this space are .*create_space\.OPTION"


@pytest.mark.parametrize(
    "space, options, theirs, remedy",
    [
        (
            "autoformer_nano",
            PATCHES,
            {"in_channels": 3},
            r"The dataset 'digits' gives the space in_channels = 1, and the network of the weights has 3: choose "
            r"image_folder or .*, and set create_dataset\.in_channels = 3, or choose other weights$",
        ),
        ("autoformer_nano", PATCHES, {"embed_dim": (24,), "in_channels": 3}, rf"in_channels = 3, .*\. {OPTION}"),
        ("autoformer_nano", PATCHES, {"embed_dim": (24,), "num_classes": 5}, rf"and \d+ more\. {OPTION}"),
        ("autoformer_nano", PATCHES, {"depth": (2,)}, rf"has no blocks\.1\.\S+ and \d+ more\. {OPTION}"),
        (
            "elasticized",
            {"model": of_a_size},
            {"image_size": 16},
            r"image_size = 8, and the network of the weights has another one: set create_dataset\.image_size to that",
        ),
        (
            "elasticized",
            {"model": of_a_model},
            {"in_channels": 3},
            r"image_size = 8 and in_channels = 1, and the network of the weights has others: set create_dataset\.image"
            r"_size to that of the weights, or choose image_folder or .*, and set create_dataset\.in_channels to that",
        ),
        (
            "gpt_nano",
            GPT,
            {"vocab_size": 50},
            r"vocab_size = \d+, and the network of the weights has 50: set create_dataset\.tokenizer to that of the we",
        ),
        (
            "gpt_nano",
            GPT,
            {"block_size": 4},
            r"block_size = 8, .* weights has 4: set create_dataset\.block_size = 4, or",
        ),
    ],
)
def test_weights_that_the_dataset_does_not_fit_are_refused_with_its_option(space, options, theirs, remedy, tmp_path):
    (tmp_path / "all.txt").write_text("def f(x):\n    return x + 1\n" * 60)
    text = {"root": str(tmp_path / "all.txt"), "block_size": 8}
    dataset = create_dataset("text", **text) if space == "gpt_nano" else create_dataset("digits")
    options = {**dataset.space_options(), **options}
    save_weights(tmp_path / "model.safetensors", create_space(space, **{**options, **theirs}).state_dict())
    with pytest.raises(OtherWeightsError, match=remedy):
        pretrained(create_space(space, **options), dataset, str(tmp_path))


def test_a_search_starts_from_weights_and_its_lineage_has_their_digest(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    project = shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(project)
    configure(arguments(project, "search"))
    _, space, _ = create()
    for parameter in space.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    space.export(space.extract(space.largest()), space.largest(), Path("start"))
    set_params(project, search={"weights": "start", "epochs": 1, "warmup_epochs": 0})

    search.main(arguments(project, "search"))
    told = capsys.readouterr().err
    assert "start: the largest network's outputs equal" in told
    assert weights_metadata(SUPERNET)["weights_sha256"] == weights_digest("start")

    names = ["autoformer_nano", "drnas", "digits"]
    write_environment([*names, "start"])
    first = Path("environment.json").read_text()
    save_weights("start/model.safetensors", space.standalone(space.largest()).state_dict())
    write_environment([*names, "start"])
    assert Path("environment.json").read_text() != first
    for source in ([], ["scratch"], ["timm:deit_tiny_patch16_224"]):
        write_environment([*names, *source])
        assert "weights" not in json.loads(Path("environment.json").read_text())


def test_a_new_space_has_not_the_state_before_a_search_from_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = vit()
    save_weights(SUPERNET, {**space.state_dict()}, {})
    before = state_before_search(space)
    with torch.no_grad():
        next(space.parameters()).add_(1.0)
    assert before.keys() == space.state_dict().keys()
    assert not torch.equal(before[next(iter(before))], next(iter(space.state_dict().values())))
    save_weights(SUPERNET, {**space.state_dict()}, {"weights_sha256": "12ab"})
    assert state_before_search(space) is None
