"""The first-party datasets: what they hold, how they augment, and what they say about bad files."""

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from dataset_files import KINDS, write_cifar, write_fashion, write_idx, write_images
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize

import tanglenas_vit.network  # noqa: F401 - both tell timm about their networks
from tanglenas_datasets import cifar
from tanglenas_datasets.augment import prepare, random_cutout, random_shift
from tanglenas_datasets.cifar import CIFAR10, CIFAR100
from tanglenas_datasets.decoding import decode
from tanglenas_datasets.digits import Digits
from tanglenas_datasets.fashion_mnist import FashionMNIST
from tanglenas_datasets.image_folder import ImageFolder
from tanglenas_datasets.text import Text
from tanglenas_engine import create_dataset, create_space
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
    rows = prepare(image.expand(400, 1, 1, 2), mean=[0], std=[1], white=1, flip=True).flatten(1).tolist()
    assert 150 < rows.count([1.0, 2.0]) < 250
    assert rows.count([1.0, 2.0]) + rows.count([2.0, 1.0]) == 400


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cutout_takes_a_square_around_any_pixel_as_far_as_it_lies_inside(length):
    holes = random_cutout(torch.ones(1500, 2, 4, 5), length) == 0
    assert holes[:, 0].equal(holes[:, 1])
    possible = set()
    for i in range(4):
        for j in range(5):
            hole = torch.zeros(4, 5, dtype=torch.bool)
            top, left = i - length // 2, j - length // 2
            hole[max(top, 0) : top + length, max(left, 0) : left + length] = True
            possible.add(tuple(hole.flatten().tolist()))
    assert {tuple(hole) for hole in holes[:, 0].flatten(1).tolist()} == possible


def test_what_cutout_takes_becomes_the_mean():
    images = torch.full((8, 3, 6, 6), 255)
    inputs = prepare(images, mean=[0.2, 0.4, 0.6], std=[0.1, 0.2, 0.4], cutout=3)
    white = torch.tensor([8.0, 3.0, 1.0]).view(3, 1, 1)
    holes = inputs == 0
    assert holes.any((1, 2, 3)).all() and torch.allclose(inputs, white * ~holes)


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
    for size in (7, 33, 16.0, "8", True):
        with pytest.raises(TangleNASError, match=f"digits: image_size is {size!r}, expected a whole number from 8 to"):
            Digits(image_size=size)
    for shift in (8, 1.0):
        with pytest.raises(TangleNASError, match=f"digits: shift is {shift}, expected a whole number from 0 to 7"):
            Digits(shift=shift)


def test_a_subset_is_a_copy_of_its_rows():
    digits = Digits()
    part = digits.subset(torch.arange(5), train=False)
    before = part.batch(torch.arange(5))[0].clone()
    digits._images.zero_()
    assert part.batch(torch.arange(5))[0].equal(before)


# Fashion-MNIST


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


def test_fashion_mnist_is_resized_as_what_is_stored_beside_a_network_says(fashion_folder):
    dataset = FashionMNIST(fashion_folder, image_size=32)
    config = dataset.input_config()
    transform = create_transform(
        tuple(config["input_size"]), mean=config["mean"], std=config["std"], crop_pct=config["crop_pct"],
        interpolation=config["interpolation"],
    )  # fmt: skip
    raw = dataset._train_images[:8]
    made = torch.stack([transform(Image.fromarray(image[0].numpy())) for image in raw])
    inputs, _ = dataset.subset(torch.arange(8), train=False).batch(torch.arange(8))
    assert inputs.shape == (8, 1, 32, 32)
    assert torch.allclose(made, inputs, atol=1.1 / 90.02)  # Pillow rounds to whole values of pixels


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


# CIFAR


@pytest.mark.parametrize("kind", KINDS)
def test_cifar_reads_the_binary_version(tmp_path, kind):
    folder, images, labels = write_cifar(tmp_path, kind)
    dataset = kind(folder)
    inputs, targets = everything(dataset)
    assert inputs.shape == (27, 3, 32, 32) and inputs.dtype == torch.float32 and targets.dtype == torch.int64
    assert targets.tolist() == labels.tolist()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    assert torch.allclose(inputs * std + mean, images / 255, atol=1e-6)
    assert dataset.test_indices.tolist() == list(range(20, 27))
    assert dataset.class_names == tuple(f"class{i}" for i in range(dataset.num_classes))


