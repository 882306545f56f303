"""Options of plugins that are functions or classes, bound in gin files by reference."""

import random
from pathlib import Path
from textwrap import dedent

import gin
import numpy as np
import pytest
import torch
from PIL import Image
from project import lay_out
from timm.data import create_transform

from tanglenas_datasets.augment import recipe_of_timm
from tanglenas_datasets.image_folder import ImageFolder
from tanglenas_engine import TangleNASError, plugins
from tanglenas_engine.pipeline.config import configurables
from tanglenas_engine.pipeline.config.configurables import create, create_optimizer
from tanglenas_engine.pipeline.config.reader import configure

BASE = ['SPACE = "autoformer_nano"', 'OPTIMIZER = "drnas"', 'DATASET = "digits"', "SEED = 0"]

PLUGINS = """
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from tanglenas_datasets.digits import Digits
    from tanglenas_engine import hookimpl
    from tanglenas_gradient.drnas import DrNAS
    from tanglenas_objectives.counts import Params
    from tanglenas_vit.autoformer import AutoFormer


    def twice(x: Tensor) -> Tensor:
        return 2 * x


    def times(x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * x


    def of_two(x: Tensor, y: Tensor) -> Tensor:
        return x + y


    class Times:
        def __init__(self, factor: float = 1.0):
            self.factor = factor

        def __call__(self, x: Tensor) -> Tensor:
            return self.factor * x


    class Space(AutoFormer):
        def __init__(self, function: Callable[[Tensor], Tensor] | None = None, **options):
            super().__init__(**options)
            self.function = function


    class Optimizer(DrNAS):
        def __init__(self, function: Callable[[Tensor], Tensor] | None = None, **options):
            super().__init__(**options)
            self.function = function


    class Dataset(Digits):
        def __init__(self, function: Callable[[Tensor], Tensor] | None = None, **options):
            super().__init__(**options)
            self.function = function


    class Objective(Params):
        def __init__(self, function: Callable[[Tensor], Tensor] | None = None):
            super().__init__()
            self.function = function


    nano = dict(embed_dim=(32, 48), depth=(2, 3), num_heads=(2, 3), mlp_ratio=(2, 3), head_dim=16)


    @hookimpl
    def tanglenas_register_spaces(register):
        register("probe", Space, **nano)


    @hookimpl
    def tanglenas_register_optimizers(register):
        register("probe", Optimizer)


    @hookimpl
    def tanglenas_register_datasets(register):
        register("probe", Dataset)


    @hookimpl
    def tanglenas_register_objectives(register):
        register("probe", Objective)
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(lay_out(tmp_path, code=False))
    yield tmp_path
    gin.clear_config()


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A plugin of each kind, called probe, with an option that is a function."""
    site = tmp_path / "site"
    (site / "probe-1.dist-info").mkdir(parents=True)
    (site / "probe-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1\n")
    (site / "probe-1.dist-info" / "entry_points.txt").write_text("[tanglenas]\nprobe = probe\n")
    (site / "probe.py").write_text(dedent(PLUGINS))
    monkeypatch.syspath_prepend(site)
    plugins.manager.cache_clear()
    yield
    plugins.manager.cache_clear()


def made(kind: str, *bindings: str):
    """Make what a config of the probe names, as a stage does."""
    macros = [f'{name.upper()} = "probe"' for name in ("space", "optimizer", "dataset") if name == kind]
    configure([*BASE, *macros, *bindings])
    _, space, dataset = create()
    return {
        "space": lambda: space,
        "dataset": lambda: dataset,
        "optimizer": lambda: create_optimizer(name="probe"),
        "objective": lambda: configurables._objective("probe"),
    }[kind]()


KINDS = ["space", "optimizer", "dataset", "objective"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "value, more, factor",
    [
        ("@probe.twice", "", 2),
        ("@probe.times", "probe.times.factor = 3.0", 3),
        ("@mine/probe.times", "mine/probe.times.factor = 4.0", 4),
        ("@probe.Times()", "probe.Times.factor = 5.0", 5),
        ("%FUNCTION", "FUNCTION = @probe.twice", 2),
    ],
)
def test_a_function_reaches_a_plugin_of_every_kind(probe, kind: str, value: str, more: str, factor: int) -> None:
    bound = made(kind, f"create_{kind}.function = {value}", *([more] if more else []))
    assert bound.function(torch.ones(())) == factor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["@probe.of_two", "@probe.Times", "'twice'", "3", "[@probe.twice]"])
def test_what_cannot_be_called_as_the_option_is_refused(probe, kind: str, value: str) -> None:
    expected = rf"create_{kind}\.function is .*, expected an @reference to what takes 1 argument and returns Tensor"
    with pytest.raises(TangleNASError, match=expected):
        made(kind, f"create_{kind}.function = {value}")


TRANSFORMS = """
    import torch
    from PIL import Image
    from torch import Tensor
    from torchvision.transforms import v2


    def tf(image: Image.Image, value: float = -1.0) -> Tensor:
        pixels = v2.functional.to_image(image.resize((32, 32))).float() / 255
        return pixels if value < 0 else torch.full_like(pixels, value)


    def plain(image):
        return tf(image)


    class Flat:
        def __init__(self, value: float = 0.0):
            self.value = value

        def __call__(self, image: Image.Image) -> Tensor:
            return torch.full((3, 32, 32), self.value)


    def black(image: Image.Image) -> Image.Image:
        return Image.new(image.mode, image.size)
"""


