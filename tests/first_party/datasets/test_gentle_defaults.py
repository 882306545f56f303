"""What becomes of own images where nobody chose anything, and what evaluate says of each class."""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import gin
import numpy as np
import pytest
import torch
from PIL import Image
from project import ROOT, lay_out
from spaces import vit

from tanglenas_datasets.image_folder import ImageFolder
from tanglenas_engine import TangleNASError, create_dataset
from tanglenas_engine.data import DataView, TensorSamples
from tanglenas_engine.pipeline import figures, outputs
from tanglenas_engine.pipeline.config.configurables import create
from tanglenas_engine.pipeline.config.reader import configure
from tanglenas_engine.stages.evaluate import evaluate


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of images of 100 x 100 pixels with a gradient from left to right, black at no place."""
    row = np.linspace(60, 255, 100).astype(np.uint8)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            image = np.broadcast_to(row[None, :, None], (100, 100, 3)).copy()
            image[0, 0] = i
            Image.fromarray(image).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def drawn(dataset: ImageFolder, count: int = 200) -> torch.Tensor:
    """Return draws of the first training image, with pixels from 0 to 1."""
    part = dataset.subset(torch.zeros(count).long(), train=True)
    return part.batch(torch.arange(count))[0] / 2 + 0.5


@pytest.mark.parametrize("size", [8, 28, 32, 64])
@pytest.mark.exhaustive
@pytest.mark.slow
def test_small_images_are_shifted_a_little_and_never_cropped_or_mirrored(pictures: Path, size: int) -> None:
    found = drawn(ImageFolder(pictures, image_size=size))
    plain = ImageFolder(pictures, image_size=size).subset(torch.tensor([0]), train=False).batch(torch.arange(1))[0][0]
    shift = size // 8
    padded = torch.nn.functional.pad(plain / 2 + 0.5, (shift,) * 4)
    windows = padded.unfold(1, size, 1).unfold(2, size, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)
    assert all(torch.isclose(one, windows, atol=1e-6).flatten(1).all(1).any() for one in found[:50])


@pytest.mark.slow
def test_large_images_keep_a_third_of_their_area_at_least(pictures: Path) -> None:
    found = drawn(ImageFolder(pictures, image_size=96))
    spans = found[:, 0, 48, -1] - found[:, 0, 48, 0]  # of a gradient over the whole width, of 0.76
    assert spans.min() > 0.76 * math.sqrt(0.35 * 3 / 4) - 0.03 and spans.max() > 0.7


@pytest.mark.slow
def test_what_is_asked_for_is_done(pictures: Path) -> None:
    mirrored = drawn(ImageFolder(pictures, image_size=32, flip=True))
    assert 0.3 < (mirrored[:, 0, 16, 8] > mirrored[:, 0, 16, 24]).float().mean() < 0.7
    cropped = drawn(ImageFolder(pictures, image_size=32, crop_scale=(0.08, 1.0)))
    assert (cropped[:, 0, 16, -1] - cropped[:, 0, 16, 0]).min() < 0.4
    still = drawn(ImageFolder(pictures, image_size=32, shift=0))
    assert still.eq(still[0]).all()


def test_imagenet_and_its_subset_keep_the_augmentation_of_their_papers(pictures: Path) -> None:
    root = pictures.parent
    for part in ("train", "val"):
        (root / "imagenet" / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            (root / "imagenet" / part / name).mkdir()
            for i in range(2):
                Image.new("RGB", (40, 40), (i, 0, 0)).save(root / "imagenet" / part / name / f"{i}.png")
    for name, expected in (
        ("imagenet", ["RandomResizedCrop", "RandomHorizontalFlip"]),
        ("imagenet16_120", ["Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip"]),
    ):
        dataset = create_dataset(name, root=root / "imagenet", num_classes=2)
        steps = [type(step).__name__ for step in dataset._train_transform.transforms]
        assert steps == [*expected, "ToImage", "ToDtype", "Normalize"]
        if name == "imagenet":
            assert tuple(dataset._train_transform.transforms[0].scale) == (0.08, 1.0)
        else:
            assert dataset._train_transform.transforms[2].padding == [2] * 4


def test_the_gin_file_has_every_option_with_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lay_out(tmp_path / "project", code=False))
    configure(["SPACE = 'autoformer_nano'", "DATASET = 'image_folder'", "SEED = 0"])
    try:
        bound = dict(gin.get_bindings("create_dataset"))
        defaults = {name: p.default for name, p in inspect.signature(ImageFolder).parameters.items()}
        assert bound.pop("root") == "data/images" and defaults.pop("root") is inspect.Parameter.empty
        assert bound == defaults
        for name in ("cat", "dog"):
            Path("data/images", name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(Path("data/images", name, "0.png"))
        assert len(create()[2]) == 2
    finally:
        gin.clear_config()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"std": 0}, "std is 0, expected numbers above 0"),
        ({"std": (1, 1, -1)}, "std is .*expected numbers above 0"),
        ({"std": math.nan}, "std is nan, expected"),
        ({"mean": math.inf}, "mean is inf, expected finite"),
        ({"crop_scale": (0, 1)}, r"crop_scale is \(0, 1\); give"),
        ({"crop_scale": (0.5,)}, "crop_scale is"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale is"),
    ],
)
def test_options_without_a_meaning_are_refused(pictures: Path, options: dict, message: str) -> None:
    with pytest.raises(TangleNASError, match=message):
        ImageFolder(pictures, **options)


@pytest.mark.parametrize(
    "transform, message",
    [
        (lambda image: torch.full((3, 8, 8), math.nan), "values of .*png that are nan or infinite"),
        (lambda image: torch.ones(3, 8, 8) / 0, "values of .*png that are nan or infinite"),
        (
            lambda image: torch.ones(3, 8, 8, dtype=torch.uint8),
            r"made torch\.uint8 of .*expected a tensor",
        ),
        (lambda image: image, "made Image of .*expected a tensor"),
        (lambda image: None, "made NoneType of .*expected a tensor"),
    ],
)
def test_a_transform_that_makes_no_inputs_is_named(pictures: Path, transform, message: str) -> None:
    dataset = ImageFolder(pictures, image_size=8, eval_transform=transform)
    with pytest.raises(TangleNASError, match=message):
        dataset.subset(torch.arange(2), train=False).batch(torch.arange(2))


# What evaluate says of each class


def test_the_confusion_matrix_counts_every_test_sample_once() -> None:
    space = vit(num_classes=3)
    network = space.extract(space.smallest())
    inputs, labels = space.example_input(20), torch.arange(20) % 3
    result = evaluate(space, space.smallest(), network, DataView({"test": TensorSamples(inputs, labels)}), batch_size=7)
    with torch.no_grad():
        answers = network.eval()(inputs).argmax(-1)
    expected = [[((labels == i) & (answers == j)).sum().item() for j in range(3)] for i in range(3)]
    assert [list(row) for row in result.confusion] == expected
    assert result.test_accuracy == pytest.approx(100 * sum(expected[i][i] for i in range(3)) / 20)
    assert not network._forward_hooks


@pytest.mark.slow
def test_classes_and_matrix_become_tables_and_a_figure(tmp_path: Path) -> None:
    said: list[str] = []
    written: dict[str, list] = {}
    names = ("cat, small", "$\\frac{$", "never")
    stage = SimpleNamespace(
        dataset=SimpleNamespace(class_names=names),
        folder=tmp_path,
        table=lambda name, rows: written.update({name: rows}),
        progress=SimpleNamespace(note=said.append),
    )
    result = SimpleNamespace(confusion=((3, 1, 0, 0), (0, 2, 0, 2), (0, 0, 0, 0), (0, 0, 0, 0)))
    outputs.write_classes(stage, result)
    assert written["classes.csv"] == [
        {"class": "cat, small", "samples": 4, "right": 3, "accuracy": 75.0, "taken_most_for": "$\\frac{$"},
        {"class": "$\\frac{$", "samples": 4, "right": 2, "accuracy": 50.0, "taken_most_for": "output 3"},
        {"class": "never", "samples": 0, "right": 0, "accuracy": "", "taken_most_for": ""},
    ]
    assert written["confusion.csv"][0] == {
        "class": "cat, small", "as cat, small": 3, "as $\\frac{$": 1, "as never": 0, "as output 3": 0,
    }  # fmt: skip
    assert len(written["confusion.csv"]) == 3 and "50.00 %, cat, small 75.00 %" in said[0]
    figures.confusion(result.confusion, names, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    outputs.write_classes(stage, SimpleNamespace(confusion=None))


@pytest.mark.parametrize("classes", [2, 10, 40, 100, 1000])
@pytest.mark.part(3)
def test_a_matrix_of_any_size_is_drawn(tmp_path: Path, classes: int) -> None:
    counts = torch.eye(classes, dtype=torch.long).mul(5).tolist()
    figures.confusion(counts, [f"class {'x' * 40} {i}" for i in range(classes)], tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png", formats=("PNG",)) as image:
        assert max(image.size) < 2500


def test_the_docs_name_the_files_of_each_class() -> None:
    said = (ROOT / "docs" / "own-data.md").read_text()
    assert all(name in said for name in ("classes.csv", "confusion.csv", "confusion.png"))
