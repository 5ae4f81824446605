"""Measure distances between two sets of images over named features: Frechet, kernel (MMD) and recall.

Published FIDs use Inception features of 10,000 images or more. Here the caller gives the features, and results name
them and the number of images: values of different features or sizes cannot be compared.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

THUMBNAIL = 8


def thumbnails(images: Sequence[Image.Image]) -> np.ndarray:
    """Return features "thumbnail-8x8": the mean colours of an 8 x 8 grid, [n, 192] in [0, 1].

    They represent layout and colour only.
    """
    small = [i.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for i in images]
    return np.stack([np.asarray(i, dtype=np.float64).ravel() / 255 for i in small])


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2) of features [n, d] (Heusel et al. 2017).

    It is biased upwards for few images.
    """
    from scipy.linalg import sqrtm

    means = a.mean(axis=0) - b.mean(axis=0)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The product of two covariances has real, non-negative eigenvalues; an imaginary part is rounding.
    root = np.real(sqrtm(first @ second))
    return float(means @ means + np.trace(first) + np.trace(second) - 2 * np.trace(root))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the unbiased MMD^2 with kernel (x.y / d + 1)^3 of features [n, d] (Binkowski et al. 2018); may be
    negative.
    """
    size = a.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        cubed: np.ndarray = (x @ y.T / size + 1) ** 3
        return cubed

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def recall(generated: np.ndarray, reference: np.ndarray, k: int = 3) -> float:
    """Return the share of reference features within a generated one's distance to its k-th neighbour.

    Kynkaanniemi et al. 2019.
    """

    def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
        return np.sqrt(np.maximum(squares, 0.0))

    own = distances(generated, generated)
    np.fill_diagonal(own, np.inf)  # an image is no neighbour of itself, but its duplicate is
    radius = np.sort(own, axis=1)[:, k - 1]
    return float((distances(reference, generated) <= radius[None]).any(axis=1).mean())
