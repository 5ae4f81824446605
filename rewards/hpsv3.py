"""HPSv3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL-7B with a head for the mean and log spread of a preference.

The score is the mean, output 0; output 1 is log sigma. The score is not bound to the "0 to 10" of its instruction. The
image is scaled to about 200,704 pixels with sides that are multiples of 28, whatever its size.

Two things are not Qwen2-VL's, since the network was trained without them. Tokens are counted 0, 1, 2, ... through the
image as well: the published class passes no positions, and the transformers 4.45.2 that it pins then counts. And the
rotary frequencies are rounded to bfloat16: the published code casts the whole network, buffers included.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pretrained import load_part
from diffalign.rewards.base import Metadata, Prepared
from diffalign.rewards.learned import check_pixels
from diffalign.rewards.pixels import normalise, patches, resize
from diffalign.rewards.published_weights import SMALL_FILES, fetch, fill_empty, fingerprint, load_state, without_memory
from diffalign.rewards.vlm import VisionLanguageOptions, VisionLanguageReward, pictures, plain

BASE = "Qwen/Qwen2-VL-7B-Instruct"
TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28
BICUBIC = Image.Resampling.BICUBIC
# The exact words, with spaces at line ends, are the model's interface: it was trained on these.
INSTRUCTION = Path(__file__).with_name("hpsv3_instruction.txt").read_text(encoding="utf-8")
ASK = f"\nPlease provide the overall ratings of this image: {TOKEN}\n\nEND\n"


class HPSv3Model(nn.Module):
    """The base model without its language head, and the reward head in float32."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base = base
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def forward(self, batch: dict[str, Tensor], token: int) -> Tensor:
        """Return (mean, log sigma) [B, 2] at the reward token."""
        hidden = self.base(**batch, position_ids=plain_positions(batch["attention_mask"])).last_hidden_state
        at = (batch["input_ids"] == token).float().argmax(1)
        found: Tensor = self.rm_head(hidden[torch.arange(len(at)), at].float())
        return found


def plain_positions(mask: Tensor) -> Tensor:
    """Return positions [3, B, L] that count the tokens of each row of a mask [B, L], wherever its padding is."""
    return (mask.long().cumsum(1) - 1).clamp(min=0).expand(3, *mask.shape)


def round_frequencies(model: nn.Module) -> None:
    """Round the rotary frequencies to bfloat16, in place; they stay float32."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())


def under_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the checkpoint (transformers 4.45's Qwen2-VL) for transformers 5's Qwen2VLModel, without a language head."""
    found = {}
    for key, value in state.items():
        if key.startswith(("model.visual.", "model.language_model.")):  # saved again by a newer release
            found[f"base.{key.removeprefix('model.')}"] = value
        elif key.startswith("visual."):
            found[f"base.{key}"] = value
        elif key.startswith("model."):
            found[f"base.language_model.{key.removeprefix('model.')}"] = value
        elif not key.startswith("lm_head."):
            found[key] = value
    return found