@pytest.mark.slow
def test_cifar_is_cropped_and_mirrored_as_torchvision_does_it(tmp_path):
    folder, images, _ = write_cifar(tmp_path, CIFAR10)
    dataset = CIFAR10(folder)
    padded = torch.nn.functional.pad(images[3], (4,) * 4)
    crops = torch.stack([padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)])
    possible = prepare(torch.cat([crops, crops.flip(-1)]), mean=CIFAR10.mean, std=CIFAR10.std)
    part = dataset.subset(torch.full((600,), 3), train=True)
    drawn = part.batch(torch.arange(600))[0]
    which = [(possible == one).flatten(1).all(1).nonzero().item() for one in drawn]
    assert min(which) < 20 and max(which) > 140 and len(set(which)) > 120


def test_cifar_augments_in_training_only(tmp_path):
    folder, _, _ = write_cifar(tmp_path, CIFAR10)
    plain = everything(CIFAR10(folder, shift=0, flip=False), train=True)[0]
    assert everything(CIFAR10(folder, cutout=16))[0].equal(plain)
    cut = everything(CIFAR10(folder, shift=0, flip=False, cutout=16), train=True)[0]
    holes = (cut == 0).all(1).sum((1, 2))  # a pixel that is the mean in all channels does not occur otherwise
    assert 64 <= holes.min() and holes.max() <= 256 and cut.where(cut == 0, plain).equal(plain * 0 + cut)
    assert cut[cut != 0].equal(plain[cut != 0])


def test_cifar_holds_no_test_image_until_it_is_asked_for_one(tmp_path):
    folder, _, _ = write_cifar(tmp_path, CIFAR10)
    dataset = CIFAR10(folder)
    (folder / "test_batch.bin").unlink()
    assert len(dataset.subset(torch.arange(20), train=True)) == 20
    with pytest.raises(TangleNASError, match=r"lacks test_batch\.bin"):
        dataset.subset(torch.tensor([3, 21]), train=False)


