"""The first-party datasets: what they hold, how they augment, and what they say about bad files."""

import gzip
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from tanglenas_datasets.augment import prepare, random_shift
from tanglenas_datasets.digits import Digits
from tanglenas_datasets.fashion_mnist import FashionMNIST
from tanglenas_datasets.image_folder import ImageFolder
from tanglenas_engine.data import Stream, batches, make_splits, open_splits
from tanglenas_engine.errors import TangleNASError


def everything(dataset, train=False):
    part = dataset.subset(torch.arange(len(dataset)), train=train)
    return part.batch(torch.arange(len(part)))


# Augmentation in memory


def test_a_shifted_image_is_the_image_moved_over_zeros():
    image = torch.arange(1, 17).reshape(1, 1, 4, 4)
    moved = random_shift(image.expand(400, 1, 4, 4), 2)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))[0, 0]
    possible = {tuple(padded[i : i + 4, j : j + 4].flatten().tolist()) for i in range(5) for j in range(5)}
    assert {tuple(row) for row in moved.flatten(1).tolist()} == possible


def test_flipping_mirrors_half_of_the_images():
    image = torch.tensor([[1.0, 2.0]]).reshape(1, 1, 1, 2)
    rows = prepare(image.expand(400, 1, 1, 2), mean=0, std=1, flip=True).flatten(1).tolist()
    assert 150 < rows.count([1.0, 2.0]) < 250
    assert rows.count([1.0, 2.0]) + rows.count([2.0, 1.0]) == 400


# Digits


def test_digits_are_normalised_images_of_8x8():
    digits = Digits()
    inputs, targets = everything(digits)
    assert inputs.shape == (1797, digits.in_channels, digits.image_size, digits.image_size)
    assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
    assert abs(inputs.mean()) < 0.01 and abs(inputs.std() - 1) < 0.01
    assert digits.test_indices is None and targets.unique().tolist() == list(range(digits.num_classes))


def test_digits_shift_in_training_only():
    digits = Digits(shift=1)
    assert not everything(digits, train=True)[0].equal(everything(digits)[0])
    assert everything(Digits(shift=0), train=True)[0].equal(everything(digits)[0])


def test_digits_can_be_enlarged():
    large = everything(Digits(image_size=16))[0]
    assert large.shape == (1797, 1, 16, 16)
    # Halved again, they are close to what they were: the enlargement turns and crops nothing.
    halved = torch.nn.functional.avg_pool2d(large, 2)
    assert torch.corrcoef(torch.stack([halved.flatten(), everything(Digits())[0].flatten()]))[0, 1] > 0.95


def test_options_that_pick_no_other_samples_leave_the_fingerprint_alone():
    assert Digits(shift=2, image_size=16).fingerprint == Digits().fingerprint


def test_impossible_digits_options_are_named():
    with pytest.raises(TangleNASError, match="image_size is 7"):
        Digits(image_size=7)
    with pytest.raises(TangleNASError, match="shift is 8"):
        Digits(shift=8)


def test_a_subset_is_a_copy_of_its_rows():
    digits = Digits()
    part = digits.subset(torch.arange(5), train=False)
    before = part.batch(torch.arange(5))[0].clone()
    digits._images.zero_()
    assert part.batch(torch.arange(5))[0].equal(before)


# Fashion-MNIST


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder, suffix="", train=40, test=20):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return folder


@pytest.fixture
def fashion_folder(tmp_path):
    return write_fashion(tmp_path / "fashion")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_reads_plain_and_gzipped_files(tmp_path, fashion_folder, suffix):
    fashion = FashionMNIST(write_fashion(tmp_path / "copy", suffix))
    inputs, targets = everything(fashion)
    assert inputs.shape == (60, 1, 28, 28) and inputs.dtype == torch.float32
    assert targets.equal(torch.cat([torch.arange(40), torch.arange(20)]) % 10)
    assert fashion.test_indices.tolist() == list(range(40, 60))
    first = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 28, 28))[7]).float()
    assert torch.allclose(inputs[7, 0] * 90.02 + 72.94, first, atol=1e-3)
    assert fashion.fingerprint == FashionMNIST(fashion_folder).fingerprint


