"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): does an image show the objects, counts, colours and places asked for?

The decisions are pure functions of detections, so they can be tested by hand and work with any detector. Metadata is
GenEval's own: {"tag", "include": [{"class", "count"[, "color"][, "position": [relation, index]]}], "exclude": [...]}.

Four scores, because the field uses four under one name:

  official  the evaluator's verdict: at least `count` of each class; only `exclude` catches too many.
  exact     equality: exactly `count` of each class, and every colour and place right.
  dense     graded, ours: the mean of terms in [0, 1]. Each include clause gives max(0, 1 - |n - count| / count) for its n
            detections, and one term each for colour and place if it asks for them; these are 0 while n is not `count`.
  server    the dense formula of the reward server that Flow-GRPO trains with. Its count term is not clipped (one object
            wanted and three found is -1), and a wrong place counts 0 and then 1 more. A place is 0 unless the clause that it
            refers to is right, in number, colour and place.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.files.facts import fault_of_facts, geneval_facts
from diffalign.rewards.base import Metadata, Reward, by_column
from diffalign.rewards.detection import Detection, Detector
from diffalign.rewards.mask2former import Mask2FormerDetector

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class GenEvalSettings:
    """The evaluator's constants, for Mask2Former; another detector may need other thresholds.

    Confidences must be strictly above the threshold. At most `max_objects` of a class are used. Offsets of centres are
    shrunk by `shrink` times the boxes' sizes; a direction counts if its share of the offset is above `direction`.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    shrink: float = 0.1
    direction: float = 0.5


@dataclass(frozen=True)
class Decision:
    """The verdicts on one image, and the first reason against it ("" if there is none)."""

    official: bool
    exact: bool
    dense: float
    server: float
    reason: str


def relations(a: Box, b: Box, settings: GenEvalSettings | None = None) -> set[str]:
    """Return how box a stands to box b: any of "left of", "right of", "above", "below"; none while they are too close."""
    s = settings or GenEvalSettings()
    shrunk, offsets = [], []
    for axis in (0, 1):
        offset = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        margin = s.shrink * ((a[axis + 2] - a[axis]) + (b[axis + 2] - b[axis]))
        shrunk.append(max(abs(offset) - margin, 0.0) * (1 if offset > 0 else -1))
        offsets.append(offset)
    if all(abs(v) < 1e-3 for v in shrunk):
        return set()
    # The evaluator divides by the length of the offset *before* shrinking.
    length = (offsets[0] ** 2 + offsets[1] ** 2) ** 0.5
    dx, dy = shrunk[0] / length, shrunk[1] / length
    found = {"left of": dx < -s.direction, "right of": dx > s.direction}
    found |= {"above": dy < -s.direction, "below": dy > s.direction}
    return {name for name, holds in found.items() if holds}


def _objects(detections: list[Detection], metadata: Metadata, s: GenEvalSettings) -> dict[str, list[Detection]]:
    """Return confident detections by class, best first."""
    # The evaluator compares in float32, so that a score of exactly float32(0.3) is not above 0.3.
    threshold = np.float32(s.counting_threshold if metadata.get("tag") == "counting" else s.threshold)
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if np.float32(detection.score) > threshold:
            kept.setdefault(detection.label, []).append(detection)
    return {label: found[: s.max_objects] for label, found in kept.items()}


def _in_place(clause: Metadata, found: list[Detection], targets: list[Detection] | None, s: GenEvalSettings) -> bool:
    relation = clause["position"][0]
    return bool(targets) and all(relation in relations(f.box, t.box, s) for f in found for t in targets or [])


def _official(objects: dict[str, list[Detection]], metadata: Metadata, s: GenEvalSettings) -> str:
    """Return the evaluator's first reason against the image, "" if it is correct."""
    groups: list[list[Detection] | None] = []
    reason = ""
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        # Only the `count` most confident boxes are used, for colours and places too.
        found = objects.get(name, [])[:count]
        fault = ""
        if len(found) < count:
            fault = f"expected {name} >= {count}, found {len(found)}"
        elif "color" in clause and sum(d.color == clause["color"] for d in found) < count:
            fault = f"expected {clause['color']} {name} >= {count}, found {', '.join(str(d.color) for d in found)}"
        elif "position" in clause and not _in_place(clause, found, groups[clause["position"][1]], s):
            fault = f"expected {name} {clause['position'][0]} the target"
        groups.append(None if fault else found)
        reason = reason or fault
    for clause in metadata.get("exclude", []):
        found = objects.get(clause["class"], [])
        if len(found) >= clause["count"]:
            reason = reason or f"expected {clause['class']} < {clause['count']}, found {len(found)}"
    return reason


def _dense(objects: dict[str, list[Detection]], metadata: Metadata, s: GenEvalSettings) -> list[float]:
    """Return the terms of `dense`: the count comes first, colours and places are graded only if it is right."""
    terms: list[float] = []
    for clause in metadata["include"]:
        found, count = objects.get(clause["class"], []), clause["count"]
        counted = len(found) == count
        terms.append(max(0.0, 1 - abs(len(found) - count) / count))
        if "color" in clause:
            colored = sum(d.color == clause["color"] for d in found)
            terms.append(1 - abs(count - colored) / count if counted else 0.0)
        if "position" in clause:
            targets = objects.get(metadata["include"][clause["position"][1]]["class"], [])
            terms.append(float(counted and _in_place(clause, found, targets, s)))
    return terms


