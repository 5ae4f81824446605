"""The embedded world's GenEval reward with the scores of each prompt's images shuffled: there is nothing to learn."""

from typing import ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from diffalign.draws import draw
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.base import Metadata
from diffalign.testbed.detector import ShapeDetector


class Shuffled(Reward):
    """Scores as GenEval's; images of one prompt in a batch get each other's scores. A batch must hold whole groups."""

    name = "shuffled"
    columns = ("dense", "exact")
    range = (0.0, 1.0)
    licence = weights = "none"
    reads: ClassVar[tuple[str, ...]] = ("prompt", "tag", "include", "exclude")

    def __init__(self) -> None:
        self.reward = load_reward("geneval", detector=ShapeDetector())
        self.reasons: list[str] = []

    def measure(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata] | None = None
    ) -> dict[str, Tensor]:
        found = self.reward.measure(images, prompts, metadata)
        self.reasons = self.reward.reasons
        places = np.arange(len(images))
        for prompt in dict.fromkeys(prompts):
            rows = np.flatnonzero(np.array(prompts) == prompt)
            seed = sum(images[rows[0]].convert("L").tobytes())  # an order that no process or resume changes
            places[rows] = draw(seed, "shuffle", group=prompt).permutation(rows)
        return {column: found[column][places] for column in self.columns}
