"""The methods of Z-Reward and those that it is compared with, by the name that a config gives them."""

from collections.abc import Callable
from typing import Any

from diffalign.judge.direct import BradleyTerry, Distilled, Supervised
from diffalign.judge.gdso import GDSO, GRPO
from diffalign.judge.method import Method, Weights
from diffalign.judge.opd import OnPolicy
from diffalign.rewards.judge import Judge

METHODS: dict[str, Callable[[Judge, Any, Weights, Judge | None], Method]] = {
    "sft": Supervised,
    "bt": BradleyTerry,
    "grpo": GRPO,
    "gdso": GDSO,
    "risd": Distilled,
    "opd": OnPolicy,
}
