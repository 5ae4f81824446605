"""GDRO's corrected score: a reward that stops rising where the pictures suffer for it."""

import numpy as np


def corrected_score(reward: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """reward (quality - 3) + 0.2 (Wang et al., arXiv 2601.02036), elementwise; NaN where either is.

    `quality` lies in 1..5: the mean of a judge's alignment, coherence and style, or, for rewards of alignment such as
    GenEval, of coherence and style alone. Most pictures get 3 to 4, and 0.2 only lifts the curve. Correct each image,
    then average: the mean of products is not the product of means. It shows a trend and is no score to rank models by.
    """
    return np.asarray(reward, dtype=np.float64) * (np.asarray(quality, dtype=np.float64) - 3.0) + 0.2
