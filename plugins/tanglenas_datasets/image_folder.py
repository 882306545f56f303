"""Datasets with one folder of images per class: your own images, ImageNet and its subsets."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from tanglenas_engine import Dataset, TangleNASError, content_hash

Transform = Callable[[Image.Image], Tensor]

_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
# Pillow raises these for a file that it cannot read.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# The fingerprint takes so many bytes of each file: all of a small image, and enough of a large one.
_HASHED_BYTES = 65536


class ImageFolder(Dataset):
    """A dataset of images under `root/<class>/`, or under `root/train/<class>/` and `root/test/<class>/`.

    The folder `test/` is the official test part. A folder `val/` beside them joins the training images, because the
    splits hold out a validation part of their own. Without `test/`, the folder `val/` is the official test part.

    Classes are numbered in the order of their sorted names. Images may lie in deeper folders. Names that start with a
    dot, and files without an image's suffix, are skipped. Pixels are decoded batch by batch.

    Args:
        root: The folder.
        image_size: Height and width of the inputs.
        in_channels: 3 for RGB, 1 for grey.
        mean, std: Mean and standard deviation of pixels from 0 to 1; one number, or one per channel.
        crop_pct: Share of an image's shorter side that the centre crop of validation and test keeps.
        crop_scale: Smallest and largest share of a training image's area that its random crop takes.
        shift: Largest random shift of training images in pixels; black comes in. It replaces the random crop: training
            images are resized and cropped as in validation.
        flip: Mirror training images at random.
        num_classes: Required number of class folders; None accepts any number.
        test_folder: The folder beside `train/` that is the official test part, where the rule above does not fit.
            ImageNet's is `val`: its `test/` has no labels, and is never read.
        check: Open every file at the start to see that it is an image, and let its content enter the fingerprint.
            Without the check, the fingerprint covers names and sizes; this takes about a minute for ImageNet.
        train_transform: A function from a PIL image to a float tensor (in_channels, image_size, image_size). It
            replaces cropping, mirroring and normalisation.
        eval_transform: The same for validation and test. It replaces resizing of the shorter side, the centre crop and
            normalisation.

    Raises:
        TangleNASError: The folder is missing or has too few classes, a class has no image, train and test
            differ in their classes, or a file is no image (at the start, or when it is decoded).
    """

    name = "image_folder"

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int = 32,
        in_channels: int = 3,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        crop_pct: float = 1.0,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        shift: int | None = None,
        flip: bool = True,
        num_classes: int | None = None,
        test_folder: str | None = None,
        check: bool = True,
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
    ) -> None:
        if in_channels not in (1, 3):
            raise TangleNASError(f"image_folder: in_channels is {in_channels}; give 1 (grey) or 3 (RGB).")
        if image_size < 1:
            raise TangleNASError(f"image_folder: image_size is {image_size}; give at least 1.")
        if not 0 < crop_pct <= 1:
            raise TangleNASError(f"image_folder: crop_pct is {crop_pct}; give a share of the image, up to 1.")
        if shift is not None and not 0 <= shift < image_size:
            raise TangleNASError(f"image_folder: shift is {shift}; give 0 to {image_size - 1} pixels, or None.")
        self.image_size = image_size
        self.in_channels = in_channels
        self.mean = _per_channel("mean", mean, in_channels)
        self.std = _per_channel("std", std, in_channels)
        self.crop_pct = crop_pct
        centre = [v2.Resize(math.floor(image_size / crop_pct)), v2.CenterCrop(image_size)]
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        augment: list[v2.Transform] = [v2.RandomResizedCrop(image_size, scale=tuple(crop_scale))]
        if shift is not None:
            augment = [*centre, v2.RandomCrop(image_size, padding=shift)]
        if flip:
            augment.append(v2.RandomHorizontalFlip())
        self._train_transform: Transform = train_transform or v2.Compose([*augment, *finish])
        self._eval_transform: Transform = eval_transform or v2.Compose([*centre, *finish])

        root = Path(root)
        if not root.is_dir():
            raise TangleNASError(f"image_folder: there is no folder {root}. Give root=, one with a folder per class.")
        train_folders, test = _layout(root, test_folder)
        train = [_classes(folder) for folder in train_folders]
        self.class_names = tuple(sorted(train[0]))
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise TangleNASError(
                f"image_folder: {train_folders[0]} has {self.num_classes} class folders "
                f"({', '.join(self.class_names) or 'none'}). Give a folder with one folder of images per "
                "class, two classes or more."
            )
        if num_classes not in (None, self.num_classes):
            raise TangleNASError(
                f"image_folder: {train_folders[0]} has {self.num_classes} class folders; num_classes asks for "
                f"{num_classes}. Give another root=, or set num_classes."
            )
        parts = [*zip(train_folders, train, strict=True)]
        if test is not None:
            parts.append((test, _classes(test)))
        for folder, classes in parts:
            if not classes:
                raise TangleNASError(
                    f"image_folder: {folder} has no class folders, {train_folders[0]} has {self.num_classes}. Sort its "
                    "images into the same folders, or remove it."
                )
            if odd := set(classes) ^ set(self.class_names):
                raise TangleNASError(
                    f"image_folder: {train_folders[0]} and {folder} differ in {len(odd)} classes, such as "
                    f"{', '.join(sorted(odd)[:3])}. Give both the same class folders."
                )

        paths: list[Path] = []
        labels: list[int] = []
        sizes: list[int] = []
        for _, classes in parts:
            for label, class_name in enumerate(self.class_names):
                paths += classes[class_name]
                labels += [label] * len(classes[class_name])
            sizes.append(len(paths))
        self.labels = torch.tensor(labels)
        if test is not None:
            self.test_indices = torch.arange(sizes[-2], sizes[-1])
        hashes = (_file_hash(path, root, check) for path in paths)
        self.fingerprint = content_hash(*self.class_names, self.labels, *hashes)
        self._paths = [str(path) for path in paths]

    def subset(self, indices: Tensor, *, train: bool) -> "ImageFiles":
        return ImageFiles(
            [self._paths[i] for i in indices.tolist()],
            self.labels[indices],
            self._train_transform if train else self._eval_transform,
            shape=(self.in_channels, self.image_size, self.image_size),
        )


class ImageFiles:
    """The samples of a subset, in image files that are decoded at each use.

    Args:
        paths: The file of each sample.
        labels: Shape (N,), int64.
        transform: A function from a PIL image, grey or RGB, to a float tensor of `shape`.
        shape: (C, H, W).
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, transform: Transform, shape: tuple[int, int, int]) -> None:
        self._paths = paths
        self._transform = transform
        self._shape = shape
        self.labels = labels

    def __len__(self) -> int:
        return len(self._paths)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([self._input(self._paths[i]) for i in indices.tolist()]), self.labels[indices]

    def _input(self, path: str) -> Tensor:
        inputs = self._transform(_decode(path, "RGB" if self._shape[0] == 3 else "L"))
        if tuple(inputs.shape) != self._shape:
            raise TangleNASError(
                f"image_folder: the transform made {tuple(inputs.shape)} of {path}; in_channels and "
                f"image_size ask for {self._shape}. Change the transform, or those."
            )
        return inputs


