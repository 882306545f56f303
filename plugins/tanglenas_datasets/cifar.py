"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images, 32x32 in colour.

The files are those of the binary version. torchvision reads the same images from pickles, which can run code.
"""

import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tanglenas_datasets.memory import ImagesInMemory, find, read
from tanglenas_engine import TangleNASError, at_least, write_atomic

_SITE = "https://www.cs.toronto.edu/~kriz/"
_PIXELS = 3 * 32 * 32


class CIFAR10(ImagesInMemory):
    """The CIFAR-10 dataset: ten classes of 32x32 images in colour, with the official test part at the end of the pool.

    Args:
        root: A folder with the files of the binary version, gzipped or not. By default they are looked for in
            `$TANGLENAS_DATA`, or in `data/` in the project.
        download: Fetch missing files to that place, unless `root` is given.
        image_size: 32, or another size from 8 on by bilinear resizing.
        shift: Largest random shift of training images, in pixels.
        flip: Mirror training images at random.
        cutout: Side of a random square that is removed from training images. Networks of the DARTS space are retrained
            with 16.

    Raises:
        TangleNASError: Files are missing, damaged, or not those of the binary version.
    """

    name = "cifar10"
    num_classes = 10
    in_channels = 3
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    archive, md5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
    inner = "cifar-10-batches-bin"
    train_files = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    test_file, names_file = "test_batch.bin", "batches.meta.txt"
    label_ranges: tuple[int, ...] = (10,)
    """The number of values of each label byte in a record; the last byte is the class."""

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        download: bool = True,
        image_size: int = 32,
        shift: int = 4,
        flip: bool = True,
        cutout: int = 0,
    ) -> None:
        at_least(f"{self.name}: image_size", image_size, 8)
        files = (*self.train_files, self.test_file, self.names_file)
        self._folder = find(self.name, root, self.inner, files, self._fetch if download else None)
        self.class_names = self._read_names()
        super().__init__(size=32, image_size=image_size, shift=shift, flip=flip, cutout=cutout)

    def _fetch(self, base: Path) -> None:
        from torchvision.datasets.utils import download_url

        download_url(_SITE + self.archive, base, md5=self.md5)
        with tarfile.open(base / self.archive) as archive:
            for file in (*self.train_files, self.test_file, self.names_file):
                member = archive.extractfile(f"{self.inner}/{file}")
                assert member is not None
                write_atomic(base / self.inner / file, member.read())

    def _read_train(self) -> tuple[Tensor, Tensor]:
        images, labels = zip(*map(self._records, self.train_files), strict=True)
        return torch.cat(images), torch.cat(labels)

    def _read_test_labels(self) -> Tensor:
        return self._records(self.test_file)[1]

    def _read_test_images(self) -> Tensor:
        return self._records(self.test_file)[0]

    def _records(self, file: str) -> tuple[Tensor, Tensor]:
        """Return images (n, 3, 32, 32), uint8, and labels (n,), int64, of a file.

        A record is its label bytes, then the red, the green and the blue pixels, row by row.
        """
        content, path = read(self._folder, file)
        first = len(self.label_ranges)
        if not content or len(content) % (first + _PIXELS):
            raise TangleNASError(
                f"{path} has {len(content):,} bytes, not a number of records of {first + _PIXELS:,}: {first} of labels "
                f"and {_PIXELS:,} of pixels. It is cut short, or no file of the binary version. Remove it, so that it "
                "is fetched again, or give another root=."
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, first + _PIXELS)
        labels = records[:, :first]
        if (wrong := np.argwhere(labels >= self.label_ranges)).size:
            record, byte = wrong[0]
            raise TangleNASError(
                f"{path}: record {record} has the label {labels[record, byte]}; expected 0 to "
                f"{self.label_ranges[byte] - 1}. The file is damaged, or one of another dataset than {self.name}."
            )
        images = torch.from_numpy(records[:, first:].reshape(-1, 3, 32, 32).copy())
        return images, torch.from_numpy(labels[:, -1].astype(np.int64))

    def _read_names(self) -> tuple[str, ...]:
        content, path = read(self._folder, self.names_file)
        names = tuple(content.decode("utf-8", "replace").split())
        if len(names) != self.num_classes:
            raise TangleNASError(
                f"{path} has {len(names)} names; expected {self.num_classes}, one for each class. Fetch it again."
            )
        return names


class CIFAR100(CIFAR10):
    """The CIFAR-100 dataset: a hundred classes of 32x32 images in colour, with the official test part at the end.

    The arguments and errors are those of `CIFAR10`.
    """

    name = "cifar100"
    num_classes = 100
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)

    archive, md5 = "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"
    inner = "cifar-100-binary"
    train_files = ("train.bin",)
    test_file, names_file = "test.bin", "fine_label_names.txt"
    label_ranges = (20, 100)  # the superclass, then the class
