"""peft's LoRA layers with what a plain adapter needs and no more.

peft's forward serves every variant of LoRA: it loops over adapters, calls two modules and a dropout, casts the input to the
adapter's float32, which autocast casts back, and multiplies by alpha / rank, also by 1. `make_lean` gives layers a forward
with the same numbers, to the last bit, without that. Whatever is not plain falls back to peft's own: dropout, variants such
as DoRA, several active adapters, a bias in the adapter, merged weights, further arguments.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as PeftLinear


meta_autocast: ContextVar[bool] = ContextVar("meta_autocast", default=False)
"""Whether autocast is imitated on the meta device, which torch's does not know."""


@functools.cache
def lean_class() -> type[PeftLinear]:
    """Return the class of lean layers; importing peft takes seconds."""
    from peft.tuners.lora import Linear

    class LeanLinear(Linear):
        """A linear layer with LoRA. `low` holds the active adapter's weights in the type of the input, if they were made."""

        low: tuple[Tensor, Tensor] | None = None

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts = self._modules  # without nn.Module's search for an attribute
            if args or kwargs or self.merged_adapters:
                out: Tensor = super().forward(x, *args, **kwargs)
                return out
            if self._disable_adapters:
                return _base(parts["base_layer"], x)
            if self.low is not None:
                return _with_low(_base(parts["base_layer"], x), x, *self.low)
            name = plain_adapter(self)
            if name is None:
                return super().forward(x)
            down, up = adapter_weights(self, name)
            # In one type with the input, or autocast sees to it.
            if x.dtype != down.dtype and not _autocasts(x.device.type):
                return super().forward(x)
            # The base first, as peft has it: backward sums the gradients of x in the opposite order.
            base = _base(parts["base_layer"], x)
            added = F.linear(F.linear(x, down), up)
            scale = self.scaling[name]
            return base + (added if scale == 1 else added * scale)

    return LeanLinear


def _autocasts(kind: str) -> bool:
    return meta_autocast.get() if kind == "meta" else torch.is_autocast_enabled(kind)


def _base(layer: Any, x: Tensor) -> Tensor:
    """Call the frozen layer; a plain one without going through its hooks, of which it has none."""
    if type(layer) is nn.Linear and not layer._forward_pre_hooks and not layer._forward_hooks:
        weights: dict[str, Any] = layer._parameters
        return F.linear(x, weights["weight"], weights["bias"])
    out: Tensor = layer(x)
    return out


def _with_low(base: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Add the adapter's product in the kernel that computes it. alpha / rank lies in `up`."""
    added = torch.addmm(base.flatten(0, -2), F.linear(x, down).flatten(0, -2), up.t())
    return added.view(base.shape)


def plain_adapter(layer: Any) -> str | None:
    """Return the name of the one active adapter of a layer, or None where peft's forward must run."""
    active = layer._active_adapter
    if not isinstance(active, str):
        if len(active) != 1:
            return None
        (active,) = active
    parts = layer._modules
    plain = (
        active in parts["lora_A"]._modules
        and active not in layer.lora_variant
        and not layer.lora_bias.get(active)
        and type(parts["lora_dropout"]._modules[active]) is nn.Identity
    )
    return active if plain else None


def adapter_weights(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] of a layer's adapter."""
    parts = layer._modules
    down: Tensor = parts["lora_A"]._modules[name]._parameters["weight"]
    up: Tensor = parts["lora_B"]._modules[name]._parameters["weight"]
    return down, up


def make_lean(trunk: nn.Module) -> None:
    """Give peft's plain LoRA layers of a trunk the lean forward, in place; names and weights stay as they are."""
    from peft.tuners.lora import Linear

    for module in trunk.modules():
        if type(module) is Linear:
            module.__class__ = lean_class()


def use_peft_forward(trunk: nn.Module) -> None:
    """Undo `make_lean`, to compare."""
    from peft.tuners.lora import Linear

    for module in trunk.modules():
        if type(module) is lean_class():
            module.__class__ = Linear
