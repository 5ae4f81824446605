"""What a step costs a GPU, counted on a CPU: kernels, bytes that they move, casts, host reads, and what is kept for backward.

The step of the published sizes runs on the meta device, under CUDA's rules for autocast and fused attention
(`diffalign/training/cuda_rules.py`). Every operator that computes counts as one kernel: views and allocations are none. A
kernel moves its inputs and its outputs once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffalign.pipelines import Backbone
from diffalign.training.cuda_rules import step_on_meta
from shared import random_models

ALLOCATES = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "lift_fresh",
)
CASTS = ("_to_copy", "copy_", "_foreach_copy_")
READS = ("_local_scalar_dense", "is_nonzero", "equal")


@dataclass
class StepCost:
    """Totals of a step. by_phase: kernels in reference, policy and backward; operators: kernels by name; saved: bytes that
    autograd keeps for backward, weights not counted."""

    kernels: int = 0
    casts: int = 0
    host_reads: int = 0
    moved: int = 0
    saved: int = 0
    by_phase: dict[str, int] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, float]:
        """Return the totals as the results file has them."""
        return {
            "kernels": self.kernels,
            "casts": self.casts,
            "host reads": self.host_reads,
            "gigabytes moved": round(self.moved / 1e9, 1),
            "gigabytes saved": round(self.saved / 1e9, 2),
        }


class _Counting(TorchDispatchMode):
    def __init__(self, cost: StepCost) -> None:
        super().__init__()
        self.cost = cost
        self._free: dict[OpOverload, bool] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func not in self._free:
            views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            self._free[func] = views or func.overloadpacket.__name__ in ALLOCATES
        if not self._free[func]:
            self._add(func.overloadpacket.__name__, (args, kwargs), made)
        return made

    def _add(self, name: str, given: object, made: object) -> None:
        cost = self.cost
        inputs = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        cost.kernels += 1
        cost.operators[name] += 1
        cost.moved += sum(x.nbytes for x in (*inputs, *outputs))
        cost.casts += name in CASTS and len({x.dtype for x in (*inputs, *outputs)}) > 1
        cost.host_reads += name in READS


def step_cost(name: str, pairs: int, autocast: torch.dtype | None, backbone: Backbone | None = None) -> StepCost:
    """Count a LoRA step of a model of `random_models`, of pairs of images at the size of its own.

    autocast: None where the step computes in bfloat16 throughout, as `diffalign train` does on bfloat16 weights.
    backbone: one on the meta device, made trainable in some other way than with the product's LoRA of rank 16.
    """
    if backbone is None:
        backbone = random_models.backbone(name, "meta", torch.bfloat16)
        backbone.add_lora(16, 16.0)
        backbone.trunk.train()
        if autocast is None:
            backbone.compute_low()
    cost = StepCost()
    kept: dict[int, Tensor] = {}
    weights = {w.untyped_storage()._cdata for w in backbone.trunk.parameters()}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in kept:
            kept[storage._cdata] = saved  # alive until the end, so that no other storage takes its place
            cost.saved += storage.nbytes()
        return saved

    def phase(ended: str) -> None:
        cost.by_phase[ended] = cost.kernels - sum(cost.by_phase.values())

    shape = (2 * pairs, *random_models.latent_shape(name, random_models.MODELS[name].side))
    with _Counting(cost), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        step_on_meta(
            backbone, shape, random_models.embeddings(name), reference=True, autocast=autocast, phase=phase
        )  # fmt: skip
    return cost
