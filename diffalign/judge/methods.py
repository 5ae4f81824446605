"""The methods of Z-Reward and those that it is compared with, by the name that a config gives them."""

from collections.abc import Callable
from typing import Any

from diffalign.config import JudgeConfig
from diffalign.judge.direct import BradleyTerry, Distilled, Supervised
from diffalign.judge.gdso import GDSO, GRPO
from diffalign.judge.method import JudgeMethod
from diffalign.judge.opd import OnPolicy
from diffalign.rewards.judge import Judge
from diffalign.training.protocols import Parameters

# Which records a method takes follows from the config, so their type is not known here.
METHODS: dict[str, Callable[[Judge, JudgeConfig, Parameters, Judge | None], JudgeMethod[Any, Any]]] = {
    "sft": Supervised,
    "bt": BradleyTerry,
    "grpo": GRPO,
    "gdso": GDSO,
    "risd": Distilled,
    "opd": OnPolicy,
}
