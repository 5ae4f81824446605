"""HPSv3++ (Liu et al. 2026, arXiv 2606.14657): Qwen3-VL-8B with HPSv3's head, conditioned on two numbers.

The first number is the capability of the model that drew the image, which a small encoder reads off the image. The
second is how far that model was trained on rewards, from 0 to 1, and is given. Both move the features at the reward
token by a scale and a shift (FiLM) before the head.

The published code infers one capability for a whole batch, so that an image's score depends on the images beside it.
Here it is inferred for each image, which is what that code does with one image. The image is scaled to about 200,704
pixels with sides that are multiples of 28, and then by Qwen3-VL's processor to multiples of 32, as published. The
rotary frequencies are rounded to bfloat16, since the published code casts the whole network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Metadata, Prepared
from diffalign.rewards.hpsv3 import BICUBIC, HPSv3, area
from diffalign.rewards.image_tensors import tensor_inputs
from diffalign.rewards.learned import check_pixels
from diffalign.rewards.pixels import resize
from diffalign.rewards.vlm import VisionLanguageOptions, pictures

CONDITION = 256
"""The width of the condition, `cond_dim` in the published config."""


class CapabilityEncoder(nn.Module):
    """Capability from 0 to 1, of features [B, D]. The published attention over a group has one member here, so it is 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, CONDITION)
        self.pool_attn = nn.Linear(CONDITION, 1)
        self.out_proj = nn.Linear(CONDITION, 1)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.out_proj(self.proj(features.to(self.proj.weight.dtype))).sigmoid()[:, 0].float()
        return found


class HPSv3PlusModel(nn.Module):
    """The base model without its language head; FiLM and reward head in float32."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base
        self.cap_encoder = CapabilityEncoder(width)
        self.cond_encoder = nn.Sequential(nn.Linear(2, CONDITION), nn.GELU(), nn.Linear(CONDITION, CONDITION))
        self.film_gen = nn.Sequential(nn.Linear(CONDITION, width), nn.ReLU(), nn.Linear(width, 2 * width))
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def forward(self, batch: dict[str, Tensor], token: int, progress: float) -> Tensor:
        """Return (mean, log sigma, capability) [B, 3] at the reward token."""
        hidden = self.base(**batch).last_hidden_state
        at = (batch["input_ids"] == token).float().argmax(1)
        features = hidden[torch.arange(len(at)), at]
        # The published code keeps the capability's gradient out of the features.
        capability = self.cap_encoder(features.detach())
        condition = torch.stack([capability, torch.full_like(capability, progress)], dim=-1)
        scale, shift = self.film_gen(self.cond_encoder(condition)).chunk(2, dim=-1)
        scores = self.rm_head(features.float() * (1 + scale) + shift)
        return torch.cat([scores, capability[:, None]], dim=1)


class HPSv3Plus(HPSv3):
    """Unbounded, higher is better. Then the model's own spread, and the capability that it inferred (0 to 1).

    weights: a local hpsv3++.pth, or its folder. base: a local copy of Qwen/Qwen3-VL-8B-Instruct, of which only config,
    tokenizer and image processor are read. progress: how far the drawing model was trained on rewards: 0 not at all, 1 a
    thousand steps. The paper raises it from 0.3 to 1 over a training.
    """

    name = "hpsv3_plus"
    columns = ("hpsv3_plus", "sigma", "capability")
    licence = "not stated by the repository; the weights' card says which for them"
    weights = "Junjun2333/HPSv3-PlusPlus, Qwen/Qwen3-VL-8B-Instruct"
    size = "17.6 GB"
    source = "arXiv 2606.14657"
    repo = "Junjun2333/HPSv3-PlusPlus"
    file = "hpsv3++.pth"
    preprocessing = "RGB, 200704 pixels in multiples of 28, then Qwen3-VL's processor"
    version = "1"
    base_repo = "Qwen/Qwen3-VL-8B-Instruct"
    instruction = Path(__file__).with_name("hpsv3_plus_instruction.txt").read_text(encoding="utf-8")

    def __init__(
        self, *, progress: float = 0.0, base: str | Path | None = None, **shared: Unpack[VisionLanguageOptions]
    ) -> None:
        super().__init__(base=base, **shared)
        if isinstance(progress, bool) or not isinstance(progress, int | float) or not 0 <= progress <= 1:
            raise DiffalignError(f"reward hpsv3_plus: progress {progress!r}; a number from 0 to 1")
        self.progress = float(progress)

    def options(self) -> dict[str, Any]:
        return super().options() | ({"progress": self.progress} if self.progress else {})

    def build(self) -> nn.Module:
        from transformers import Qwen3VLModel

        def make(config: Any) -> nn.Module:
            return HPSv3PlusModel(Qwen3VLModel(config), config.text_config.hidden_size)

        return self.filled("qwen3_vl", ("rm_head.", "cond_encoder.", "film_gen."), make)

    @torch.no_grad()
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = [""] * len(items)
        token = self.token
        images = [image.resize(area(image.width, image.height, self.pixels), BICUBIC) for image in pictures(items)]
        found = self.network(self.encode(images, self.texts(prompts)), token, self.progress).cpu()
        return {"hpsv3_plus": found[:, 0], "sigma": found[:, 1].exp(), "capability": found[:, 2]}

    def score_tensors(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        check_pixels(self.name, pixels, prompts)
        token = self.token
        width, height = area(pixels.shape[-1], pixels.shape[-2], self.pixels)
        sized = resize(pixels.to(self.device).float(), height, width).clamp(0, 1)
        # The processor writes everything but the pixels; their values come from the tensors, with the gradient.
        batch = self.encode([Image.new("RGB", (width, height))] * len(prompts), self.texts(prompts))
        batch["pixel_values"] = tensor_inputs(self.processor.image_processor, sized)["pixel_values"].to(self.dtype)
        scores: Tensor = self.network(batch, token, self.progress)[:, 0]
        return scores
