"""The preference step: from cached groups to an objective's loss and metrics.

The reference's forward comes first, without gradient, unless an earlier run has kept its predictions; then the policy's.
Both see the same noisy latents, the same times and the same caption. Errors are taken in float32, whatever the model
computes in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.objectives import GroupErrors, Objective, ObjectiveOutput, best_and_worst, check_labels, has_preference
from diffalign.pipelines import Backbone, NoiseProcess
from diffalign.pipelines.image_passes import in_passes
from diffalign.pipelines.inversion import inverted_noise
from diffalign.pipelines.paths import Paths, step_target
from diffalign.training.device import to_device
from diffalign.training.preference.disagreement import halves
from diffalign.training.preference.draws import Draws
from diffalign.training.preference.guided import guided_prediction
from diffalign.training.preference.mixed_sizes import by_size, labelled_first, member_means, over_sizes, sizes_of
from diffalign.training.preference.reference_store import Recall, live
from diffalign.training.protocols import Conditioning

if TYPE_CHECKING:
    from diffalign.data.training_source import Batch


def used_members(objective: Objective, rewards: Tensor, draws: Draws) -> Tensor:
    """Return the indices [B, k] of those among `draws.members` that the objective's loss depends on.

    Images without a label are none of them, unless a group has fewer of the others than the rest of the micro-batch.
    """
    labels, order = rewards.gather(1, draws.members), draws.order.gather(1, draws.members)
    if objective.members == "all":
        return labelled_first(draws.members, labels)
    best, worst = best_and_worst(GroupErrors(policy_error=labels, rewards=labels, order=order))
    return draws.members.gather(1, best if objective.members == "best" else torch.cat([best, worst], dim=1))


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the squared error, mean over the latent's elements: [B, k, C, h, w] -> [B, k] float32."""
    return (prediction.float() - target.float()).square().mean(dim=(2, 3, 4))


def _inverted(
    config: TrainConfig, backbone: Backbone, latents: Tensor, times: Tensor, conditioning: Conditioning
) -> Tensor:
    """Find each image's own noise, [N, C, h, w]: under the caption that the loss sees, without guidance or gradient."""
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
class Inputs:
    """The inputs of both networks for B groups with k images each.

    noisy, target [B k, C, h, w]: the noisy latents and what is to be predicted; times [B k]; conditioning [B k, ...] each.
    scale [B]: what squared errors are multiplied by. unguided: what guidance of scale `guidance` steers away from, [1, ...]
    each, where a prediction is guided.
    """

    noisy: Tensor
    target: Tensor
    times: Tensor
    conditioning: Conditioning
    scale: Tensor
    guidance: float = 1.0
    unguided: Conditioning | None = None


def _inputs(
    config: TrainConfig,
    backbone: Backbone,
    batch: Batch,
    draws: Draws,
    chosen: Tensor,
    unconditional: Conditioning,
    recall: Recall,
) -> Inputs:
    """Return the inputs for the images `chosen` [B, k], on the device."""
    process, device, k = backbone.process, backbone.device, chosen.shape[1]
    pick = chosen[:, :, None, None, None].expand(-1, -1, *batch.latents.shape[2:])
    latents = to_device(batch.latents.gather(1, pick).flatten(0, 1), device)
    times = to_device(draws.times.repeat_interleave(k), device)
    conditioning = {}
    for name, value in batch.conditioning.items():
        dropped = draws.dropped.view(-1, *[1] * (value.dim() - 1))
        # A condition image stays where the prompt is dropped, as guidance at sampling has it.
        kept = torch.where(dropped, unconditional[name].to(value.dtype), value) if name in unconditional else value
        conditioning[name] = to_device(kept, device).repeat_interleave(k, dim=0)
    if batch.paths is not None and draws.path_step is not None:
        return _path_inputs(process, batch.paths, draws.path_step, chosen, times, conditioning, unconditional)
    if draws.noise is None:
        noise = recall("noise", chosen, lambda: _inverted(config, backbone, latents, times, conditioning))
    else:
        noise = draws.noise.gather(1, pick).flatten(0, 1)
    noise = to_device(noise, device)
    scale = process.error_scale(draws.times, config.error_space)
    return Inputs(
        process.add_noise(latents, noise, times), process.target(latents, noise, times), times, conditioning, scale
    )


