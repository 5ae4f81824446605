"""ImageReward (Xu et al. 2023, arXiv 2304.05977) on transformers' BLIP parts, from the published checkpoint.

A ViT-L/16 encodes the image, a BERT with cross-attention reads the prompt and the image's tokens, and an affine head on
its first token gives the score, standardised by two constants of the training set. Sizes are read from the checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.pretrained import load_part
from diffalign.rewards.aesthetic import linear_head
from diffalign.rewards.learned import TokenizedReward
from diffalign.rewards.pixels import crop_square, crop_square_tensor, normalise
from diffalign.rewards.published_weights import SMALL_FILES, fetch, fill_empty, fingerprint, load_state, without_memory

SIDE, TOKENS, HEAD_WIDTH = 224, 35, 64
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENIZER = "google-bert/bert-base-uncased"

# The checkpoint's names (BLIP's own code) to those of transformers' BlipVisionModel and BlipTextModel.
RENAMES = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.")


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the checkpoint under transformers' names, without projections that the score does not use."""
    found = {}
    for key, value in state.items():
        if not key.startswith(UNUSED):
            for pattern, new in RENAMES:
                key = re.sub(pattern, new, key)
            found[key] = value
    return found


class ImageRewardModel(nn.Module):
    """Image encoder, text encoder and head; `state` (under transformers' names) gives the sizes."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        width, _, patch, _ = state["vision.embeddings.patch_embedding.weight"].shape
        vocabulary, text_width = state["text.embeddings.word_embeddings.weight"].shape
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_layers(state, "vision.encoder.layers."),
                num_attention_heads=width // HEAD_WIDTH,
                image_size=SIDE,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary,
                hidden_size=text_width,
                encoder_hidden_size=width,
                intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_layers(state, "text.encoder.layer."),
                num_attention_heads=text_width // HEAD_WIDTH,
                max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[0],
                layer_norm_eps=1e-12,
            ),
            add_pooling_layer=False,
        )
        self.head = linear_head(text_width, (1024, 128, 64, 16, 1), (0.2, 0.2, 0.1))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the score, float32 [B], of pixels [B, 3, 224, 224] and token ids [B, L]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        everything = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everything
        ).last_hidden_state
        return (self.head(read[:, 0].float())[:, 0] - MEAN) / STD


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


class ImageReward(TokenizedReward):
    """About standard normal over its training images, typically -3 to 2. Prompts are cut at 35 tokens, as in the
    original.

    weights: a local `ImageReward.pt`, or its folder. tokenizer: a local copy of bert-base-uncased.
    """

    name = "imagereward"
    columns = ("imagereward",)
    range = (-float("inf"), float("inf"))
    usual = "-3 to 2"
    licence = "Apache-2.0"
    weights = "THUDM/ImageReward"
    size = "1.8 GB"
    source = "arXiv 2304.05977"
    repo = "THUDM/ImageReward"
    file = "ImageReward.pt"
    longest = TOKENS
    # The original resizes before it converts to RGB, so it interpolates a palette image on palette indices.
    preprocessing = "RGB, shorter side to 224 bicubic on 8 bits, centre crop, CLIP normalisation"

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer."""
        return fetch(self.name, TOKENIZER, None, "main", self.local_tokenizer, "tokenizer", SMALL_FILES)

    def weights_id(self) -> str:
        return f"{super().weights_id()}, tokenizer {fingerprint(self.tokenizer_path)}"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded at first use."""
        if self._tokenizer is None:
            from transformers import BertTokenizer

            self._tokenizer = load_part(BertTokenizer, self.tokenizer_path, f"reward {self.name}")
        return self._tokenizer

    def lengths(self, prompts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(prompts, verbose=False)["input_ids"]]

    def build(self) -> nn.Module:

        path = self.path
        state = renamed(load_state(path))
        with without_memory():
            model = ImageRewardModel(state)
        fill_empty(model, state, path, self.name, self.dtype, self.device, exact="head.")
        return model

    def prepare(self, image: Image.Image) -> Tensor:
        return normalise(crop_square(image, SIDE, "round"))

    def prepare_tensors(self, pixels: Tensor) -> Tensor:
        return normalise(crop_square_tensor(pixels, SIDE, "round"))

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        network = self.network
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        scores: Tensor = network(
            pixels.to(self.dtype), tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        )
        return scores
