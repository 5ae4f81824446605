"""Distillation in a world where the answer is known: an exact teacher of N(1, 0.5), and a student with one step.

The student starts as the teacher, whose one step from pure noise gives the mean of the data for every noise: no spread at
all. Matching the distributions must give it the spread 0.5 and leave the mean.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.pipelines.few_step import FewStep
from diffalign.training.distillation.draws import make_distill_draws
from diffalign.training.distillation.roll_out import roll_out
from helpers import toy_distill as toy

MEAN, STD = 1.0, 0.5
ONE_STEP = torch.tensor([1.0, 0.0])


class Elementwise(nn.Module):
    """The exact velocity for N(MEAN, STD), element by element, plus what the active network adds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student, self.fake = (nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 1)) for _ in range(2))
        for network in (self.student, self.fake):
            nn.init.zeros_(network[2].weight)
            nn.init.zeros_(network[2].bias)
        self.active: str | None = "student"
        self.mid_block = nn.Identity()  # where a critic looks

    def forward(self, x: Tensor, prompt: Tensor, time: Tensor) -> Tensor:
        t = time.view(-1, 1, 1, 1).expand_as(x)
        variance = ((1 - t) * STD) ** 2 + t**2
        noise = t * (x - (1 - t) * MEAN) / variance
        data = MEAN + (1 - t) * STD**2 * (x - (1 - t) * MEAN) / variance
        velocity = noise - data
        if self.active is None:
            return velocity
        network = self.student if self.active == "student" else self.fake
        inner = network[:2](torch.stack([x, t], dim=-1))
        self.mid_block(inner.flatten(1, 3))
        added: Tensor = network[2](inner).squeeze(-1)
        return velocity + added


class Backbone(toy.ToyBackbone):
    def __init__(self) -> None:
        super().__init__()
        self.trunk: Any = Elementwise()


@pytest.mark.parametrize("group", [{"axis": "none", "size": 1, "scale": "per_sample"}, {"size": 4}])
def test_a_one_step_student_finds_the_spread(tmp_path: Path, group: dict[str, Any]) -> None:
    after = trained(tmp_path, group)
    assert float(after.std()) == pytest.approx(STD, abs=0.12)
    assert float(after.mean()) == pytest.approx(MEAN, abs=0.12)


@pytest.mark.parametrize("mean", [MEAN, 1.8])
def test_real_images_move_the_student_beyond_its_teacher(tmp_path: Path, mean: float) -> None:
    """Towards real images that lie elsewhere than the teacher's; where they agree (the control), nowhere."""
    gan = {"weight": 1.0, "critic_weight": 1.0, "hidden": 16, "real": "toy"}
    after = float(trained(tmp_path, {"axis": "none", "size": 1, "scale": "per_sample"}, gan, Real(mean)).mean())
    assert (1.2 < after < 1.9) if mean != MEAN else after == pytest.approx(MEAN, abs=0.12)


class Real:
    """Images of N(mean, STD)."""

    def __init__(self, mean: float) -> None:
        self.latents = mean + STD * torch.randn(256, *toy.SHAPE, generator=torch.Generator().manual_seed(5))

    def batch(self, numbers: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = [n % len(self.latents) for n in numbers]
        return self.latents[rows], {"prompt": torch.zeros(len(rows), 3)}


def trained(
    tmp_path: Path, group: dict[str, Any], gan: dict[str, Any] | None = None, real: Real | None = None
) -> Tensor:
    """What the student draws after 150 updates; before, it has no spread."""
    backbone = Backbone()
    images = 16
    config = toy.toy_config(
        tmp_path,
        match={"guidance": 1.0},
        group=group,
        student={"steps": 1},
        fake={"updates": 5, "optimizer": {"lr": 1e-2, "betas": [0.0, 0.99]}},
        optimizer={"lr": 5e-3, "betas": [0.0, 0.99]},
        train={"steps": 150, "groups_per_step": images // group["size"], "micro_batch": images // group["size"]},
        checkpoint={"every": 150},
        gan=gan or {},
    )

    def drawn() -> Tensor:
        student = FewStep(backbone.process, ONE_STEP, "renoise")
        draws = make_distill_draws(config, student, 10**6, list(range(8)), [str(i) for i in range(8)], toy.SHAPE)
        empty = {"prompt": torch.zeros(len(draws.noise), 3)}
        return roll_out(backbone, student, empty, draws, learn=False, finish=False).x

    before = drawn()
    assert float(before.std()) < 1e-4 and float(before.mean()) == pytest.approx(MEAN, abs=1e-4)
    toy.run(config, backbone, times=ONE_STEP, real=real)
    return drawn()
