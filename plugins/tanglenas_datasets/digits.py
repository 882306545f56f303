"""scikit-learn's handwritten digits: 1,797 images of 8x8 that its package contains."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tanglenas_datasets.augment import prepare
from tanglenas_engine import Dataset, TensorSamples, at_least, content_hash

_WHITE = 16  # the largest raw pixel


class Digits(Dataset):
    """The digits dataset: ten classes of 8x8 images with one channel, without an official test part.

    Args:
        image_size: 8, or up to 32 by bilinear enlargement.
        shift: Largest random shift of training images, in pixels.
    """

    name = "digits"
    num_classes = 10
    in_channels = 1
    class_names = tuple("0123456789")
    mean = (4.88 / _WHITE,)
    std = (6.02 / _WHITE,)

    def __init__(self, image_size: int = 8, shift: int = 1) -> None:
        self.image_size = at_least("digits: image_size", image_size, 8, 32)
        self.shift = at_least("digits: shift", shift, 0, self.image_size - 1)
        # This import takes a second, which `dvc repro` would wait for each time that it asks for the class.
        from sklearn.datasets import load_digits

        data = load_digits()
        self.labels = torch.from_numpy(data.target).long()
        self._images = torch.from_numpy(data.images).to(torch.uint8).unsqueeze(1)  # (1797, 1, 8, 8)
        self.fingerprint = content_hash(self._images, self.labels)

    def subset(self, indices: Tensor, *, train: bool) -> TensorSamples:
        images = self._images[indices].float()
        if self.image_size != 8:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", align_corners=False)
        transform = partial(prepare, mean=self.mean, std=self.std, white=_WHITE, shift=self.shift if train else 0)
        return TensorSamples(images, self.labels[indices], transform)
