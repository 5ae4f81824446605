"""The first step's check of cuDNN's attention, whose backward pass has been wrong for some inputs."""

import math
from collections.abc import Callable

import torch

from diffalign.pipelines.attention import CudnnRule
from diffalign.training.protocols import Parameters, Say

CLOSE = 0.1
"""How far norms of the gradient may lie apart, relative to flash's: faults were factors of 70 and NaN."""


def check_cudnn(rule: CudnnRule, gradient: Callable[[], object], policy: Parameters, say: Say) -> None:
    """Compute a step's gradient with flash attention and with cuDNN's, and leave cuDNN's where they differ.

    gradient: computes the gradient of the same step each time it is called, into `policy`, which is left without one.
    """
    norms = []
    for rule.allowed in (False, True):
        gradient()
        found = [parameter.grad for parameter in policy.values() if parameter.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(found)))
        for parameter in policy.values():
            parameter.grad = None
    flash, cudnn = norms
    rule.allowed = math.isfinite(cudnn) and abs(cudnn - flash) <= CLOSE * flash
    if not rule.allowed:
        say(
            f"model.attention=cudnn: the first step's gradient has the norm {cudnn:.3g}, and {flash:.3g} with flash attention; "
            "flash is used"
        )
