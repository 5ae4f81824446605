"""The first step compares cuDNN's gradient with flash's, and leaves a wrong kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.pipelines.attention import CudnnRule
from diffalign.training.preference.kernel_check import check_cudnn
from helpers import toy
from helpers.files import rows


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


class Cudnn(toy.ToyBackbone):
    """A toy whose kernel multiplies gradients by `factor` where the rule allows it; predictions stay as they are."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.cudnn, self.factor = CudnnRule(), factor
        self.used: list[bool] = []

    def predict(self, *arguments: Any, **options: Any) -> Tensor:
        found = super().predict(*arguments, **options)
        if found.requires_grad:
            self.used.append(self.cudnn.allowed)
        factor = self.factor if self.cudnn.allowed else 1.0
        return found.detach() + factor * (found - found.detach())


def test_the_first_step_of_a_run_is_checked(tmp_path: Path) -> None:
    """Behind a wrong kernel a run is the one without it; a right one is used after one comparison."""

    def run(name: str, attention: str, factor: float) -> tuple[list[tuple[float, float]], list[bool]]:
        backbone = Cudnn(factor)
        if attention == "sdpa":
            backbone.cudnn.allowed = False
        train = {"steps": 3, "groups_per_step": 2, "micro_batch": 2}
        config = toy.toy_config(tmp_path / name, train=train)
        # A config that is read refuses cudnn on a CPU.
        model = config.model.model_copy(update={"attention": attention})
        config = config.model_copy(update={"model": model})
        toy.train(config, backbone=backbone, source=toy.ToySource(), say=lambda _: None)
        return [(row["loss"], row["grad_norm"]) for row in rows(tmp_path / name)], backbone.used

    plain, _ = run("plain", "sdpa", 1.0)
    wrong, left = run("wrong", "cudnn", 70.0)
    right, used = run("right", "cudnn", 1.0)
    assert len(plain) == 3 and wrong == plain and right == plain
    assert left == [False, True, False, False, False] and used == [False, True, True, True, True]
