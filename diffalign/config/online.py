"""The `train.online` section: images that training draws, scores and learns from while it runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from diffalign.config.images import SamplingSection
from diffalign.config.run import PROMPT_COUNT, RewardSection
from diffalign.config.section import MOST_IMAGES, MOST_PROMPTS, MOST_STEPS, NAMED, Section, Sizes, refuse, refuse_twice


class OldPolicySection(Section):
    """How the old policy, which draws the images, follows the new one before each draw (`tune.reference: old`)."""

    decay: float = Field(
        0.0, ge=0, lt=1, description="how much of the old weights stays; 0: the images come from the policy as it is"
    )
    slope: float | None = Field(
        None,
        gt=0,
        description="at most this times the updates so far stays, as 0.001 (DiffusionNFT); null: no such limit",
    )
    after: int = Field(0, ge=0, description="updates that slope does not count")

    @model_validator(mode="after")
    def _check_after(self) -> OldPolicySection:
        if self.after and self.slope is None:
            refuse("it delays slope, which is null; set slope=0.0075, or leave it out", "after", "slope")
        return self


class PathSection(Section):
    """Steps of the sampler that draw noise, and that are learnt from (`noise: path`; Flow-GRPO)."""

    noise_level: float = Field(
        0.7,
        gt=0,
        description="noise of a step: a in sigma = a sqrt(t / (1 - t)) for a flow, eta of DDIM for a diffusion model",
    )
    window: Sizes | None = Field(
        None, description="[first, end]: the steps from first to before end, from 0; null: all but the last"
    )

    def steps_of(self, steps: int) -> tuple[int, int]:
        """Return the first step that draws, and the one after the last."""
        return self.window or (0, steps - 1)


class OnlineSection(SamplingSection):
    """Images that the model draws during training, in place of a dataset. A draw is `groups` prompts x `images_per_prompt`."""

    prompts: Annotated[str, NAMED] = Field(
        min_length=1, description="what images are drawn of: as in `diffalign sample`, such as a .txt or .jsonl file"
    )
    n: int | None = Field(None, gt=0, le=MOST_PROMPTS, description=PROMPT_COUNT)
    rewards: list[RewardSection] = Field(min_length=1, description="what scores them; labels.source names one of these")
    every: int = Field(1, gt=0, description="updates on a draw, before the next one")
    groups: int = Field(
        48, gt=0, le=MOST_IMAGES, description="prompts of a draw, in a seeded order that meets all of them"
    )
    images_per_prompt: int = Field(24, ge=2, le=MOST_IMAGES, description="images of a prompt, one group")
    steps: int = Field(10, gt=0, le=MOST_STEPS, description="denoising steps")
    guidance_scale: float = Field(
        1.0,
        ge=0,
        description="classifier-free guidance; 1: none, as losses want that take the images for the model's own",
    )
    old: OldPolicySection = OldPolicySection()
    path: PathSection = PathSection()

    @model_validator(mode="after")
    def _check_rewards(self) -> OnlineSection:
        refuse_twice([reward.written_name for reward in self.rewards], "a reward", "rewards")
        return self

    @model_validator(mode="after")
    def _check_window(self) -> OnlineSection:
        first, end = self.path.steps_of(self.steps)
        if self.path.window is not None and not 0 <= first < end < self.steps:
            refuse(
                f"two rising numbers of 0 to {self.steps - 1} are needed, not [{first}, {end}]: the last step leads to a "
                "clean latent and draws nothing",
                "path.window",
                "steps",
            )
        return self
