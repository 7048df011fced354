"""Scikit-learn's digits: real images that come with the package, so that nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

BACKGROUND, SPREAD = 0.3, 0.37  # mean and standard deviation of the pixels, which lie in [0, 1]


@dataclass
class Digits:
    """One split of the data: upright images, and the same images turned by 90 degrees."""

    images: Tensor
    labels: Tensor
    rotated: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rotated = self.images.rot90(1, dims=(1, 2)).contiguous()


def load_data() -> tuple[Digits, Digits]:
    """Return 1,437 training and 360 test images, the same in every run."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8)
    images, labels = (images / 16 - BACKGROUND) / SPREAD, torch.tensor(labels)
    train, test = train_test_split(range(len(images)), test_size=360, stratify=labels, random_state=0)
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def shift(images: Tensor) -> Tensor:
    """Return augmented images: half of them move by up to a pixel in each direction."""
    n = len(images)
    windows = F.pad(images, (1, 1, 1, 1), value=-BACKGROUND / SPREAD).unfold(1, 8, 1).unfold(2, 8, 1)  # [n, 3, 3, 8, 8]
    row, column = torch.where(torch.rand(2, n) < 0.5, torch.randint(3, (2, n)), 1)
    return windows[torch.arange(n), row, column]
