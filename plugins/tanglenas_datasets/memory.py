"""Datasets of images that fit into memory, and the search for their files."""

import gzip
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from tanglenas_datasets.augment import prepare
from tanglenas_engine import Dataset, TangleNASError, TensorSamples, at_least, content_hash, data_path


class ImagesInMemory(Dataset):
    """A dataset of images (N, C, H, W), uint8, whose official test part ends the pool.

    The test file is decoded when a subset first asks for a test image, which a search never does.

    Args:
        size: Height and width of the images.
        image_size: Height and width of the inputs, after bilinear resizing.
        shift, flip, cutout: Augmentation of training images; see `prepare`.
    """

    def __init__(self, *, size: int, image_size: int, shift: int = 0, flip: bool = False, cutout: int = 0) -> None:
        for option, pixels in (("shift", shift), ("cutout", cutout)):
            at_least(f"{self.name}: {option}", pixels, 0, size - 1)
        self.image_size = image_size
        self.shift = shift
        self.flip = flip
        self.cutout = cutout
        self._train_images, train_labels = self._read_train()
        test_labels = self._read_test_labels()
        self.labels = torch.cat([train_labels, test_labels])
        self.test_indices = torch.arange(len(train_labels), len(self.labels))
        # The fingerprint leaves out the test images, because nothing may read them yet.
        self.fingerprint = content_hash(self._train_images, train_labels, test_labels)

    @abstractmethod
    def _read_train(self) -> tuple[Tensor, Tensor]:
        """Return training images (N, C, H, W), uint8, and labels (N,), int64."""

    @abstractmethod
    def _read_test_labels(self) -> Tensor:
        """Return the labels of the test images, shape (N,), int64."""

    @abstractmethod
    def _read_test_images(self) -> Tensor:
        """Return the test images, shape (N, C, H, W), uint8."""

    @cached_property
    def _test_images(self) -> Tensor:
        return self._read_test_images()

    def subset(self, indices: Tensor, *, train: bool) -> TensorSamples:
        pool = self._train_images
        if (indices >= len(pool)).any():
            pool = torch.cat([pool, self._test_images])
        augmentation = {"shift": self.shift, "flip": self.flip, "cutout": self.cutout} if train else {}
        transform = partial(prepare, mean=self.mean, std=self.std, image_size=self.image_size, **augmentation)
        return TensorSamples(pool[indices], self.labels[indices], transform)


def find(
    name: str,
    root: str | os.PathLike[str] | None,
    inner: str,
    files: Sequence[str],
    fetch: Callable[[Path], None] | None,
) -> Path:
    """Return the folder that has all the files, each gzipped or not.

    Args:
        name: Name of the dataset.
        root: The folder to look in; by default `$TANGLENAS_DATA`, or `data/` in the project.
        inner: The subfolder into which downloads go; it is searched too.
        fetch: Downloads the files to `inner` under the folder that it is given, or None. It is called if files are
            missing and no `root` is given.

    Raises:
        TangleNASError: A file is missing and was not downloaded.
    """
    # DVC may run stages in a copy of the project that it deletes: downloads belong into the project itself.
    default = Path(os.environ.get("DVC_ROOT", ""), os.environ.get("TANGLENAS_DATA") or "data")
    base = default if root is None else data_path(root)
    for folder in (base, base / inner):
        if all(located(folder, file) for file in files):
            return folder
    if root is None and fetch:
        try:
            fetch(base)
        except (OSError, RuntimeError) as error:
            raise TangleNASError(
                f"{name} could not be downloaded to {base}: {error}. Try again with a network, or "
                f"give root= (create_dataset.root in a gin file), a folder with {', '.join(files)}."
            ) from error
        return base / inner
    missing = [file for file in files if not located(base, file)]
    raise TangleNASError(
        f"{name}: {base} lacks {', '.join(missing)} (each may end in .gz). Give root= (create_dataset.root in a gin "
        "file), the folder that has them, or leave root out and allow download=True."
    )


def located(folder: Path, file: str) -> Path | None:
    """Return the path of a file, gzipped or not, or None if it does not exist."""
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def read(folder: Path, file: str) -> tuple[bytes, Path]:
    """Return the content of a file, gzipped or not, and its path.

    Raises:
        TangleNASError: The file is missing or damaged.
    """
    path = located(folder, file)
    if path is None:
        raise TangleNASError(f"{folder} lacks {file} (or {file}.gz). Put it there.")
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes(), path
    except (OSError, EOFError, zlib.error) as error:
        raise TangleNASError(f"{path} is damaged or cut short: {error}. Fetch it again.") from error
