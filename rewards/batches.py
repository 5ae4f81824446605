"""Measure a batch so that one odd image costs only itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffalign.errors import DiffalignError
from diffalign.rewards.base import Metadata, Prepared, Reward

SYSTEMATIC = (DiffalignError, ImportError, torch.AcceleratorError)
"""Errors that no image causes: a mistake of the user, a missing package, and a GPU that has failed and stays so."""
ENOUGH = 4
"""When all of so many images, the first ones, fail with one message, the reward is at fault."""


@dataclass(frozen=True)
class Measured:
    """What became of one image. values: by column, NaN where it could not be scored, for which `reason` says why.

    error: what the reward raised; another run may succeed. Without one the reason is the reward's own answer.
    """

    values: dict[str, float]
    reason: str = ""
    error: Exception | None = None


def measure_batch(
    reward: Reward, items: Sequence[Prepared], prompts: list[str], metadata: list[Metadata], proven: bool = False
) -> list[Measured]:
    """Return the scores of prepared images. If the batch fails, its images are scored one by one.

    proven: the reward has scored images before, so whatever fails is an image's fault. Raises torch.OutOfMemoryError if
    a single image does not fit in the GPU's memory, the errors in `SYSTEMATIC`, and what the reward raised if it is
    not proven and `ENOUGH` images fail alike.
    """
    try:
        columns = {k: v.tolist() for k, v in reward.measure_prepared(items, prompts, metadata).items()}
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
        size = len(items) // 2
        torch.cuda.empty_cache()
    except SYSTEMATIC:
        raise
    except Exception as error:  # whatever a reward raises, it costs the images that cause it alone
        if len(items) == 1:
            return [Measured(dict.fromkeys(reward.columns, float("nan")), reason_of(error), error)]
        size = 1
    else:
        return [Measured({k: columns[k][n] for k in reward.columns}, reward.reasons[n]) for n in range(len(items))]
    parts = [slice(start, start + size) for start in range(0, len(items), size)]
    found = [m for p in parts for m in measure_batch(reward, items[p], prompts[p], metadata[p], proven)]
    first = found[0].error
    if first and not proven and len(found) >= ENOUGH and all(m.error and m.reason == found[0].reason for m in found):
        raise first
    return found


def reason_of(error: Exception) -> str:
    """Return one line for an error: its kind and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
