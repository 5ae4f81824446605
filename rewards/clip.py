"""Rewards on transformers' CLIPModel: PickScore, CLIPScore in its conventions, and what they share.

In transformers 5 `get_image_features` and `get_text_features` return an object whose `pooler_output` is already the
projected embedding; projecting it again gives a number that looks like a score but is wrong.
"""

from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import DiffalignError
from diffalign.files.parse import parse_json
from diffalign.pretrained import load_part
from diffalign.rewards.learned import CosineReward, LearnedOptions, TokenizedReward
from diffalign.rewards.pixels import Rounding, crop_square, crop_square_tensor, normalise
from diffalign.rewards.published_weights import SMALL_FILES, fetch, fingerprint, pretrained

SIDE = 224
TOKENS = 77


class ClipOptions(LearnedOptions, total=False):
    """Options that every reward on a CLIP takes. tokenizer: a local copy of its folder."""

    tokenizer: str | Path | None


class ClipReward(TokenizedReward, CosineReward):
    """A reward on image and text embeddings of a CLIPModel folder; subclasses define the score."""

    preprocessing = "shorter side to 224 bicubic on 8 bits, centre crop, CLIP normalisation"
    longest = TOKENS
    rounding: Rounding = "floor"
    tokenizer_repo: str | None = None
    """The hub repository of the tokenizer if it is not beside the weights."""

    def build(self) -> torch.nn.Module:
        from transformers import CLIPModel

        return pretrained(CLIPModel, self.path, self.name, self.dtype)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at first use."""
        if self._tokenizer is None:
            from transformers import CLIPTokenizer

            self._tokenizer = load_part(CLIPTokenizer, self.tokenizer_path, f"reward {self.name}")
        return self._tokenizer

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's folder: beside the weights, or its own."""
        if self.local_tokenizer is None and any(self.path.glob("tokenizer*.json")):
            return self.path
        repo = self.tokenizer_repo or self.repo
        return fetch(self.name, repo, None, "main", self.local_tokenizer, "tokenizer", SMALL_FILES)

    def lengths(self, prompts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer([self.wording(p) for p in prompts], verbose=False)["input_ids"]]

    def wording(self, prompt: str) -> str:
        """Return the text that is embedded for a prompt."""
        return prompt

    def weights_id(self) -> str:
        # Included so that a missing tokenizer is reported before anything is scored.
        apart = self.reads and self.tokenizer_path != self.path
        tokenizer = f", tokenizer {fingerprint(self.tokenizer_path)}" if apart else ""
        return super().weights_id() + tokenizer

    def prepare(self, image: Image.Image) -> Tensor:
        return normalise(crop_square(image, SIDE, self.rounding))

    def prepare_tensors(self, pixels: Tensor) -> Tensor:
        return normalise(crop_square_tensor(pixels, SIDE, self.rounding))

    def embed_images(self, pixels: Tensor) -> Tensor:
        features = self.network.get_image_features(pixel_values=pixels.to(self.dtype)).pooler_output
        return F.normalize(features.float(), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Return unit vectors of texts, float32 [B, D], cut at 77 tokens."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        features = self.network.get_text_features(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        ).pooler_output
        return F.normalize(features.float(), dim=-1)


class PickScore(ClipReward):
    """exp(logit_scale) cos(image, text) of a CLIP ViT-H/14 tuned on Pick-a-Pic (Kirstain et al. 2023, arXiv
    2305.01569).

    Two images of one prompt compare by the softmax of their scores. Flow-GRPO divides by 26 and EvalScope drops the
    scale; this reward does neither.
    """

    name = "pickscore"
    columns = ("pickscore",)
    range = (-100.0, 100.0)
    usual = "17 to 24"
    licence = "MIT (code); the weights' card says which for them"
    weights = "yuvalkirstain/PickScore_v1"
    size = "3.9 GB"
    source = "arXiv 2305.01569"
    repo = "yuvalkirstain/PickScore_v1"
    tokenizer_repo = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.network.logit_scale.float().exp() * self.cosine(pixels, prompts)


class Convention(NamedTuple):
    """A definition of CLIPScore: score = max(scale * cos, floor)."""

    repo: str
    prefix: str
    scale: float
    floor: float
    rounding: Rounding


def quick_gelu(reward: str, folder: Path) -> Path:
    """Return the folder of an OpenAI CLIP. Raises DiffalignError if its activation is not QuickGELU, which changes
    scores.
    """
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        activation = config.get("vision_config", {}).get("hidden_act", "quick_gelu")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DiffalignError(f"reward {reward}: {folder}/config.json cannot be read: {error}") from error
    if activation != "quick_gelu":
        raise DiffalignError(
            f"reward {reward}: {folder} computes with {activation}; OpenAI's CLIP needs hidden_act quick_gelu"
        )
    return folder


B32, L14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
NEVER = -float("inf")
CONVENTIONS = {
    "hessel": Convention(B32, "A photo depicts ", 2.5, 0.0, "round"),
    "torchmetrics": Convention(L14, "", 100.0, 0.0, "floor"),
    "cosine": Convention(L14, "", 1.0, NEVER, "round"),
    "compbench": Convention(B32, "", 1.0, NEVER, "round"),
}


class CLIPScore(ClipReward):
    """CLIPScore in one of the conventions that the field uses under one name.

    hessel: the paper's 2.5 max(cos, 0), ViT-B/32, "A photo depicts " before the caption. torchmetrics: max(100 cos, 0),
    ViT-L/14. cosine: plain, ViT-L/14 (ImageReward's repository, EvalScope). compbench: plain, ViT-B/32 (T2I-CompBench).
    `model` replaces the convention's CLIP; a convention keeps its formula with any.
    """

    name = "clipscore"
    columns = ("clipscore",)
    range = (-1.0, 100.0)
    licence = "MIT (CLIP)"
    weights = "openai/clip-vit-base-patch32, openai/clip-vit-large-patch14"
    size = "0.6 GB or 1.7 GB"
    source = "arXiv 2104.08718"

    def __init__(self, *, convention: str = "hessel", model: str | None = None, **shared: Unpack[ClipOptions]) -> None:
        if convention not in CONVENTIONS:
            raise DiffalignError(f"reward clipscore: convention {convention!r}; one of {', '.join(CONVENTIONS)}")
        super().__init__(**shared)
        self.convention = convention
        self.formula = CONVENTIONS[convention]
        self.repo = model or self.formula.repo
        self.rounding = self.formula.rounding

    def options(self) -> dict[str, Any]:
        return {**super().options(), "convention": self.convention}

    def wording(self, prompt: str) -> str:
        return self.formula.prefix + prompt

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        cosine = self.cosine(pixels, [self.wording(prompt) for prompt in prompts])
        return (self.formula.scale * cosine).clamp(min=self.formula.floor)
