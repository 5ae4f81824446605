"""FLOPs and memory of one training step, cut into inversion, reference, policy, backward and update, while it runs.

The cuts are where the trunk's forward begins and ends and where the optimiser steps, so that the loop itself is measured and
not a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from diffalign.training.cuda_rules import LiveBytes

# torch's own table has the fused attention kernels of GPUs and not those of CPUs.
ON_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
    ),
}


def counted(what: Callable[[], object]) -> int:
    """FLOPs of a call: two for each multiply-add of matrix products, convolutions and attention, nothing else."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        what()
    return int(counter.get_total_flops())


@contextmanager
def _cut(trunks: list[nn.Module], close: Callable[[str], None]) -> Iterator[None]:
    """Within the block `close(phase)` is called at the end of every phase of a step."""
    with ExitStack() as hooks:

        def ran(*_: Any) -> None:
            close("policy" if torch.is_grad_enabled() else "reference")

        handles = [trunk.register_forward_hook(ran) for trunk in trunks]
        handles += [trunk.register_forward_pre_hook(lambda *_: close("other")) for trunk in trunks]
        handles.append(register_optimizer_step_pre_hook(lambda *_: close("backward")))
        handles.append(register_optimizer_step_post_hook(lambda *_: close("update")))
        for handle in handles:
            hooks.callback(handle.remove)
        yield
        close("other")


@contextmanager
def flops_by_phase(trunks: list[nn.Module], references: int) -> Iterator[dict[str, int]]:
    """Fills the dict with the FLOPs of the single step within the block.

    Forwards without gradient beyond the `references` of the reference are an inversion's, each as large as the others.
    """
    found: dict[str, int] = {}
    seen = without_gradient = 0
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:

        def close(phase: str) -> None:
            nonlocal seen, without_gradient
            total = counter.get_total_flops()
            found[phase] = found.get(phase, 0) + total - seen
            seen, without_gradient = total, without_gradient + (phase == "reference")

        with _cut(trunks, close):
            yield found
    if without_gradient > references:
        one = found["reference"] // without_gradient
        found |= {"reference": one * references, "inversion": one * (without_gradient - references)}


@contextmanager
def peaks_by_phase(trunks: list[nn.Module], cuda: bool) -> Iterator[dict[str, int]]:
    """Fills the dict with the most bytes held in each phase of the single step within the block: all that CUDA's allocator
    has given out; on a CPU only what operators made within the block, so without weights and optimiser."""
    found: dict[str, int] = {}
    with ExitStack() as stack:
        live = None if cuda else stack.enter_context(LiveBytes())

        def close(phase: str) -> None:
            if live is None:
                peak = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            else:
                peak, live.peak = live.peak, live.now
            found[phase] = max(peak, found.get(phase, 0))

        if live is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            # Views of weights, and averages that are changed in place, come out of operators too and are not made by them.
            live.ignore(weight for trunk in trunks for weight in trunk.parameters())

            def known(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                live.ignore(value for value in tree_leaves(dict(optimizer.state)) if isinstance(value, Tensor))

            stack.callback(register_optimizer_step_pre_hook(known).remove)
        with _cut(trunks, close):
            yield found
