"""Datasets with one folder of images per class: your own images, ImageNet and its subsets."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from tanglenas_datasets.augment import recipe_of_timm
from tanglenas_datasets.decoding import UNREADABLE, decode, opened, reason
from tanglenas_datasets.folders import SUFFIXES, Part, Passed, listed, read_parts, shown
from tanglenas_datasets.image_checks import check_all, twins, unreadable, unreadable_later
from tanglenas_engine import Dataset, Progress, TangleNASError, at_least, blamed, content_hash, data_path

Transform = Callable[[Image.Image], Tensor]
Augmentation = Callable[[Image.Image], Image.Image]

# The fingerprint takes so many bytes of each file: all of a small image, and enough of a large one.
_HASHED_BYTES = 65536
# The gentle augmentation where none is chosen: a crop to a small share of a small image leaves too few pixels.
_SMALL = 64
_CROP_SCALE = (0.35, 1.0)


class ImageFolder(Dataset):
    """A dataset of images under `root/<class>/`, or under `root/train/<class>/` and `root/test/<class>/`.

    The folder `test/` is the official test part. A folder `val/` beside them joins the training images, because the
    splits hold out a validation part of their own. Without `test/`, the folder `val/` is the official test part. Other
    spellings of the three are known, in any case, such as Training, valid and seg_test.

    The class folders of the training part are the classes, in the order of their sorted names. Other parts may lack
    some, and have no other. Images may lie in deeper folders. Names that start with a dot, folders that systems make,
    files without an image's suffix, and links to a folder above are passed over; `describe` tells them. Pixels are
    decoded batch by batch.

    Args:
        root: The folder. A relative path is one under the current folder or the project's root.
        image_size: Height and width of the inputs.
        in_channels: 3 for RGB, 1 for grey.
        mean, std: Mean and standard deviation of pixels from 0 to 1; one number up to 1, or one per channel.
        crop_pct: Share of an image's shorter side that the centre crop of validation and test keeps.
        crop_scale: Smallest and largest share of a training image's area that its random crop takes.
        shift: Largest random shift of training images in pixels; black comes in. It replaces the random crop: training
            images are resized and cropped as in validation. Only one of both may be set. With neither, inputs of up to
            64 pixels are shifted by an eighth of their size, and larger ones are cropped to 35 % of the area at least.
        flip: Mirror training images at random: right for photographs, wrong for digits, letters and signs.
        augment: More augmentation of training images, after crop and mirror: a recipe of timm ("rand-m9-mstd0.5",
            "augmix-m3", "v0"), a function from a PIL image to one, such as a transform of torchvision v2, or a list of
            both.
        num_classes: Required number of class folders; None accepts any number.
        test_folder: The folder beside `train/` that is the official test part, where the rule above does not fit.
            ImageNet's is `val`: its `test/` has no labels, and is never read.
        parts: False takes every folder in `root` for a class, whatever its name.
        check: Open every file at the start to see that it is an image, let its content enter the fingerprint, and
            decode every file once before a search. Without the check, the fingerprint covers names and sizes; this
            takes about a minute for ImageNet.
        train_transform: A function from a PIL image to a float tensor (in_channels, image_size, image_size). It
            replaces cropping, mirroring, `augment` and normalisation, whose options are refused beside it.
        eval_transform: The same for validation and test. It replaces resizing of the shorter side, the centre crop and
            normalisation. If both transforms are given, mean, std and crop_pct are refused.

    Raises:
        TangleNASError: An option is out of its range or would do nothing, the folder is missing or has too few classes,
            its folders look like parts and are none, a class has no training image, a file is there twice, or a file
            is no image (at the start, or when it is decoded).
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
        crop_scale: tuple[float, float] | None = None,
        shift: int | None = None,
        flip: bool = False,
        augment: str | Augmentation | Sequence[str | Augmentation] | None = None,
        num_classes: int | None = None,
        test_folder: str | None = None,
        parts: bool = True,
        check: bool = True,
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
    ) -> None:
        _check_options(image_size, in_channels, crop_pct, crop_scale, shift, augment)
        replaced: dict[str, tuple[Any, Any]] = {}  # what was given, and what asks for nothing
        if train_transform:
            replaced |= {"crop_scale": (crop_scale, None), "shift": (shift, None)}
            replaced |= {"flip": (flip, False), "augment": (augment or None, None)}
        if train_transform and eval_transform:
            replaced |= {"mean": (mean, 0.5), "std": (std, 0.5), "crop_pct": (crop_pct, 1.0)}
        if idle := {name: none for name, (given, none) in replaced.items() if given != none}:
            whole = "train_transform and eval_transform replace" if eval_transform else "train_transform replaces"
            raise TangleNASError(
                f"image_folder: {whole} all augmentation and normalisation, so {', '.join(idle)} would do nothing: set "
                f"{', '.join(f'{name} = {none}' for name, none in idle.items())}, or leave out the transform."
            )
        self.image_size = image_size
        self.in_channels = in_channels
        self.mean = _per_channel("mean", mean, in_channels)
        self.std = _per_channel("std", std, in_channels)
        self.crop_pct = crop_pct
        train, evaluation = self._transforms(crop_scale, shift, flip, augment)
        self._train_transform: Transform = train_transform or train
        self._eval_transform: Transform = eval_transform or evaluation
        self._own_transform = eval_transform
        self._options = {
            True: "train_transform" if train_transform else "augment" if augment else "",
            False: "eval_transform" if eval_transform else "",
        }
        self._checked = check
        root = data_path(root)
        if not root.is_dir():
            raise TangleNASError(
                f"image_folder: there is no folder {root}. Give root= (create_dataset.root in a gin file), one with a "
                "folder per class."
            )
        read, passed = read_parts(root, test_folder, parts)
        self._set_classes(read, num_classes)

        self._description = _description(read, self.class_names, passed)
        paths = self._set_samples(read)
        self.fingerprint = content_hash(*self.class_names, self.labels, *_file_hashes(paths, root, check))

    def input_config(self) -> dict[str, Any]:
        """Return how inputs are made. The description of a custom `eval_transform` stands in place of mean and std.

        See `Dataset.input_config`.
        """
        config = super().input_config()
        if self._own_transform is None:
            return config
        replaced = ("mean", "std", "crop_pct", "interpolation")
        kept = {name: value for name, value in config.items() if name not in replaced}
        return {**kept, "eval_transform": _described(self._own_transform)}

    def _transforms(
        self,
        crop_scale: tuple[float, float] | None,
        shift: int | None,
        flip: bool,
        augment: str | Augmentation | Sequence[str | Augmentation] | None,
    ) -> tuple[Transform, Transform]:
        """Return the functions from a PIL image to an input, in training and in evaluation."""
        centre = [v2.Resize(math.floor(self.image_size / self.crop_pct)), v2.CenterCrop(self.image_size)]
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        if shift is None and crop_scale is None and self.image_size <= _SMALL:
            shift = self.image_size // 8
        varied: list[Augmentation] = [v2.RandomResizedCrop(self.image_size, scale=tuple(crop_scale or _CROP_SCALE))]
        if shift is not None:
            varied = [*centre, v2.RandomCrop(self.image_size, padding=shift)]
        if flip:
            varied.append(v2.RandomHorizontalFlip())
        recipes = [augment] if isinstance(augment, str) or callable(augment) else augment or []
        varied += [recipe_of_timm(recipe, self.mean) if isinstance(recipe, str) else recipe for recipe in recipes]
        return v2.Compose([*varied, *finish]), v2.Compose([*centre, *finish])

    def _set_classes(self, read: Sequence[Part], num_classes: int | None) -> None:
        """Take the classes of the first part, and check that there are training images of each.

        Other parts may lack a class, but have no other: it would be a class with another spelling, or none.
        """
        first, training = read[0], read[:-1] or read  # the last of several parts is the test part
        self.class_names = tuple(sorted(first.classes))
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise TangleNASError(
                f"image_folder: {shown(first.folder)} has {self.num_classes} class folders "
                f"({listed(self.class_names) or 'none'}). Give a folder with one folder of images per "
                f"class, two classes or more.{_deeper(first)}"
            )
        for part in read[1:]:
            if not any(part.classes.values()):
                raise TangleNASError(
                    f"image_folder: {shown(part.folder)} has no class folders with images, {shown(first.folder)} has "
                    f"{len(first.classes)}. Sort its images into the same folders, or remove it."
                )
            if others := sorted(part.classes.keys() - first.classes.keys()):
                raise TangleNASError(
                    f"image_folder: {shown(part.folder)} has the class folders {listed(others)}, which "
                    f"{shown(first.folder)} with {listed(self.class_names)} has not. Give a class one name in all "
                    "parts, and put training images of it there, or remove these folders."
                )
        if lacking := [name for name in self.class_names if not any(part.classes.get(name) for part in training)]:
            raise TangleNASError(
                f"image_folder: there is no training image in {' or '.join(shown(part.folder) for part in training)} "
                f"of the classes {listed(first.folder / name for name in lacking)}. Put images of them there "
                f"({' '.join(sorted(SUFFIXES))}), or remove these folders."
            )
        if num_classes not in (None, self.num_classes):
            raise TangleNASError(
                f"image_folder: {shown(first.folder)} has {self.num_classes} class folders; num_classes asks for "
                f"{num_classes}. Give another root=, or set num_classes."
            )

    def _set_samples(self, read: Sequence[Part]) -> list[Path]:
        """Take the files and labels of all parts, and return the files."""
        paths: list[Path] = []
        labels: list[int] = []
        sizes: list[int] = []
        for part in read:
            for label, class_name in enumerate(self.class_names):
                found = part.classes.get(class_name, [])
                paths += found
                labels += [label] * len(found)
            sizes.append(len(paths))
        self.labels = torch.tensor(labels)
        # Without test/, the folder val/ is the official test part.
        if len(read) > 1:
            self.test_indices = torch.arange(sizes[-2], sizes[-1])
        self._paths = [str(path) for path in paths]
        return paths

    def describe(self) -> str:
        return self._description

    def verify(self, progress: Progress, folder: Path) -> None:
        if self._checked:
            digests = check_all(self._paths, folder, progress)
            test = set() if self.test_indices is None else set(self.test_indices.tolist())
            if told := twins(self._paths, digests, test):
                progress.note(told)

    def subset(self, indices: Tensor, *, train: bool) -> "ImageFiles":
        return ImageFiles(
            [self._paths[i] for i in indices.tolist()],
            self.labels[indices],
            self._train_transform if train else self._eval_transform,
            self._options[train],
            shape=(self.in_channels, self.image_size, self.image_size),
        )


