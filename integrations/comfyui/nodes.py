"""A ComfyUI node that scores a batch of images with one of diffalign's rewards and passes the best one on.

ComfyUI's images are float tensors [B, H, W, C] in [0, 1]. Its interface is `INPUT_TYPES`, `RETURN_TYPES`, `FUNCTION` and
`NODE_CLASS_MAPPINGS` (docs.comfy.org, custom nodes, Python); nothing of ComfyUI is imported.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from PIL import Image

from diffalign.rewards import REWARDS, Reward, load_reward, takes
from diffalign.scoring.spec import parse

Inputs = dict[str, dict[str, tuple[Any, ...]]]


class DiffalignScore:
    """Scores every image of a batch against a prompt. Higher is better."""

    CATEGORY = "diffalign"
    FUNCTION = "score"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE", "FLOAT", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("best", "score", "scores")
    OUTPUT_NODE = True
    DESCRIPTION = "Scores images with a reward of diffalign; gives the best one, its score, and all scores as text."

    def __init__(self) -> None:
        self._built: tuple[tuple[str, str, str], Reward] | None = None

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Return the node's inputs."""
        return {
            "required": {
                "images": ("IMAGE",),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "reward": (sorted(REWARDS), {"default": "pickscore"}),
            },
            "optional": {
                "options": ("STRING", {"default": "", "tooltip": "key=value,key=value, as after `diffalign score -r`"}),
                "device": (["cpu", "cuda"], {"default": "cuda" if torch.cuda.is_available() else "cpu"}),
            },
        }

    def score(
        self, images: torch.Tensor, prompt: str, reward: str, options: str = "", device: str = "cpu"
    ) -> dict[str, Any]:
        """Return the best image [1, H, W, C], its score, and a line for each image; the lines are also shown.

        Raises ValueError, which ComfyUI shows at the node, if no image has a score, and DiffalignError for an option.
        """
        judge = self._reward(reward, options, device)
        pixels = (images[..., :3].detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        pictures = [Image.fromarray(one) for one in pixels]
        why = judge.reason_not_scorable(prompt, {})
        if why:
            raise ValueError(f"{reward}: {why}")
        scores = judge.score(pictures, [prompt] * len(pictures)).tolist()
        lines = [
            f"{s:.6g}" if math.isfinite(s) else f"no score: {r}" for s, r in zip(scores, judge.reasons, strict=True)
        ]
        best = max(range(len(scores)), key=lambda i: scores[i] if math.isfinite(scores[i]) else -math.inf)
        if not math.isfinite(scores[best]):
            raise ValueError(f"{reward}: no image has a score: {judge.reasons[best]}")
        text = "\n".join(lines)
        return {"ui": {"text": [text]}, "result": (images[best : best + 1], float(scores[best]), text)}

    def _reward(self, name: str, options: str, device: str) -> Reward:
        """Return the reward; it stays in memory until another one is asked for."""
        wanted = (name, options, device)
        if self._built is None or self._built[0] != wanted:
            if self._built is not None:
                self._built[1].free()
            spec = parse(f"{name}:{options.strip()}", "reward")
            given = dict(spec.options)
            if takes(name, "device"):
                given.setdefault("device", device)
            self._built = (wanted, load_reward(name, **given))
        return self._built[1]


NODE_CLASS_MAPPINGS: dict[str, type] = {"DiffalignScore": DiffalignScore}
NODE_DISPLAY_NAME_MAPPINGS = {"DiffalignScore": "Score images (diffalign)"}
