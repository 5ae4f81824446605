"""Optional stabilisers, all off by default: skip steps with an outlier gradient norm; adapt beta, or let it fall.

The first two remember plain numbers, which go into the checkpoint, and see metrics that are already reduced over processes, so
every process decides alike.
"""

import dataclasses
import math
from collections.abc import Mapping
from statistics import median

from torch import Tensor

from diffalign.objectives import DiffusionDPO, Objective, SmPO
from diffalign.training.checkpoint import Memory

USUAL_STEPS = 50
NEEDED_STEPS = 10
AUTO_BETA_MEMORY = 0.95
# How far beta may move from where it started; the margin is tiny at first and would send it anywhere.
AUTO_BETA_REACH = 100.0


def is_outlier(norm: float | Tensor, factor: float | None, memory: Memory) -> bool:
    """Return whether a gradient norm is `factor` times the median of recent ones; remember ordinary norms.

    A norm that is not finite, as where fp16 overflows, is an outlier from the first step on, and is never remembered.
    """
    if factor is None:
        return False
    norm = float(norm)
    usual = memory.setdefault("usual_norms", [])
    usual[:] = [one for one in usual if math.isfinite(one)]  # checkpoints of earlier versions may hold others
    if not math.isfinite(norm) or (len(usual) >= NEEDED_STEPS and norm > factor * median(usual)):
        return True
    usual.append(norm)
    del usual[:-USUAL_STEPS]
    return False


def with_auto_beta(objective: Objective, target: float | None, memory: Memory) -> Objective:
    """Return the objective with the beta at which the mean margin gives a gradient factor of `target`.

    The gradient factor is sigmoid(offset - margin), the offset being that of dpo.

    The margin is beta times a size that is remembered as a moving average; before there is one, and while it is not above
    0, beta stays what it was. Objectives other than dpo and smpo, which the config refuses, stay as they are.
    """
    if target is None or not isinstance(objective, DiffusionDPO | SmPO):
        return objective
    size = memory.get("margin_size", 0.0) / (1 - AUTO_BETA_MEMORY ** memory.get("margin_count", 0) or 1.0)
    if size <= 0:
        return objective
    offset = objective.offset if isinstance(objective, DiffusionDPO) else 0.0
    wanted = (math.log((1 - target) / target) + offset) / size
    low, high = objective.beta / AUTO_BETA_REACH, objective.beta * AUTO_BETA_REACH
    return dataclasses.replace(objective, beta=min(max(wanted, low), high))


def with_beta_end(objective: Objective, step: int, steps: int) -> Objective:
    """Return the objective with the beta of a step of `steps`: half a cosine from its own to `beta_end` times that."""
    if not isinstance(objective, DiffusionDPO | SmPO) or objective.beta_end is None:
        return objective
    share, done = objective.beta_end, step / max(steps - 1, 1)
    factor = share + (1 - share) * 0.5 * (1 + math.cos(math.pi * done))
    return dataclasses.replace(objective, beta=factor * objective.beta)


def pulled_margin(row: Mapping[str, float]) -> float | None:
    """Return a step's mean margin, each group with the weight that it has in the gradient; None where no group pulls.

    In DPO all groups weigh alike. SmPO has its smoothing gamma (2p - 1) both inside the margin and before the gradient:
    near-ties have a margin of 0, a factor of 1/2 and no gradient, whatever beta is. Counted in full they would send beta
    up until the sure pairs, which do all the pulling, are saturated.
    """
    if row["share_without_preference"] >= 1:
        return None
    if "smoothed_margin" not in row:
        return row["margin"]
    return row["smoothed_margin"] / row["smoothing"] if row["smoothing"] > 0 else None


def remember_margin(row: Mapping[str, float], beta: float, memory: Memory) -> None:
    """Take the margin of a step's metrics into the moving average of margin / beta."""
    margin = pulled_margin(row)
    if margin is None:
        return
    old = memory.get("margin_size", 0.0)
    memory["margin_size"] = AUTO_BETA_MEMORY * old + (1 - AUTO_BETA_MEMORY) * margin / beta
    memory["margin_count"] = memory.get("margin_count", 0) + 1
