"""The student's roll-out: from noise to an image by its few steps, with a gradient through one of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.pipelines import Backbone
from diffalign.pipelines.few_step import FewStep
from diffalign.training.device import to_device
from diffalign.training.distillation.draws import DistillDraws
from diffalign.training.protocols import Conditioning


@dataclass(frozen=True)
class RollOut:
    """A student's roll-out.

    x [N, C, h, w]: the image after the step that learns, with its gradient; final: after all steps, without. before, mean
    [N, C, h, w] (with its gradient), rho [N], action: the transition that the step makes, rho 0 where it draws nothing.
    """

    x: Tensor
    final: Tensor
    before: Tensor
    mean: Tensor
    rho: Tensor
    action: Tensor


def roll_out(
    backbone: Backbone, student: FewStep, conditioning: Conditioning, draws: DistillDraws, *, learn: bool, finish: bool
) -> RollOut:
    """Sample with the student from noise to its step `draws.stop` (backward simulation, DMD2 section 4.5).

    Only that step carries a gradient, and only if `learn`; the steps before it are the student's own, not noised data, so
    that training sees what inference sees. `finish`: sample on to the end, for rewards.
    """
    device = backbone.device
    x = to_device(draws.noise[:, 0], device).float()  # unit noise, whatever the base's own sampler starts from

    def predict(x: Tensor, index: int) -> Tensor:
        with backbone.role("student"):
            return backbone.predict(x, student.at(index, x), conditioning)

    def advance(x: Tensor, prediction: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation of the next latent, and the latent."""
        mean, rho = student.transition(x, prediction, index)
        if not student.stochastic or index == student.steps - 1:
            return mean, rho, mean
        return mean, rho, student.advance(x, prediction, index, to_device(draws.noise[:, index + 1], device))

    # ---- Up to the step that learns ----
    with torch.no_grad():
        for index in range(draws.stop):
            x = advance(x, predict(x, index), index)[2]
    # Autocast keeps casts of weights; those made here, without gradient, must not serve the step that learns.
    torch.clear_autocast_cache()

    # ---- The step that learns: its x0 is the image, its transition an action of the student's policy ----
    with torch.set_grad_enabled(learn):
        prediction = predict(x, draws.stop)
        image = student.process.x0(x, prediction, student.at(draws.stop, x))
        mean, rho, action = advance(x, prediction, draws.stop)

    # ---- To the end, for rewards of the finished image ----
    final = action.detach()
    if finish:
        with torch.no_grad():
            for index in range(draws.stop + 1, student.steps):
                final = advance(final, predict(final, index), index)[2]
        torch.clear_autocast_cache()
    return RollOut(image, final, x, mean, rho, action.detach())
