"""The handwritten digits that ship inside scikit-learn: 1,797 real images of 8×8 pixels."""

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from gendiff.data import Tensors


@final
@dataclass(frozen=True, eq=False)
class Digits:
    """Images [N, 1, 8, 8] in [0, 1] and their labels [N]: four fifths to train on, one held out."""

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

    @property
    def train(self) -> Tensors:
        """What is trained on, as a dataset."""
        return Tensors({"image": self.images, "label": self.labels})