class ImageFiles:
    """The samples of a subset, in image files that are decoded at each use.

    Args:
        paths: The file of each sample.
        labels: Shape (N,), int64.
        transform: A function from a PIL image, grey or RGB, to a float tensor of `shape`.
        option: The option of the dataset that the function comes from; "" for the dataset's own.
        shape: (C, H, W).
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, transform: Transform, option: str, shape: tuple[int, int, int]
    ) -> None:
        self._paths = paths
        self._transform = transform
        self._option = option
        self._shape = shape
        self.labels = labels

    def __len__(self) -> int:
        return len(self._paths)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([self._input(self._paths[i]) for i in indices.tolist()]), self.labels[indices]

    def _input(self, path: str) -> Tensor:
        try:
            image = decode(path, "RGB" if self._shape[0] == 3 else "L")
        except UNREADABLE as error:
            raise unreadable_later(path, error) from error
        inputs = self._transformed(image, path)
        if not isinstance(inputs, Tensor) or inputs.dtype != torch.float32:
            made = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TangleNASError(
                f"image_folder: the transform made {made} of {shown(path)}, expected a tensor of torch.float32. End it "
                "with ToImage() and ToDtype(torch.float32, scale=True), or the like."
            )
        if not inputs.isfinite().all():
            raise TangleNASError(
                f"image_folder: the transform made values of {shown(path)} that are nan or infinite, expected finite "
                "ones. Does it divide by a deviation of 0?"
            )
        if tuple(inputs.shape) != self._shape:
            raise TangleNASError(
                f"image_folder: the transform made {tuple(inputs.shape)} of {shown(path)}; in_channels and "
                f"image_size ask for {self._shape}. Change the transform, or those."
            )
        return inputs

    def _transformed(self, image: Image.Image, path: str) -> Tensor:
        if self._option:
            expected = f"a function of any PIL image in mode {image.mode}, of any size"
            with blamed(f"create_dataset.{self._option}", expected, lambda: f"on {shown(path)}: "):
                return self._transform(image)
        try:
            return self._transform(image)
        except Exception as error:
            raise TangleNASError(
                f"image_folder: {shown(path)} of {image.width} x {image.height} pixels cannot be brought to "
                f"{self._shape[1]} x {self._shape[2]} ({type(error).__name__}: {error}). Remove it, or cut it."
            ) from error


def _described(value: Any) -> str:
    """Return the name of a function, and the class and options of another callable, as far as these are known.

    A partial has its arguments, another object what its `repr` says. An address in memory is no option.
    """
    if isinstance(value, partial):
        named = (f"{name}={_described(it)}" for name, it in sorted(value.keywords.items()))
        return f"{_described(value.func)}({', '.join([*map(_described, value.args), *named])})"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    kind, said = type(value), " ".join(repr(value).split())
    if " at 0x" in said:
        return f"{kind.__module__}.{kind.__qualname__}"
    return f"{kind.__module__}.{said}" if callable(value) else said


def _check_options(
    image_size: int,
    in_channels: int,
    crop_pct: float,
    crop_scale: tuple[float, float] | None,
    shift: int | None,
    augment: str | Augmentation | Sequence[str | Augmentation] | None,
) -> None:
    """Check the options of images and of their augmentation.

    Raises:
        TangleNASError: An option is out of its range, or would do nothing beside another one.
    """
    at_least("image_folder: image_size", image_size, 1)
    if in_channels not in (1, 3) or not isinstance(in_channels, int):
        raise TangleNASError(f"image_folder: in_channels is {in_channels}; give 1 (grey) or 3 (RGB).")
    if not isinstance(crop_pct, Real) or not 0 < crop_pct <= 1:
        raise TangleNASError(f"image_folder: crop_pct is {crop_pct!r}; give a share of the image, up to 1.")
    if crop_scale is not None and not (
        isinstance(crop_scale, Sequence)
        and len(crop_scale) == 2
        and all(isinstance(share, Real) for share in crop_scale)
        and 0 < crop_scale[0] <= crop_scale[1] <= 1
    ):
        raise TangleNASError(
            f"image_folder: crop_scale is {crop_scale!r}; give the smallest and the largest share of the area, "
            "such as (0.35, 1.0), or None."
        )
    if shift is not None:
        at_least("image_folder: shift", shift, 0, image_size - 1)
    if augment is not None and not (isinstance(augment, str | Sequence) or callable(augment)):
        raise TangleNASError(
            f"image_folder: augment is {augment!r}; give a recipe of timm, a transform of PIL images, or a list of "
            "them."
        )
    if shift is not None and crop_scale is not None:
        raise TangleNASError(
            f"image_folder: shift is {shift} and replaces the random crop, so crop_scale would do nothing: set one "
            "of them to None."
        )


def _description(parts: Sequence[Part], class_names: Sequence[str], passed: Passed) -> str:
    """Return lines with the folders, the classes with the number of their images, and what was passed over."""
    lines = []
    for part in parts:
        counts = [f"{name} ({len(part.classes.get(name, [])):,})" for name in class_names]
        total = sum(map(len, part.classes.values()))
        role = "" if part.role == "all" else f"{part.role}: "
        lines.append(f"  {role}{shown(part.folder)}: {total:,} images in {len(counts):,} classes: {listed(counts)}")
    return "\n".join([*lines, f"  passed over: {passed}"] if str(passed) else lines)


def _deeper(part: Part) -> str:
    """Return advice where the only folder holds what may be the classes."""
    if len(part.classes) != 1:
        return ""
    (images,) = part.classes.values()
    (name,) = part.classes
    inner = {path.relative_to(part.folder / name).parts[0] for path in images if path.parent != part.folder / name}
    return f" Did you mean root={str(part.folder / name)!r}?" if len(inner) > 1 else ""


def _file_hashes(paths: Sequence[Path], root: Path, check: bool) -> list[str]:
    """Hash all files.

    Raises:
        TangleNASError: A file cannot be read or, with `check`, its header is no image's.
    """
    hashes, bad = [], {}
    for path in paths:
        try:
            hashes.append(_file_hash(path, root, check))
        except UNREADABLE as error:
            bad[str(path)] = reason(error)
    if bad:
        raise unreadable(bad, len(paths))
    return hashes


def _file_hash(path: Path, root: Path, check: bool) -> str:
    """Hash a file's name and size; with `check`, hash its first bytes too, and refuse a header that is no image's."""
    head = b""
    if check:
        with path.open("rb") as file:
            head = file.read(_HASHED_BYTES)
            file.seek(0)
            with opened(file):
                pass
    return content_hash(path.relative_to(root).as_posix(), str(path.stat().st_size), head)


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    try:
        values = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * channels
    except (TypeError, ValueError):
        raise TangleNASError(
            f"image_folder: {name} is {value!r}. Give one number, or one per channel, as pixels are from 0 to 1."
        ) from None
    if len(values) != channels:
        raise TangleNASError(
            f"image_folder: {name} has {len(values)} values for {channels} channel(s). Give one number, or "
            "one per channel."
        )
    if not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        expected = "numbers above 0" if name == "std" else "finite numbers"
        raise TangleNASError(f"image_folder: {name} is {value}, expected {expected}, as pixels are from 0 to 1.")
    if min(values) < 0 or max(values) > 1:
        raise TangleNASError(
            f"image_folder: {name} is {value}, expected numbers from 0 to 1, as pixels are from 0 to 1. Divide "
            "numbers for pixels from 0 to 255 by 255."
        )
    return values
