"""One step of a toy distillation."""

from typing import Any

from diffalign.pipelines.few_step import FewStep
from diffalign.training.distillation.draws import make_distill_draws
from diffalign.training.distillation.step import student_step
from helpers import toy_distill as toy


def one_step(config: Any, backbone: toy.ToyBackbone, iteration: int, judge: Any = None) -> tuple[Any, Any, Any]:
    """Output of a student step on prompts 0 and 1, its draws, and the conditioning."""
    student = FewStep(backbone.process, toy.TIMES, config.student.sampler, config.student.eta)
    prompts, images = toy.ToyPrompts(), config.group.size if config.group.axis == "prompt" else 1
    draws = make_distill_draws(config, student, iteration, [0, 1], ["p0", "p1"], toy.SHAPE)
    conditioning = {k: v.repeat_interleave(images, dim=0) for k, v in prompts.batch([0, 1]).items()}
    indices = [i for i in (0, 1) for _ in range(images)]
    output = student_step(config, backbone, student, conditioning, prompts.unconditional, draws, indices, judge)
    return output, draws, conditioning
