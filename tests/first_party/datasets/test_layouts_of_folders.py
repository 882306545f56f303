"""Folders of images as they lie on disks: parts under many names, links, and what systems leave in them."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tanglenas_datasets.folders import shown
from tanglenas_datasets.image_folder import ImageFolder
from tanglenas_engine import TangleNASError, make_splits


def write(folder: Path, count: int = 2, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write images into a folder for each class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (40 * number, 20 * i, len(folder.name))).save(folder / name / f"{i}.png")
    return folder


# Parts of 1, 2 and 3 images a class, in this order; then the positions of test in the pool.
LAYOUTS = {
    "train test": range(2, 6),
    "Train Test": range(2, 6),
    "TRAIN TEST": range(2, 6),
    "Training Testing": range(2, 6),
    "training testing": range(2, 6),
    "seg_train seg_test": range(2, 6),
    "seg_train/seg_train seg_test/seg_test": range(2, 6),
    "train_set test_set": range(2, 6),
    "TrainSet TestSet": range(2, 6),
    "trainset testset": range(2, 6),
    "train_images test_images": range(2, 6),
    "train-data test-data": range(2, 6),
    "train valid": range(2, 6),
    "train validation": range(2, 6),
    "train dev": range(2, 6),
    "train Val": range(2, 6),
    "train valid test": range(6, 12),
    "Train Validation Test": range(6, 12),
    "train2017 val2017": range(2, 6),
    "train": None,
    "Training": None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_usual_spellings_of_parts_are_known(tmp_path: Path, layout: str) -> None:
    for count, part in enumerate(layout.split(), start=1):
        write(tmp_path / part, count)
    dataset = ImageFolder(tmp_path)
    assert dataset.class_names == ("cat", "dog")
    found = dataset.test_indices
    assert (found if found is None else found.tolist()) == (LAYOUTS[layout] if found is None else [*LAYOUTS[layout]])


def test_words_of_a_part_may_stand_apart(tmp_path: Path) -> None:
    write(tmp_path / "Training Images", 1)
    write(tmp_path / "Test Images", 2)
    assert ImageFolder(tmp_path).test_indices.tolist() == [2, 3, 4, 5]


def images(folder: Path) -> None:
    """Write images that no folder of a class holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")


def several(root: Path, *folders: str) -> None:
    for folder in folders:
        write(root / folder)


