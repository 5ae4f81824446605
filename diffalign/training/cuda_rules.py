"""A CUDA step without CUDA: torch's rules for that device on tensors that have shapes and no contents.

The step runs on the meta device. Attention counts as torch's fused kernels keep it, and autocast as CUDA's rules have it.
Prediction of memory (`memory.py`) and the count of a step's cost (`benchmarks/step_cost.py`) rest on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffalign.pipelines import Backbone
from diffalign.pipelines.checkpointing import checkpoint_function
from diffalign.pipelines.lean_lora import meta_autocast

Output = TypeVar("Output")
FLASH = torch.ops.aten._scaled_dot_product_flash_attention


class LiveBytes(TorchDispatchMode):
    """A count of the bytes of storages that operators made and that are still alive: `now`, and at most, `peak`.

    It works on any device, the meta device included. What was there before the block is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        self._seen[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        # torch keeps the Python object of a storage alive as long as the storage itself.
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._seen.pop(key)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these: they belong to the parts that are known, and operators that write into them make nothing new."""
        for tensor in tensors:
            self._seen.setdefault(tensor.untyped_storage()._cdata, 0)


class _RMSNorm(torch.autograd.Function):
    """CUDA's fused norm in shapes: one kernel forward, which keeps its input and one float32 a row, and one backward.

    The context is typed Any, since autograd lets a function put attributes of its own on it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        ctx.trained = weight if weight is not None and weight.requires_grad else None
        return x * (x if weight is None else weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        trained = None if ctx.trained is None else torch.empty_like(ctx.trained)
        return gradients[0] * ctx.saved_tensors[0], trained


class CudaRules(TorchFunctionMode):
    """CUDA's rules on the meta device: fused attention, and with `autocast` the casts that torch.autocast makes.

    autocast: the 16-bit type of matrix products and convolutions, None without autocast. Copies of float32 weights are
    kept until `forget`, as autocast's cache keeps them to the end of the forward pass.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self._copies: dict[int, Tensor] = {}
        self._keeps = True
        self._low: set[Callable[..., object]] = {
            F.linear, F.conv2d, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm,
            torch.baddbmm, torch.addmm, F.scaled_dot_product_attention,
        }  # fmt: skip
        self._full: set[Callable[..., object]] = {
            F.layer_norm, F.group_norm, F.rms_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss,
            torch.exp, Tensor.exp, torch.pow, Tensor.pow, torch.rsqrt, Tensor.rsqrt, torch.sum, Tensor.sum,
        }  # fmt: skip

    def __enter__(self) -> Self:
        self._before = meta_autocast.set(self.autocast is not None)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        meta_autocast.reset(self._before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and (func in self._low or func in self._full):
            to: Callable[[Any], Any] = self._lowered if func in self._low else _widened
            args, kwargs = tree_map(to, args), tree_map(to, kwargs)
        if func is F.scaled_dot_product_attention:
            # diffusers passes them by place in some families and by name in others.
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            # One operator, so that modes of operators see it as they see a GPU's: inputs, output and one float32 a query
            # are kept, and the matrix of all pairs never exists.
            return FLASH(given["query"], given["key"], given["value"])[0]
        if func is F.rms_norm:
            x, _, weight, *_ = (*args, None) if "weight" not in kwargs else (*args, kwargs["weight"])
            if weight is None or weight.dtype == x.dtype:  # others are computed step by step on CUDA, too
                return _RMSNorm.apply(x, weight)
        return func(*args, **kwargs)

    def forget(self) -> None:
        """End the forward pass: copies live as long as the graph needs them, and new ones are not kept."""
        self._copies.clear()
        self._keeps = False

    def checkpoint(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Return a checkpoint function that also has these rules when backward repeats a block, where no mode reaches."""

        def block(function: Callable[..., Output], *inputs: object, **named: object) -> Output:
            def ruled(*inputs: object, **named: object) -> Output:
                with nullcontext() if self._keeps else CudaRules(self.autocast):
                    return function(*inputs, **named)

            output: Output = own(ruled, *inputs, **named)
            return output

        return block

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return value
        if value.dtype == self.autocast:
            return value
        if isinstance(value, nn.Parameter) and value.requires_grad:
            copy = self._copies[id(value)] if id(value) in self._copies else value.to(self.autocast)
            if self._keeps:
                self._copies[id(value)] = copy
            return copy
        return value.to(self.autocast)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def step_on_meta(
    backbone: Backbone,
    latents: tuple[int, ...],
    conditioning: dict[str, Tensor],
    *,
    reference: bool,
    autocast: torch.dtype | None,
    phase: Callable[[str], None] = lambda _: None,
) -> None:
    """Run forward and backward of one micro-batch: reference, policy, the mean of its squared error, backward.

    The backbone is on the meta device; latents [N, C, h, w] is a shape, conditioning of one prompt. `phase` is called with
    the name of each phase when it ends: reference, policy, backward. Modes of the caller see every operator.
    """
    noisy = torch.empty(latents, device="meta")
    times = torch.empty(latents[0], device="meta")
    repeated = {name: value.expand(latents[0], *value.shape[1:]).to("meta") for name, value in conditioning.items()}
    trunk: Any = backbone.trunk  # diffusers' models carry methods that nn.Module does not declare
    rules = CudaRules(autocast)
    if backbone.checkpointing:
        own = checkpoint_function(trunk, backbone.checkpointing)
        trunk.enable_gradient_checkpointing(rules.checkpoint(own))
    with rules:
        kept = None
        if reference:
            with torch.no_grad(), backbone.role("reference"):
                kept = backbone.predict(noisy, times, repeated)
            phase("reference")
        with backbone.role("policy"):
            error = (backbone.predict(noisy, times, repeated) - noisy).square().mean()
        del kept
    phase("policy")
    rules.forget()
    error.backward()
    phase("backward")
