"""Augmentation: of whole batches of raw images in memory, and recipes for single images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from tanglenas_engine import TangleNASError


def prepare(
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    white: int = 255,
    shift: int = 0,
    flip: bool = False,
    cutout: int = 0,
    image_size: int | None = None,
) -> Tensor:
    """Turn raw images (B, C, H, W) into float32 inputs (B, C, H, W), resized where `image_size` is given.

    Args:
        mean, std: Mean and standard deviation per channel, of pixels from 0 to 1.
        white: The raw value of a white pixel.
        shift: Largest random shift of an image in pixels, in each direction; zeros come in. torchvision's random
            crop with this padding does the same.
        flip: Mirror each image with probability one half.
        cutout: Side of the square in each image that becomes the mean; 0 switches it off.
        image_size: Height and width after bilinear resizing.
    """
    if shift:
        images = random_shift(images, shift)
    if flip:
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    raw_mean, raw_std = (torch.tensor([value * white for value in values])[:, None, None] for values in (mean, std))
    inputs = (images.float() - raw_mean) / raw_std
    if cutout:
        inputs = random_cutout(inputs, cutout)
    if image_size not in (None, inputs.shape[-1]):
        inputs = F.interpolate(inputs, size=image_size, mode="bilinear", antialias=True)
    return inputs


def random_shift(images: Tensor, shift: int) -> Tensor:
    """Move each image (B, C, H, W) by up to `shift` pixels in both directions; zeros come in at the edges."""
    height, width = images.shape[-2:]
    # (B, C, 2 * shift + 1, 2 * shift + 1, H, W): every moved copy, as views
    moved = F.pad(images, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * shift + 1, (2, len(images)))
    return moved[torch.arange(len(images)), :, down, right]


def random_cutout(images: Tensor, length: int) -> Tensor:
    """Zero the part of a square around a random pixel that lies inside each image (B, C, H, W).

    Source: DeVries and Taylor (2017, arXiv:1708.04552). `RandomErasing` of torchvision and timm keeps the whole square
    inside the image: it removes more pixels and leaves the edges alone.
    """

    def covered(size: int) -> Tensor:
        start = torch.randint(size, (len(images), 1)) - length // 2
        return (torch.arange(size) >= start) & (torch.arange(size) < start + length)  # (B, size)

    rows, columns = map(covered, images.shape[-2:])
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def recipe_of_timm(recipe: str, mean: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """Return the augmentation of PIL images that a recipe in timm's notation names.

    Args:
        recipe: RandAugment such as "rand-m9-mstd0.5-inc1", AugMix such as "augmix-m3-w3", or the name of an AutoAugment
            policy: "original", "originalr", "v0", "v0r" or "3a".
        mean: The mean of each channel, of pixels from 0 to 1; it fills what a rotation or a shift uncovers.

    Raises:
        TangleNASError: timm knows no such recipe.
    """
    from timm.data import auto_augment

    fill = tuple(min(255, round(255 * value)) for value in mean)
    settings: dict[str, Any] = {"img_mean": fill if len(fill) > 1 else fill[0]}
    kind = recipe.split("-")[0]
    if kind == "augmix":
        settings["translate_pct"] = 0.3  # as timm's create_transform has it, where other recipes have 0.45
    make = {"rand": auto_augment.rand_augment_transform, "augmix": auto_augment.augment_and_mix_transform}
    try:
        made: Any = make.get(kind, auto_augment.auto_augment_transform)(recipe, settings)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise TangleNASError(
            f"image_folder: augment is {recipe!r}, which timm does not know ({error or type(error).__name__}). Give "
            'such as "rand-m9-mstd0.5", "augmix-m3" or "v0", or an @reference to a transform of PIL images.'
        ) from None
    operations = [op for policy in made.policy for op in policy] if hasattr(made, "policy") else made.ops
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return made


def _posterize(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """Keep so many bits of each channel, as timm does, but one at least: today's Pillow refuses 0."""
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))
