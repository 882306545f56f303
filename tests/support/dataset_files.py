"""Small datasets of random images, in the files of the real ones."""

import gzip
import struct

import numpy as np
import torch
from PIL import Image

from tanglenas_datasets.cifar import CIFAR10, CIFAR100

KINDS = {
    CIFAR10: ("cifar-10-batches-bin", {f"data_batch_{i}.bin": 4 for i in range(1, 6)}, "test_batch.bin", [10]),
    CIFAR100: ("cifar-100-binary", {"train.bin": 20}, "test.bin", [20, 100]),
}
NAMES = {CIFAR10: "batches.meta.txt", CIFAR100: "fine_label_names.txt"}


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


def write_cifar(root, kind, test=7, each=None):
    """Random images in the form of the archive; returns its folder, all images and all labels.

    Each file of the training part has `each` images, or a few.
    """
    inner, files, test_file, ranges = KINDS[kind]
    folder = root / inner
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = [], []
    for file, count in {**{name: each or few for name, few in files.items()}, test_file: test}.items():
        images.append(rng.integers(0, 256, (count, 3, 32, 32), np.uint8))
        every_class = rng.permutation(max(count, *ranges))[:count, None]
        labels.append((every_class % ranges).astype(np.uint8))
        (folder / file).write_bytes(np.hstack([labels[-1], images[-1].reshape(count, -1)]).tobytes())
    names = [f"class{i}" for i in range(ranges[-1])]
    (folder / NAMES[kind]).write_text("\n".join(names) + "\n\n")
    return folder, torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)[:, -1])


COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def write_images(folder, count=6, classes=COLOURS, size=(12, 10), shade=0):
    """Images of one colour, in a folder for each class; with a shade, no two of a folder are equal."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            red, green, blue = COLOURS.get(name, (200, 100, 50))
            Image.new("RGB", size, (red, abs(green - i * shade), blue)).save(folder / name / f"{i}.png")
    return folder