REFUSED = {
    "no train": (lambda root: several(root, "val", "test"), "test, val, which look like parts, but no train/"),
    "only test": (lambda root: several(root, "Testing"), "Testing, which look like parts, but no train/"),
    "two train": (lambda root: several(root, "train", "Training"), "2 folders that look like the train part"),
    "two val": (
        lambda root: several(root, "train", "val", "valid"),
        "2 folders that look like the val part: val, valid",
    ),
    "numbered": (lambda root: several(root, "train1", "train2"), "2 folders that look like the train part"),
    "unsorted": (lambda root: (images(root / "train"), images(root / "test")), "train looks like the train part, but"),
    "unsorted test": (
        lambda root: (several(root, "train"), images(root / "Test")),
        "Test looks like the test part, but",
    ),
    "mixed": (lambda root: (several(root, "train"), images(root / "train")), "holds images beside folders"),
    "mixed test": (
        lambda root: (several(root, "train", "test"), images(root / "test")),
        "test looks like the test part, but holds images beside folders",
    ),
    "empty test": (lambda root: (several(root, "train"), (root / "test").mkdir()), "test has no class folders"),
    "a class and a part": (
        lambda root: (several(root, "train"), images(root / "bus"), images(root / "car")),
        "train looks like the train part, but bus, car beside it hold images like classes",
    ),
    "unknown part": (lambda root: several(root, "train", "holdout"), r"holdout has classes of \S*train \(cat, dog\)"),
    "longer names": (
        lambda root: several(root, "asl_alphabet_train", "asl_alphabet_test"),
        "look like parts. Call",
    ),
    "folds": (lambda root: several(root, "fold1", "fold2"), r"fold1, fold2 in \S* hold the same folders, cat, dog"),
    "classes first": (
        lambda root: (write(root / "cat", classes=("train", "test")), write(root / "dog", classes=("train", "test"))),
        r"cat holds the parts test, train\. Put the parts above",
    ),
    "other classes": (
        lambda root: (several(root, "Training"), write(root / "Testing", classes=("cat", "fox"))),
        r"Testing has the class folders fox, which \S*Training with cat, dog has not\. Give",
    ),
    "a class in val alone, which is the test part": (
        lambda root: (several(root, "train"), write(root / "val", classes=("cat", "fox"))),
        r"val has the class folders fox, which \S*train with cat, dog has not\. Give",
    ),
    "another spelling in val, which joins the training images": (
        lambda root: (several(root, "train", "test"), write(root / "val", classes=("cat", "Dog"))),
        r"val has the class folders Dog, which \S*train with cat, dog has not\. Give",
    ),
    "a class that is empty in every part": (
        lambda root: (several(root, "train", "test"), (root / "train/fox").mkdir(), (root / "test/fox").mkdir()),
        r"no training image in \S*train of the classes \S*train.fox\. Put",
    ),
    "test with empty classes alone": (
        lambda root: (several(root, "train"), (root / "test/cat").mkdir(parents=True)),
        r"test has no class folders with images, \S*train has 2\.",
    ),
    "wrapped": (
        lambda root: several(root, "archive"),
        r"has 1 class folders.*Did you mean root='\S*archive'",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_looks_like_parts_and_is_none_is_refused(tmp_path: Path, how: str) -> None:
    make, message = REFUSED[how]
    make(tmp_path)
    with pytest.raises(TangleNASError, match=message):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("empty", [False, True], ids=["no folder", "an empty folder"])
@pytest.mark.parametrize(
    "parts, part", [("train test", "test"), *(("train val test", part) for part in ("train", "val", "test"))]
)
def test_a_part_may_lack_a_class_that_there_are_training_images_of(
    tmp_path: Path, parts: str, part: str, empty: bool
) -> None:
    for name in parts.split():
        write(tmp_path / name, 20, classes=("cat", "dog") if name == part else ("cat", "dog", "fox"))
    if empty or part == "train":  # it names the classes
        (tmp_path / part / "fox").mkdir()
    dataset = ImageFolder(tmp_path)
    assert dataset.class_names == ("cat", "dog", "fox")
    assert f"{part}: {tmp_path / part}: 40 images in 3 classes: cat (20), dog (20), fox (0)" in dataset.describe()
    assert len(dataset) == 60 * len(parts.split()) - 20
    test = make_splits(dataset, seed=0).test
    assert dataset.labels[test].unique().tolist() == ([0, 1] if part == "test" else [0, 1, 2])


@pytest.mark.parametrize(
    "how", ["no train", "two train", "folds", "classes first", "longer names", "a class and a part"]
)
def test_every_folder_is_a_class_where_a_person_says_so(tmp_path: Path, how: str) -> None:
    REFUSED[how][0](tmp_path)
    assert ImageFolder(tmp_path, parts=False).class_names == tuple(sorted(os.listdir(tmp_path)))
    with pytest.raises(TangleNASError, match="parts is False: set only one"):
        ImageFolder(tmp_path, parts=False, test_folder="test")


@pytest.mark.parametrize("name", ["train", "Test", "valid", "val"])
def test_a_class_may_have_the_name_of_a_part(tmp_path: Path, name: str) -> None:
    write(tmp_path, classes=("bus", "car", name))
    assert set(ImageFolder(tmp_path).class_names) == {"bus", "car", name}


def test_classes_may_hold_folders_of_different_names(tmp_path: Path) -> None:
    write(tmp_path / "cat", classes=("indoor", "outdoor"))
    write(tmp_path / "dog", classes=("outdoor",))
    assert ImageFolder(tmp_path).class_names == ("cat", "dog")


def test_a_named_test_folder_keeps_its_meaning_beside_other_spellings(tmp_path: Path) -> None:
    for count, part in enumerate(["Training", "valid", "unlabelled"], start=1):
        write(tmp_path / part, count)
    dataset = ImageFolder(tmp_path, test_folder="valid")
    assert dataset.test_indices.tolist() == [2, 3, 4, 5] and "passed over: unlabelled/" in dataset.describe()
    dataset = ImageFolder(tmp_path, test_folder="unlabelled")
    assert dataset.test_indices.tolist() == list(range(6, 12))


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPEG", "pnm", "pbm", "dib"])
def test_files_of_the_less_known_suffixes_are_images(tmp_path: Path, suffix: str) -> None:
    write(tmp_path)
    kind = {"jfif": "JPEG", "jpe": "JPEG", "pnm": "PPM", "pbm": "PPM", "dib": "DIB"}.get(suffix, suffix)
    Image.new("1" if suffix == "pbm" else "RGB", (8, 8)).save(tmp_path / "cat" / f"x.{suffix}", kind)
    dataset = ImageFolder(tmp_path)
    assert len(dataset) == 5 and len(dataset.subset(torch.arange(5), train=False).batch(torch.arange(5))[0]) == 5


def test_classes_and_what_was_passed_over_are_told(tmp_path: Path) -> None:
    several(tmp_path, "train", "test")
    (tmp_path / "train" / "cat" / "photo.heic").touch()
    (tmp_path / "train" / "dog" / "photo.HEIC").touch()
    (tmp_path / "test" / "labels.csv").touch()
    (tmp_path / "README").touch()
    (tmp_path / "notes").mkdir()
    train, test, passed = ImageFolder(tmp_path).describe().splitlines()
    assert train == f"  train: {tmp_path}/train: 4 images in 2 classes: cat (2), dog (2)"
    assert test == f"  test: {tmp_path}/test: 4 images in 2 classes: cat (2), dog (2)"
    assert passed == "  passed over: 2 .heic, 1 without suffix, 1 .csv, notes/"


def test_the_description_of_many_classes_is_short_and_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    write(tmp_path, 1, (*(f"{i:03}" for i in range(40)), "\x1b[31mred", "x" * 250))
    said = ImageFolder(tmp_path).describe()
    assert "42 classes" in said and said.endswith("and 32 more") and "\x1b" not in said
    assert shown("a\x1b[2Jb") == "a\\x1b[2Jb" and len(shown("x" * 1000)) == 200


# Links, and what systems leave


@pytest.mark.parametrize("target", ["..", ".", "../..", "../cat", "../../.."])
def test_a_link_to_a_folder_above_is_passed_over(tmp_path: Path, target: str) -> None:
    root = write(tmp_path / "here" / "images", 3)
    before = ImageFolder(root).fingerprint
    (root / "cat" / "up").symlink_to(target)
    dataset = ImageFolder(root)
    assert len(dataset) == 6 and dataset.fingerprint == before
    assert "passed over: link cat/up to a folder above it" in dataset.describe()


def test_two_links_to_folders_above_end(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "cat" / name).symlink_to("..")
        (tmp_path / "dog" / name).symlink_to(tmp_path)
        (tmp_path / name).symlink_to(".")
    assert len(ImageFolder(tmp_path)) == 4


TWICE = {
    "two links to each other": lambda root: (
        (root / "cat" / "l").symlink_to("../dog"),
        (root / "dog" / "l").symlink_to("../cat"),
    ),
    "a class is a link": lambda root: (root / "fox").symlink_to("dog"),
    "a folder within a class": lambda root: (
        write(root / "cat" / "more"),
        (root / "dog" / "l").symlink_to("../cat/more"),
    ),
    "a link to a file": lambda root: (root / "cat" / "9.png").symlink_to("../dog/0.png"),
    "a link in the class": lambda root: (root / "cat" / "9.png").symlink_to("0.png"),
    "a hard link": lambda root: os.link(root / "cat" / "0.png", root / "dog" / "9.png"),
    "a pool": lambda root: (
        write(root.parent / "pool"),
        (root / "cat" / "l").symlink_to(root.parent / "pool"),
        (root / "dog" / "l").symlink_to(root.parent / "pool"),
    ),
}


@pytest.mark.parametrize("how", TWICE)
def test_one_file_is_never_two_samples(tmp_path: Path, how: str) -> None:
    root = write(tmp_path / "images")
    TWICE[how](root)
    with pytest.raises(TangleNASError, match=r"are one folder, so that|files are there twice"):
        ImageFolder(root)


def test_a_test_part_that_is_a_link_to_the_training_part_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train")
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(TangleNASError, match=r"test and \S*train are one folder"):
        ImageFolder(tmp_path)


def test_links_to_images_elsewhere_are_samples(tmp_path: Path) -> None:
    pool = write(tmp_path / "pool", 3)
    root = tmp_path / "images"
    root.mkdir()
    (root / "cat").symlink_to(pool / "cat")
    (root / "dog").mkdir()
    for i in range(3):
        (root / "dog" / f"{i}.png").symlink_to(pool / "dog" / f"{i}.png")
    assert ImageFolder(root).fingerprint == ImageFolder(pool).fingerprint


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    for i in range(30):
        (tmp_path / "cat" / f"gone{i}.png").symlink_to("nowhere")
    (tmp_path / "cat" / "gone.txt").symlink_to("nowhere")
    for check in (True, False):
        with pytest.raises(TangleNASError, match=r"30 links lead to no file: \S*gone0\.png.* and 20 more\. Fetch"):
            ImageFolder(tmp_path, check=check)


JUNK = ["@eaDir", "@EADIR", ".ipynb_checkpoints", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"]


@pytest.mark.parametrize("name", JUNK)
def test_what_systems_leave_is_passed_over(tmp_path: Path, name: str) -> None:
    for root in (tmp_path / "plain", tmp_path / "parts"):
        for folder in [root] if root.name == "plain" else [root / "train", root / "test"]:
            write(folder, 2)
            for place in (folder, folder / "cat", root):
                (place / name / "0.png").mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / "dog" / "0.png", place / name / "0.png" / "SYNOPHOTO_THUMB_M.png")
        dataset = ImageFolder(root)
        assert dataset.class_names == ("cat", "dog") and len(dataset) == (4 if root.name == "plain" else 8)


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    (tmp_path / "cat" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "dog" / "folder.png").mkdir()
    dataset = ImageFolder(tmp_path)
    assert len(dataset) == 4 and re.search("passed over: 2 not a regular file$", dataset.describe())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "cat").chmod(0)
    try:
        with pytest.raises(TangleNASError, match="cat cannot be listed: Permission denied"):
            ImageFolder(tmp_path)
    finally:
        (tmp_path / "cat").chmod(0o700)


@pytest.mark.parametrize("name", ["", ".", "..", "../elsewhere", "/elsewhere"])
def test_a_test_folder_is_below_the_root(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train")
    with pytest.raises(TangleNASError, match=r"test_folder is .*, expected the name of a folder in"):
        ImageFolder(tmp_path, test_folder=name)


@pytest.mark.parametrize(
    "options", [{"mean": "x"}, {"std": [None]}, {"crop_scale": 0.5}, {"augment": 5}, {"shift": 1.5}], ids=str
)
def test_options_of_another_type_are_named(tmp_path: Path, options: dict[str, object]) -> None:
    write(tmp_path)
    with pytest.raises(TangleNASError, match=f"image_folder: {next(iter(options))} is .*(?:[Gg]ive|expected)"):
        ImageFolder(tmp_path, **options)


def blank(image: object) -> torch.Tensor:
    return torch.zeros(3, 32, 32)


def test_inputs_of_an_own_transform_are_described_by_its_name(tmp_path: Path) -> None:
    write(tmp_path)
    known = ImageFolder(tmp_path).input_config()
    own = ImageFolder(tmp_path, eval_transform=blank).input_config()
    assert own.pop("eval_transform") == f"{__name__}.blank"
    assert {*known} - {*own} == {"mean", "std", "crop_pct", "interpolation"}
    assert own == {name: known[name] for name in own}
