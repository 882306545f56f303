"""Every registered dataset keeps the contract, and a pipeline goes through with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gin
import pytest
from dataset_files import write_cifar, write_fashion, write_images
from project import STAGES, set_params
from stages import MAIN, arguments, forget_settings

from tanglenas_datasets.cifar import CIFAR10, CIFAR100
from tanglenas_engine import create_dataset
from tanglenas_engine.plugins import manager
from tanglenas_engine.testing import check_dataset


def of_folders(root: Path, **options: object) -> dict[str, object]:
    for shade, part in enumerate(("train", "val"), start=1):
        write_images(root / part, count=20, shade=shade)
    return {"root": str(root), **options}


def of_text(root: Path) -> dict[str, object]:
    root.mkdir()
    (root / "lines.txt").write_text("".join(f"{i} and {i * i % 97} are two numbers.\n" for i in range(300)))
    return {"root": str(root), "block_size": 16}


SMALL: dict[str, Callable[[Path], dict[str, object]]] = {
    "digits": lambda root: {},
    "fashion_mnist": lambda root: {"root": str(write_fashion(root, train=80))},
    "cifar10": lambda root: {"root": str(write_cifar(root, CIFAR10, each=20)[0])},
    "cifar100": lambda root: {"root": str(write_cifar(root, CIFAR100, each=400)[0])},
    "image_folder": of_folders,
    "imagenet": lambda root: of_folders(root, num_classes=3, image_size=32),
    "imagenet16_120": lambda root: of_folders(root, num_classes=3),
    "text": of_text,
    "stdlib_text": lambda root: {"characters": 20_000, "block_size": 16},
}
"""Write few samples of a dataset into a folder, and return the options that read them."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    forget_settings(monkeypatch)
    yield
    gin.clear_config()


@pytest.mark.part(1)
@pytest.mark.parametrize("name", manager().names("dataset"))
def test_a_registered_dataset_keeps_the_contract(name: str, tmp_path: Path) -> None:
    options = SMALL[name](tmp_path / "data")
    check_dataset(lambda: create_dataset(name, **options))


@pytest.mark.part(1)
@pytest.mark.parametrize("name", manager().names("dataset"))
def test_a_pipeline_goes_through_with_a_registered_dataset(
    name: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    shutil.copytree(template, project)
    monkeypatch.chdir(project)
    options = SMALL[name](tmp_path / "data")
    text = "block_size" in create_dataset(name, **options).space_options()
    set_params(project, dataset=name, space="gpt_nano" if text else "toy_conv_macro_nano", optimizer="spos")
    set_params(project, search={"epochs": 1, "warmup_epochs": 0, "batch_size": 16}, retrain={"batch_size": 16})
    bindings = [f"create_dataset.{option} = {value!r}" for option, value in options.items()]
    with Path("gin", "datasets", f"{name}.gin").open("a") as file:
        file.write("\n".join(["", *bindings, ""]))
    for stage in STAGES:
        MAIN[stage](arguments(project, stage))
    assert json.loads(Path("metrics/evaluate.json").read_text())["test_samples"] > 0
