"""Z-Reward (arXiv 2606.09076) as a reward: a student's rating of every dimension, one token out, differentiable.

R(p, I) = Agg_d mu(p, I, d), with mu the mean of the distribution over nine half-point levels. The paper calls Agg
task-dependent and names none; here it is a weighted mean, with equal weights unless `mix` says otherwise. The paper's
weights are not public, so a judge has to be named: one trained with `diffalign.judge`, or any image-text model,
zero-shot.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Metadata, Prepared
from diffalign.rewards.judge import Judge, Pictures, checked_tokenizer, load_processor
from diffalign.rewards.judge_prompt import LABELS, Wording, load_settings
from diffalign.rewards.learned import check_pixels
from diffalign.rewards.published_weights import fingerprint
from diffalign.rewards.rubric import DIMENSIONS, load_rubrics
from diffalign.rewards.score_distribution import LEVELS, ScoreDistribution
from diffalign.rewards.vlm import VisionLanguageOptions, VisionLanguageReward, pictures


def columns_of(dimensions: Sequence[str]) -> tuple[str, ...]:
    """Return the columns: the aggregate; mean and spread of each dimension; its nine probabilities, as alignment@4.5."""
    moments = [name for d in dimensions for name in (d, f"{d}_spread")]
    return ("zreward", *moments, *(f"{d}@{level:.1f}" for d in dimensions for level in LEVELS))


class ZReward(VisionLanguageReward):
    """The mean of a judge's score distribution, 1 to 5, averaged over dimensions.

    weights: a folder with a judge or any image-text model. model: its hub id. labels: `digits` or `letters`; default:
    what the judge was trained on, else digits. dimensions: names of our rubrics, NAME=FILE, or FILE, as a list or
    joined by "+"; default: the judge's own, else our four. mix: weights of the dimensions by name, or
    "alignment=2+realism=1"; missing ones are 0. share: run image and question through the model once for all
    dimensions, if possible.
    """

    name = "zreward"
    columns = columns_of(DIMENSIONS)
    range = (1.0, 5.0)
    licence = "the model's own"
    weights = "weights=FOLDER of a judge, or model=HUB_ID of an image-text model"
    size = "the model's"
    source = "arXiv 2606.09076"
    differentiable = True
    repo = ""

    def __init__(
        self,
        *,
        labels: str | None = None,
        dimensions: str | Sequence[str | Path] | None = None,
        mix: str | Mapping[str, float] | None = None,
        share: bool = True,
        **shared: Unpack[VisionLanguageOptions],
    ) -> None:
        super().__init__(**shared)
        if labels is not None and labels not in LABELS:
            raise DiffalignError(f"reward zreward: labels {labels!r}; one of {', '.join(LABELS)}")
        self.share = share
        self._settings = load_settings(Path(self.local).expanduser()) if self.local is not None else {}
        self.labels: str = labels or self._settings.get("labels", "digits")
        self.wording: Wording = self._settings.get("wording", Wording())
        own: dict[str, str] = self._settings.get("rubrics", {})
        wanted = dimensions.split("+") if isinstance(dimensions, str) else dimensions
        self.rubrics = load_rubrics(wanted or list(own) or DIMENSIONS, own)
        self.dimensions = tuple(self.rubrics)
        self.columns = columns_of(self.dimensions)
        self.mix = self._mix(mix)
        self._judge: Judge | None = None

    def _mix(self, given: str | Mapping[str, float] | None) -> dict[str, float]:
        if isinstance(given, str):
            pairs = [pair.partition("=") for pair in given.split("+")]
            try:
                given = {name.strip(): float(value) for name, _, value in pairs}
            except ValueError as error:
                raise DiffalignError(f"reward zreward: mix {given!r}; write NAME=WEIGHT+NAME=WEIGHT") from error
        empty = ScoreDistribution(torch.full((1, len(self.dimensions), len(LEVELS)), 1 / 9), LEVELS, self.dimensions)
        try:
            return {name: round(w, 6) for name, w in zip(self.dimensions, empty.weights(given).tolist(), strict=True)}
        except DiffalignError as error:
            raise DiffalignError(f"reward zreward: mix: {error}") from error

    @property
    def path(self) -> Path:
        if self.local is None and not self.repo:
            raise DiffalignError(
                "reward zreward: no public weights exist; name a judge, zreward:weights=FOLDER, or any image-text model, "
                "zreward:model=HUB_ID"
            )
        return super().path

    @property
    def processor(self) -> Any:
        if self._processor is None:
            self._processor = load_processor(self.processor_path)
            checked_tokenizer(self._processor)
        return self._processor

    @property
    def judge(self) -> Judge:
        """The judge on the loaded model, frozen."""
        if self._judge is None:
            processor = self.processor  # errors before the weights are read
            if self.local is None and load_settings(self.path):
                # Its columns must be known before it is fetched.
                raise DiffalignError(
                    f"reward zreward: {self.repo} is a judge with rubrics of its own; name its folder: weights={self.path}"
                )
            self._judge = Judge(self.network, processor, labels=self.labels, rubrics=self.rubrics, wording=self.wording)
        return self._judge

    def distribution(self, images: Pictures, prompts: Sequence[str]) -> ScoreDistribution:
        """Return probabilities [B, dimensions, 9] of images, or of float pixels [B, 3, H, W] in [0, 1] with their
        gradient.
        """
        return self.judge.distribution(images, prompts, self.dimensions, share=self.share)

    @torch.no_grad()
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = [""] * len(items)
        found = self.distribution(pictures(items), prompts)
        means, spreads = found.mean.cpu(), found.spread.cpu()
        rows = [found.aggregate(self.mix).cpu()]
        for d in range(len(self.dimensions)):
            rows += [means[:, d], spreads[:, d]]
        rows += list(found.probabilities.cpu().flatten(1).unbind(1))
        return dict(zip(self.columns, rows, strict=True))

    def score_tensors(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        check_pixels(self.name, pixels, prompts)
        return self.distribution(pixels, prompts).aggregate(self.mix)

    def weights_id(self) -> str:
        return f"{'local folder' if self.local is not None else self.repo}@{fingerprint(self.path)}"

    def options(self) -> dict[str, Any]:
        words = json.dumps([self.rubrics, asdict(self.wording)], sort_keys=True).encode()
        return {
            **super().options(),
            "labels": self.labels,
            "mix": self.mix,
            "words": hashlib.blake2b(words, digest_size=6).hexdigest(),
        }

    def free(self) -> None:
        self._judge = None
        super().free()
