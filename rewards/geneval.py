"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): does an image show the objects, counts, colours and places asked for?

The decisions are pure functions of detections, so they can be tested by hand and work with any detector. Metadata is
GenEval's own: {"tag", "include": [{"class", "count"[, "color"][, "position": [relation, index]]}], "exclude": [...]}.

Four scores, because the field uses four under one name:

  official  the evaluator's verdict: at least `count` of each class; only `exclude` catches too many.
  exact     equality: exactly `count` of each class, and every colour and place right.
  dense     graded, ours: the mean of terms in [0, 1]. Each include clause gives max(0, 1 - |n - count| / count) for its n
            detections, and one term each for colour and place if it asks for them; these are 0 while n is not `count`.
  server    the dense formula of the reward server that Flow-GRPO trains with. Its count term is not clipped (one object
            wanted and three found is -1), and a wrong place counts 0 and then 1 more.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from PIL import Image
from torch import Tensor

from diffalign.errors import DiffalignError
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
    threshold = s.counting_threshold if metadata.get("tag") == "counting" else s.threshold
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
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


def _graded(
    objects: dict[str, list[Detection]], metadata: Metadata, s: GenEvalSettings
) -> tuple[list[float], list[float], bool]:
    """Return the terms of `dense`, the terms of `server`, and whether everything is exactly as asked."""
    dense: list[float] = []
    server: list[float] = []
    exact = True
    for clause in metadata["include"]:
        found, count = objects.get(clause["class"], []), clause["count"]
        # The count comes first: colours and places are graded only if it is right.
        term = 1 - abs(len(found) - count) / count
        dense.append(max(0.0, term))
        server.append(term)
        right = len(found) == count
        attributes = [key for key in ("color", "position") if key in clause]
        if not right:
            dense += [0.0] * len(attributes)
            server += [0.0] if attributes else []
        elif attributes:
            for key in attributes:
                if key == "color":
                    colored = sum(d.color == clause["color"] for d in found)
                    dense.append(1 - abs(count - colored) / count)
                    server.append(dense[-1])
                    right = right and colored == count
                else:
                    target = metadata["include"][clause["position"][1]]
                    targets = objects.get(target["class"], [])
                    placed = _in_place(clause, found, targets, s)
                    dense.append(float(placed))
                    # The server skips the place where the target clause failed, and only then counts a plain 0.
                    server += [1.0] if placed else [0.0, 1.0] if len(targets) == target["count"] else [0.0]
                    right = right and placed
        exact = exact and right
    return dense, server, exact


def decide(detections: list[Detection], metadata: Metadata, settings: GenEvalSettings | None = None) -> Decision:
    """Return all verdicts on the detections of one image."""
    s = settings or GenEvalSettings()
    objects = _objects(detections, metadata, s)
    reason = _official(objects, metadata, s)
    dense, server, exact = _graded(objects, metadata, s)
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
        return super().reason_not_scorable(prompt, metadata) or (
            "" if metadata.get("include") else "no GenEval metadata (include)"
        )

    def weights_id(self) -> str:
        return self.detector.weights_id() if isinstance(self.detector, Mask2FormerDetector) else "the detector's"

    def free(self) -> None:
        if isinstance(self.detector, Mask2FormerDetector):
            self.detector.free()

    def options(self) -> dict[str, Any]:
        return {"detector": type(self.detector).__name__, **asdict(self.settings)}

    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        for prompt, facts in zip(prompts, metadata or [{}] * len(prompts), strict=True):
            if not facts.get("include"):
                raise DiffalignError(
                    f"reward geneval: prompt {prompt!r} has no GenEval metadata; give prompts as jsonl rows with "
                    '"tag", "include" and "prompt"'
                )
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
        for reason, facts in zip(self.reasons, metadata or [], strict=True):
            if reason:
                rows.append((float("nan"),) * len(self.columns))
            else:
                d = decide(next(detections), facts, self.settings)
                rows.append((d.dense, float(d.official), float(d.exact), d.server))
        return by_column(self.columns, rows)