def test_fashion_mnist_opens_the_test_images_only_when_asked(fashion_folder):
    (fashion_folder / "t10k-images-idx3-ubyte").write_bytes(b"not to be read")
    fashion = FashionMNIST(fashion_folder)
    assert len(fashion.subset(torch.arange(40), train=True)) == 40
    with pytest.raises(TangleNASError, match="t10k-images-idx3-ubyte is no IDX file"):
        fashion.subset(torch.tensor([3, 41]), train=False)


def test_fashion_mnist_grows_by_a_margin_of_background(fashion_folder):
    small, large = (everything(FashionMNIST(fashion_folder, image_size=size))[0] for size in (28, 32))
    assert large[:, :, 2:-2, 2:-2].equal(small)
    assert large[:, :, :2].unique().tolist() == [pytest.approx(-72.94 / 90.02)]


def test_fashion_mnist_augments_in_training_only(fashion_folder):
    plain = everything(FashionMNIST(fashion_folder), train=True)[0]
    for options in ({"shift": 2}, {"flip": True}):
        fashion = FashionMNIST(fashion_folder, **options)
        assert everything(fashion)[0].equal(plain)
        assert not everything(fashion, train=True)[0].equal(plain)


def test_fashion_mnist_is_found_where_torchvision_keeps_it(tmp_path, monkeypatch):
    write_fashion(tmp_path / "FashionMNIST" / "raw")
    monkeypatch.setenv("TANGLENAS_DATA", str(tmp_path))
    assert len(FashionMNIST(download=False)) == 60


def test_missing_fashion_files_are_named(fashion_folder, tmp_path, monkeypatch):
    (fashion_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(TangleNASError, match="lacks t10k-labels-idx1-ubyte"):
        FashionMNIST(fashion_folder)
    monkeypatch.setenv("TANGLENAS_DATA", str(tmp_path / "nothing"))
    with pytest.raises(TangleNASError, match=r"nothing lacks train-images.* t10k-labels.*download=True"):
        FashionMNIST(download=False)


def test_a_failed_download_says_what_else_to_do(tmp_path, monkeypatch):
    import torchvision

    def no_network(root, download):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)
    monkeypatch.setenv("TANGLENAS_DATA", str(tmp_path))
    with pytest.raises(TangleNASError, match=r"could not be downloaded .* give root="):
        FashionMNIST()


def damage(content, how):
    return {
        "cut short": content[:-100],
        "cut in the header": content[:6],
        "empty": b"",
        "too long": content + b"\0",
        "another type": content[:2] + b"\x0d" + content[3:],
        "another rank": content[:3] + b"\x01" + content[4:],
    }[how]


@pytest.mark.parametrize(
    "how, message",
    [
        ("cut short", "says it holds 31360 values, 40 x 28 x 28, but holds 31260"),
        ("cut in the header", "is no IDX file of unsigned bytes with 3 dimension"),
        ("empty", "starts with nothing"),
        ("too long", "but holds 31361"),
        ("another type", "starts with 00 00 0d 03"),
        ("another rank", "starts with 00 00 08 01"),
    ],
)
def test_damaged_idx_files_are_refused(fashion_folder, how, message):
    path = fashion_folder / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(TangleNASError, match=message):
        FashionMNIST(fashion_folder)


@pytest.mark.parametrize("how", ["cut short", "not gzip", "overwritten"])
def test_damaged_gzip_files_are_refused(tmp_path, how):
    path = write_fashion(tmp_path / "gz", ".gz") / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    damaged = {
        "cut short": content[:-40],
        "not gzip": b"PK" + content,
        "overwritten": content[:40] + bytes(9) + content[49:],
    }
    path.write_bytes(damaged[how])
    with pytest.raises(TangleNASError, match=r"train-images-idx3-ubyte\.gz is damaged or cut short"):
        FashionMNIST(tmp_path / "gz")


def test_fashion_files_that_do_not_belong_together_are_refused(fashion_folder):
    write_idx(fashion_folder / "train-labels-idx1-ubyte", np.arange(41) % 10)
    with pytest.raises(TangleNASError, match=r"shape \(40, 28, 28\); expected \(41, 28, 28\)"):
        FashionMNIST(fashion_folder)
    write_idx(fashion_folder / "train-labels-idx1-ubyte", np.arange(40))
    with pytest.raises(TangleNASError, match="labels from 0 to 9"):
        FashionMNIST(fashion_folder)