@pytest.mark.parametrize("size", [16, 64])
def test_cifar_can_be_resized(tmp_path, size):
    folder, _, _ = write_cifar(tmp_path, CIFAR10)
    resized, plain = (everything(CIFAR10(folder, image_size=image_size))[0] for image_size in (size, 32))
    assert torch.allclose(resized, resize(plain, [size, size]), atol=1e-5)
    assert CIFAR10(folder, image_size=size).fingerprint == CIFAR10(folder).fingerprint


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that a server on this machine offers in the place of the archives' site; stop() ends it."""
    folder = tmp_path / "site"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stop():
        server.shutdown()
        server.server_close()
        thread.join()

    monkeypatch.setattr(cifar, "_SITE", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TANGLENAS_DATA", str(tmp_path / "data"))
    yield folder, stop
    if thread.is_alive():
        stop()


def pack(site, kind, root, monkeypatch):
    inner = KINDS[kind][0]
    with tarfile.open(site / kind.archive, "w:gz") as archive:
        archive.add(root / inner, inner)
    monkeypatch.setattr(kind, "md5", hashlib.md5((site / kind.archive).read_bytes()).hexdigest())


@pytest.mark.parametrize("kind", KINDS)
def test_cifar_is_downloaded_once(tmp_path, site, monkeypatch, kind):
    folder, stop = site
    original, _, _ = write_cifar(tmp_path, kind)
    pack(folder, kind, tmp_path, monkeypatch)
    with pytest.raises(TangleNASError, match=r"data lacks .*\.bin.* allow download=True"):
        kind(download=False)
    downloaded = kind()
    stop()
    assert downloaded.fingerprint == kind(original).fingerprint == kind(download=False).fingerprint
    assert everything(downloaded)[0].equal(everything(kind(original))[0])


def test_a_cifar_archive_of_another_checksum_is_not_unpacked(tmp_path, site, monkeypatch):
    folder, _ = site
    write_cifar(tmp_path, CIFAR10)
    pack(folder, CIFAR10, tmp_path, monkeypatch)
    content = (folder / CIFAR10.archive).read_bytes()
    (folder / CIFAR10.archive).write_bytes(content[:-1])
    with pytest.raises(TangleNASError, match=r"cifar10 could not be downloaded to .*corrupted.* give root="):
        CIFAR10()
    (folder / CIFAR10.archive).write_bytes(content)
    assert len(CIFAR10()) == 27


def test_cifar_without_a_network_says_what_else_to_do(site):
    site[1]()
    with pytest.raises(
        TangleNASError, match=r"cifar100 could not be downloaded .* give root= .*, a folder with train\.bin"
    ):
        CIFAR100()


def overwritten(content, at, value):
    return content[:at] + bytes([value]) + content[at + 1 :]


@pytest.mark.parametrize(
    "kind, file, damage, message",
    [
        (CIFAR10, "data_batch_3.bin", lambda c: c[:-1], r"data_batch_3\.bin has 12,291 bytes.* records of 3,073: 1 of"),
        (CIFAR10, "data_batch_3.bin", lambda c: c + b"\0", "has 12,293 bytes"),
        (CIFAR10, "test_batch.bin", lambda c: b"", r"test_batch\.bin has 0 bytes"),
        (
            CIFAR10,
            "data_batch_1.bin",
            lambda c: overwritten(c, 2 * 3073, 10),
            "record 2 has the label 10; expected 0 to 9",
        ),
        (CIFAR100, "train.bin", lambda c: c[:-2], "records of 3,074: 2 of"),
        (CIFAR100, "train.bin", lambda c: overwritten(c, 3074, 20), "record 1 has the label 20; expected 0 to 19"),
        (CIFAR100, "test.bin", lambda c: overwritten(c, 1, 100), "record 0 has the label 100; expected 0 to 99"),
        (CIFAR100, "fine_label_names.txt", lambda c: c[:-9], "has 99 names; expected 100"),
    ],
)
def test_damaged_cifar_files_are_refused(tmp_path, kind, file, damage, message):
    folder, _, _ = write_cifar(tmp_path, kind)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(TangleNASError, match=message):
        kind(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 4}, "image_size is 4"),
        ({"image_size": 32.0}, r"image_size is 32\.0"),
        ({"shift": 32}, "shift is 32, expected a whole number from 0 to 31"),
        ({"cutout": -1}, "cutout is -1"),
    ],
)
def test_impossible_cifar_options_are_named(tmp_path, options, message):
    with pytest.raises(TangleNASError, match=f"cifar10: {message}"):
        CIFAR10(write_cifar(tmp_path, CIFAR10)[0], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_cifar_has_its_published_sizes_and_statistics(kind):
    root = os.environ.get(f"TANGLENAS_{kind.__name__}")
    if not root:
        pytest.skip(f"set TANGLENAS_{kind.__name__} to a folder with the files of the binary version")
    dataset = kind(root)
    assert len(dataset) == 60_000 and len(dataset.test_indices) == 10_000
    inputs, targets = dataset.subset(torch.arange(50_000), train=False).batch(torch.arange(50_000))
    assert (inputs.mean((0, 2, 3)).abs() < 1e-2).all() and ((inputs.std((0, 2, 3)) - 1).abs() < 1e-2).all()
    assert targets.bincount().tolist() == [50_000 // kind.num_classes] * kind.num_classes


# Image folders


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


def test_cropping_by_shift_moves_the_centre_over_black(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path, 1, [name], size=(16, 16))
    noise = np.random.default_rng(0).integers(1, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a" / "0.png")
    dataset = ImageFolder(tmp_path, image_size=16, mean=0, std=1 / 255, shift=2, flip=False)
    part = dataset.subset(torch.zeros(300, dtype=torch.long), train=True)
    drawn = part.batch(torch.arange(300))[0].round().to(torch.uint8)
    padded = torch.nn.functional.pad(torch.from_numpy(noise).permute(2, 0, 1), (2,) * 4)
    possible = torch.stack([padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)])
    assert {(possible == one).flatten(1).all(1).nonzero().item() for one in drawn} == set(range(25))


def test_flipping_is_an_option(tmp_path):
    write_images(tmp_path, 1)
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255
    Image.fromarray(half).save(tmp_path / "blue" / "0.png")
    for flip, sides in ((True, {-1.0, 1.0}), (False, {1.0})):
        part = ImageFolder(tmp_path, image_size=8, shift=0, flip=flip).subset(torch.zeros(40).long(), train=True)
        assert set(part.batch(torch.arange(40))[0][:, 0, 0, 0].tolist()) == sides


def test_the_centre_crop_keeps_its_share(tmp_path):
    write_images(tmp_path, 1)
    image = Image.new("RGB", (16, 16), (0, 0, 0))
    image.paste((255, 255, 255), (4, 4, 12, 12))
    image.save(tmp_path / "blue" / "0.png")
    assert everything(ImageFolder(tmp_path, image_size=8, crop_pct=0.5))[0][0].min() == 1
    assert everything(ImageFolder(tmp_path, image_size=16))[0][0].min() == -1


def test_imagenet_is_tested_on_val_and_leaves_its_unlabelled_images_alone(tmp_path):
    write_images(tmp_path / "train", 3, size=(40, 30))
    write_images(tmp_path / "val", 1, size=(40, 30))
    (tmp_path / "test").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "test" / "1.JPEG")
    dataset = create_dataset("imagenet", root=tmp_path, num_classes=3)
    assert (dataset.name, dataset.crop_pct) == ("imagenet", 0.875) and dataset.test_indices.tolist() == [9, 10, 11]
    inputs, _ = dataset.subset(torch.arange(2), train=True).batch(torch.arange(2))
    assert inputs.shape == (2, 3, 224, 224)
    blue = (torch.tensor([0.0, 0.0, 1.0]) - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    assert torch.allclose(inputs[0, :, 100, 100], blue, atol=1e-5)
    with pytest.raises(TangleNASError, match="train has 3 class folders; num_classes asks for 1000"):
        create_dataset("imagenet", root=tmp_path)


def test_imagenet_opens_no_file_at_the_start(tmp_path):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "val", 1)
    make = partial(create_dataset, "imagenet", root=tmp_path, num_classes=3)
    fingerprint = make().fingerprint
    path = tmp_path / "train" / "blue" / "0.png"
    path.write_bytes(bytes(path.stat().st_size))
    assert make().fingerprint == fingerprint
    with pytest.raises(TangleNASError, match=r"blue.0\.png is no readable image"):
        make().subset(torch.arange(1), train=False).batch(torch.arange(1))
    with pytest.raises(TangleNASError, match=r"blue.0\.png is no readable image"):
        make(check=True)
    path.write_bytes(bytes(7))
    assert make().fingerprint != fingerprint


@pytest.mark.slow
def test_imagenet16_120_has_120_classes_of_16x16(tmp_path):
    classes = [f"n{i:08}" for i in range(120)]
    write_images(tmp_path / "train", 2, classes, size=(16, 16))
    write_images(tmp_path / "val", 1, classes, size=(16, 16))
    dataset = create_dataset("imagenet16_120", root=tmp_path)
    assert (dataset.num_classes, dataset.image_size, len(dataset)) == (120, 16, 360)
    assert dataset.test_indices.tolist() == list(range(240, 360))
    moved = dataset.subset(torch.arange(240), train=True).batch(torch.arange(240))[0]
    assert moved.shape == (240, 3, 16, 16)
    black = -torch.tensor(dataset.mean) / torch.tensor(dataset.std)
    borders = torch.isclose(moved, black.view(3, 1, 1)).all(1).all(1)  # columns that came in, (240, 16)
    assert set(borders.sum(1).tolist()) == {0, 1, 2} and not borders[:, 2:-2].any()
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / part / classes[0])
    with pytest.raises(TangleNASError, match="train has 119 class folders; num_classes asks for 120"):
        create_dataset("imagenet16_120", root=tmp_path)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_part_of_imagenet_is_named(tmp_path, missing):
    for part in {"train", "val"} - {missing}:
        write_images(tmp_path / part, 1)
    with pytest.raises(TangleNASError, match=rf"there is no folder \S*{missing}\. Give root="):
        create_dataset("imagenet", root=tmp_path, num_classes=3)


