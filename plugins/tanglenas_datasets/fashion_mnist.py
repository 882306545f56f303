"""Fashion-MNIST: 60,000 training and 10,000 test images of clothing, 28x28, one channel."""

import gzip
import math
import os
import struct
import zlib
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tanglenas_datasets.augment import prepare
from tanglenas_engine.data import Dataset, TensorSamples, content_hash
from tanglenas_engine.errors import TangleNASError

_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
# Of the raw pixels of the training images, which go from 0 to 255.
_MEAN, _STD = 72.94, 90.02


class FashionMNIST(Dataset):
    """Ten classes of 28x28 images with one channel; the official test part ends the pool.

    The test images are read when a subset first asks for one: a search never touches their file.

    Args:
        root: A folder with the four IDX files, gzipped or not, of Fashion-MNIST or of anything in the form of
            MNIST. Without it they are looked for in `$TANGLENAS_DATA`, or `data/` under the current folder,
            where torchvision keeps them.
        download: Without `root`, whether torchvision may fetch missing files to that place.
        image_size: 28, or 32 with two rows of background on each side.
        shift: Training images move by up to so many pixels, at random.
        flip: Training images are mirrored at random.

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

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        download: bool = True,
        image_size: int = 28,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        if image_size not in (28, 32):
            raise TangleNASError(f"fashion_mnist: image_size is {image_size}; give 28 or 32.")
        if not 0 <= shift < image_size:
            raise TangleNASError(f"fashion_mnist: shift is {shift}; give 0 (off) to {image_size - 1} pixels.")
        self.image_size = image_size
        self.shift = shift
        self.flip = flip
        self._folder = _find(root, download)
        train_labels, test_labels = (_labels(self._folder, part) for part in ("train", "t10k"))
        self._train_images = _images(self._folder, "train", len(train_labels))
        self._test_size = len(test_labels)
        self.labels = torch.cat([train_labels, test_labels])
        self.test_indices = torch.arange(len(train_labels), len(self.labels))
        # Without the test images, which nothing may read yet.
        self.fingerprint = content_hash(self._train_images, train_labels, test_labels)

    @cached_property
    def _test_images(self) -> Tensor:
        return _images(self._folder, "t10k", self._test_size)

    def subset(self, indices: Tensor, *, train: bool) -> TensorSamples:
        pool = self._train_images
        if (indices >= len(pool)).any():
            pool = torch.cat([pool, self._test_images])
        margin = (self.image_size - 28) // 2
        transform = partial(prepare, mean=_MEAN, std=_STD, shift=self.shift if train else 0, flip=self.flip and train)
        return TensorSamples(F.pad(pool[indices], (margin,) * 4), self.labels[indices], transform)


def _find(root: str | os.PathLike[str] | None, download: bool) -> Path:
    """The folder with the four files."""
    base = Path(os.environ.get("TANGLENAS_DATA") or "data") if root is None else Path(root)
    # torchvision's place is FashionMNIST/raw.
    folders = [base, base / "FashionMNIST" / "raw"]
    for folder in folders:
        if all(_path(folder, name) for name in _FILES):
            return folder
    if root is None and download:
        from torchvision.datasets import FashionMNIST as Torchvision

        try:
            Torchvision(str(base), download=True)
        except (OSError, RuntimeError) as error:
            raise TangleNASError(
                f"fashion_mnist could not be downloaded to {base}: {error}. Try again with a network, or "
                "give root=, a folder with the four IDX files."
            ) from error
        return folders[1]
    missing = [name for name in _FILES if not _path(base, name)]
    raise TangleNASError(
        f"fashion_mnist: {base} lacks {', '.join(missing)} (each may end in .gz). Give root=, the folder "
        "that has the four IDX files, or leave root out and allow download=True."
    )


def _path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _labels(folder: Path, part: str) -> Tensor:
    labels, path = _read(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(labels) == 0 or labels.max() > 9:
        raise TangleNASError(f"{path} should hold labels from 0 to 9, at least one. Fetch the file again.")
    return labels.long()


def _images(folder: Path, part: str, count: int) -> Tensor:
    """Shape (count, 1, 28, 28), uint8."""
    images, path = _read(folder, f"{part}-images-idx3-ubyte", 3)
    if images.shape != (count, 28, 28):
        raise TangleNASError(
            f"{path} holds images of shape {tuple(images.shape)}; expected {(count, 28, 28)}, one for each "
            "label. Take all four files from one source."
        )
    return images.unsqueeze(1)


def _read(folder: Path, name: str, dimensions: int) -> tuple[Tensor, Path]:
    """The uint8 array in an IDX file, and the path it lies at.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each dimension as a
    big-endian uint32, then the values.
    """
    path = _path(folder, name)
    if path is None:
        raise TangleNASError(f"{folder} lacks {name} (or {name}.gz). Put it there.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TangleNASError(f"{path} is damaged or cut short: {error}. Fetch it again.") from error
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