def test_the_real_fashion_mnist_has_its_published_sizes_and_statistics():
    root = os.environ.get("TANGLENAS_FASHION_MNIST")
    if not root:
        pytest.skip("set TANGLENAS_FASHION_MNIST to a folder with the four IDX files")
    fashion = FashionMNIST(root)
    splits = make_splits(fashion, seed=0)
    assert splits.sizes() == {
        "weights": 27_000,
        "architecture": 27_000,
        "validation": 6_000,
        "test": 10_000,
    }
    inputs, targets = fashion.subset(torch.arange(60_000), train=False).batch(torch.arange(60_000))
    assert abs(inputs.mean()) < 1e-3 and abs(inputs.std() - 1) < 1e-3
    assert targets.bincount().tolist() == [6_000] * 10


# Image folders


COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def write_images(folder, count=6, classes=COLOURS, size=(12, 10)):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, COLOURS[name]).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write_images(tmp_path / "pictures")


def test_image_folder_numbers_classes_and_files_in_sorted_order(pictures):
    (pictures / "red" / "more").mkdir()
    Image.new("L", (30, 30), 255).save(pictures / "red" / "more" / "big.JPG")
    (pictures / "red" / "notes.txt").write_text("not an image")
    (pictures / "red" / "._0.png").write_bytes(b"left by another system")
    (pictures / ".cache").mkdir()
    dataset = ImageFolder(pictures, image_size=8)
    inputs, targets = everything(dataset)
    assert dataset.class_names == ("blue", "green", "red") and dataset.test_indices is None
    assert targets.tolist() == [0] * 6 + [1] * 6 + [2] * 7
    assert inputs.shape == (19, 3, 8, 8) and inputs.dtype == torch.float32 and type(inputs) is torch.Tensor
    # mean and std of one half take 0..255 to -1..1
    assert inputs[0, :, 4, 4].tolist() == [-1, -1, 1] and inputs[12, :, 4, 4].tolist() == [1, -1, -1]


def test_image_folder_goes_through_splits_and_streams(pictures):
    dataset = ImageFolder(pictures, image_size=8)
    splits = make_splits(dataset, seed=0, validation_portion=0.2)
    view = open_splits(dataset, splits, ["weights", "validation"])
    stream = Stream(view.weights, 4, seed=0)
    (first, _), (again, _) = next(stream.start()), next(stream.start())
    assert first.shape == (4, 3, 8, 8) and first.equal(again)
    assert sum(len(targets) for _, targets in batches(view.validation, 2)) == len(view.validation)
    assert pickle.loads(pickle.dumps(view.weights)).labels.equal(view.weights.labels)


@pytest.mark.parametrize("layout", ["train test", "train val", "train val test", "train"])
def test_image_folder_takes_the_official_test_part(tmp_path, layout):
    for count, part in enumerate(layout.split(), start=1):
        write_images(tmp_path / part, count)
    dataset = ImageFolder(tmp_path)
    # parts of 1, 2, 3 images for each of three classes, in that order
    expected = {"train": None, "train val test": list(range(9, 18))}.get(layout, list(range(3, 9)))
    assert (None if dataset.test_indices is None else dataset.test_indices.tolist()) == expected


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path, classes=["blue", "red"])
    (tmp_path / "red").rename(tmp_path / "train")
    assert ImageFolder(tmp_path).class_names == ("blue", "train")


def test_a_fingerprint_follows_the_content_and_not_the_place(pictures, tmp_path):
    fingerprint = ImageFolder(pictures).fingerprint
    copy = tmp_path / "elsewhere"
    shutil.copytree(pictures, copy, copy_function=shutil.copyfile)
    assert ImageFolder(copy, image_size=16).fingerprint == fingerprint
    Image.new("RGB", (12, 10), (254, 0, 0)).save(copy / "red" / "0.png")
    changed = ImageFolder(copy).fingerprint
    assert changed != fingerprint
    (copy / "red" / "0.png").rename(copy / "red" / "00.png")
    assert ImageFolder(copy).fingerprint not in (fingerprint, changed)


def test_grey_images_and_own_statistics(pictures):
    inputs, _ = everything(ImageFolder(pictures, in_channels=1, image_size=8, mean=0, std=1))
    assert inputs.shape == (18, 1, 8, 8)
    assert inputs[12].unique().tolist() == [pytest.approx(76 / 255)]  # red in grey, by ITU-R 601-2
    inputs, _ = everything(ImageFolder(pictures, image_size=8, mean=(1, 0, 0), std=(1, 1, 0.5)))
    assert inputs[0, :, 0, 0].tolist() == [-1, 0, 2]


