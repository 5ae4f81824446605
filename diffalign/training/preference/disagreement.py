"""Pairs whose loser the reference already prefers, and what training does to them and to the others.

The optimum of a Diffusion-DPO loss may keep the reference's order where that is the wrong one (constrained preference
optimisation, arXiv 2605.20834). A pair is the best and the worst image of a group, at the noise and time of the step; the
reference prefers the image with the lower error.
"""

from torch import Tensor

from diffalign.objectives import GroupErrors, best_and_worst

SHARE = "reference_disagrees"
IN_HALVES = {
    "disagreeing_gap": True,
    "disagreeing_turned": True,
    "agreeing_gap": False,
    "agreeing_lost": False,
}
"""Metrics of one half of the pairs -> whether it is the one in which the reference prefers the loser."""


def halves(group: GroupErrors) -> dict[str, Tensor]:
    """Return [B] each: whether the reference prefers the loser, and metrics that are 0 for pairs of the other half.

    gap: d of the loser less d of the winner, above 0 where the policy has moved towards the label. turned: whether the
    policy's errors are in the label's order, which the reference's are not; lost: the reverse.
    """
    best, worst = best_and_worst(group)
    gap = (group.error_difference.gather(1, worst) - group.error_difference.gather(1, best)).squeeze(1)
    assert group.reference_error is not None
    reference = (group.reference_error.gather(1, worst) - group.reference_error.gather(1, best)).squeeze(1)
    policy = (group.policy_error.gather(1, worst) - group.policy_error.gather(1, best)).squeeze(1)
    against = (reference < 0).to(gap.dtype)
    return {
        SHARE: against,
        "disagreeing_gap": against * gap,
        "disagreeing_turned": against * (policy > 0),
        "agreeing_gap": (1 - against) * gap,
        "agreeing_lost": (1 - against) * (policy < 0),
    }


def within_halves(row: dict[str, float]) -> dict[str, float]:
    """Return a row of means over all pairs with the metrics of a half as means over its own pairs; 0 where it has none."""
    share = row.get(SHARE)
    if share is None:
        return row
    parts = {True: share, False: 1.0 - share}
    return row | {name: row[name] / parts[half] if parts[half] > 0 else 0.0 for name, half in IN_HALVES.items()}
