"""Prompts to train on without images: only what the networks are conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from diffalign.pipelines import Backbone
from diffalign.training.protocols import Conditioning

if TYPE_CHECKING:
    from diffalign.data.prompts import PromptRow

ENCODED_AT_ONCE = 32
WAITING_REMEDY = "train.cache_prompts=true shortens it"


class PromptSource:
    """Prompts with their ids, encoded beforehand (`cache`) or as they come up; then the text encoders must stay.

    `unconditional`: what the pipeline itself steers away from under guidance with no negative prompt, [1, ...] each.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[PromptRow], cache: bool) -> None:
        self.backbone, self.prompts = backbone, prompts
        self.ids = [row.prompt_id for row in prompts]
        self.unconditional = backbone.encode_unconditional()
        self._encoded: Conditioning | None = None
        if cache:
            chunks = [self._encode(range(i, self._end(i))) for i in range(0, len(prompts), ENCODED_AT_ONCE)]
            self._encoded = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _end(self, start: int) -> int:
        return min(start + ENCODED_AT_ONCE, len(self.prompts))

    def _encode(self, indices: Sequence[int]) -> Conditioning:
        return self.backbone.encode_prompts([self.prompts[i].prompt for i in indices])

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, indices: Sequence[int]) -> Conditioning:
        """Return the conditioning of these prompts, each [B, ...] on the CPU."""
        if self._encoded is None:
            return self._encode(indices)
        return {name: values[list(indices)] for name, values in self._encoded.items()}
