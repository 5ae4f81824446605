"""Groups of different sizes in one micro-batch: an objective sees each group's labelled images and no others.

An objective takes B groups of K images. Groups of equal size are given to it together, and its results are put back in
their order, so no objective has to know of masks. Where all groups are of one size nothing is cut and no number changes.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from diffalign.objectives import GroupErrors, Objective, ObjectiveOutput
from diffalign.training.device import to_device


def labelled_first(members: Tensor, labels: Tensor) -> Tensor:
    """Return `members` [B, n] with the images that have a label in front, cut to the largest number of them.

    labels: those of the members, NaN where there is none. Where all have one nothing changes.
    """
    known = labels.isfinite()
    width = max(int(known.sum(dim=1).max()), 2)
    if width == members.shape[1] and bool(known.all()):
        return members
    front = known.int().argsort(dim=1, descending=True, stable=True)
    return members.gather(1, front)[:, :width]


def sizes_of(labels: Tensor) -> list[int]:
    """Return how many images of each group an objective gets: the labelled ones, or all of a group that has no weight.

    labels [B, k], on the CPU, NaN at the end of the rows.
    """
    counts, k = labels.isfinite().sum(dim=1).tolist(), labels.shape[1]
    return [count if count >= 2 else k for count in counts]


def by_size(objective: Objective, errors: GroupErrors, sizes: list[int]) -> ObjectiveOutput:
    """Return the objective of groups of which group i has the first `sizes[i]` images of its row."""
    output = over_sizes(lambda part: _as_dict(objective(part)), errors, sizes)
    return ObjectiveOutput(output.pop("loss"), output)


def member_means(values: Tensor, sizes: list[int]) -> Tensor:
    """Return the mean over each group's first `sizes[i]` images, [B], of values [B, k]."""
    return over_sizes(lambda part: {"mean": part.policy_error.mean(1)}, GroupErrors(values), sizes)["mean"]


def over_sizes(
    measure: Callable[[GroupErrors], dict[str, Tensor]], errors: GroupErrors, sizes: list[int]
) -> dict[str, Tensor]:
    """Return values of [B] that `measure` takes of groups of one size at a time."""
    if all(size == errors.policy_error.shape[1] for size in sizes):
        return measure(errors)
    parts, rows_of = [], []
    for size in sorted(set(sizes)):
        rows = [row for row, one in enumerate(sizes) if one == size]
        parts.append(measure(_cut(errors, rows, size)))
        rows_of += rows
    back = to_device(torch.tensor(rows_of).argsort(), errors.policy_error.device)
    return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}


def _cut(errors: GroupErrors, rows: list[int], size: int) -> GroupErrors:
    """Return the first `size` images of these groups."""
    chosen = to_device(torch.tensor(rows), errors.policy_error.device)
    values = {field.name: vars(errors)[field.name] for field in fields(errors)}
    given = {name: value[chosen] for name, value in values.items() if value is not None}
    return replace(errors, **{name: value[:, :size] if value.dim() > 1 else value for name, value in given.items()})


def _as_dict(output: ObjectiveOutput) -> dict[str, Tensor]:
    return {**output.metrics, "loss": output.loss}
