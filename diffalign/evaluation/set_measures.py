"""Measure sets of images: FID and KID against a reference, CLIP-I and DINO similarity, and LPIPS within prompts.

FID and KID are torchmetrics' on features that were extracted once. A value says nothing without its features and sample
sizes, so both stand beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.evaluation.set_networks import unit
from diffalign.intervals import bootstrap
from diffalign.packages import extras_named
from diffalign.terminal import counted

SUBSETS, SUBSET = 100, 1000
PAIRS = 2000
"""The most pairs of images without prompts; they are drawn at random."""


@dataclass(frozen=True)
class SetMeasure:
    """One measure: its value, in words what its spread is, and what to know of it."""

    name: str
    value: float
    spread: str = ""
    note: str = ""


class _Given(nn.Module):
    """Stands in the place of torchmetrics' network, since the features are there already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_fid(generated: int, reference: int, size: int) -> None:
    """Refuse FID of fewer images than it has features: their covariance is singular, and the value mostly bias."""
    if min(generated, reference) < size:
        raise DiffalignError(
            f"fid: {generated} generated and {reference} reference images are too few: the covariance of {size} features "
            f"needs at least {size} of each (published values take 10,000 or more); use -m kid"
        )


def fid(generated: Tensor, reference: Tensor) -> SetMeasure:
    """Return the Frechet distance of features [n, d] (Heusel et al. 2017), with torchmetrics.

    Raises DiffalignError for fewer images than features.
    """
    check_fid(len(generated), len(reference), generated.shape[1])
    with extras_named("measure fid"):
        from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(generated.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    note = (
        "" if min(len(generated), len(reference)) >= 10_000 else "biased upwards below 10,000 images; use equal numbers"
    )
    return SetMeasure("fid", float(metric.compute()), note=note)


def kid(
    generated: Tensor, reference: Tensor, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = 0
) -> SetMeasure:
    """Return the kernel distance of features [n, d] (Binkowski et al. 2018): unbiased MMD^2, mean over subsets.

    subset_size: 1000 as published, or all images where they are fewer. Raises DiffalignError for less than 2 images.
    """
    fewest = min(len(generated), len(reference))
    size = subset_size or min(SUBSET, fewest)
    if size == len(generated) == len(reference):
        subsets = 1  # every subset is the whole
    if not 2 <= size <= fewest:
        raise DiffalignError(f"kid: subset_size={size}, but there are {len(generated)} and {len(reference)} images")
    with extras_named("measure kid"):
        from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps all features
        # The subsets come from torch's global generator, which is put back afterwards.
        torch.random.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(feature=_Given(generated.shape[1]), subsets=subsets, subset_size=size)
        metric.update(reference.double(), real=True)
        metric.update(generated.double(), real=False)
        mean, std = metric.compute()
    note = "" if size == SUBSET else f"subsets of {size}, not {SUBSET}"
    spread = f"std {float(std):.5f} over {subsets} subsets of {size}" if subsets > 1 else ""
    return SetMeasure("kid", float(mean), spread, note)


def similarity(name: str, generated: Tensor, reference: Tensor) -> SetMeasure:
    """Return the mean cosine over all pairs of a generated and a reference image (Ruiz et al. 2023), features [n, d].

    The interval resamples generated images.
    """
    cosines = (unit(generated) @ unit(reference).mean(dim=0)).numpy()
    (interval,) = bootstrap(cosines[:, None], unit="images", resamples=2000)
    return SetMeasure(name, float(cosines.mean()), interval.words(".4f"))


def pairs_of(prompts: Sequence[str | None]) -> list[tuple[str, int, int]]:
    """Return (prompt, i, j) of all pairs of images that share a prompt; of `PAIRS` random pairs where none has a prompt.

    Raises DiffalignError if there is no pair.
    """
    count = len(prompts)
    if not any(prompts) and count * (count - 1) // 2 > PAIRS:
        chosen = draw(0, "lpips").integers(count, size=(3 * PAIRS, 2))
        different = dict.fromkeys((int(min(pair)), int(max(pair))) for pair in chosen if pair[0] != pair[1])
        return [("", i, j) for i, j in sorted(list(different)[:PAIRS])]
    groups: dict[str, list[int]] = {}
    named = any(prompts)
    for i, prompt in enumerate(prompts):
        if prompt or not named:
            groups.setdefault(prompt or "", []).append(i)
    found = [(prompt, i, j) for prompt, rows in groups.items() for i, j in combinations(rows, 2)]
    if not found:
        raise DiffalignError("lpips: no two images share a prompt; draw several images of each prompt")
    return found


def diversity(pairs: Sequence[tuple[str, int, int]], distances: Sequence[float]) -> SetMeasure:
    """Return the mean over prompts of the mean LPIPS distance between a prompt's images; the interval is over prompts."""
    by_prompt: dict[str, list[float]] = {}
    for (prompt, _, _), distance in zip(pairs, distances, strict=True):
        by_prompt.setdefault(prompt, []).append(distance)
    means = np.array([np.mean(found) for found in by_prompt.values()])
    (interval,) = bootstrap(means[:, None], resamples=2000)
    within = counted(len(means), "prompt") if any(by_prompt) else "the whole set"
    spread = interval.words(".4f") if len(means) > 1 else ""
    return SetMeasure("lpips", float(means.mean()), spread, f"{counted(len(pairs), 'pair')} within {within}")


def batches(count: int, size: int) -> Iterator[range]:
    """Yield the places of `count` things, `size` at a time."""
    yield from (range(start, min(count, start + size)) for start in range(0, count, size))
