"""`diffalign train`: a preference dataset and a model to trained weights."""

import torch

from diffalign.config import TrainConfig
from diffalign.data.cache import check_conditions
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.labels import shuffled_labels
from diffalign.data.training_source import ChosenLabels, check_guidance, choose_labels, prepare_source
from diffalign.errors import DiffalignError
from diffalign.files.images import displayed_size
from diffalign.files.lock import writing_folder
from diffalign.health import examine_labels
from diffalign.objectives import check_labels, has_preference
from diffalign.pipelines.settings import SamplingSettings
from diffalign.progress import say
from diffalign.stages.checks import check_packages, check_validation
from diffalign.stages.describe_training import describe_training
from diffalign.stages.dry_run import (
    MANY_EPOCHS,
    TIME_UNKNOWN,
    print_config,
    print_facts,
    warn,
)
from diffalign.stages.fingerprints import of_data, of_model
from diffalign.stages.micro_batch import kept_micro_batch, open_fitting
from diffalign.stages.resolve import (
    open_validation,
    planned_backbone,
    settled,
    with_judges,
)
from diffalign.stages.resolve_rewards import resolve_device
from diffalign.stages.train_online import train_online
from diffalign.stages.trainer import run_and_report
from diffalign.training.checkpoint import check_before_loading
from diffalign.training.device import precision_of, start_accelerator
from diffalign.training.preference.method import Preference

LOOKED_AT = 32
"""Groups whose pictures' sizes a dry run looks at."""


def train(config: TrainConfig, dry_run: bool = False) -> None:
    """Train a model on preference data: `diffalign train`."""
    with writing_folder(None if dry_run else config.run_dir, "run_dir"):
        _train(config, dry_run)


def _train(config: TrainConfig, dry_run: bool) -> None:
    learnt = [reward.name for reward in config.train.online.rewards] if config.train.online else []
    config, device = kept_micro_batch(with_judges(settled(config), learnt)), resolve_device(config.device)
    check_before_loading(config)
    if dry_run:
        print_config(config)
    else:
        check_packages(config)
    if config.train.online is not None:
        train_online(config, config.train.online, device, dry_run)
        return
    dataset = PreferenceDataset(config.data.folder)
    labels = choose_labels(config.data, config.labels, dataset)
    _check_preferences(config, dataset, labels)
    judged, judges = check_validation(config.validation, device, dry_run)
    if dry_run:
        _describe(config, dataset, labels, device, judges)
        return
    accelerator = start_accelerator(config)
    resolved = {"train.mixed_precision": precision_of(config, cuda=accelerator.device.type == "cuda")}
    check_before_loading(config, resolved)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    config, backbone = open_fitting(config, labels.members, accelerator)
    check_guidance(config.data, dataset, backbone)
    # The processes fill the cache together, and wait for each other's files; no collective waits meanwhile.
    source = prepare_source(
        config.data, config.labels, dataset, backbone, say, labels, tracked=config.noise == "tracked"
    )
    if source.label_stats:
        # Into config.yaml: another run can then share the scale, and this one cannot go on with another.
        config = config.model_copy(update={"labels": config.labels.model_copy(update={"stats": source.label_stats})})
        say(f"labels.stats: {', '.join(f'{key} {value:.6g}' for key, value in source.label_stats.items())}")
    # Roles say who made an image: that its maker explains them is no finding.
    roles = config.objective.kind.label_kind == "role"
    compared = config.objective.kind.label_kind != "none"
    weightless = int((~has_preference(source.rewards, source.mask)).sum()) if compared else 0
    findings = [] if roles else examine_labels(source.labelled(dataset), weightless)
    if config.labels.source == "preference":
        findings += shuffled_labels(dataset)
    wanted, side = config.validation, config.data.resolution or backbone.default_resolution
    drawn = SamplingSettings(wanted.steps, wanted.guidance_scale, wanted.negative_prompt, side, side)
    validation = (
        None if judged is None else open_validation(wanted, backbone, judged.rows, judged.rewards, config.seed, drawn)
    )
    if config.data.cache != "off":
        backbone.drop_encoders(keep_vae=validation is not None, keep_text=config.data.cache == "latents")
    method = Preference(config, backbone, source, accelerator, say)
    resolved |= of_model(backbone, config.tune) | of_data(dataset, source)
    run_and_report(config, method, validation=validation, findings=findings, resolved=resolved)


def _check_preferences(config: TrainConfig, dataset: PreferenceDataset, labels: ChosenLabels) -> None:
    """Refuse labels that the objective does not take, condition images for some groups alone, and data without preferences."""
    if problem := check_labels(labels.rewards, config.objective.kind.label_kind):
        raise DiffalignError(f"labels.source={config.labels.source}: {problem}")
    check_conditions(dataset, labels.rows)
    if config.objective.kind.label_kind != "none" and not has_preference(labels.rewards, labels.mask).any():
        raise DiffalignError(
            f"data.path {config.data.path}: no group states a preference, there is nothing to learn; "
            "its scores may all be equal, or the groups may have one image each"
        )


def _describe(
    config: TrainConfig, dataset: PreferenceDataset, labels: ChosenLabels, device: str, judges: dict[str, str]
) -> None:
    """Print what a run would do, from the files alone: nothing is written or downloaded, no GPU memory is taken."""
    chosen, members, smaller = labels.rows, labels.members, labels.smaller
    facts = dataset.facts(config.data.split)
    epochs = config.train.steps * config.train.groups_per_step / len(chosen)
    print_facts("dataset", facts)
    print_facts("run", {
        "device": device,
        "groups used": f"{len(chosen)} of {members} images" + (f", {smaller} of them smaller" if smaller else ""),
        "images of a group in a step": config.data.group_size or members,
        "steps": f"{config.train.steps} x {config.train.groups_per_step} groups = {epochs:.2f} epochs",
        "time": TIME_UNKNOWN,
    })  # fmt: skip
    if epochs > MANY_EPOCHS:
        steps = max(1, MANY_EPOCHS * len(chosen) // config.train.groups_per_step)
        warn(f"{epochs:.0f} epochs: the same groups again and again; {MANY_EPOCHS} are train.steps={steps}")
    if config.validation.every is None:
        warn("no validation: nothing tells when to stop; set validation.every and validation.prompts=FILE")

    backbone = planned_backbone(config.model)
    if backbone is not None:
        check_guidance(config.data, dataset, backbone)
        _warn_of_size(config, dataset, chosen, backbone.default_resolution)
    describe_training(config, backbone, members, device, judges)


def _warn_of_size(config: TrainConfig, dataset: PreferenceDataset, chosen: list[int], own: int) -> None:
    """Warn where most pictures are smaller than the resolution they are trained at, or that is far from the model's own."""
    wanted = config.data.resolution or own
    ids = dataset.column("group_id")
    sizes = [displayed_size(image.data) for i in chosen[:LOOKED_AT] for image in dataset.images(ids[i])[:1]]
    small = [size for size in sizes if min(size) < wanted]
    if 2 * len(small) > len(sizes):
        least = "x".join(map(str, min(small, key=min)))
        warn(
            f"pictures are smaller than the resolution {wanted} (such as {least}) and would be enlarged; set data.resolution"
        )
    if 2 * wanted < own or wanted > 2 * own:
        warn(f"the resolution {wanted} is far from the model's own, {own}")