def test_validation_images_that_are_not_sorted_by_class_are_named(tmp_path):
    write_images(tmp_path / "train", 1)
    (tmp_path / "val").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(TangleNASError, match=r"val has no class folders with images, \S*train has 3\. Sort its"):
        create_dataset("imagenet", root=tmp_path, num_classes=3)


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


def test_sixteen_bit_images_are_scaled_to_eight(pictures):
    Image.fromarray(np.full((10, 10), 0x8000, np.uint16)).save(pictures / "blue" / "0.png")
    inputs, _ = everything(ImageFolder(pictures, image_size=8, mean=0, std=1 / 255))
    assert inputs[0].round().unique().tolist() == [0x80]


@pytest.mark.parametrize(
    "mode, colour, saved",
    [
        ("RGBA", (10, 20, 30, 0), {}),
        ("LA", (10, 0), {}),
        ("P", 0, {"transparency": b"\0"}),
        ("L", 10, {"transparency": 10}),
        ("RGB", (10, 20, 30), {"transparency": (10, 20, 30)}),
        ("I;16", 0x0A0B, {"transparency": 0x0A0B}),
    ],
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_what_is_transparent_is_white_and_the_rest_as_it_was(pictures, mode, colour, saved, in_channels):
    opaque = {"RGBA": (10, 20, 30, 255), "LA": (10, 255), "P": 1, "L": 11, "RGB": (10, 20, 31), "I;16": 0x0A0C}[mode]
    image = Image.new(mode, (8, 8), opaque)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(Image.new(mode, (4, 8), colour), (4, 0))  # a number would lose its upper 8 bits
    image.save(pictures / "blue" / "0.png", **saved)
    inputs, _ = everything(ImageFolder(pictures, image_size=8, in_channels=in_channels, mean=0, std=1 / 255))
    assert inputs[0, :, :, 4:].round().unique().tolist() == [255]
    assert inputs[0, :, :, :4].round().max() < 32


def test_a_transparent_colour_of_16_bits_is_white(pictures):
    """Pillow writes no RGB images of 16 bits, so that the file is made here: a transparent pixel and another one."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    colour, other = (0x0A0B, 0x140C, 0x1E0D), (0x0B0B, 0x140C, 0x1E0D)
    pixels = b"\0" + struct.pack(">6H", *colour, *other)
    header = chunk(b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0))
    content = header + chunk(b"tRNS", struct.pack(">3H", *colour)) + chunk(b"IDAT", zlib.compress(pixels))
    path = pictures / "blue" / "0.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b""))
    assert np.asarray(decode(path, "RGB")).tolist() == [[[255, 255, 255], [0x0B, 0x14, 0x1E]]]


def test_half_a_transparency_lets_half_of_the_white_through(pictures):
    palette = Image.new("P", (10, 10), 0)
    palette.putpalette([10, 20, 30])
    palette.save(pictures / "blue" / "0.png", transparency=b"\x80")
    inputs, _ = everything(ImageFolder(pictures, image_size=8, mean=0, std=1 / 255))
    assert inputs[0, :, 0, 0].round().tolist() == [132, 137, 142]


def shaded(image, value=0.0):
    return torch.full((3, 8, 8), value)


class Shaded:
    def __call__(self, image):
        return shaded(image)


V2 = "torchvision.transforms.v2"


@pytest.mark.parametrize(
    "transform, told",
    [
        (shaded, f"{__name__}.shaded"),
        (Shaded(), f"{__name__}.Shaded"),
        (partial(shaded, value=0.5), f"{__name__}.shaded(value=0.5)"),
        (partial(partial(shaded), None, value=Shaded()), f"{__name__}.shaded(None, value={__name__}.Shaded)"),
        (v2.Compose([v2.Pad(4), v2.ToImage()]),
         f"{V2}._container.Compose( Pad(padding=4, fill=0, padding_mode=constant) ToImage() )"),
        (torch.nn.Sequential(v2.CenterCrop(8)),
         "torch.nn.modules.container.Sequential( (0): CenterCrop(size=(8, 8)) )"),
    ],
)  # fmt: skip
def test_a_transform_of_ones_own_is_described_with_its_options(pictures, transform, told):
    described = ImageFolder(pictures, image_size=8, eval_transform=transform).input_config()
    assert described["eval_transform"] == told


def test_own_transforms_replace_both_pipelines(pictures):
    dataset = ImageFolder(
        pictures,
        image_size=4,
        train_transform=lambda image: torch.full((3, 4, 4), float(image.size[0])),
        eval_transform=lambda image: torch.zeros(3, 4, 4),
    )
    assert everything(dataset, train=True)[0].unique().tolist() == [12]
    assert everything(dataset)[0].unique().tolist() == [0]


@pytest.mark.parametrize(
    "given", [{"flip": True}, {"shift": 2}, {"crop_scale": (0.1, 1.0)}, {"augment": "v0"}, {"shift": 0, "flip": True}]
)
def test_options_that_a_transform_of_ones_own_replaces_are_refused(pictures, given):
    def own(image):
        return torch.zeros(3, 8, 8)

    with pytest.raises(TangleNASError, match=rf"train_transform replaces .*, so {', '.join(given)} would do nothing"):
        ImageFolder(pictures, image_size=8, train_transform=own, **dict(sorted(given.items(), reverse=True)))
    ImageFolder(pictures, image_size=8, eval_transform=own, **given)


@pytest.mark.parametrize("given", [{"mean": (123.675, 116.28, 103.53)}, {"std": 58.395}, {"mean": -0.1}])
def test_a_normalisation_of_pixels_up_to_255_is_refused(pictures, given):
    with pytest.raises(
        TangleNASError, match=r"expected numbers from 0 to 1, as pixels are from 0 to 1. Divide .* by 255"
    ):
        ImageFolder(pictures, **given)


@pytest.mark.parametrize("given", [{"mean": 0.1}, {"std": (0.1, 0.2, 0.3)}, {"crop_pct": 0.9}])
def test_options_that_both_transforms_of_ones_own_replace_are_refused(pictures, given):
    def own(image):
        return torch.zeros(3, 8, 8)

    with pytest.raises(
        TangleNASError, match=rf"and eval_transform replace .*, so {next(iter(given))} would do nothing"
    ):
        ImageFolder(pictures, image_size=8, train_transform=own, eval_transform=own, **given)
    ImageFolder(pictures, image_size=8, train_transform=own, **given)


def test_a_transform_of_another_shape_is_named(pictures):
    dataset = ImageFolder(pictures, image_size=4, eval_transform=lambda image: torch.zeros(1, 4, 4))
    with pytest.raises(TangleNASError, match=r"made \(1, 4, 4\) of .*0\.png.* ask for \(3, 4, 4\)"):
        everything(dataset)


def fails_on_wide_images(image):
    return torch.zeros(3, 8, 8) if image.width == image.height else image.colours()


@pytest.mark.parametrize("option", ["train_transform", "eval_transform", "augment"])
def test_a_transform_that_fails_is_named_with_its_option_its_line_and_the_file(pictures, option):
    Image.new("RGB", (12, 10)).save(pictures / "green" / "0.png")
    given = [lambda image: fails_on_wide_images(image.resize((8, 9)))] if option == "augment" else fails_on_wide_images
    dataset = ImageFolder(pictures, image_size=8, **{option: given})
    told = (
        rf"create_dataset\.{option} cannot be used \(on \S*0\.png: AttributeError: .*colours.*"
        rf"{Path(__file__).name}:\d+, in fails_on_wide_images\)\)\. Expected a function of any PIL image in mode RGB"
    )
    with pytest.raises(TangleNASError, match=told):
        everything(dataset, train=option != "eval_transform")


def png(width, height):
    """A PNG file that says it is so large, and holds a few pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def test_floating_point_pixels_are_refused(pictures):
    Image.fromarray(np.zeros((10, 10), np.float32)).save(pictures / "blue" / "0.tif")
    with pytest.raises(TangleNASError, match=r"blue.0\.tif is no readable image: its pixels are floating-point"):
        everything(ImageFolder(pictures))


@pytest.mark.parametrize("train", [True, False])
def test_an_image_that_the_dataset_itself_cannot_bring_to_its_size_is_named_alone(pictures, monkeypatch, train):
    monkeypatch.setattr("torchvision.transforms.v2.Normalize.forward", lambda self, image: 1 / 0)
    dataset = ImageFolder(pictures)
    message = r"\.png of 12 x 10 pixels cannot be brought to 32 x 32 \(ZeroDivisionError: division by zero\)\. Remove"
    with pytest.raises(TangleNASError, match=message):
        dataset.subset(torch.arange(1), train=train).batch(torch.arange(1))


@pytest.mark.parametrize("mode", ["1", "CMYK", "L", "LA", "P", "RGBA", "YCbCr"])
def test_images_of_any_mode_become_rgb(pictures, mode):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    Image.new("RGB", (10, 10), (255, 255, 255)).convert(mode).save(pictures / "blue" / f"0.{suffix}")
    dataset = ImageFolder(pictures, image_size=8)
    index = dataset._paths.index(str(pictures / "blue" / f"0.{suffix}"))
    assert everything(dataset)[0][index].min() > 0.98


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
    elif how == "huge":
        (root / "red" / "x.png").write_bytes(png(20_000, 20_000))
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
        ("class without images", r"no training image in \S*pictures of the classes \S*yellow\. Put"),
        ("no image", r"red.x\.jpg is no readable image: it is of no known format \(BMP.*\)\. Replace"),
        ("empty file", r"red.x\.png is no readable image"),
        ("huge", r"red.x\.png is no readable image: Image size \(400000000 pixels\) exceeds limit"),
        ("classes differ", r"test has the class folders crimson, which \S*train with blue, green, red has not\. Give"),
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
        ({"image_size": 16.0}, r"image_size is 16\.0, expected a whole number"),
        ({"in_channels": 3.0}, r"in_channels is 3\.0"),
        ({"crop_pct": "1"}, "crop_pct is '1'; give a share"),
        ({"crop_scale": ("0.5", 1)}, r"crop_scale is \('0.5', 1\); give"),
        ({"root": None}, "the path of data is None, expected a text"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values for 3"),
        ({"crop_pct": 1.5}, "crop_pct is 1.5"),
        ({"shift": 32}, "shift is 32, expected a whole number from 0 to 31"),
        ({"shift": 2, "crop_scale": (0.5, 1.0)}, "shift is 2 and replaces the random crop, so crop_scale would do"),
    ],
)
def test_impossible_image_folder_options_are_named(pictures, options, message):
    with pytest.raises(TangleNASError, match=message):
        ImageFolder(**{"root": pictures, **options})


