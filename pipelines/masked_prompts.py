"""Prompts that come with a mask, padded to a fixed number of tokens: what Sana's pipeline has from PixArt's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from diffalign.pipelines.base import TransformerBackbone
from diffalign.pipelines.options import MaskedPromptOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 300
"""The pipelines' own number of tokens of a prompt."""


class MaskedPrompts(TransformerBackbone):
    """Conditioning: prompt_embeds [B, L, D] and prompt_attention_mask [B, L]."""

    conditioning: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_attention_mask")
    encoder_outputs: ClassVar[tuple[str, ...]] = (
        "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask",
    )  # fmt: skip
    prompt_masks: ClassVar[tuple[str, ...]] = ("prompt_attention_mask",)

    options: MaskedPromptOptions

    def prompt_tokens(self) -> int:
        return self.options.max_sequence_length or TOKENS

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        return [(self.pipeline.tokenizer, self.prompt_tokens())]

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        length = self.prompt_tokens()
        return {"prompt_embeds": (length, self._model.config.caption_channels), "prompt_attention_mask": (length,)}

    def encoding_options(self) -> dict[str, object]:
        return {"max_sequence_length": self.prompt_tokens()}

    def negative_prompts(self, negative: str | None, count: int) -> list[str]:
        return [negative or ""] * count

    def encode_guided_prompts(self, prompts: list[str], negatives: list[str] | None) -> dict[str, Tensor]:
        return super().encode_guided_prompts(prompts, negatives or [""] * len(prompts))

    def pipeline_inputs(self, encoded: dict[str, Tensor]) -> dict[str, object]:
        return {**encoded, "negative_prompt": None}  # its default is a text, which cannot go beside embeddings

    def sampling_options(self) -> dict[str, object]:
        return {"use_resolution_binning": False, **self.encoding_options()}

    def call_options(self) -> dict[str, object]:
        length = self.options.max_sequence_length
        return {"use_resolution_binning": False, **({} if length is None else {"max_sequence_length": length})}
