"""Peak memory of a training step, predicted part by part before anything is put on a GPU.

    peak = weights + reference + adapters + optimiser + average + gradients + activations (+ gathered, with train.shard)

All parts but activations follow from counts: bytes of the frozen weights as they are stored; 4 bytes a trained number for its
gradient and for its average; for the optimiser see `optimizer_bytes`. Activations are counted: the step runs on the meta
device, where tensors have shapes and no contents, and what is alive at its fullest moment is summed. Attention counts as
torch's fused kernels keep it, and autocast as CUDA's rules have it. What a CUDA context, cuBLAS's workspaces and the
allocator's rounding take is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from diffalign.config import TrainConfig
from diffalign.pipelines import Backbone
from diffalign.training.preference.policy import build_objective, prepare_policy

Output = TypeVar("Output")
LARGEST = 16
"""Groups in a micro-batch beyond which a GPU is busy anyway."""
BLOCK, SMALL = 256, 4096
"""bitsandbytes' 8-bit states: a float32 scale for BLOCK numbers; tensors smaller than SMALL stay in 32 bits."""


class LiveBytes(TorchDispatchMode):
    """A count of the bytes of storages that operators made and that are still alive: `now`, and at most, `peak`.

    It works on any device, the meta device included. What was there before the block is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


class _Attention(torch.autograd.Function):
    """Shapes of fused attention: inputs, output and one float32 a query are kept; the matrix of all pairs never exists."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


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
        tensor: Any = Tensor
        self._low: set[Any] = {F.linear, F.conv2d, torch.conv2d, torch.matmul, tensor.matmul, torch.bmm, tensor.bmm}
        self._low |= {tensor.__matmul__, torch.baddbmm, torch.addmm, F.scaled_dot_product_attention}
        self._full: set[Any] = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, tensor.softmax, F.mse_loss}
        self._full |= {torch.exp, tensor.exp, torch.pow, tensor.pow, torch.rsqrt, tensor.rsqrt, torch.sum, tensor.sum}
        self._full |= {torch.nn.functional.rms_norm}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and (func in self._low or func in self._full):
            to: Callable[[Any], Any] = self._lowered if func in self._low else _widened
            args, kwargs = tree_map(to, args), tree_map(to, kwargs)
        if func is F.scaled_dot_product_attention:
            # diffusers passes them by place in some families and by name in others.
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            return _Attention.apply(given["query"], given["key"], given["value"])
        return func(*args, **kwargs)

    def forget(self) -> None:
        """End the forward pass: copies live as long as the graph needs them, and new ones are not kept."""
        self._copies.clear()
        self._keeps = False

    def checkpoint(self, function: Callable[..., Output], *inputs: object, **options: Any) -> Output:
        """Checkpoint a function as torch does, under these rules also when backward repeats it (where no mode reaches)."""

        def ruled(*inputs: object, **options: object) -> Output:
            with nullcontext() if self._keeps else CudaRules(self.autocast):
                return function(*inputs, **options)

        output: Output = checkpoint(ruled, *inputs, use_reentrant=False, **options)
        return output

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


def stored_bytes(module: nn.Module | None, wanted: Callable[[str], bool] = lambda _: True) -> int:
    """Return the bytes of a module's parameters and buffers whose names are wanted, with the scales of 4-bit weights."""
    if module is None:
        return 0
    total = 0
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if wanted(name):
            state = vars(value).get("quant_state")  # of bitsandbytes' 4-bit weights
            total += value.nbytes + (_state_bytes(state) if state is not None else 0)
    return total


def _state_bytes(state: Any) -> int:
    """Return the bytes of a 4-bit weight's scales; with double quantisation they are 8-bit numbers with scales of their own."""
    nested = _state_bytes(state.state2) if state.nested else 0
    return int(state.absmax.nbytes) + int(state.code.nbytes) + nested