@pytest.fixture
def images(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder of images, and the bindings that open it."""
    (project / "transforms_of_tests.py").write_text(dedent(TRANSFORMS))
    monkeypatch.syspath_prepend(project)
    for name in ("cat", "dog"):
        (project / "data" / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), (200, 50 * i, 0)).save(project / "data" / "images" / name / f"{i}.png")
    return [*BASE, 'DATASET = "image_folder"']


def batch(dataset: ImageFolder, train: bool) -> torch.Tensor:
    return dataset.subset(torch.arange(4), train=train).batch(torch.arange(4))[0]


@pytest.mark.parametrize("name", ["train_transform", "eval_transform"])
@pytest.mark.parametrize(
    "value, more, found",
    [
        ("@transforms_of_tests.tf", "", 200 / 255),
        ("@transforms_of_tests.plain", "", 200 / 255),
        ("@transforms_of_tests.tf", "transforms_of_tests.tf.value = 7.0", 7),
        ("@transforms_of_tests.Flat()", "transforms_of_tests.Flat.value = 9.0", 9),
    ],
)
def test_a_transform_of_ones_own_is_bound_in_a_gin_file(images, name: str, value: str, more: str, found: float) -> None:
    configure([*images, f"create_dataset.{name} = {value}", *([more] if more else [])])
    _, _, dataset = create()
    assert batch(dataset, name == "train_transform")[0, 0, 5, 5] == pytest.approx(found)


@pytest.mark.parametrize("value", ["@transforms_of_tests.Flat", "'tf'", "@torch.optim.SGD"])
def test_what_is_no_transform_is_refused(images, value: str) -> None:
    configure([*images, f"create_dataset.train_transform = {value}"])
    with pytest.raises(TangleNASError, match=r"train_transform is .*, expected an @reference to what takes 1 argument"):
        create()


TORCHVISION = "torchvision.transforms.v2"
RECIPES = {
    "timm": ["create_dataset.augment = 'rand-m9-mstd0.5'"],
    "augmix": ["create_dataset.augment = 'augmix-m3'"],
    "policy": ["create_dataset.augment = 'v0'"],
    "torchvision": [f"create_dataset.augment = @{TORCHVISION}.RandAugment()", f"{TORCHVISION}.RandAugment.num_ops = 3"],
    "list": [
        f"create_dataset.augment = ['rand-m5', @{TORCHVISION}.ColorJitter()]",
        f"{TORCHVISION}.ColorJitter.brightness = 0.4",
    ],
    "function": ["create_dataset.augment = @transforms_of_tests.black"],
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_augmentation_is_bound_in_a_gin_file(images, name: str, channels: int) -> None:
    configure([*images, f"create_dataset.in_channels = {channels}", *RECIPES[name]])
    _, _, dataset = create()
    configure([*images, f"create_dataset.in_channels = {channels}"])
    _, _, without = create()
    assert batch(dataset, False).equal(batch(without, False))
    torch.manual_seed(0)
    assert batch(dataset, True).shape == (4, channels, 32, 32)
    if name == "function":
        assert batch(dataset, True).unique().tolist() == [-1]
    assert dataset.fingerprint == without.fingerprint


@pytest.mark.parametrize("recipe", ["rand-x9", "nothing", "", "augmix-q1"])
def test_a_recipe_that_timm_does_not_know_is_refused(images, recipe: str) -> None:
    configure([*images, f"create_dataset.augment = {recipe!r}"])
    with pytest.raises(TangleNASError, match=r"augment is .*which timm does not know"):
        create()


def test_augment_beside_a_transform_that_replaces_it_is_refused(images) -> None:
    both = ["create_dataset.augment = 'v0'", "create_dataset.train_transform = @transforms_of_tests.tf"]
    configure([*images, *both])
    with pytest.raises(TangleNASError, match="train_transform replaces all augmentation"):
        create()


@pytest.mark.parametrize("recipe", ["rand-m9", "augmix-m3"])
def test_a_recipe_has_the_settings_of_timm(recipe):
    ours = recipe_of_timm(recipe, (0.5, 0.5, 0.5))
    (theirs,) = (
        it
        for it in create_transform(8, is_training=True, auto_augment=recipe, mean=(0.5,) * 3).transforms
        if type(it) is type(ours)
    )
    percentages = [{operation.hparams.get("translate_pct") for operation in it.ops} for it in (ours, theirs)]
    assert percentages[0] == percentages[1]


@pytest.mark.parametrize("recipe", ["rand-m0", "rand-m1", "rand-m10-inc1", "v0", "v0r", "original", "3a", "augmix-m10"])
def test_a_recipe_of_any_strength_makes_images(recipe: str) -> None:
    augmentation = recipe_of_timm(recipe, (0.5, 0.5, 0.5))
    image = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    random.seed(0)
    np.random.seed(0)
    assert all(augmentation(image).size == (16, 16) for _ in range(300))
