"""The preference step: from cached groups to an objective's loss and metrics.

The reference's forward comes first, without gradient, unless an earlier run has kept what it says; then the policy's. Both
see the same noisy latents, the same times and the same caption. Errors are taken in float32, whatever the model computes in.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffalign.draws import draw, normal
from diffalign.errors import DiffalignError
from diffalign.objectives import GroupErrors, Objective, ObjectiveOutput, best_and_worst, check_labels, has_preference
from diffalign.pipelines.image_passes import in_passes
from diffalign.pipelines.inversion import inverted_noise
from diffalign.training.device import to_device
from diffalign.training.preference.mixed_sizes import by_size, labelled_first, member_means, sizes_of
from diffalign.training.preference.reference_store import Recall, live


@dataclass(frozen=True)
class Draws:
    """What is random in a micro-batch of B groups of K images.

    members [B, n]: the images of each group that this step looks at, all of them or `data.group_size`. noise [B, K, C,
    h, w] float32, None where it is found by inversion; times [B] in the process's units; order [B, K] breaks ties;
    dropped [B] bool, groups whose prompt is replaced by the empty one.
    """

    members: Tensor
    noise: Tensor | None
    times: Tensor
    order: Tensor
    dropped: Tensor


def make_draws(
    config: Any,
    process: Any,
    step: int,
    slots: list[int],
    group_ids: list[str],
    shape: torch.Size,
    labelled: Tensor | None = None,
) -> Draws:
    """Draws for the groups at positions `slots` of a step; `shape` is that of the latents, [B, K, C, h, w].

    labelled: bool [B, K], which images `data.group_size` draws from first; None: all.
    The slot is part of the key, so a group that a step meets twice (at the seam of two epochs) is not drawn alike.
    """
    _, members, *latent = shape
    size = config.data.group_size or members

    def one(stream: str, slot: int, group: str, member: int | None = None) -> Any:
        return draw(config.seed, stream, step=step, inner=slot, group=group, member=member)

    noise, uniform, order, dropped, chosen = [], [], [], [], []
    for row, (slot, group) in enumerate(zip(slots, group_ids, strict=True)):
        if config.noise == "shared":
            noise.append(normal(one("noise", slot, group), (1, *latent)).repeat(members, axis=0))
        elif config.noise == "independent":
            each = [normal(one("noise", slot, group, m), (1, *latent)) for m in range(members)]
            noise.append(torch.cat([torch.from_numpy(n) for n in each]).numpy())
        uniform.append(one("time", slot, group).random())
        order.append(one("order", slot, group).permutation(members))
        every = np.arange(members) if size == members else one("members", slot, group).permutation(members)
        if labelled is not None and size < members:
            every = every[np.argsort(~labelled[row].numpy()[every], kind="stable")]
        chosen.append(np.sort(every[:size]))
        dropped.append(bool(one("prompt_dropout", slot, group).random() < config.train.prompt_dropout))
    times = process.draw_times(torch.tensor(uniform, dtype=torch.float64), **config.times.model_dump())
    if config.noise == "inverted":
        times = process.invertible_times(times, config.inversion.steps)
    return Draws(
        torch.from_numpy(np.stack(chosen)),
        torch.stack([torch.from_numpy(n) for n in noise]) if noise else None,
        times,
        torch.stack([torch.from_numpy(o) for o in order]),
        torch.tensor(dropped),
    )


def used_members(objective: Objective, rewards: Tensor, draws: Draws) -> Tensor:
    """Indices [B, k] of those among `draws.members` that the objective's loss depends on.

    Images without a label are none of them, unless a group has fewer of the others than the rest of the micro-batch.
    """
    labels, order = rewards.gather(1, draws.members), draws.order.gather(1, draws.members)
    if objective.members == "all":
        return labelled_first(draws.members, labels)
    best, worst = best_and_worst(GroupErrors(policy_error=labels, rewards=labels, order=order))
    return draws.members.gather(1, best if objective.members == "best" else torch.cat([best, worst], dim=1))


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the latent's elements, [B, k, C, h, w] -> [B, k] float32."""
    return (prediction.float() - target.float()).square().mean(dim=(2, 3, 4))


