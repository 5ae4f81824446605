"""Leaner parts of blocks against diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.pipelines.lean_blocks import fuse_norms, lean_attention


def attention(**options: Any) -> Any:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    return Attention(query_dim=8, heads=2, dim_head=4, **options).train()


def run(layer: Any, processor: Any, *inputs: Any, **named: Any) -> list[Tensor]:
    """The output, and gradients of the inputs and of the layer's weights."""
    layer.set_processor(processor)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = layer(*leaves, **named)
    out.square().sum().backward()
    found = [out.detach(), *(x.grad for x in leaves if x.grad is not None)]
    found += [p.grad for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("options", "inputs", "named"),
    [
        ({}, [(2, 5, 8)], {}),
        ({"cross_attention_dim": 6}, [(2, 5, 8), (2, 3, 6)], {}),
        ({"rescale_output_factor": 2.0}, [(2, 5, 8)], {}),
        ({"residual_connection": True}, [(2, 5, 8)], {}),
        ({"qk_norm": "layer_norm"}, [(2, 5, 8)], {}),
        ({"cross_attention_dim": 6, "cross_attention_norm": "layer_norm"}, [(2, 5, 8), (2, 3, 6)], {}),
        ({"norm_num_groups": 2}, [(2, 8, 3, 3)], {}),
        ({}, [(2, 5, 8)], {"attention_mask": torch.tensor([[0.0, 0.0, -1e4, 0.0, 0.0]]).expand(2, 5)}),
    ],
    ids=["self", "cross", "rescaled", "residual", "normed", "context normed", "image", "masked"],
)
def test_attention_is_diffusers_to_the_bit(options: dict[str, Any], inputs: list[Any], named: dict[str, Any]) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    layer = attention(**options)
    values = [torch.randn(shape) for shape in inputs]
    ours, theirs = (run(layer, kind(), *values, **named) for kind in (lean_attention(), AttnProcessor2_0))
    assert len(ours) == len(theirs) > 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_fused_norm_rounds_once() -> None:
    """In 16 bits within one rounding of the exact norm; in float32, and with weights of another type, diffusers' bits."""
    from diffusers.models.normalization import RMSNorm

    torch.manual_seed(0)
    x = torch.randn(64, 32)
    for dtype, weights in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        norm = nn.Sequential(RMSNorm(32, eps=1e-6))
        norm[0].weight.data.normal_()
        norm = norm.to(weights).requires_grad_(False)
        before = norm(x.to(dtype))
        fuse_norms(norm)
        after = norm(x.to(dtype))
        low, weight = x.to(dtype).double(), norm[0].weight.double()
        exact = low * (low.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
        assert after.dtype == before.dtype
        if dtype == torch.float32:
            assert torch.equal(after, before)
        else:
            assert torch.equal(after, exact.to(dtype)) or float(((after - exact) / exact).abs().max()) < 2**-8
            assert float(((before - exact) / exact).abs().max()) > float(((after - exact) / exact).abs().max())
