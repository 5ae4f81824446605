"""PPO on the stochastic step that a student has just learnt from: further updates on a roll-out's transition.

A roll-out's step at `stop` is a draw a ~ N(mean(x), rho^2) of the student's policy. Its advantage is that of the finished
image. In the update that rolled it out the ratio is 1; every further update weighs it by the ratio of the student's
present density to the one it was drawn with, clipped (Schulman et al. 2017, eq. 7).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config import DistillConfig
from diffalign.objectives.few_step_policy import log_probability, ppo_loss
from diffalign.pipelines import Backbone
from diffalign.pipelines.few_step import FewStep
from diffalign.training.protocols import Conditioning


@dataclass(frozen=True)
class Transition:
    """A stochastic step of a roll-out, kept without its graph.

    before, action [N, C, h, w]: the latent that step `stop` began with, and the one it drew; log [N]: of that draw's
    probability; advantage [N]: of the finished image.
    """

    stop: int
    before: Tensor
    action: Tensor
    log: Tensor
    advantage: Tensor


def policy_step(
    config: DistillConfig, backbone: Backbone, student: FewStep, conditioning: Conditioning, kept: Transition
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's loss of a kept transition under the student as it now is, [N], and how far the ratios are from 1."""
    reward = config.reward
    with backbone.role("student"):
        prediction = backbone.predict(kept.before, student.at(kept.stop, kept.before), conditioning)
    mean, rho = student.transition(kept.before, prediction, kept.stop)
    loss, ratio = ppo_loss(
        log_probability(kept.action, mean, rho), kept.log, kept.advantage, reward.policy_clip, reward.policy_clip
    )
    away = (ratio.detach() - 1.0).abs()
    clipped = (away > reward.policy_clip).float()
    return reward.policy_weight * loss, {"ratio_change": away, "ratio_clipped": clipped}


def kept_transition(
    stop: int, before: Tensor, action: Tensor, mean: Tensor, rho: Tensor, advantage: Tensor
) -> Transition:
    """Keep a roll-out's draw for `policy_step`, without its graph."""
    with torch.no_grad():
        log = log_probability(action, mean, rho)
    return Transition(stop, before.detach(), action.detach(), log, advantage.detach())
