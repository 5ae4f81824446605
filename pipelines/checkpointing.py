"""Gradient checkpointing: blocks keep their inputs and compute the rest again in the backward pass.

Unlike diffusers' own, it saves no state of random generators where no dropout is active, which costs host time at every
block and bars CUDA graphs. It can keep the outputs of attention, which are small beside what they cost to compute again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from diffalign.pipelines.low_adapters import current, installed

Output = TypeVar("Output")
Checkpointing = bool | Literal["attention"]
"""False: keep everything. True: keep the blocks' inputs. "attention": keep the outputs of attention too."""

ATEN = torch.ops.aten
KEPT = [
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]


def draws_dropout(trunk: nn.Module) -> bool:
    """Return whether a forward of the trunk in train mode draws random numbers."""
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in trunk.modules())


def checkpoint_function(trunk: nn.Module, kind: Checkpointing) -> Callable[..., Any]:
    """Return what diffusers calls in the place of a block, for its `enable_gradient_checkpointing`.

    The copies of adapters that the forward computes with are those of its repetition, too.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws_dropout(trunk)}
    if kind == "attention":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(KEPT)

    def block(function: Callable[..., Output], *inputs: Any, **named: Any) -> Output:
        low = current(trunk)

        def again(*inputs: Any, **named: Any) -> Output:
            if current(trunk) is low:
                return function(*inputs, **named)
            with installed(trunk, low):
                return function(*inputs, **named)

        found: Output = checkpoint(again, *inputs, **options, **named)
        return found

    return block