def _inverted(config: Any, backbone: Any, latents: Tensor, times: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
    """Each image's own noise, [N, C, h, w]: under the caption that the loss sees, without guidance or gradient."""
    settings = config.inversion.model_dump()

    def predict(noisy: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return backbone.predict(noisy, t, {name: value[rows.to(value.device)] for name, value in conditioning.items()})

    with torch.no_grad(), backbone.role(settings.pop("by")):
        noise = inverted_noise(backbone.process, predict, latents, times, **settings)
    # Autocast keeps casts of weights for the next forward. In some versions of torch those made here, without gradient,
    # would be used in the policy's forward, which would then train nothing and say nothing.
    torch.clear_autocast_cache()
    return noise


@dataclass(frozen=True)
class PreferenceOutput:
    """output: the objective's; weight [B]: 0 for groups that state no preference; errors and drift for the log."""

    output: ObjectiveOutput
    weight: Tensor
    errors: GroupErrors
    metrics: dict[str, Tensor]


def preference_step(
    config: Any,
    objective: Objective,
    backbone: Any,
    batch: Any,
    draws: Draws,
    unconditional: dict[str, Tensor],
    module: nn.Module | None,
    *,
    recall: Recall = live,
    images_per_pass: int | None = None,
) -> PreferenceOutput:
    """Loss and metrics of B groups, each of [B], with gradient to the policy.

    `module` stands in for the policy's trunk (None: the trunk itself). `recall` gives what an earlier run has kept of the
    reference. `images_per_pass`: so many images go through the model at a time, with the same gradient.
    """
    process, device = backbone.process, backbone.device
    problem = check_labels(batch.rewards, objective.label_kind)
    if problem:
        raise DiffalignError(f"labels.source={config.labels.source}: {problem}")
    chosen = used_members(objective, batch.rewards, draws)  # [B, k]
    groups, k = chosen.shape
    pick = chosen[:, :, None, None, None].expand(-1, -1, *batch.latents.shape[2:])
    latents = to_device(batch.latents.gather(1, pick).flatten(0, 1), device)  # [B k, C, h, w]
    times = to_device(draws.times.repeat_interleave(k), device)
    conditioning = {}
    for name, value in batch.conditioning.items():
        kept = torch.where(draws.dropped.view(-1, *[1] * (value.dim() - 1)), unconditional[name].to(value.dtype), value)
        conditioning[name] = to_device(kept, device).repeat_interleave(k, dim=0)
    if draws.noise is None:
        noise = to_device(
            recall("noise", chosen, lambda: _inverted(config, backbone, latents, times, conditioning)), device
        )
    else:
        noise = to_device(draws.noise.gather(1, pick).flatten(0, 1), device)
    noisy, target = process.add_noise(latents, noise, times), process.target(latents, noise, times)

    def predicted(role: str) -> Tensor:
        """[B, k, C, h, w]."""
        stand_in = module if role == "policy" else None

        def predict(noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
            return backbone.predict(noisy, t, conditioning, module=stand_in)

        with backbone.role(role):
            prediction = in_passes(predict, noisy, times, conditioning, images_per_pass)
        return prediction.view(groups, k, *prediction.shape[1:])

    def reference_prediction() -> Tensor:
        with torch.no_grad():
            return predicted("reference")

    target = target.view(groups, k, *target.shape[1:])
    reference = reference_error = None
    if objective.needs_reference and config.reference.errors_only:
        reference_error = to_device(
            recall("error", chosen, lambda: squared_error(reference_prediction(), target)), device
        )
    elif objective.needs_reference:
        reference = to_device(recall("prediction", chosen, reference_prediction), device)
        reference_error = squared_error(reference, target)
    policy = predicted("policy")
    scale = to_device(process.error_scale(draws.times, config.error_space), device)[:, None]
    gap = None if reference is None else squared_error(policy, reference)
    # A group without two labels has no weight, but 0 times NaN would still be NaN.
    given = batch.rewards.gather(1, chosen)
    sizes, labels = sizes_of(given), to_device(given.nan_to_num(0.0, 0.0, 0.0), device)
    errors = GroupErrors(
        policy_error=scale * squared_error(policy, target),
        reference_error=None if reference_error is None else scale * reference_error,
        rewards=labels,
        mask=to_device(batch.mask, device),
        order=to_device(draws.order.gather(1, chosen), device),
        prediction_gap=scale * gap if gap is not None and objective.needs_gap else None,
        role=labels if objective.label_kind == "role" else None,
        time=to_device(draws.times, device),
    )
    output = by_size(objective, errors, sizes)
    weight = torch.ones(groups)
    if objective.label_kind != "none":
        weight = has_preference(batch.rewards.gather(1, draws.members), batch.mask).float()
    metrics = {"policy_error": member_means(errors.policy_error, sizes), **output.metrics}
    if errors.reference_error is not None:
        metrics["reference_error"] = member_means(errors.reference_error, sizes)
    if gap is not None:
        metrics["drift"] = member_means(gap, sizes)
    return PreferenceOutput(output, to_device(weight, device), errors, {k: v.detach() for k, v in metrics.items()})
