"""Fashion-MNIST: 60,000 training and 10,000 test images of clothing, 28x28, one channel."""

import math
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from tanglenas_datasets.memory import ImagesInMemory, find, read
from tanglenas_engine import TangleNASError, at_least

_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


class FashionMNIST(ImagesInMemory):
    """The Fashion-MNIST dataset: ten classes of 28x28 images with one channel, with the official test part at the end.

    Args:
        root: A folder with the four IDX files of Fashion-MNIST, gzipped or not. By default they are looked for in
            `$TANGLENAS_DATA`, or in `data/` in the project, where torchvision keeps them. Files of other data in
            the form of MNIST are read, but their classes get the names of clothes.
        download: Let torchvision fetch missing files to that place, unless `root` is given.
        image_size: Height and width of the inputs: 28, or 32 after bilinear resizing.
        shift: Largest random shift of training images, in pixels.
        flip: Mirror training images at random.
        cutout: Side of a random square that is removed from training images.

    Raises:
        TangleNASError: Files are missing, damaged, or not those of a dataset in the form of MNIST.
    """

    name = "fashion_mnist"
    num_classes = 10
    in_channels = 1
    class_names = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
    # These are statistics of the training images.
    mean = (72.94 / 255,)
    std = (90.02 / 255,)

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        download: bool = True,
        image_size: int = 28,
        shift: int = 0,
        flip: bool = False,
        cutout: int = 0,
    ) -> None:
        if at_least("fashion_mnist: image_size", image_size, 28, 32) not in (28, 32):
            raise TangleNASError(f"fashion_mnist: image_size is {image_size}; give 28 or 32.")
        self._folder = find(self.name, root, "FashionMNIST/raw", _FILES, _fetch if download else None)
        super().__init__(size=28, image_size=image_size, shift=shift, flip=flip, cutout=cutout)

    def _read_train(self) -> tuple[Tensor, Tensor]:
        labels = _labels(self._folder, "train")
        return _images(self._folder, "train", len(labels)), labels

    def _read_test_labels(self) -> Tensor:
        return _labels(self._folder, "t10k")

    def _read_test_images(self) -> Tensor:
        return _images(self._folder, "t10k", len(self.test_indices))


def _fetch(base: Path) -> None:
    from torchvision.datasets import FashionMNIST as Torchvision

    Torchvision(str(base), download=True)


def _labels(folder: Path, part: str) -> Tensor:
    labels, path = _read(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(labels) == 0 or labels.max() > 9:
        raise TangleNASError(f"{path} should hold labels from 0 to 9, at least one. Fetch the file again.")
    return labels.long()


def _images(folder: Path, part: str, count: int) -> Tensor:
    """Return images of shape (count, 1, 28, 28), uint8."""
    images, path = _read(folder, f"{part}-images-idx3-ubyte", 3)
    if images.shape != (count, 28, 28):
        raise TangleNASError(
            f"{path} holds images of shape {tuple(images.shape)}; expected {(count, 28, 28)}, one for each "
            "label. Take all four files from one source."
        )
    return images.unsqueeze(1)


def _read(folder: Path, name: str, dimensions: int) -> tuple[Tensor, Path]:
    """Return the uint8 array in an IDX file, and the path of the file.

    The format is: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each dimension as a
    big-endian uint32, then the values.
    """
    content, path = read(folder, name)
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise TangleNASError(
            f"{path} is no IDX file of unsigned bytes with {dimensions} dimension(s): it starts with "
            f"{content[:4].hex(' ') or 'nothing'}. Fetch it again, or give it the name of what it is."
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise TangleNASError(
            f"{path} says it holds {math.prod(shape)} values, {' x '.join(map(str, shape))}, but holds "
            f"{len(content) - start}. Fetch it again."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape), path
