"""From raw images in memory to the inputs of a network, a whole batch at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prepare(images: Tensor, *, mean: float, std: float, shift: int = 0, flip: bool = False) -> Tensor:
    """Raw images (B, C, H, W) to float32 inputs (B, C, H, W).

    Args:
        mean, std: Of the raw pixels, for the normalisation.
        shift: Each image moves by up to so many pixels in each direction, at random; zeros come in.
        flip: Each image is mirrored with probability one half.
    """
    if shift:
        images = random_shift(images, shift)
    if flip:
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    return (images.float() - mean) / std


def random_shift(images: Tensor, shift: int) -> Tensor:
    """Move each image (B, C, H, W) by up to `shift` pixels in both directions; zeros come in at the edges."""
    height, width = images.shape[-2:]
    # (B, C, 2 * shift + 1, 2 * shift + 1, H, W): every moved copy, as views
    moved = F.pad(images, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * shift + 1, (2, len(images)))
    return moved[torch.arange(len(images)), :, down, right]
