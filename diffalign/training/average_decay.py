"""The decay of the moving average of the weights, as a function of the step, so that it needs no state to resume."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.config.model import PolicySection
from diffalign.config.online import OldPolicySection
from diffalign.config.run import AveragedStepSection


@dataclass(frozen=True)
class AverageDecay:
    """min(largest, (1 + t) / (10 + t) with warm-up, slope (t - after) where there is one), t being the steps before this one.

    The warm-up is that of TensorFlow's and diffusers' averages. GDRO states min(0.001 t, 0.5): largest 0.5, slope 0.001, no
    warm-up. Read as the weight of the old average; its paper leaves open which of the two it multiplies.
    """

    largest: float
    warmup: bool = True
    slope: float | None = None
    after: int = 0

    def at(self, step: int) -> float:
        """Return how much of the average stays in the update after step 0, 1, ..."""
        limits = [self.largest]
        if self.warmup:
            limits.append((1 + step) / (10 + step))
        if self.slope is not None:
            limits.append(self.slope * max(step - self.after, 0))
        return min(limits)

    def share_of_start(self, steps: int) -> float:
        """Return how much of the average after `steps` steps is the weights before the first, in [0, 1]."""
        share = 1.0
        for step in range(steps):
            share *= self.at(step)
            if share < 1e-9:  # a long run need not be counted to its end
                return 0.0
        return share


def decay_of(train: AveragedStepSection) -> AverageDecay | None:
    """Return the decay that a config's `train` section states; None where it wants no average."""
    return None if train.ema_decay is None else AverageDecay(train.ema_decay, train.ema_warmup, train.ema_slope)


def reference_decay(tune: PolicySection) -> AverageDecay | None:
    """Return the decay of a reference that averages the policy; None where the reference stays as it is."""
    if tune.reference != "ema":
        return None
    return AverageDecay(tune.reference_decay, tune.reference_warmup, tune.reference_slope)


def old_decay(old: OldPolicySection) -> AverageDecay:
    """Return how much of the old policy stays before a draw, after so many updates (DiffusionNFT: min(0.001 s, 0.5))."""
    return AverageDecay(old.decay, warmup=False, slope=old.slope, after=old.after)
