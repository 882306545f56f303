"""The transform from raw images in memory to the inputs of a network, for a whole batch at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
