"""The reward-gradient loop on the toy backbone; as a program, so that tests can start it in several processes.

python toy_reward_gradient.py RUN_DIR STEPS IMAGES_PER_STEP MICRO_BATCH
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.config import RewardGradientConfig
from diffalign.pipelines.own_sampler import SamplerSteps
from diffalign.pipelines.process import Diffusion, Flow, NoiseProcess
from diffalign.training.device import start_accelerator
from diffalign.training.protocols import LatentScores
from diffalign.training.reward_gradient.draws import make_gradient_draws, span_of
from diffalign.training.reward_gradient.method import RewardGradient
from diffalign.training.reward_gradient.step import RewardGradientOutput, reward_gradient_step
from diffalign.training.run import run as train
from helpers import toy
from helpers.toy_distill import ToyPrompts

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)


def process(kind: str) -> NoiseProcess:
    return Flow(3.0) if kind == "flow" else Diffusion(ALPHAS.float(), "epsilon", offset=1)


class ToyBackbone(toy.ToyBackbone):
    guided, vae_scale_factor = False, 1

    def __init__(self, kind: str = "flow", moved: bool = False) -> None:
        super().__init__()
        self.process: Any = process(kind)
        if moved:  # so that the policy differs from the reference, and every weight has a gradient
            with torch.no_grad():
                self.trunk.up.add_(0.1 * torch.randn(self.trunk.up.shape, generator=torch.Generator().manual_seed(3)))

    def whole_graph(self) -> Any:
        return nullcontext()

    def sampling_times(self, steps: int, height: int, width: int) -> Tensor:
        times: Tensor = self.process.schedule(steps)
        return times

    def sampler_steps(self, steps: int, height: int, width: int) -> SamplerSteps:
        times = self.sampling_times(steps, height, width)
        return SamplerSteps(times[:-1], times[1:])


def bright(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
    """A reward that is not linear in the latents: how near their mean is to 1.5."""
    return {"bright": -(latents.flatten(1).mean(dim=1) - 1.5).square()}


def toy_config(run_dir: Path, **sections: Any) -> RewardGradientConfig:
    """Keyword sections are merged over the defaults; `method` and `rewards` replace them."""
    plain: dict[str, Any] = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "model": {"path": "toy"},
        "prompts": "toy",
        "sampler": {"steps": 6, "guidance_scale": 2.5},
        "rewards": [{"name": "bright"}],
        "train": {"steps": 6, "images_per_step": 4, "micro_batch": 4, "threads": 1, "max_grad_norm": 100.0},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 3},
        "tracking": {"trackers": []},
    }
    for name, values in sections.items():
        merge = isinstance(values, dict) and name != "method"
        plain[name] = {**plain.get(name, {}), **values} if merge else values
    return RewardGradientConfig.model_validate(plain)


def run(
    config: RewardGradientConfig,
    backbone: ToyBackbone | None = None,
    scores: LatentScores = bright,
    source: Any = None,
    **given: Any,
) -> None:
    """`given`: further arguments of the run."""
    method: Any = RewardGradient(
        config, backbone or ToyBackbone(), source or ToyPrompts(), toy.SHAPE, scores, start_accelerator(config)
    )
    train(config, method, **{"say": lambda _: None, **given})


def one_step(
    config: RewardGradientConfig, backbone: ToyBackbone, step: int = 0, scores: LatentScores = bright
) -> tuple[RewardGradientOutput, dict[str, Tensor]]:
    """Output of a step on prompts 0 and 1, and the gradients of the mean loss by name."""
    prompts = ToyPrompts()
    backbone.trunk.zero_grad()
    times = backbone.sampling_times(config.sampler.steps, 4, 4)
    draws = make_gradient_draws(config, step, [0, 1], ["p0", "p1"], toy.SHAPE)
    output = reward_gradient_step(
        config,
        backbone,
        times,
        prompts.batch([0, 1]),
        prompts.unconditional,
        draws,
        span_of(config, step),
        [0, 1],
        scores,
    )
    output.loss.mean().backward()
    return output, {name: p.grad.clone() for name, p in backbone.trainable().items() if p.grad is not None}


if __name__ == "__main__":
    run_dir, steps, images, micro = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    settings = {"steps": steps, "images_per_step": images, "micro_batch": micro}
    run(toy_config(run_dir, train=settings, method={"name": "alignprop", "last": [1, 4]}, drift={"weight": 0.1}))
