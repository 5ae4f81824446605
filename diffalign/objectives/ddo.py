"""DDO (Zheng et al., arXiv 2503.01103): the policy as a discriminator between real images and the reference's images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from diffalign.objectives.base import Charts, GroupErrors, LabelKind, Members, Objective, ObjectiveOutput, logsigmoid
from diffalign.objectives.dpo import MARGIN_CHARTS


@dataclass(frozen=True)
class DDO(Objective):
    """mean over real images of -log sigmoid(-beta d) + alpha mean over generated ones of -log sigmoid(beta d).

    The paper's objective with its diffusion surrogate, -beta d in the place of beta times the log-ratio; the sigmoid is
    taken for each image, time and noise, and averaged afterwards, which is an upper bound (Jensen). alpha belongs to the
    generated ones alone. The paper writes sums over the elements, here errors are means: its beta of 0.01 to 0.1 is 31 to
    307 for the 3 x 32 x 32 elements that it was found on. Its alpha is 0.5 to 6. Both were searched in every round.

    A group holds real and generated images of one prompt. Generated ones must come from the *reference*, by its own
    sampler and without guidance; a new reference needs new images. The paper has class labels, not prompts.

    At policy = reference the loss is (1 + alpha) log 2. With a beta below 1 in the paper's unit the exact minimiser
    overshoots the data, and rounds of self-play oscillate around it: stop a round early, and judge it on held-out data.
    """

    alpha: float = field(default=4.0, metadata={"gt": 0, "description": "weight of the generated images"})
    beta: float = field(
        default=50.0,
        metadata={
            "gt": 0,
            "description": "scale for mean errors: the paper's 0.01 to 0.1 times the number of the latent's elements",
        },
    )

    title: ClassVar[str] = "DDO; labels are 1 for real images and 0 for generated ones"
    needs_reference: ClassVar[bool] = True
    needs_gap: ClassVar[bool] = False
    label_kind: ClassVar[LabelKind] = "role"
    members: ClassVar[Members] = "all"
    charts: ClassVar[Charts] = {
        "real_term": ("Real images", "log 2 at the reference"),
        "generated_term": ("Generated images", "log 2 at the reference, before alpha"),
        **MARGIN_CHARTS,
    }

    def __call__(self, group: GroupErrors) -> ObjectiveOutput:
        if group.role is None:
            raise ValueError("DDO tells real images from generated ones: role is missing")
        d = group.error_difference
        real, made = (group.role > 0.5).to(d.dtype), (group.role <= 0.5).to(d.dtype)
        n_real, n_made = real.sum(1).clamp_min(1), made.sum(1).clamp_min(1)
        real_term = (real * -logsigmoid(-self.beta * d)).sum(1) / n_real
        made_term = (made * -logsigmoid(self.beta * d)).sum(1) / n_made
        winner, loser = (real * d).sum(1) / n_real, (made * d).sum(1) / n_made
        right = real * 0.5 * (1 - d.sign()) + made * 0.5 * (1 + d.sign())
        metrics = {
            "real_term": real_term,
            "generated_term": made_term,
            "margin": self.beta * (loser - winner),
            "accuracy": right.mean(dim=1),
            "winner_gap": winner,
            "loser_gap": loser,
        }
        return ObjectiveOutput(real_term + self.alpha * made_term, metrics)
