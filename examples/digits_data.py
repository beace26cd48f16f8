"""The handwritten digits that ship inside scikit-learn: 1,797 real images of 8×8 pixels."""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset


@final
@dataclass(frozen=True, eq=False)
class Digits(Dataset[dict[str, Any]]):
    """Images [N, 1, 8, 8] in [0, 1] and their labels [N]: four fifths to train on, one held out.

    As a dataset it has the training images only.
    """

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor

    @classmethod
    def load(cls) -> "Digits":
        """Always the same split, 1,436 images and 359, with every class in both in proportion."""
        pixels, classes = load_digits(return_X_y=True)
        images, labels = torch.tensor(pixels / 16).float().reshape(-1, 1, 8, 8), torch.tensor(classes)
        train, held = train_test_split(
            np.arange(len(labels)), train_size=1436, test_size=359, stratify=classes, random_state=0
        )
        return cls(images[train], labels[train], images[held], labels[held])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """A training image as `PixelCodec` reads it, and the number that its randomness is keyed by."""
        return {"id": i, "image": self.images[i], "label": self.labels[i]}
