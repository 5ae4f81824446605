"""Turn the names in a config into devices, models, prompts, rewards and validations; here, and nowhere else.

`shapes-sd3` becomes a folder, `testbed:test` becomes prompts, `detector: shapes` becomes a detector that is handed to the
reward, since rewards and pipelines know nothing of the embedded world.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffalign import testbed
from diffalign.config import (
    EvalConfig,
    ModelSection,
    RewardSection,
    SampleConfig,
    TrainConfig,
)
from diffalign.data.prompts import PromptRow, read_prompts
from diffalign.data.suites import read_suite
from diffalign.data.suites_hub import from_hub, read_hub_suite
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.rewards import REWARDS, Reward, accepted, load_reward
from diffalign.testbed.detector import ShapeDetector
from diffalign.testbed.prompts import prompts as testbed_prompts
from diffalign.training.validation import Validation

Say = Callable[[str], None]


DETECTORS: dict[str, type] = {"shapes": ShapeDetector}


TESTBED_PROMPTS = 256


def say(message: str) -> None:
    print(message, flush=True)


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one; CUDA asked for and absent is a mistake."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DiffalignError("device=cuda: this machine has no usable CUDA device; use device=cpu or device=auto")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def open_backbone(model: ModelSection, device: str) -> Any:
    """The backbone that a config's `model` section names."""
    path = str(testbed.model_path(model.path)) if model.path in testbed.MODELS else model.path
    options = model.model_dump(exclude={"path", "dtype", "compile"})
    return load_backbone(path, dtype=getattr(torch, model.dtype), device=device, **options)


def resolve_prompts(source: str, n: int | None, seed: int = 0) -> list[PromptRow]:
    """A prompt file, `testbed:SPLIT`, `suite:NAME:PATH` or `suite:NAME:hub`."""
    kind, _, split = source.partition(":")
    if kind == "suite":
        name, _, path = split.partition(":")
        return (read_hub_suite(name, path) if from_hub(path) else read_suite(name, Path(path)))[:n]
    if kind == "testbed":
        rows = testbed_prompts(split, n or TESTBED_PROMPTS, seed)
        return [PromptRow(row["prompt"], {k: v for k, v in row.items() if k != "prompt"}) for row in rows]
    return read_prompts(source)[:n]


def open_reward(section: RewardSection, device: str = "cpu") -> Reward:
    """The reward, with its detector built and handed over where it takes one."""
    options = dict(section.options)
    known = accepted(section.name) if section.name in REWARDS else set()
    if "device" in known:
        options.setdefault("device", device)
    if section.detector is not None and "detector" in known:
        if section.detector not in DETECTORS:
            raise DiffalignError(f"reward.detector {section.detector!r}: unknown; there are {', '.join(DETECTORS)}")
        options["detector"] = DETECTORS[section.detector]()
    return load_reward(section.name, **options)


def open_rewards(
    sections: Sequence[RewardSection], rows: list[PromptRow], device: str, key: str, prompts: str
) -> dict[str, Reward]:
    """Rewards by name, refused before any image is drawn where one of them cannot judge a prompt."""
    rewards = {section.name: open_reward(section, device) for section in sections}
    for name, reward in rewards.items():
        for row in rows:
            if reason := reward.unfit(row.prompt, row.metadata):
                raise DiffalignError(
                    f"{key}: {name} cannot judge {row.prompt!r} of {prompts}: {reason}; name another reward, such as "
                    "{name: pickscore}, or give prompts with what it needs"
                )
    return rewards


class Ticker:
    """A plain line every few seconds: sampling has no loss to show. Time counts anew from a call with 0 done."""

    def __init__(self, what: str, every: float = 15.0) -> None:
        self.what, self.every, self.started, self.last = what, every, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not done:
            self.started = self.last = now
        elif now - self.last >= self.every or done == total:
            self.last = now
            say(f"{self.what}: {done}/{total} images, {(now - self.started) / max(done, 1):.3f} s each")


def check_guidance_scale(config: SampleConfig | EvalConfig, backbone: Any) -> None:
    """Where the guidance scale is an input of the network, images are drawn at the one that it is trained under."""
    if backbone.guidance is not None and backbone.guidance != config.guidance_scale:
        raise DiffalignError(
            f"guidance_scale={config.guidance_scale:g}: {backbone.path} takes the scale as an input and is trained under "
            f"model.guidance={backbone.guidance:g}; set both to the same value"
        )


def weights_digest(weights: Path) -> str:
    """Hash of a weights folder's tensors. Not of the files: safetensors writes their metadata in any order."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(weights.rglob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(tensors):
            digest.update(f"{path.relative_to(weights)} {name}".encode())
            digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def prepare_validation(config: TrainConfig, backbone: Any) -> Validation | None:
    """Prompts encoded and rewards built, while the text encoders are there; None where no validation is wanted."""
    wanted = config.validation
    if wanted.every is None or wanted.prompts is None:
        return None
    rows = resolve_prompts(wanted.prompts, wanted.n)
    device = resolve_device(config.device)
    rewards = open_rewards(wanted.rewards, rows, device, "validation.rewards", wanted.prompts)
    texts = [row.prompt for row in rows]
    chunks = [texts[i : i + wanted.batch_size] for i in range(0, len(texts), wanted.batch_size)]
    parts = [backbone.encode_guided(chunk, wanted.negative_prompt) for chunk in chunks]
    encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    side = config.data.resolution or backbone.default_resolution
    return Validation(backbone, wanted, rows, encoded, rewards, side, config.seed)