def optimizer_bytes(name: str, parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes that an optimiser keeps beside the weights, after its first step.

    adamw: two float32 averages a number, and a float32 counter a tensor. adamw8bit: two bytes a number and two float32
    scales for every 256; tensors below 4,096 numbers as adamw without the counter. adafactor: for a tensor of two or more
    dimensions the float32 means over its last and over its last but one, for others one float32 a number.
    """
    total = 0
    for parameter in parameters:
        n, shape = parameter.numel(), parameter.shape
        if name == "adafactor":
            total += 4 * (n if len(shape) < 2 else n // shape[-1] + n // shape[-2])
        elif name == "adamw8bit":
            total += 8 * n if n < SMALL else 2 * n + 2 * 4 * -(-n // BLOCK)
        else:
            total += 8 * n + 4
    return total


def to_meta(backbone: Backbone) -> None:
    """Leave only the shapes of the trunk. The backbone can still predict, without numbers."""
    from diffalign.pipelines.quantize import as_shapes

    as_shapes(backbone.trunk)
    backbone.trunk.to("meta")
    backbone.device = torch.device("meta")


def step_peak(
    backbone: Backbone,
    latents: tuple[int, ...],
    conditioning: dict[str, Tensor],
    *,
    reference: bool,
    autocast: torch.dtype | None,
    micro_batches: int = 1,
) -> tuple[int, int]:
    """Return the bytes at the fullest moment of forward and backward, and how many of them are gradients when all are there.

    Weights and optimiser are not counted. The backbone is on the meta device; latents [N, C, h, w] is a shape, conditioning
    of one prompt. From the second of several micro-batches on, all gradients are there while activations are.
    """
    noisy = torch.empty(latents, device="meta")
    times = torch.empty(latents[0], device="meta")
    repeated = {name: value.expand(latents[0], *value.shape[1:]).to("meta") for name, value in conditioning.items()}
    trained = list(backbone.trainable().values())
    trunk: Any = backbone.trunk  # diffusers' models carry methods that nn.Module does not declare
    with LiveBytes() as live:
        live.ignore([weight for module in backbone.trunks() for weight in module.parameters()])
        for _ in range(min(micro_batches, 2)):
            rules = CudaRules(autocast)
            if trunk.is_gradient_checkpointing:
                trunk.enable_gradient_checkpointing(rules.checkpoint)
            with rules:
                kept = None
                if reference:
                    with torch.no_grad(), backbone.role("reference"):
                        kept = backbone.predict(noisy, times, repeated)
                with backbone.role("policy"):
                    error = (backbone.predict(noisy, times, repeated) - noisy).square().mean()
                del kept
            rules.forget()
            error.backward()
            del error
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    for parameter in trained:
        parameter.grad = None
    return live.peak, gradients


def gathered_bytes(backbone: Backbone) -> int:
    """Return the bytes that fsdp2 gathers during a step.

    Of each trunk the weights outside its blocks, which stay whole, and two blocks (one at work, one on its way); of the
    policy as much again for their gradients.
    """
    total = 0
    for trunk in backbone.trunks():
        blocks = [stored_bytes(m) for m in trunk.modules() if type(m).__name__ in backbone.blocks]
        whole = stored_bytes(trunk) - sum(blocks) + 2 * max(blocks)
        total += 2 * whole if trunk is backbone.trunk else whole
    return total


class MemoryPrediction:
    """What a process of a training run will hold, for steps of any size.

    `backbone` is untuned, on the CPU or on the meta device, and unusable afterwards. conditioning: of one prompt. processes:
    over how many the weights are cut where train.shard is fsdp2. `trainable`: the numbers that are trained.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        conditioning: dict[str, Tensor],
        *,
        cuda: bool,
        processes: int = 1,
    ) -> None:
        self.config, self.backbone, self.conditioning = config, backbone, conditioning
        self.processes = processes
        self.objective = build_objective(config.objective)
        self.frozen = stored_bytes(backbone.trunk)
        to_meta(backbone)
        # Whole, uncompiled and from no file: none of it changes a shape.
        plain = {
            "model": config.model.model_copy(update={"compile": False}),
            "train": config.train.model_copy(update={"shard": "none"}),
            "tune": config.tune.model_copy(update={"init": None, "reference": "init"}),
        }
        prepare_policy(config.model_copy(update=plain), backbone, self.objective)
        self.trained = list(backbone.trainable().values())
        self.trainable = sum(p.numel() for p in self.trained)
        precision = config.train.mixed_precision
        if precision == "auto":
            precision = "bf16" if cuda else "no"
        self.autocast = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def parts(self, latents: tuple[int, ...], micro_batch: int) -> dict[str, int]:
        """Return bytes by part, `peak` their sum, and `host` what the optimiser keeps in the host's memory.

        latents: [images of a micro-batch, C, h, w]. micro_batch: its groups.
        """
        config, backbone, objective, tune = self.config, self.backbone, self.objective, self.config.tune
        peak, gradients = step_peak(
            backbone,
            latents,
            self.conditioning,
            reference=objective.needs_reference,
            autocast=self.autocast,
            micro_batches=-(-config.train.groups_per_step // (micro_batch * self.processes)),
        )
        states = optimizer_bytes(config.optimizer.name, self.trained)
        cut = self.processes if config.train.shard == "fsdp2" else 1
        moves = tune.reference_moves
        own_reference = moves or (tune.init is not None and tune.reference == "init")
        full = tune.kind == "full"
        if full:
            reference = self.frozen // cut if objective.needs_reference and not moves else 0
            if moves:  # a copy in float32, and the base beside it where the loss is anchored to it
                reference = 4 * self.trainable + (self.frozen if objective.needs_anchor_gap else 0)
        else:
            reference = 4 * self.trainable if own_reference else 0
        parts = {
            "weights": stored_bytes(backbone.trunk) // cut if full else self.frozen,
            "reference": reference,
            "adapters": 0 if full else 4 * self.trainable,
            "optimiser": 0 if config.optimizer.offload else states // cut,
            "average": 4 * self.trainable // cut if config.train.ema_decay else 0,
            "gradients": gradients // cut,
            "activations": max(0, peak - gradients),
            "gathered": gathered_bytes(backbone) if cut > 1 else 0,
        }
        return {**parts, "peak": sum(parts.values()), "host": states if config.optimizer.offload else 0}

    def of_groups(self, micro_batch: int, members: int) -> tuple[int, dict[str, int]]:
        """Return the images in the model at a time and the parts, for micro-batches of so many groups of `members` images."""
        config, backbone = self.config, self.backbone
        used = {"best": 1, "best_worst": 2, "all": config.data.group_size or members}
        images = micro_batch * used[config.objective.kind.members]
        images = min(images, config.train.images_per_pass or images)
        side = (config.data.resolution or backbone.default_resolution) // backbone.vae_scale_factor
        return images, self.parts((images, backbone.latent_channels, side, side), micro_batch)


def predict_memory(
    config: TrainConfig,
    backbone: Backbone,
    latents: tuple[int, ...],
    conditioning: dict[str, Tensor],
    *,
    cuda: bool,
    processes: int = 1,
) -> dict[str, int]:
    """Return the parts of one `MemoryPrediction` for the config's own micro-batch."""
    prediction = MemoryPrediction(config, backbone, conditioning, cuda=cuda, processes=processes)
    return prediction.parts(latents, config.train.micro_batch)


def described(prediction: MemoryPrediction, micro_batch: int, members: int) -> dict[str, str]:
    """Describe the memory of a micro-batch of groups with `members` images each, for `--dry-run`."""
    images, parts = prediction.of_groups(micro_batch, members)
    host = parts.pop("host")
    sizes = {name: f"{size / 2**30:.3f} GiB" for name, size in parts.items() if size}
    sizes["peak"] += f", in a step of {images} images at a time; beside it a CUDA context and the allocator's rounding"
    return sizes | ({"host": f"{host / 2**30:.3f} GiB (optimizer.offload)"} if host else {})


def fitting_micro_batch(prediction: MemoryPrediction, members: int, room: int) -> int:
    """Return the largest number of groups in a micro-batch whose step fits into `room` bytes; 1 where none does.

    It divides the groups of a process's step. Activations grow evenly with the groups, so two sizes tell all.
    """
    each = max(1, prediction.config.train.groups_per_step // prediction.processes)
    sizes = [n for n in range(min(each, LARGEST), 0, -1) if each % n == 0]
    one = prediction.of_groups(1, members)[1]["peak"]
    if len(sizes) == 1 or one > room:
        return 1
    second = sizes[-2]
    growth = (prediction.of_groups(second, members)[1]["peak"] - one) / (second - 1)
    return next((size for size in sizes if one + growth * (size - 1) <= room), 1)
