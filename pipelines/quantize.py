"""Keep the frozen linear layers of a trunk in 8 or 4 bits, for a LoRA on top.

`int8`: a signed byte a weight and one scale for each output, both plain tensors: no package, any device. `nf4`: the 4-bit
normal float of Dettmers et al. 2023 (arXiv:2305.14314) with double quantisation, by bitsandbytes. Only the repeated blocks'
layers are quantised; embeddings, norms, convolutions and the last layer keep their type. Policy and reference run through
the same quantised layers, so a fresh LoRA still leaves a margin of exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.packages import require

QUANTIZE = ("none", "int8", "nf4")
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256
"""How many 4-bit weights share a scale, and how many of these scales another one (bitsandbytes' defaults)."""


class _Int8Product(torch.autograd.Function):
    """x W^T with W unpacked for the time of the product, forward and again backward: autograd would keep it in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        gradient = gradients[0]
        return gradient @ (weight.to(gradient.dtype) * scale.to(gradient.dtype)), None, None


class Int8Linear(nn.Linear):
    """A frozen linear layer: weight int8 [out, in], scale [out, 1], largest magnitude of a row = 127."""

    scale: Tensor

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """Quantise a layer: the same one within half a step of its rows' scales."""
        new = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        new.bias = layer.bias
        wide = layer.weight.detach().float()
        scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        new.weight = nn.Parameter((wide / scale).round().to(torch.int8), requires_grad=False)
        new.register_buffer("scale", scale.to(layer.weight.dtype))
        return new

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        # A custom function is not cast by autocast, so it is done here.
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        else:
            x = x.to(self.scale.dtype)
        out: Tensor = _Int8Product.apply(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def _cast_as_autocast_would(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Cast the input of a bitsandbytes layer, which gives its output the type of its input.

    Norms come out of autocast in float32, so without this all that follows them would be float32 too, and activations twice
    as large.
    """
    x, *rest = inputs
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return (x.to(torch.get_autocast_dtype(kind)), *rest)


def _nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = layer.weight.dtype
    biased = layer.bias is not None
    new = Linear4bit(
        layer.in_features, layer.out_features, biased, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    new.bias = layer.bias
    # On some CPUs it would repack a layer in place for a kernel of lower precision: policy and reference would disagree.
    new.support_avx512bf16_for_cpu = False
    moved: nn.Module = new.to(device)  # the move is what quantises
    moved.register_forward_pre_hook(_cast_as_autocast_would)
    return moved


class Linear4bit(nn.Linear):
    """The shapes of bitsandbytes' layer of this name on the meta device, where that package does not run."""

    compute_dtype: torch.dtype

    @classmethod
    def of(cls, layer: nn.Linear) -> Linear4bit:
        """Return the shapes of a layer in 4 bits: two weights a byte, 8-bit scales for 64 of them, and scales of those."""
        new = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        new.bias, new.compute_dtype = layer.bias, layer.weight.dtype
        weights = layer.weight.numel()
        scales = -(-weights // NF4_BLOCK)

        def state(count: int, dtype: torch.dtype, codes: int, below: SimpleNamespace | None) -> SimpleNamespace:
            absmax, code = torch.empty(count, dtype=dtype, device="meta"), torch.empty(codes, device="meta")
            return SimpleNamespace(absmax=absmax, code=code, nested=below is not None, state2=below)

        outer = state(-(-scales // NF4_OUTER_BLOCK), torch.float32, 256, None)
        packed = torch.empty(-(-weights // 2), 1, dtype=torch.uint8, device="meta")
        new.weight = nn.Parameter(packed, requires_grad=False)
        vars(new.weight)["quant_state"] = inner = state(scales, torch.uint8, 16, outer)
        inner.shape = layer.weight.shape
        return new


def quantize_blocks(trunk: nn.Module, kind: str, blocks: Sequence[str], device: torch.device) -> None:
    """Replace the linear layers inside modules of these class names, one by one, so that little is held twice.

    Raises DiffalignError for an unknown kind, and for nf4 without bitsandbytes. On the meta device nf4 needs it not.
    """
    if kind not in QUANTIZE:
        raise DiffalignError(f"model.quantize: unknown kind '{kind}'; choose one of {', '.join(QUANTIZE)}")
    if kind == "none":
        return
    shapes = kind == "nf4" and device.type == "meta"
    if kind == "nf4" and not shapes:
        require("bitsandbytes", "model.quantize=nf4", "use int8")
    for block in [module for module in trunk.modules() if type(module).__name__ in blocks]:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    new: nn.Module
                    if kind == "int8":
                        new = Int8Linear.of(layer)
                    else:
                        new = Linear4bit.of(layer) if shapes else _nf4(layer, device)
                    parent.register_module(name, new.requires_grad_(False))


def is_quantized(trunk: nn.Module) -> bool:
    """Return whether some weights are stored as whole numbers."""
    return any(not p.is_floating_point() for p in trunk.parameters())


def number_of_weights(trunk: nn.Module) -> int:
    """Count the weights of the frozen trunk, however many bits each takes."""
    total = 0
    for name, parameter in trunk.named_parameters():
        if ".lora_" not in name:
            state = vars(parameter).get("quant_state")
            total += parameter.numel() if state is None else int(torch.Size(state.shape).numel())
    return total


def as_shapes(trunk: nn.Module) -> None:
    """Replace 4-bit layers by 8-bit ones on the meta device, where bitsandbytes does not run.

    Forward and backward of both unpack one layer at a time, so their activations are alike.
    """
    for parent in list(trunk.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ == "Linear4bit":
                bits: Any = layer
                plain = nn.Linear(
                    bits.in_features, bits.out_features, bits.bias is not None, device="meta", dtype=bits.compute_dtype
                )
                parent.register_module(name, Int8Linear.of(plain).requires_grad_(False))
