"""16-bit copies of float32 adapter weights for one forward pass and its backward.

The optimiser's weights stay float32. Autocast would cast each matrix on its way into each product; here all of an adapter are
copied in one kernel, and the gradients come back to the float32 weights in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.pipelines.adapters import adapter_layers
from diffalign.pipelines.lean_lora import adapter_weights, lean_class, plain_adapter

Pair = tuple[Tensor, Tensor]
Installed = list[tuple[nn.Module, Pair]]


class _Lowered(torch.autograd.Function):
    """Matrices A and scaled matrices B in another type: forward rounds once, backward returns float32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scales: Sequence[float], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scales = scales
        made = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(made, _scaled(weights, scales))
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        there = [i for i, gradient in enumerate(gradients) if gradient is not None]
        low = [gradient for gradient in gradients if gradient is not None]
        wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in low]
        if low:
            torch._foreach_copy_(wide, low)
        found: list[Tensor | None] = [None] * len(gradients)
        for i, gradient in zip(there, _scaled(wide, [ctx.scales[i] for i in there]), strict=True):
            found[i] = gradient
        return (None, None, *found)


def _scaled(values: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    """Multiply each tensor by its number; by 1 at no cost."""
    if all(scale == 1 for scale in scales):
        return list(values)
    return list(torch._foreach_mul(list(values), list(scales)))


def lowered(trunk: nn.Module, dtype: torch.dtype) -> Installed:
    """Copy the weights of the adapter that is active in each lean layer; empty where the bare base is.

    alpha / rank is multiplied into B, in float32 and before the rounding. Layers that are not plain are left out, and cast for
    themselves.
    """
    found: list[nn.Module] = []
    weights: list[Tensor] = []
    scales: list[float] = []
    for module in adapter_layers(trunk):
        layer: Any = module
        if type(layer) is not lean_class() or layer._disable_adapters or layer.merged_adapters:
            continue
        name = plain_adapter(layer)
        if name is not None:
            found.append(layer)
            weights += adapter_weights(layer, name)
            scales += [1.0, float(layer.scaling[name])]
    low = _Lowered.apply(dtype, scales, *weights) if found else ()
    return [(layer, (low[2 * i], low[2 * i + 1])) for i, layer in enumerate(found)]


def current(trunk: nn.Module) -> Installed:
    """Return the copies that the trunk computes with now; empty without any."""
    found: Installed = vars(trunk).get("_low_adapters", [])
    return found


@contextmanager
def installed(trunk: nn.Module, pairs: Installed) -> Iterator[None]:
    """Let the trunk's layers compute with these copies inside the block, and without any after it."""
    vars(trunk)["_low_adapters"] = pairs
    for layer, pair in pairs:
        vars(layer)["low"] = pair
    try:
        yield
    finally:
        vars(trunk)["_low_adapters"] = []
        for layer, _ in pairs:
            vars(layer)["low"] = None
