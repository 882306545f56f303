"""Stages make inputs as they were made where the weights that they take were trained."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import gin
import pytest
from project import set_params
from stages import MAIN, arguments, forget_settings

from tanglenas_datasets.digits import Digits
from tanglenas_engine import create_space
from tanglenas_engine.errors import TangleNASError
from tanglenas_engine.pipeline.config.reader import configured
from tanglenas_engine.pipeline.files import SUPERNET, WEIGHTS, load_into
from tanglenas_engine.pipeline.inputs.same_inputs import compare, input_options
from tanglenas_engine.runtime.progress import ConsoleProgress, SilentProgress
from tanglenas_engine.runtime.weights import load_weights, save_weights, weights_metadata

MADE = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
MADE |= {"in_channels": 3, "image_size": 32}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    forget_settings(monkeypatch)
    yield
    gin.clear_config()


def images(size: int = 32, **changes) -> SimpleNamespace:
    """A dataset of images, of which nothing but the description of its inputs is there."""
    described = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    config = {**described, "input_size": (3, size, size), **changes}
    return SimpleNamespace(name="images", input_config=lambda: config)


@pytest.mark.parametrize("stage", ["discretize", "evaluate"])
def test_weights_of_other_inputs_are_refused_with_the_place_to_bind_these(
    done: Path, refused, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(Digits, "mean", (0.125,))
    message = refused(stage)
    assert f"mean 0.305, and {stage} has mean 0.125: make them alike, by options in gin/datasets/digits.gin" in message


def test_a_retrain_takes_the_weights_of_a_search_with_the_same_inputs_alone(
    done: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "std", (0.25,))
    assert "the supernet in out/search" in refused("retrain", "retrain.mode = 'finetune'")
    MAIN["retrain"](arguments(done, "retrain"))  # from scratch
    MAIN["evaluate"](arguments(done, "evaluate"))


@pytest.mark.parametrize("stage", ["discretize", "evaluate"])
def test_a_search_says_that_a_later_stage_has_images_of_another_size(done: Path, capsys, stage: str) -> None:
    with (done / "gin" / "demo" / f"{stage}.gin").open("a") as file:
        file.write("\ncreate_dataset.image_size = 16\n")
    MAIN["search"](arguments(done, "search"))
    told = capsys.readouterr().out
    assert ("discretize will refuse this search: " in told) == (stage == "discretize")
    assert f"trained on inputs with image_size 8, and {stage} has image_size 16" in told


@pytest.mark.parametrize(
    "params, limit",
    [
        ({"discretize": {"max_macs": 1_300_000, "max_params": 10_000_000}}, "1,300,000"),
        ({"search": {"objective": "macs", "target_share": 0.6}}, ""),
        ({"search": {"objective": "macs", "target": 1_200_000.7}}, "1,200,000"),
        ({"search": {"objective": "macs", "target": 1_200_000}, "discretize": {"max_macs": 1_300_000}}, "1,300,000"),
    ],
)
def test_a_search_says_that_retrain_may_exceed_the_limit_of_discretize(
    done: Path, capsys, params: dict[str, dict[str, object]], limit: str
) -> None:
    set_params(done, **params)
    for stage in ("retrain", "evaluate"):
        with (done / "gin" / "demo" / f"{stage}.gin").open("a") as file:
            file.write("\ncreate_dataset.image_size = 16\n")
    MAIN["search"](arguments(done, "search"))
    told = capsys.readouterr().out
    assert f"{limit} MACs for networks as in the search with image_size 8. Retrain builds larger" in told
    assert "10,000,000" not in told


@pytest.mark.parametrize("change", [{"size": 64}, {"crop_pct": 0.875}])
def test_evaluate_may_have_other_sizes_and_says_so(capsys, change: dict[str, float]) -> None:
    """Networks are better on images a bit larger than those of their training (Touvron et al., 2019)."""
    compare("evaluate", images(**change), MADE, "the network", ConsoleProgress())
    assert "the network was trained on inputs with " in capsys.readouterr().out


def test_a_network_from_scratch_may_have_other_images_than_the_search(done: Path, capsys) -> None:
    derived = json.loads(Path("metrics/discretize.json").read_text())
    Path("metrics/discretize.json").write_text(json.dumps({**derived, "limit_macs": derived["macs"]}))
    for stage in ("retrain", "evaluate"):
        with (done / "gin" / "demo" / f"{stage}.gin").open("a") as file:
            file.write("\ncreate_dataset.image_size = 16\n")
        MAIN[stage](arguments(done, stage))
        told = " ".join("".join(capsys.readouterr()).split())
        assert f"exceeds the limit of {derived['macs']:,}, which the architecture keeps at the sizes of the" in told
    assert json.loads(WEIGHTS.with_name("config.json").read_text())["pretrained_cfg"]["input_size"] == [1, 16, 16]


@pytest.mark.parametrize("larger", [("retrain", "evaluate"), ("evaluate",)], ids=" ".join)
def test_networks_with_position_embeddings_go_on_with_larger_images(done: Path, larger: tuple[str, ...]) -> None:
    for stage in larger:
        with (done / "gin" / "demo" / f"{stage}.gin").open("a") as file:
            file.write("\ncreate_dataset.image_size = 16\n")
    MAIN["retrain"]([*arguments(done, "retrain"), "retrain.mode = 'finetune'"])
    MAIN["evaluate"](arguments(done, "evaluate"))
    size = 16 if "retrain" in larger else 8
    assert json.loads(WEIGHTS.with_name("config.json").read_text())["pretrained_cfg"]["input_size"] == [1, size, size]
    evaluated = json.loads(Path("metrics/evaluate.json").read_text())
    assert evaluated["macs"] > json.loads(Path("metrics/discretize.json").read_text())["macs"]


def test_a_search_takes_a_finetune_on_larger_images(done: Path, capsys) -> None:
    set_params(done, retrain={"mode": "finetune"})
    for stage in ("retrain", "evaluate"):
        with (done / "gin" / "demo" / f"{stage}.gin").open("a") as file:
            file.write("\ncreate_dataset.image_size = 16\n")
    MAIN["search"](arguments(done, "search"))


def test_weights_that_say_nothing_of_their_inputs_are_taken(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = weights_metadata(SUPERNET)
    assert json.loads(metadata.pop("inputs")) == input_options(Digits())
    save_weights(SUPERNET, load_weights(SUPERNET), metadata)
    WEIGHTS.with_name("config.json").unlink()
    monkeypatch.setattr(Digits, "mean", (0.125,))
    for stage in ("evaluate", "discretize"):  # the other way round, the network may be another one
        MAIN[stage](arguments(done, stage))


@pytest.mark.parametrize(
    "stage, mode, dataset, told",
    [
        ("retrain", "finetune", images(64), ""),  # progressive resizing
        ("retrain", "finetune", images(crop_pct=0.875), ""),
        ("retrain", "finetune", images(mean=(0.4, 0.5, 0.5)), "mean 0.5, and retrain has mean [0.4, 0.5, 0.5]"),
        ("retrain", "inherit", images(64), "image_size 32, and retrain has image_size 64: make them alike"),
        ("discretize", "scratch", images(64), "image_size 32, and discretize has image_size 64"),
        ("discretize", "scratch", images(crop_pct=0.875), "crop_pct 1.0, and discretize has crop_pct 0.875"),
        ("discretize", "scratch", images(mean=(0.50001, 0.5, 0.5)), ""),  # the last digits of a mean of images
        ("evaluate", "scratch", images(std=(1.0,) * 3), "std 0.5, and evaluate has std 1.0"),
        ("evaluate", "scratch", images(interpolation="bicubic"), "interpolation bilinear, and evaluate has"),
        ("evaluate", "scratch", SimpleNamespace(name="text", input_config=lambda: {"block_size": 8}), ""),
    ],
)
def test_weights_that_are_trained_further_may_have_other_sizes(stage: str, mode: str, dataset, told: str) -> None:
    with configured([f"retrain.mode = '{mode}'"]):
        if told:
            with pytest.raises(TangleNASError) as error:
                compare(stage, dataset, MADE, "the network", SilentProgress())
            assert told in str(error.value)
        else:
            compare(stage, dataset, MADE, "the network", SilentProgress())


OWN = {"eval_transform": "mine.centred", "in_channels": 3, "image_size": 32}


def own_images(name: str) -> SimpleNamespace:
    return SimpleNamespace(
        name="image_folder", input_config=lambda: {"eval_transform": name, "input_size": (3, 32, 32), "num_classes": 2}
    )


@pytest.mark.parametrize("stage", ["discretize", "evaluate"])
@pytest.mark.parametrize(
    "dataset, made, told",
    [
        (
            own_images("mine.lying"),
            MADE,
            "trained on inputs with mean 0.5, and {} has eval_transform mine.lying",
        ),
        (images(), OWN, "trained on inputs with eval_transform mine.centred, and {} has mean 0.5"),
        (images(), {"mean": [0.5] * 3, "in_channels": 3}, ""),  # a plugin's dataset may not say all
        (own_images("mine.lying"), OWN, "eval_transform mine.centred, and {} has eval_transform mine.lying: make them"),
        (own_images("mine.centred"), OWN, ""),
        (own_images("mine.centred"), {"in_channels": 3, "image_size": 32}, ""),  # of an earlier version
    ],
)
def test_a_transform_of_ones_own_is_another_than_none_and_than_that_of_another_name(
    stage: str, dataset, made, told: str
) -> None:
    with nullcontext() if not told else pytest.raises(TangleNASError) as error:
        compare(stage, dataset, made, "the network", SilentProgress())
    assert not told or told.format(stage) in str(error.value)


@pytest.mark.parametrize(
    "name, there, here, standalone, told",
    [
        ("autoformer_nano", {"image_size": 16}, {"image_size": 32}, True, "bind create_space.patch_size as it was"),
        ("autoformer_nano", {"image_size": 16}, {"image_size": 32}, False, "bind create_space.patch_size as it was"),
        ("resnet_nano", {"num_classes": 2, "image_size": 8}, {"num_classes": 3, "image_size": 16}, True,
         "have the image size of their training"),
        ("gpt_nano", {"vocab_size": 8}, {"vocab_size": 9}, True, ""),
        ("gpt_nano", {"vocab_size": 8}, {"vocab_size": 9}, None, "pipelines/evaluate.py is of an earlier version"),
    ],
)  # fmt: skip
def test_weights_of_another_network_are_refused_with_the_remedy_for_their_space(
    tmp_path: Path, name: str, there: dict[str, int], here: dict[str, int], standalone: bool | None, told: str
) -> None:
    """An earlier pipelines/evaluate.py does not pass the space of a standalone network."""
    trained, space = (create_space(name, **options) for options in (there, here))
    networks = [it if standalone is False else it.standalone(it.smallest()) for it in (trained, space)]
    save_weights(tmp_path / "model.safetensors", networks[0].state_dict())
    with pytest.raises(TangleNASError, match="holds the weights of another network") as error:
        load_into(networks[1], tmp_path / "model.safetensors", space=space if standalone else None)
    said = str(error.value)
    assert told in said and ("image_size" in said) is ("image_size" in here)
    assert said.endswith("or `dvc repro`") is (told == "")