# What a dataset says of its inputs, and what an exported network keeps of it

PATCHES = {"autoformer_nano": {"patch_size": 7}}


@pytest.mark.slow
def test_datasets_of_images_state_the_normalisation_that_they_apply(tmp_path, fashion_folder, pictures):
    folders = {kind: write_cifar(tmp_path, kind)[0] for kind in KINDS}
    datasets = [Digits(), FashionMNIST(fashion_folder), *(kind(folder) for kind, folder in folders.items())]
    for dataset in [*datasets, ImageFolder(pictures, mean=(0.1, 0.2, 0.3), std=0.4)]:
        assert len(dataset.mean) == len(dataset.std) == dataset.in_channels
        inputs = everything(dataset)[0]
        # Black is the least that there can be; all of these have some.
        least = -torch.tensor(dataset.mean) / torch.tensor(dataset.std)
        assert torch.allclose(inputs.amin((0, 2, 3)), least, atol=0.02), dataset.name
    assert Text.mean is Text.std is None


@pytest.mark.slow
@pytest.mark.parametrize("space", ["autoformer_nano", "mobilenetv3_nano"])
def test_timm_makes_inputs_for_an_exported_network_as_its_dataset_does(tmp_path, space):
    write_images(tmp_path / "images", 1)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "blue" / "0.png")
    dataset = ImageFolder(tmp_path / "images", image_size=28, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), crop_pct=0.875)
    space = create_space(space, **dataset.space_options(), **PATCHES.get(space, {}))
    architecture = space.smallest()
    space.export(space.extract(architecture), architecture, tmp_path / "model", dataset)
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    image = Image.open(io.BytesIO((tmp_path / "images" / "blue" / "0.png").read_bytes()), formats=("PNG",))
    assert torch.allclose(transform(image), everything(dataset)[0][0], atol=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["no dataset", "a transform of one's own"])
@pytest.mark.parametrize("space", ["autoformer_nano", "mobilenetv3_nano"])
def test_an_export_says_nothing_of_inputs_that_are_not_known(tmp_path, space, own):
    write_images(tmp_path / "images", 1)
    dataset = ImageFolder(tmp_path / "images", image_size=28, eval_transform=v2.ToImage()) if own else None
    sizes = {"image_size": 28, "in_channels": 3, "num_classes": 3, **PATCHES.get(space, {})}
    space = create_space(space, **sizes)
    space.export(space.extract(space.smallest()), space.smallest(), tmp_path / "model", dataset)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    said = config["pretrained_cfg"]
    assert not {"mean", "std", "crop_pct", "interpolation"} & said.keys() and ("label_names" in said) is own
    name = "torchvision.transforms.v2._type_conversion.ToImage()" if own else None
    assert config.get("eval_transform") == name and "eval_transform" not in said
    timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
