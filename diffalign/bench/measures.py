"""Form a suite's scores from judged images, as means of means, with intervals over prompts.

Every score of every suite is sum_k w_k (sum of values of kind k / number of them) / sum_k w_k: the mean over all images or
questions where there is one kind, the mean over kinds where there are several. So one bootstrap serves all: it resamples
prompts, since images and questions of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffalign.errors import DiffalignError
from diffalign.intervals import Interval, bootstrap

Cell = tuple[int, str, float, int]
"""(prompt, kind, sum of values, number of values)."""


@dataclass(frozen=True)
class JudgedImage:
    """An image of a suite. prompt: its place in the suite. values: of each judge, LABEL for the score and LABEL.COLUMN."""

    prompt: int
    metadata: Mapping[str, Any]
    values: Mapping[str, float]

    @property
    def tag(self) -> str:
        """The suite's own kind of prompt."""
        return str(self.metadata.get("tag") or "")

    def answers(self, label: str) -> list[float]:
        """Return the probability of the right answer to each question that the judge `label` was asked; [] if to none."""
        found: list[float] = []
        while (value := self.values.get(f"{label}.answer@{len(found) + 1}", math.nan)) == value:
            found.append(value)
        return found


@dataclass(frozen=True)
class Measure:
    """One score of a suite, with the cells that it is formed of. weights: of kinds; without them all count the same."""

    name: str
    cells: tuple[Cell, ...]
    digits: int = 4
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        values: Iterable[tuple[int, str, float]],
        *,
        scale: float = 1.0,
        digits: int = 4,
        weights: Mapping[str, float] | None = None,
    ) -> Measure:
        """Return the score formed of (prompt, kind, value); values that are NaN do not count. scale: multiplies values."""
        summed: dict[tuple[int, str], tuple[float, int]] = {}
        for prompt, kind, value in values:
            if math.isfinite(value):
                total, count = summed.get((prompt, kind), (0.0, 0))
                summed[prompt, kind] = (total + scale * value, count + 1)
        cells = tuple((prompt, kind, total, count) for (prompt, kind), (total, count) in summed.items())
        return cls(name, cells, digits, dict(weights or {}))

    @property
    def prompts(self) -> list[int]:
        """The places of the prompts that count."""
        return sorted({prompt for prompt, *_ in self.cells})

    @property
    def kinds(self) -> list[str]:
        """The kinds, in the order in which they came."""
        return list(dict.fromkeys(kind for _, kind, *_ in self.cells))

    def table(self, prompts: Sequence[int], kinds: Sequence[str]) -> np.ndarray:
        """Return sums and then numbers of values, [prompts, 2 kinds]; 0 where a prompt has none of a kind."""
        row = {prompt: i for i, prompt in enumerate(prompts)}
        column = {kind: k for k, kind in enumerate(kinds)}
        found = np.zeros((len(prompts), 2 * len(kinds)))
        for prompt, kind, total, count in self.cells:
            if prompt in row and kind in column:
                found[row[prompt], [column[kind], len(kinds) + column[kind]]] += total, count
        return found

    def mean(self, means: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
        """Return the score of every row of means over prompts of `table` [rows, 2 kinds]; kinds without values are left
        out.
        """
        sums, counts = means[:, : len(kinds)], means[:, len(kinds) :]
        weights = np.array([self.weights.get(kind, 0.0 if self.weights else 1.0) for kind in kinds]) * (counts > 0)
        ratios = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        weight = weights.sum(axis=1)
        return np.divide((weights * ratios).sum(axis=1), weight, out=np.full(len(means), np.nan), where=weight > 0)

    def value(self) -> float:
        """Return the score; NaN where nothing was judged."""
        if not self.cells:
            return math.nan
        return float(self.mean(self.table(self.prompts, self.kinds).mean(axis=0, keepdims=True), self.kinds)[0])

    def interval(self, seed: int = 0, resamples: int = 2000) -> Interval:
        """Return the 95% interval over prompts."""
        if not self.cells:
            return Interval(0, None, None)
        kinds = self.kinds
        (found,) = bootstrap(
            self.table(self.prompts, kinds),
            lambda means: self.mean(means, kinds)[:, None],
            seed=seed,
            resamples=resamples,
        )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return what bench.json holds of the score: value, ends of its interval, and its cells."""
        interval = self.interval()
        return {
            "value": None if math.isnan(self.value()) else self.value(),
            "low": interval.low,
            "high": interval.high,
            "prompts": len(self.prompts),
            "digits": self.digits,
            "weights": dict(self.weights),
            "cells": [list(cell) for cell in self.cells],
        }

    @classmethod
    def from_dict(cls, name: str, found: Mapping[str, Any]) -> Measure:
        """Return the score that `as_dict` wrote."""
        cells = tuple((int(p), str(k), float(s), int(n)) for p, k, s, n in found["cells"])
        return cls(name, cells, int(found["digits"]), {str(k): float(w) for k, w in found["weights"].items()})


def difference(a: Measure, b: Measure, seed: int = 0, resamples: int = 2000) -> tuple[float, Interval]:
    """Return the score of b less that of a over the prompts that both have, with its paired 95% interval.

    Raises DiffalignError if they share no prompt.
    """
    prompts = sorted(set(a.prompts) & set(b.prompts))
    if not prompts:
        raise DiffalignError(f"{a.name}: the two results share no judged prompt")
    kinds = list(dict.fromkeys([*a.kinds, *b.kinds]))
    both = np.concatenate([a.table(prompts, kinds), b.table(prompts, kinds)], axis=1)
    half = 2 * len(kinds)

    def change(means: np.ndarray) -> np.ndarray:
        return (b.mean(means[:, half:], kinds) - a.mean(means[:, :half], kinds))[:, None]

    (interval,) = bootstrap(both, change, seed=seed, resamples=resamples)
    return float(change(both.mean(axis=0, keepdims=True))[0, 0]), interval
