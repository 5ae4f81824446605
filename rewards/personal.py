"""A reward of one person's taste: a linear head on frozen features, fitted to their choices by `diffalign judge personal`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.files import read_json, reading, replacing_folder
from diffalign.files.tensors import read_tensors
from diffalign.redaction import redacted
from diffalign.rewards.base import Metadata, Prepared, PreparedReward
from diffalign.rewards.features import Features, load_features, probe
from diffalign.rewards.learned import check_pixels

TENSORS, NOTE = "personal.safetensors", "personal.json"
MEND = "fit it again with `diffalign judge personal DATA`"
FORMAT = 1
SAME = 0.05
"""Relative difference of a fixed picture's features up to which they are the same: number types differ by less."""


class FeatureNote(TypedDict):
    """Which features a head is of: what `load_features` takes, and the weights that were used."""

    name: str
    options: dict[str, Any]
    weights: str


@dataclass(frozen=True)
class Head:
    """score = (features - mean) . weight. weight, mean: float64 [D].

    probe: float64 [D], the features of a fixed picture, by which other weights are noticed. about: the fit, to be read.
    """

    weight: np.ndarray
    mean: np.ndarray
    probe: np.ndarray
    features: FeatureNote
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write personal.safetensors and personal.json; an older head in the folder is replaced."""
        with replacing_folder(folder) as part:
            arrays = {"weight": self.weight, "mean": self.mean, "probe": self.probe}
            save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, part / TENSORS)
            note = {"format": FORMAT, "features": self.features, **self.about}
            (part / NOTE).write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_head(folder: Path) -> Head:
    """Read what `Head.save` wrote. Raises DiffalignError for a folder without a head, or with a damaged one."""
    note = read_json(folder / NOTE, MEND, "format", "features")
    if note is None:
        raise DiffalignError(
            f"reward personal: {folder} holds no {NOTE}; make one with `diffalign judge personal DATA`"
        )
    if note["format"] != FORMAT:
        raise DiffalignError(f"reward personal: {folder / NOTE} is of format {note['format']!r}, not {FORMAT}; {MEND}")
    tensors = read_tensors(folder / TENSORS)
    with reading(folder / TENSORS, mend=MEND):
        weight, mean, seen = (tensors[name].double().numpy() for name in ("weight", "mean", "probe"))
        if weight.ndim != 1 or not weight.shape == mean.shape == seen.shape:
            raise ValueError(f"shapes {weight.shape}, {mean.shape} and {seen.shape} are no head's")
        if not np.isfinite([weight, mean, seen]).all():
            raise ValueError("a number in it is not finite")
    with reading(folder / NOTE, mend=MEND):
        features = note["features"]
        named: FeatureNote = {
            "name": str(features["name"]), "options": dict(features["options"]), "weights": str(features["weights"]),
        }  # fmt: skip
    about = {key: value for key, value in note.items() if key not in ("format", "features")}
    return Head(weight, mean, seen, named, about)


class Personal(PreparedReward):
    """How much a person would like the image, in log-odds: of two images of one prompt, a is chosen with probability
    1 / (1 + exp(b - a)). 0 is the average of the images that were voted on.

    weights: the folder that `diffalign judge personal` wrote. tower: a local copy of the features' weights, where they
    have moved. device, dtype: of the features' model.
    """

    name = "personal"
    columns = ("personal",)
    range = (-float("inf"), float("inf"))
    usual = "-5 to 5"
    licence = "yours (the head); the features' own"
    weights = "weights=FOLDER of `diffalign judge personal`"
    size = "the features'"
    source = "Bradley and Terry 1952, with a ridge on the weights"
    differentiable = True

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        tower: str | Path | None = None,
        device: str = "cpu",
        dtype: str | None = None,
    ) -> None:
        self.reasons = []
        self._head: Head | None = None
        self._features: Features | None = None
        self._same = False
        if weights is not None:
            self._head = read_head(Path(weights).expanduser())
            note = self._head.features
            given = {"weights": tower, "dtype": dtype}
            options = {**note["options"], **{key: value for key, value in given.items() if value is not None}}
            self._features = load_features(note["name"], options, device)
            self.reads = self._features.reads
            self.longest = self._features.longest
            self.preprocessing = self._features.preprocessing

    @property
    def head(self) -> Head:
        """The head. Raises DiffalignError where no folder was named."""
        if self._head is None:
            raise DiffalignError(
                "reward personal: weights=FOLDER is needed; make one with `diffalign judge personal DATA`"
            )
        return self._head

    @property
    def features(self) -> Features:
        """The features, of the weights that the head was fitted on. Raises DiffalignError where they are others."""
        head = self.head
        assert self._features is not None  # there is a head
        if not self._same:
            found = probe(self._features).double().numpy()
            if found.shape != head.probe.shape or np.linalg.norm(found - head.probe) > SAME * np.linalg.norm(
                head.probe
            ):
                raise DiffalignError(
                    f"reward personal: the head was fitted on features of {head.features['weights']}, and these are other "
                    f"ones, of {self._features.weights_id()}; give the former with tower=PATH, or {MEND}"
                )
            self._same = True
        return self._features

    def lengths(self, prompts: list[str]) -> list[int]:
        return self.features.lengths(prompts)

    def prepare(self, image: Image.Image) -> Tensor:
        return self.features.prepare(image)

    @torch.no_grad()
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = [""] * len(items)
        pixels = torch.stack([item for item in items if isinstance(item, Tensor)])
        return {self.columns[0]: self._score(pixels, prompts).cpu()}

    def score_tensors(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        check_pixels(self.name, pixels, prompts)
        return self._score(self.features.prepare_tensors(pixels.float()), prompts)

    def _score(self, prepared: Tensor, prompts: list[str]) -> Tensor:
        found = self.features.embed(prepared, prompts)
        # float64 on the CPU: differences of features are small beside the features.
        centred = found.cpu().double() - torch.from_numpy(self.head.mean)
        return (centred @ torch.from_numpy(self.head.weight)).float().to(found.device)

    def options(self) -> dict[str, Any]:
        if self._features is None:
            return {}
        return {"features": self._features.name, **self._features.options()}

    def weights_id(self) -> str:
        head = self.head
        digest = hashlib.blake2b(head.weight.tobytes() + head.mean.tobytes(), digest_size=6).hexdigest()
        return f"personal@{digest}, features {redacted(self.features.weights_id())}"

    def licence_id(self) -> str:
        return self.licence if self._features is None else f"yours (the head); {self._features.licence} (features)"

    def free(self) -> None:
        if self._features is not None:
            self._features.free()
