"""A micro-batch of prompts as distillation takes it: their conditioning, and everything random about them."""

from dataclasses import dataclass

from diffalign.config import DistillConfig
from diffalign.pipelines.few_step import FewStep
from diffalign.training.distillation.critic import CriticDraws, make_critic_draws
from diffalign.training.distillation.draws import DistillDraws, group_shape, make_distill_draws
from diffalign.training.protocols import Conditioning, Prompts


@dataclass(frozen=True)
class PromptBatch:
    """B prompts with M images each, a prompt's images side by side.

    ids [B]: the prompts'; indices [B M]: each image's prompt; conditioning [B M, ...]; critic_draws: None without a critic.
    """

    ids: list[str]
    indices: list[int]
    conditioning: Conditioning
    draws: DistillDraws
    critic_draws: CriticDraws | None


def make_batch(
    config: DistillConfig,
    student: FewStep,
    source: Prompts,
    iteration: int,
    slots: list[int],
    prompts: list[int],
    shape: tuple[int, int, int],
) -> PromptBatch:
    """Read and draw the prompts at positions `slots` of an iteration. prompts: their indices; shape: (C, h, w) of a latent."""
    images, _ = group_shape(config)
    ids = [source.ids[i] for i in prompts]
    conditioning = {name: value.repeat_interleave(images, dim=0) for name, value in source.batch(prompts).items()}
    draws = make_distill_draws(config, student, iteration, slots, ids, shape)
    critic_draws = None
    if config.gan.weight:
        critic_draws = make_critic_draws(config, student.process, iteration, slots, ids, shape, images)
    return PromptBatch(ids, [i for i in prompts for _ in range(images)], conditioning, draws, critic_draws)
