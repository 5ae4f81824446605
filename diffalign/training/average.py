"""The moving average of a policy's weights, which is validated and saved in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffalign.health import Finding
from diffalign.training.average_decay import AverageDecay
from diffalign.training.checkpoint import TrainState
from diffalign.training.protocols import Parameters, Weights

MOST_START = 0.1
"""The share of the average that its start may have in the end."""


def examine_average(decay: AverageDecay | None, steps: int) -> list[Finding]:
    """Return a finding where an average over `steps` steps is dominated by the weights before the first."""
    share = 0.0 if decay is None else decay.share_of_start(steps)
    if share <= MOST_START:
        return []
    return [Finding("average_is_start", 0, f"after {steps} steps {share:.0%} of it is the weights before the first")]


def move_average(average: Parameters | Weights, policy: Parameters, kept: float) -> None:
    """Move an average towards weights of the same names, so that `kept` of it stays."""
    weights = [policy[name].detach() for name in average]
    torch._foreach_lerp_([value.detach() for value in average.values()], weights, 1 - kept)


def start_average(policy: Parameters, decay: AverageDecay | None) -> Weights | None:
    """Return copies of the weights, for an average that begins with them; None where no average is wanted."""
    return {name: p.detach().clone() for name, p in policy.items()} if decay else None


def update_average(state: TrainState, step: int) -> None:
    """Move the average towards the weights as they are after step 0, 1, ..."""
    if state.decay and state.average is not None:
        move_average(state.average, state.policy, state.decay.at(step))


@torch.no_grad()
def keep_average(state: TrainState) -> None:
    """Put the average, if there is one, in the weights' place for good. Nothing trains after it, so no copy is kept."""
    for name, average in (state.average or {}).items():
        state.policy[name].copy_(average)


@contextmanager
def averaged(policy: Parameters, ema: Weights | None) -> Iterator[None]:
    """Put `ema` in the policy's place for the time of the block, and its weights back bit for bit."""
    kept = {name: policy[name].detach().clone() for name in ema or {}}
    with torch.no_grad():
        for name, average in (ema or {}).items():
            policy[name].copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                policy[name].copy_(value)