@pytest.mark.parametrize("orientation, first", [(1, "left"), (3, "right")])
def test_images_are_turned_as_their_exif_says(pictures, orientation, first):
    image = Image.new("RGB", (16, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(pictures / "blue" / "0.png", exif=exif)
    inputs, _ = everything(ImageFolder(pictures, image_size=16))
    assert (inputs[0, 0, 8, 2] > 0) == (first == "left")


def test_wide_images_keep_their_centre(pictures):
    image = Image.new("RGB", (40, 10), (0, 0, 0))
    image.paste((255, 255, 255), (15, 0, 25, 10))
    image.save(pictures / "blue" / "0.png")
    inputs, _ = everything(ImageFolder(pictures, image_size=10))
    assert inputs[0].min() == 1


def test_sixteen_bit_and_transparent_images_are_read(pictures):
    deep = np.full((10, 10), 0x8000, np.uint16)
    Image.fromarray(deep).save(pictures / "blue" / "0.png")
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([10, 20, 30])
    palette.save(pictures / "blue" / "1.png", transparency=b"\x80")
    inputs, _ = everything(ImageFolder(pictures, image_size=8, mean=0, std=1 / 255))
    assert inputs[0].round().unique().tolist() == [0x80]
    assert inputs[1, :, 0, 0].round().tolist() == [10, 20, 30]


def test_own_transforms_replace_both_pipelines(pictures):
    dataset = ImageFolder(
        pictures,
        image_size=4,
        train_transform=lambda image: torch.full((3, 4, 4), float(image.size[0])),
        eval_transform=lambda image: torch.zeros(3, 4, 4),
    )
    assert everything(dataset, train=True)[0].unique().tolist() == [12]
    assert everything(dataset)[0].unique().tolist() == [0]


def test_a_transform_of_another_shape_is_named(pictures):
    dataset = ImageFolder(pictures, image_size=4, eval_transform=lambda image: torch.zeros(1, 4, 4))
    with pytest.raises(TangleNASError, match=r"made \(1, 4, 4\) of .*0\.png.* ask for \(3, 4, 4\)"):
        everything(dataset)


def break_folder(root, how):
    if how == "gone":
        shutil.rmtree(root)
    elif how == "empty":
        shutil.rmtree(root)
        root.mkdir()
    elif how == "one class":
        shutil.rmtree(root / "red"), shutil.rmtree(root / "blue")
    elif how == "class without images":
        (root / "yellow").mkdir()
        (root / "yellow" / "readme.txt").write_text("soon")
    elif how == "no image":
        (root / "red" / "x.jpg").write_text("<html>Not found</html>")
    elif how == "empty file":
        (root / "red" / "x.png").touch()
    elif how == "classes differ":
        root.rename(root.parent / "all")
        shutil.copytree(root.parent / "all", root / "train")
        shutil.copytree(root.parent / "all", root / "test")
        (root / "test" / "red").rename(root / "test" / "crimson")


@pytest.mark.parametrize(
    "how, message",
    [
        ("gone", "there is no folder .*pictures"),
        ("empty", r"has 0 class folders \(none\)"),
        ("one class", r"has 1 class folders \(green\)"),
        ("class without images", "class folder .*yellow has no image"),
        ("no image", r"red.x\.jpg is no readable image"),
        ("empty file", r"red.x\.png is no readable image"),
        ("classes differ", "train and .*test differ in 2 classes, such as crimson, red"),
    ],
)
def test_a_bad_folder_is_refused_at_the_start(pictures, how, message):
    break_folder(pictures, how)
    with pytest.raises(TangleNASError, match=message):
        ImageFolder(pictures)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_image_is_named_when_it_is_decoded(pictures, num_workers):
    path = pictures / "blue" / "3.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    samples = ImageFolder(pictures).subset(torch.arange(18), train=False)
    with pytest.raises(TangleNASError, match=r"blue.3\.jpg is no readable image"):
        list(batches(samples, 4, num_workers=num_workers))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"in_channels": 2}, "in_channels is 2"),
        ({"image_size": 0}, "image_size is 0"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values for 3"),
    ],
)
def test_impossible_image_folder_options_are_named(pictures, options, message):
    with pytest.raises(TangleNASError, match=message):
        ImageFolder(pictures, **options)