class HPSv3(VisionLanguageReward):
    """Unbounded, higher is better; the second column is the model's own spread.

    weights: a local HPSv3.safetensors, or its folder. base: a local copy of Qwen/Qwen2-VL-7B-Instruct, of which only
    config, tokenizer and image processor are read, since the checkpoint holds all weights.
    """

    base_repo: ClassVar[str] = BASE
    instruction: ClassVar[str] = INSTRUCTION

    name = "hpsv3"
    columns: tuple[str, ...] = ("hpsv3", "sigma")
    range = (-float("inf"), float("inf"))
    licence = "MIT (code); the weights' card says which for them"
    weights = "MizzenAI/HPSv3, Qwen/Qwen2-VL-7B-Instruct"
    size = "16.6 GB"
    differentiable = True
    source = "arXiv 2508.03789"
    repo = "MizzenAI/HPSv3"
    file = "HPSv3.safetensors"
    preprocessing = "RGB, Qwen2-VL's processor at 200704 pixels"
    version = "2"

    def __init__(
        self, *, base: str | Path | None = None, pixels: int = PIXELS, **shared: Unpack[VisionLanguageOptions]
    ) -> None:
        super().__init__(**shared)
        self.local_base, self.pixels = base, pixels

    def options(self) -> dict[str, Any]:
        return super().options() | ({} if self.pixels == PIXELS else {"pixels": self.pixels})

    @property
    def processor_path(self) -> Path:
        return fetch(self.name, self.base_repo, None, "main", self.local_base, "base", SMALL_FILES)

    def weights_id(self) -> str:
        return f"{super().weights_id()} on {self.base_repo}@{fingerprint(self.processor_path)}"

    @property
    def token(self) -> int:
        """The id of the reward token."""
        tokenizer = self.processor.tokenizer
        if TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([TOKEN], special_tokens=True)
        return int(tokenizer.convert_tokens_to_ids(TOKEN))

    def build(self) -> nn.Module:
        from transformers import Qwen2VLModel

        return self.filled("qwen2_vl", "rm_head.", lambda c: HPSv3Model(Qwen2VLModel(c), c.text_config.hidden_size))

    def filled(self, kind: str, exact: str | tuple[str, ...], make: Callable[[Any], nn.Module]) -> nn.Module:
        """Return `make(config)` with the checkpoint's weights.

        kind: the `model_type` that the base's config must have. exact: the beginnings of names that stay in float32.
        """
        from transformers import AutoConfig

        config = load_part(AutoConfig, self.processor_path, f"reward {self.name}")
        if config.model_type != kind:
            raise DiffalignError(
                f"reward {self.name}: {self.processor_path} is a {config.model_type}; base= must be {self.base_repo}"
            )
        state = under_transformers(load_state(self.path, "model"))
        words = state.get("base.language_model.embed_tokens.weight")
        if words is None:
            raise DiffalignError(f"reward {self.name}: {self.path} holds no Qwen model; is it another model's file?")
        # One row was added for the reward token; the checkpoint says how many there are.
        config.text_config.vocab_size = len(words)
        with without_memory():
            model = make(config)
        del words
        fill_empty(model, state, self.path, self.name, self.dtype, self.device, exact=exact)
        round_frequencies(model)
        return model

    def texts(self, prompts: list[str]) -> list[str]:
        """Return the question about each prompt."""
        return [self.instruction.replace("{prompt}", plain(prompt)) + ASK for prompt in prompts]

    def _inputs(self, images: list[Image.Image], prompts: list[str]) -> dict[str, Tensor]:
        """Return inputs for images that have their final size."""
        return self.encode(images, self.texts(prompts), do_resize=False)

    @torch.no_grad()
    def measure_prepared(
        self, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        self.reasons = [""] * len(items)
        token = self.token
        images = [image.resize(area(image.width, image.height, self.pixels), BICUBIC) for image in pictures(items)]
        found = self.network(self._inputs(images, prompts), token).cpu()
        return {"hpsv3": found[:, 0], "sigma": found[:, 1].exp()}

    def score_tensors(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        check_pixels(self.name, pixels, prompts)
        token = self.token
        width, height = area(pixels.shape[-1], pixels.shape[-2], self.pixels)
        # The processor writes everything but the pixels; their values come from the tensors, with the gradient.
        batch = self._inputs([Image.new("RGB", (width, height))] * len(prompts), prompts)
        resized = resize(pixels.to(self.device).float(), height, width).clamp(0, 1)
        processor = self.processor.image_processor
        normal = normalise(resized, tuple(processor.image_mean), tuple(processor.image_std))
        batch["pixel_values"] = patches(normal, processor.patch_size, processor.merge_size).to(self.dtype)
        scores: Tensor = self.network(batch, token)[:, 0]
        return scores


def area(width: int, height: int, pixels: int, factor: int = 28) -> tuple[int, int]:
    """Return (width, height), multiples of 28 with about `pixels` in all, near the image's aspect by Qwen's rule."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rows, columns = smart_resize(height, width, factor=factor, min_pixels=pixels, max_pixels=pixels)
    return columns, rows
