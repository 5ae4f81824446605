"""How many prompts are longer than a text encoder reads, and no warning of a library for each of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WARNINGS = (
    "part of your input was truncated because",
    "Token indices sequence length is longer than",
    "negative_prompt is passed but classifier-free guidance is not enabled",
)
"""What diffusers' pipelines and transformers' tokenizers say of every long prompt, and of every prompt drawn unguided."""


class _NoTruncation(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in WARNINGS)


def hide_truncation_warnings() -> None:
    """Keep the libraries from printing a warning for each long prompt; `cut_lines` counts them in one line."""
    for library in ("diffusers", "transformers"):
        for handler in logging.getLogger(library).handlers:
            if not any(isinstance(one, _NoTruncation) for one in handler.filters):
                handler.addFilter(_NoTruncation())


def count_longer(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], longest: int) -> int:
    """Return how many distinct prompts have more than `longest` tokens, beginning and end included."""
    unique = list(dict.fromkeys(prompts))
    if not unique:
        return 0
    encoded: list[list[int]] = tokenizer(unique, verbose=False)["input_ids"]
    return sum(len(ids) > longest for ids in encoded)