def _path_inputs(
    process: NoiseProcess,
    paths: Paths,
    step: Tensor,
    chosen: Tensor,
    times: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
) -> Inputs:
    """Return the inputs for step `step` [B] of the images' paths: errors are minus log-probabilities of what was drawn."""
    rows, device = torch.arange(len(chosen))[:, None], times.device
    before, after = (to_device(paths.states[rows, chosen, step[:, None] + n].flatten(0, 1), device) for n in (0, 1))
    stops = to_device(paths.steps.stops[step].repeat_interleave(chosen.shape[1]), device)
    target, weight = step_target(process, before, after, times, stops, paths.steps.level)
    scale = weight.unflatten(0, chosen.shape)[:, 0]
    return Inputs(before, target, times, conditioning, scale, paths.steps.guidance, unconditional)


def _predicted(
    backbone: Backbone, role: str, inputs: Inputs, images_per_pass: int | None, module: nn.Module | None
) -> Tensor:
    """Return the prediction of a role, [B k, C, h, w]; `module` stands in for its trunk."""

    def predict(noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return guided_prediction(backbone, noisy, t, conditioning, inputs.unguided, inputs.guidance, module)

    with backbone.role(role):
        return in_passes(predict, inputs.noisy, inputs.times, inputs.conditioning, images_per_pass)


@dataclass(frozen=True)
class Compared:
    """What predictions of policy, reference and base are worth, in native space: see `GroupErrors` for each."""

    policy_error: Tensor
    reference_error: Tensor | None
    gap: Tensor | None
    anchor_gap: Tensor | None
    residuals: Tensor | None


def _mixed_residuals(objective: Objective, policy: Tensor, reference: Tensor | None, target: Tensor) -> Tensor | None:
    """Return the mean absolute residuals of the mixes that the objective names, [B, k, n], without a gradient."""
    if not objective.mixed_residuals or reference is None:
        return None
    ours, theirs, wanted = (values.detach().float() for values in (policy, reference, target))
    mixes = (w * ours + (1 - w) * theirs - wanted for w in objective.mixed_residuals)
    return torch.stack([mix.abs().mean(dim=(2, 3, 4)) for mix in mixes], dim=2)


@dataclass(frozen=True)
class PreferenceOutput:
    """A step's result.

    output: the objective's; weight [B]: 0 for groups that state no preference; errors: what the objective saw; metrics [B].
    """

    output: ObjectiveOutput
    weight: Tensor
    errors: GroupErrors
    metrics: dict[str, Tensor]


def preference_step(
    config: TrainConfig,
    objective: Objective,
    backbone: Backbone,
    batch: Batch,
    draws: Draws,
    unconditional: Conditioning,
    module: nn.Module | None,
    *,
    recall: Recall = live,
    images_per_pass: int | None = None,
) -> PreferenceOutput:
    """Return loss and metrics of B groups, each of [B], with gradient to the policy.

    module: stands in for the policy's trunk (None: the trunk itself). recall: gives what an earlier run has kept of the
    reference. images_per_pass: how many images go through the model at a time, with the same gradient. Raises
    DiffalignError for labels that the objective does not take.
    """
    # ---- The images that the loss depends on, and what both networks see of them ----
    problem = check_labels(batch.rewards, objective.label_kind)
    if problem:
        raise DiffalignError(f"labels.source={config.labels.source}: {problem}")
    chosen = used_members(objective, batch.rewards, draws)  # [B, k]
    inputs = _inputs(config, backbone, batch, draws, chosen, unconditional, recall)
    target = inputs.target.unflatten(0, chosen.shape)

    def frozen_prediction(role: str = "reference") -> Tensor:
        with torch.no_grad():
            return _predicted(backbone, role, inputs, images_per_pass, None).unflatten(0, chosen.shape)

    # ---- Reference first: switching adapters between the policy's forward and its backward would lose gradients ----
    reference = reference_error = None
    if objective.needs_reference and config.reference.errors_only:
        reference_error = recall("error", chosen, lambda: squared_error(frozen_prediction(), target))
        reference_error = to_device(reference_error, backbone.device)
    elif objective.needs_reference:
        reference = to_device(recall("prediction", chosen, frozen_prediction), backbone.device)
        reference_error = squared_error(reference, target)

    # ---- The untrained base, where the objective is anchored to it and the reference is another model ----
    base = None
    if objective.needs_anchor_gap and not config.tune.reference_is_base:
        base = frozen_prediction("base")

    # ---- Policy, with gradient ----
    policy = _predicted(backbone, "policy", inputs, images_per_pass, module).unflatten(0, chosen.shape)
    gap = None if reference is None else squared_error(policy, reference)
    compared = Compared(
        squared_error(policy, target),
        reference_error,
        gap,
        gap if base is None else squared_error(policy, base),
        _mixed_residuals(objective, policy, reference, target),
    )

    # ---- Objective: of each group's labelled images and no others ----
    errors = _group_errors(objective, backbone, batch, draws, chosen, inputs, compared)
    sizes = sizes_of(batch.rewards.gather(1, chosen))
    output = by_size(objective, errors, sizes)
    metrics = {"policy_error": member_means(errors.policy_error, sizes), **output.metrics}
    if errors.reference_error is not None:
        metrics["reference_error"] = member_means(errors.reference_error, sizes)
        if objective.label_kind not in ("none", "role"):  # roles tie: there is no one best image
            metrics |= over_sizes(halves, errors, sizes)
    if gap is not None:
        metrics["drift"] = member_means(gap, sizes)
        if config.train.drift_weight:
            excess = (metrics["drift"] - config.train.drift_radius).relu()
            metrics["drift_excess"] = excess
            output = replace(output, loss=output.loss + config.train.drift_weight * excess)

    # ---- Weight: a group without a strict preference has no say where labels do ----
    weight = torch.ones(len(chosen))
    if objective.label_kind != "none":
        weight = has_preference(batch.rewards.gather(1, draws.members), batch.mask).float()
    weight = to_device(weight, backbone.device)
    return PreferenceOutput(output, weight, errors, {k: v.detach() for k, v in metrics.items()})


def _group_errors(
    objective: Objective,
    backbone: Backbone,
    batch: Batch,
    draws: Draws,
    chosen: Tensor,
    inputs: Inputs,
    compared: Compared,
) -> GroupErrors:
    """Return what the objective sees, [B, k] each, in the error space of the config."""
    device = backbone.device
    process = backbone.process
    scale = to_device(inputs.scale, device)[:, None]
    anchor = compared.anchor_gap if objective.needs_anchor_gap else None
    if anchor is not None and batch.paths is not None:
        anchor = scale * anchor  # a divergence, as the errors are log-probabilities
    reference_error, gap, residuals = compared.reference_error, compared.gap, compared.residuals
    # A group without two labels has no weight, but 0 times NaN would still be NaN.
    labels = to_device(batch.rewards.gather(1, chosen).nan_to_num(0.0, 0.0, 0.0), device)
    return GroupErrors(
        policy_error=scale * compared.policy_error,
        reference_error=None if reference_error is None else scale * reference_error,
        rewards=labels,
        mask=to_device(batch.mask, device),
        order=to_device(draws.order.gather(1, chosen), device),
        prediction_gap=scale * gap if gap is not None and objective.needs_gap else None,
        role=labels if objective.label_kind == "role" else None,
        time=to_device(draws.times / process.span, device),
        anchor_gap=anchor,
        policy_l1=None if residuals is None else scale.sqrt()[:, :, None] * residuals,
    )
