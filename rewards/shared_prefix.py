"""Run image and question through a judge once for all dimensions: each rubric continues from the cached keys and
values.

An image is most of the tokens, so four dimensions cost little more than one. The numbers are those of the unshared form
to about 1e-5 in float32. It works for models that place images as Qwen2-VL does (`get_rope_index`: Qwen2-VL, 2.5-VL,
3-VL, 3.5); others, and models with linear attention whose gradient is wanted (their cache is overwritten in place), use
the unshared form.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class ChatJudge(Protocol):
    """What is needed of a judge, whose methods explain themselves in `judge.py`."""

    model: PreTrainedModel

    @property
    def device(self) -> torch.device: ...

    def chat(self, prompt: str, dimension: str) -> tuple[str, str]: ...

    def encode(self, images: Sequence[Image.Image] | Tensor, heads: Sequence[str]) -> dict[str, Tensor]: ...

    def tail(self, text: str) -> list[int]: ...

    def closed(self, logits: Tensor) -> Tensor: ...


def shareable(judge: ChatJudge) -> bool:
    """Return whether this model's prefix can be shared, with a gradient if one is being recorded."""
    inner = getattr(judge.model, "model", None)
    if not hasattr(inner, "get_rope_index"):
        return False
    kinds = judge.model.config.get_text_config().to_dict().get("layer_types") or []
    return not (torch.is_grad_enabled() and any("linear" in str(kind) for kind in kinds))


def shared_logits(
    judge: ChatJudge, images: Sequence[Image.Image] | Tensor, prompts: Sequence[str], names: Sequence[str]
) -> Tensor | None:
    """Return float32 [B, dimensions, labels]; None if the chat template does not write the question before the rubric."""
    from transformers import DynamicCache

    chats = [[judge.chat(prompt, name) for name in names] for prompt in prompts]
    if any(len({head for head, _ in row}) > 1 for row in chats):
        return None
    batch = judge.encode(images, [row[0][0] for row in chats])
    cache = DynamicCache(config=judge.model.config.get_text_config())
    takes = "cache" if "cache" in inspect.signature(judge.model.forward).parameters else "past_key_values"
    judge.model(**batch, **{takes: cache}, use_cache=True, logits_to_keep=1)
    mask = batch["attention_mask"]
    positions, _ = judge.model.model.get_rope_index(
        batch["input_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=mask,
        mm_token_type_ids=batch["mm_token_type_ids"],
    )
    # Text continues after the furthest position in any of the three directions; padding has low positions.
    start = positions.masked_fill(mask[None] == 0, -1).amax((0, 2))
    found = []
    for n in range(len(names)):
        ids = torch.tensor([judge.tail(row[n][1]) for row in chats], device=judge.device)
        places = start[:, None] + 1 + torch.arange(ids.shape[1], device=judge.device)
        out = judge.model(
            input_ids=ids,
            attention_mask=torch.cat([mask, torch.ones_like(ids)], 1),
            position_ids=places.expand(3, *ids.shape),
            **{takes: branch(cache)},
            use_cache=True,
            logits_to_keep=1,
        )
        found.append(judge.closed(out.logits[:, -1]))
    return torch.stack(found, 1)


def branch(cache: Cache) -> Cache:
    """Return a cache that continues from this one and leaves it unchanged.

    Keys and values are replaced, not overwritten, as they grow, so they need no copy, and the gradient flows into them.
    The states of linear attention are overwritten, so these are copied.
    """
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in found.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                setattr(layer, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()})
    return found