def _server(objects: dict[str, list[Detection]], metadata: Metadata, s: GenEvalSettings) -> tuple[list[float], bool]:
    """Return the terms of `server`, and whether everything is exactly as asked."""
    terms: list[float] = []
    groups: list[list[Detection] | None] = []  # of each clause its objects; None if number, colour or place is wrong
    for clause in metadata["include"]:
        found, count = objects.get(clause["class"], []), clause["count"]
        terms.append(1 - abs(len(found) - count) / count)
        right = len(found) == count
        if not right and ("color" in clause or "position" in clause):
            terms.append(0.0)
        if right and "color" in clause:
            colored = sum(d.color == clause["color"] for d in found)
            terms.append(1 - abs(count - colored) / count)
            right = colored == count
        if right and "position" in clause:
            targets = groups[clause["position"][1]]
            right = _in_place(clause, found, targets, s)
            # A wrong place counts 0 and then 1 more; without a right target it is a plain 0.
            terms += [1.0] if right else [0.0] if targets is None else [0.0, 1.0]
        groups.append(found if right else None)
    return terms, None not in groups


def decide(detections: list[Detection], metadata: Metadata, settings: GenEvalSettings | None = None) -> Decision:
    """Return all verdicts on the detections of one image."""
    s = settings or GenEvalSettings()
    objects = _objects(detections, metadata, s)
    reason = _official(objects, metadata, s)
    dense = _dense(objects, metadata, s)
    server, exact = _server(objects, metadata, s)
    return Decision(not reason, exact, sum(dense) / len(dense), sum(server) / len(server), reason)


class GenEvalReward(Reward):
    """GenEval on any detector. Score: `dense`; `official` and `exact` are 0 or 1.

    detector: default: the evaluator's own (`mask2former.Mask2FormerDetector`), which gets weights, clip, revision,
    device and dtype. The other options are those of GenEvalSettings.
    """

    name = "geneval"
    columns = ("dense", "official", "exact", "server")
    range = (0.0, 1.0)
    licence = "MIT (the decisions, Mask2Former, CLIP)"
    weights = "facebook/mask2former-swin-small-coco-instance, openai/clip-vit-large-patch14"
    size = "2 GB"
    source = "arXiv 2310.11513"
    version = "2"
    reads = ("prompt", "metadata")

    def __init__(
        self,
        detector: Detector | None = None,
        *,
        weights: str | Path | None = None,
        clip: str | Path | None = None,
        revision: str = "main",
        device: str = "cpu",
        dtype: str = "float32",
        **settings: float,
    ) -> None:
        self.detector = detector or Mask2FormerDetector(
            weights=weights, clip=clip, revision=revision, device=device, dtype=dtype
        )
        try:
            self.settings = GenEvalSettings(**cast("dict[str, Any]", settings))
        except TypeError as error:
            raise DiffalignError(
                f"reward geneval: {error}; its settings are {', '.join(GenEvalSettings().__dict__)}"
            ) from error
        self.reasons: list[str] = []

    def reason_not_scorable(self, prompt: str | None, metadata: Metadata) -> str:
        return super().reason_not_scorable(prompt, metadata) or fault_of_facts(geneval_facts(metadata))

    def weights_id(self) -> str:
        if isinstance(self.detector, Mask2FormerDetector):
            return self.detector.weights_id()
        return f"the detector {type(self.detector).__name__}"

    def licence_id(self) -> str:
        ours = isinstance(self.detector, Mask2FormerDetector)
        return self.licence if ours else "MIT (the decisions), the detector's own"

    def free(self) -> None:
        if isinstance(self.detector, Mask2FormerDetector):
            self.detector.free()

    def options(self) -> dict[str, Any]:
        return {"detector": type(self.detector).__name__, **asdict(self.settings)}

    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        metadata = [geneval_facts(facts) for facts in metadata or [{}] * len(prompts)]
        for prompt, facts in zip(prompts, metadata, strict=True):
            if not facts.get("include"):
                raise DiffalignError(
                    f"reward geneval: prompt {prompt!r} has no GenEval metadata; give prompts as jsonl rows with "
                    '"tag", "include" and "prompt"'
                )
            if fault := fault_of_facts(facts):
                raise DiffalignError(f"reward geneval: prompt {prompt!r}: {fault}")
        readable, self.reasons = [], []
        for image in images:
            try:
                image.load()
                readable.append(image)
                self.reasons.append("")
            except (OSError, SyntaxError, ValueError) as error:
                self.reasons.append(f"unreadable image: {error}")
        detections = iter(self.detector.detect(readable))
        rows = []
        for reason, facts in zip(self.reasons, metadata, strict=True):
            if reason:
                rows.append((float("nan"),) * len(self.columns))
            else:
                d = decide(next(detections), facts, self.settings)
                rows.append((d.dense, float(d.official), float(d.exact), d.server))
        return by_column(self.columns, rows)
