"""The first step compares cuDNN's gradient with flash's, and leaves a wrong kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffalign.pipelines.attention import CudnnRule
from diffalign.training.preference.kernel_check import check_cudnn


@pytest.mark.parametrize(
    ("factor", "kept"),
    [(1.0, True), (1.05, True), (70.0, False), (0.5, False), (float("nan"), False), (float("inf"), False)],
)
def test_a_wrong_kernel_is_left(factor: float, kept: bool) -> None:
    rule, weight, said = CudnnRule(), nn.Parameter(torch.zeros(3)), list[str]()
    order: list[bool] = []

    def gradient() -> None:
        order.append(rule.allowed)
        weight.grad = torch.ones(3) * (factor if rule.allowed else 1.0)

    check_cudnn(rule, gradient, {"weight": weight}, said.append)
    assert order == [False, True] and rule.allowed == kept and weight.grad is None
    assert [line.startswith("model.attention=cudnn: ") and "flash is used" in line for line in said] == [True] * (
        not kept
    )
