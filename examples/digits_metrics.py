"""How good are generated digits? Three figures, each with what real digits get beside it.

The classifier, the principal components and the neighbours are fitted on real digits only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC


def frechet(a: NDArray, b: NDArray) -> float:
    """The squared Fréchet distance of two sets [N, D], taken for Gaussians with covariances A and B.

    |mean_a - mean_b|² + tr(A + B - 2 (A^½ B A^½)^½)
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * overlap)


def share_nearer(to_train: NDArray, to_held_out: NDArray, sizes: tuple[int, int]) -> float:
    """The share of images that are nearer to training than to held-out images, as if these were as many.

    An image that copies neither set is nearer to one in proportion to its size, so that counts are divided
    by sizes: the share is then 50 %. It is 100 % where all are copies of training images.
    """
    train, held_out = np.sum(to_train < to_held_out) / sizes[0], np.sum(to_held_out < to_train) / sizes[1]
    return float(train / (train + held_out))


@dataclass(frozen=True)
class Figures:
    """Shares in [0, 1]; `ratio` is the Fréchet distance in units of that of real training images."""

    accuracy: float
    distance: float
    ratio: float
    share: float


class Judge:
    """Judges images [N, 1, 8, 8] by real ones.

    Fréchet distances depend on the size of a set. All are between as many images as are held out and these:
    judged images are cut into sets of that size, a whole number of them, and the mean is taken.
    """

    def __init__(self, train: ArrayLike, labels: ArrayLike, held_out: ArrayLike, held_labels: ArrayLike):
        self.train, self.held_out = flat(train), flat(held_out)
        self.classifier = SVC(C=10).fit(self.train, labels)
        self.components = PCA(20).fit(self.train)
        self.neighbours = [NearestNeighbors(n_neighbors=1).fit(real) for real in (self.train, self.held_out)]
        self.yardstick = self.distance(self.train)
        others = self.neighbours[0].kneighbors(self.held_out)[0], self.neighbours[1].kneighbors()[0]
        accuracy = float(self.classifier.score(self.held_out, held_labels))
        self.real = Figures(accuracy, self.yardstick, 1.0, self.share(*others))

    def __call__(self, images: ArrayLike, labels: ArrayLike) -> Figures:
        x = flat(images)
        nearest = [real.kneighbors(x)[0] for real in self.neighbours]
        accuracy, distance = float(self.classifier.score(x, labels)), self.distance(x)
        return Figures(accuracy, distance, distance / self.yardstick, self.share(*nearest))

    def share(self, to_train: NDArray, to_held_out: NDArray) -> float:
        return share_nearer(to_train, to_held_out, (len(self.train), len(self.held_out)))

    def distance(self, x: NDArray) -> float:
        a, b = self.components.transform(x), self.components.transform(self.held_out)
        return float(np.mean([frechet(part, b) for part in a.reshape(-1, *b.shape)]))


def flat(images: ArrayLike) -> NDArray:
    return np.asarray(images, dtype=np.float64).reshape(len(np.asarray(images)), -1)