def _layout(root: Path, test_folder: str | None) -> tuple[list[Path], Path | None]:
    """Return the folders of training classes, and the folder of test classes or None."""
    train, val, test = root / "train", root / "val", root / "test"
    if test_folder is not None:
        test = root / test_folder
        if missing := [str(folder) for folder in (train, test) if not folder.is_dir()]:
            raise TangleNASError(
                f"image_folder: there is no folder {' and no '.join(missing)}. Give root=, a folder with train/ and "
                f"{test_folder}/, each with one folder per class."
            )
        return ([train, val] if val.is_dir() and val != test else [train]), test
    # A class may be called "train"; its folder then holds images.
    if not train.is_dir() or any(path.suffix.lower() in _SUFFIXES for path in train.iterdir()):
        return [root], None
    if test.is_dir():
        return ([train, val] if val.is_dir() else [train]), test
    return [train], val if val.is_dir() else None


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Return the sorted image files of each class."""
    classes = {}
    for class_folder in sorted(folder.iterdir()):
        if not class_folder.is_dir() or class_folder.name.startswith("."):
            continue
        classes[class_folder.name] = sorted(
            Path(place, name)
            for place, _, names in os.walk(class_folder, followlinks=True)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES
        )
        if not classes[class_folder.name]:
            raise TangleNASError(
                f"image_folder: class folder {class_folder} has no image ({' '.join(sorted(_SUFFIXES))}). "
                "Put images there, or remove the folder."
            )
    return classes


def _file_hash(path: Path, root: Path, check: bool) -> str:
    """Hash a file's name and size; with `check`, hash its first bytes too, and refuse a header that is no image's."""
    head = b""
    if check:
        try:
            with path.open("rb") as file:
                head = file.read(_HASHED_BYTES)
                file.seek(0)
                Image.open(file)
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error
    return content_hash(path.relative_to(root).as_posix(), str(path.stat().st_size), head)


def _decode(path: str, mode: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, of which black and white are not known")
            if image.mode.startswith("I"):  # Pillow would clip 16 bits, not scale them
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            if "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert(mode)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: BaseException) -> TangleNASError:
    reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else str(error).rstrip(".")
    return TangleNASError(f"image_folder: {path} is no readable image: {reason}. Replace the file, or remove it.")


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * channels
    if len(values) != channels:
        raise TangleNASError(
            f"image_folder: {name} has {len(values)} values for {channels} channel(s). Give one number, or "
            "one per channel."
        )
    return values
