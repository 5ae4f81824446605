"""Parts of diffusers' blocks without kernels that change nothing, or with one kernel in the place of eight.

A kernel of a large model reads and writes tens of megabytes. diffusers divides every output of a UNet's attention by 1, and
computes the root mean square norm of 16-bit tensors step by step, in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def lean_attention() -> type:
    """Return diffusers' processor for plain attention, which skips what a transformer block of a UNet does not use.

    Numbers are equal to the last bit. Masks, norms, residuals and images [B, C, h, w] are left to diffusers' own.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    class LeanAttention(AttnProcessor2_0):
        # diffusers reads the signature of __call__ to decide which arguments to pass; `wraps` hands it on.
        @functools.wraps(AttnProcessor2_0.__call__)
        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            *rest: Any,
            **named: Any,
        ) -> Tensor:
            extras = (
                attn.spatial_norm,
                attn.group_norm,
                attn.norm_q,
                attn.norm_k,
                attention_mask,
                *rest,
                *named.values(),
            )
            plain = hidden_states.ndim == 3 and attn.rescale_output_factor == 1.0 and all(x is None for x in extras)
            if not plain or attn.residual_connection or (encoder_hidden_states is not None and attn.norm_cross):
                out: Tensor = super().__call__(
                    attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **named
                )
                return out
            source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            layers = ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
            query, key, value = (layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer, x in layers)
            mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            mapped: Tensor = attn.to_out[1](attn.to_out[0](mixed))
            return mapped

    LeanAttention.__name__ = LeanAttention.__qualname__ = "LeanAttnProcessor2_0"
    return LeanAttention


@functools.cache
def fused_norm() -> type[nn.Module]:
    """Return diffusers' RMSNorm with torch's one kernel for 16-bit numbers, which rounds once and not twice."""
    from diffusers.models.normalization import RMSNorm

    class FusedRMSNorm(RMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            weight = self.weight
            half = hidden_states.dtype in (torch.bfloat16, torch.float16)
            if not half or self.bias is not None or (weight is not None and weight.dtype != hidden_states.dtype):
                out: Tensor = super().forward(hidden_states)
                return out
            return F.rms_norm(hidden_states, self.dim, weight, self.eps)

    return FusedRMSNorm


def fuse_norms(trunk: nn.Module) -> None:
    """Let a trunk that computes in 16 bits normalise in one kernel, in place."""
    from diffusers.models.normalization import RMSNorm

    for module in trunk.modules():
        if type(module) is RMSNorm:
            module.__class__ = fused_norm()
