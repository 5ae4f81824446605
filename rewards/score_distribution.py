"""Scores as distributions over half-point levels (Z-Reward, arXiv 2606.09076), and what follows from them.

Z-Reward rates every dimension of an image on nine levels, 1.0 to 5.0 in steps of 0.5, and keeps the probabilities of
all nine: the mean is the score, the spread says how certain the judge is, and two images compare by the probability
that one is better, which two equal means do not show.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import DiffalignError

LEVELS = tuple(1 + k / 2 for k in range(9))
"""The nine half points of the rubric."""
SPAN = LEVELS[-1] - LEVELS[0]
"""R = S_max - S_min of the paper, which bounds an error of the mean."""


@dataclass(frozen=True)
class ScoreDistribution:
    """probabilities: float32 [B, dimensions, levels], each row summing to 1, with its gradient if it has one.

    levels: the score of each bin, ascending. dimensions: their names, or none. Other dtypes are converted to float32:
    in bfloat16 the nine probabilities of a judge sum to 0.9998 and its mean is off by 0.006. Raises DiffalignError if
    shapes do not fit.
    """

    probabilities: Tensor
    levels: tuple[float, ...] = LEVELS
    dimensions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.probabilities.shape)
        if len(shape) != 3 or shape[2] != len(self.levels):
            raise DiffalignError(
                f"probabilities of shape {list(shape)}; [B, dimensions, {len(self.levels)}] are needed"
            )
        if self.dimensions and len(self.dimensions) != shape[1]:
            raise DiffalignError(f"{shape[1]} dimensions of probabilities and {len(self.dimensions)} names for them")
        if any(b <= a for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise DiffalignError(f"levels {list(self.levels)} do not rise")
        object.__setattr__(self, "probabilities", self.probabilities.float())

    @classmethod
    def from_logits(
        cls, logits: Tensor, levels: tuple[float, ...] = LEVELS, dimensions: tuple[str, ...] = ()
    ) -> "ScoreDistribution":
        """Return the closed-set softmax of logits [B, dimensions, levels], computed in float32."""
        return cls(logits.float().softmax(-1), levels, dimensions)

    @property
    def _values(self) -> Tensor:
        return self.probabilities.new_tensor(self.levels)

    @property
    def mean(self) -> Tensor:
        """mu = sum_s s q(s), [B, dimensions]; d mu / d z_s = q(s) (s - mu) for the logits z."""
        return (self.probabilities * self._values).sum(-1)

    @property
    def variance(self) -> Tensor:
        """sum_s q(s) (s - mu)^2, [B, dimensions], in squared points."""
        return (self.probabilities * (self._values - self.mean[..., None]) ** 2).sum(-1)

    @property
    def spread(self) -> Tensor:
        """The standard deviation, [B, dimensions], in points: 0 (sure) to 2 (half of the mass at either end)."""
        return self.variance.sqrt()

    @property
    def entropy(self) -> Tensor:
        """-sum_s q(s) log q(s), [B, dimensions], in nats: 0 to log(levels)."""
        return torch.special.entr(self.probabilities).sum(-1)

    def win_probability(self, other: "ScoreDistribution") -> Tensor:
        """Return P(a > b) + P(a = b) / 2 for image i of this one over image i of `other`, [B, dimensions].

        The two ratings are taken as independent, so half of a tie goes to each side, and swapping the two gives 1 minus
        it.
        """
        if self.levels != other.levels:
            raise DiffalignError(f"levels {list(self.levels)} and {list(other.levels)} cannot be compared")
        if self.probabilities.shape[1] != other.probabilities.shape[1]:
            raise DiffalignError(
                f"{self.probabilities.shape[1]} and {other.probabilities.shape[1]} dimensions cannot be compared"
            )
        values = self._values
        better = (values[:, None] > values).float() + 0.5 * (values[:, None] == values).float()
        return ((self.probabilities @ better) * other.probabilities).sum(-1)

    def weights(self, given: Mapping[str, float] | Sequence[float] | None = None) -> Tensor:
        """Return weights of the dimensions that sum to 1, [dimensions]: equal ones, in order, or by name (absent: 0).

        Raises DiffalignError for a name that is no dimension, and for weights that are negative, infinite or all 0.
        """
        count = self.probabilities.shape[1]
        if isinstance(given, Mapping):
            unknown = sorted(set(given) - set(self.dimensions))
            if unknown:
                raise DiffalignError(
                    f"weight of {unknown[0]!r}: the dimensions are {', '.join(self.dimensions) or 'unnamed'}"
                )
            given = [given.get(name, 0.0) for name in self.dimensions]
        w = self.probabilities.new_tensor([1.0] * count if given is None else list(given))
        if len(w) != count or not bool(torch.isfinite(w).all()) or bool((w < 0).any()) or not bool(w.sum() > 0):
            raise DiffalignError(
                f"weights {w.tolist()} of {count} dimensions: one a dimension, none below 0, not all 0"
            )
        return w / w.sum()

    def aggregate(self, weights: Mapping[str, float] | Sequence[float] | None = None) -> Tensor:
        """Return the weighted mean of the dimensions' means, [B], in [1, 5]. The paper calls it task-dependent and
        gives none.
        """
        return self.mean @ self.weights(weights)
