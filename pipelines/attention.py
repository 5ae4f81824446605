"""Choose the attention kernel of a UNet or a transformer, in a way that takes effect.

`model.set_attention_backend()` of diffusers is a silent no-op on UNets and SD3: their processors do not go through its
dispatcher, and the call changes a process-wide default instead. So those processors are exchanged here. Those of newer models
(FLUX, Qwen-Image, Z-Image) do go through the dispatcher and are given their kernel one by one, which spares other models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.kernels import avoid_cudnn_attention
from diffalign.packages import not_installed
from diffalign.pipelines.lean_blocks import lean_attention

ATTENTION = ("sdpa", "xformers", "flash", "cudnn")
# The same in the words of diffusers' dispatcher.
DISPATCHED = {"sdpa": "native", "xformers": "xformers", "flash": "_native_flash", "cudnn": "native"}
# Processors of diffusers that are exchanged: plain attention of UNets, joint attention of SD3.
EXCHANGED = ("AttnProcessor2_0", "LeanAttnProcessor2_0", "JointAttnProcessor2_0")


@dataclass
class CudnnRule:
    """Where `attention: cudnn` uses cuDNN's kernel. `allowed` is cleared where its gradients turn out to be wrong."""

    allowed: bool = True

    def fits(self, queries: int, keys: int, width: int, dtype: torch.dtype) -> bool:
        """Return whether no fault of cuDNN's backward is known for these lengths, head width and number type.

        Known ones: lengths that are no multiples of its tiles of 128 (github.com/pytorch/pytorch/issues/196678, #169849), and
        a FLUX with heads of 16 (`kernels.avoid_cudnn_attention`).
        """
        whole = queries % 128 == 0 and keys % 128 == 0
        return self.allowed and whole and width in (64, 128) and dtype == torch.bfloat16


def set_attention(model: nn.Module, kind: str) -> CudnnRule | None:
    """Set the kernel of every attention processor of a diffusers model, in place.

    `sdpa`: torch picks the kernel, but not cuDNN's. `flash`: torch's flash kernel or an error, never a silent fall-back.
    `xformers`: its memory-efficient attention. `cudnn`: cuDNN's kernel where the rule that is returned allows it, `sdpa`
    elsewhere and for models of the dispatcher. Raises DiffalignError for an unknown kind, where xformers cannot run, and for
    a processor whose kernel cannot be chosen, except under `sdpa`.
    """
    if kind not in ATTENTION:
        raise DiffalignError(f"model.attention: unknown kind '{kind}'; choose one of {', '.join(ATTENTION)}")
    if kind == "xformers":
        _require_xformers()
    avoid_cudnn_attention()
    rule = CudnnRule() if kind == "cudnn" else None
    plain, joint = _processors(kind, rule)
    # Not `model.attn_processors`, which some models (Z-Image) lack.
    for layer in _attention_layers(model):
        processor = layer.processor
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = DISPATCHED[kind]
        elif type(processor).__name__ in EXCHANGED:
            layer.set_processor(joint() if "Joint" in type(processor).__name__ else plain())
        elif kind != "sdpa":
            raise DiffalignError(
                f"model.attention: {type(processor).__name__} of this model has one kernel only; use attention: sdpa"
            )
    return rule


def _attention_layers(model: nn.Module) -> list[Any]:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    return [layer for layer in model.modules() if isinstance(layer, Attention | AttentionModuleMixin)]


def _require_xformers() -> None:
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise not_installed("xformers", "model.attention", "use attention: sdpa") from error
    if not torch.cuda.is_available():
        raise DiffalignError("model.attention: xformers needs a CUDA device and none is available; use attention: sdpa")
    if not _xformers_computes():
        raise DiffalignError(
            "model.attention: the installed xformers has no kernel for this torch and GPU (`python -m xformers.info` says what "
            "it was built for); use attention: sdpa, which picks among torch's own fused kernels"
        )


@functools.cache
def _xformers_computes() -> bool:
    """Try xformers: a wheel for another torch imports with a warning, and every call of it fails."""
    from xformers.ops import memory_efficient_attention

    small = torch.zeros(1, 32, 1, 64, dtype=torch.float16, device="cuda")
    try:
        memory_efficient_attention(small, small, small)
    except NotImplementedError:  # how xformers says that none of its kernels was built
        return False
    return True


def _processors(kind: str, rule: CudnnRule | None) -> tuple[type, type]:
    """Return processor classes for plain attention (UNet) and for joint attention (SD3)."""
    from diffusers.models.attention_processor import (
        AttnProcessor2_0,
        JointAttnProcessor2_0,
        XFormersAttnProcessor,
        XFormersJointAttnProcessor,
    )

    if kind == "xformers":
        return XFormersAttnProcessor, XFormersJointAttnProcessor
    if kind == "flash":
        return _flash(AttnProcessor2_0), _flash(JointAttnProcessor2_0)
    if rule is not None:
        return _cudnn(lean_attention(), rule), _cudnn(JointAttnProcessor2_0, rule)
    return lean_attention(), JointAttnProcessor2_0


def _cudnn(processor: Any, rule: CudnnRule) -> type:
    """Return a subclass that prefers cuDNN's kernel while it runs, where the rule allows it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    class CudnnAttention(processor):
        @functools.wraps(processor.__call__)
        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            *rest: Any,
            **named: Any,
        ) -> Any:
            inputs = (attn, hidden_states, encoder_hidden_states, attention_mask, *rest)
            length = hidden_states.shape[1]
            other = length if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            joint = "Joint" in processor.__name__ and encoder_hidden_states is not None
            queries, keys = (length + other, length + other) if joint else (length, other)
            kind, dtype = hidden_states.device.type, hidden_states.dtype
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
            plain = attention_mask is None and hidden_states.ndim == 3
            if not (plain and rule.fits(queries, keys, attn.inner_dim // attn.heads, dtype)):
                return super().__call__(*inputs, **named)
            with sdpa_kernel(order, set_priority=True):
                return super().__call__(*inputs, **named)

    CudnnAttention.__name__ = CudnnAttention.__qualname__ = f"Cudnn{processor.__name__}"
    return CudnnAttention


@functools.cache
def _flash(processor: Any) -> type:
    """Return a subclass that allows only the flash kernel while it runs.

    The restriction sits in the processor rather than around the model, because gradient checkpointing runs the
    processor again during backward, outside any context the caller held open.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class FlashAttention(processor):
        # diffusers reads the signature of __call__ to decide which arguments to pass; `wraps` hands it on.
        @functools.wraps(processor.__call__)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                try:
                    return super().__call__(*arguments, **options)
                except RuntimeError as error:
                    if "No available kernel" not in str(error):
                        raise
                    raise DiffalignError(
                        "model.attention: torch's flash kernel cannot run here (on CUDA it needs bfloat16 or float16); "
                        "set train.mixed_precision: bf16 or attention: sdpa"
                    ) from error

    FlashAttention.__name__ = FlashAttention.__qualname__ = f"Flash{processor.__name__}"
    return FlashAttention
