"""`diffalign train`: a preference dataset and a model to trained weights."""

import os

import torch

from diffalign.config import TrainConfig, resolved_yaml
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.labels import shuffled_labels
from diffalign.data.training_source import check_guidance, choose_groups, prepare_source
from diffalign.errors import DiffalignError
from diffalign.files.lock import writing_folder
from diffalign.health import examine_labels
from diffalign.objectives import has_preference
from diffalign.pipelines.settings import SamplingSettings
from diffalign.progress import say, say_block
from diffalign.stages.fingerprints import of_data, of_model
from diffalign.stages.resolve import note_other_base, open_backbone, open_validation, resolve_device, settled
from diffalign.stages.trainer import run_and_report
from diffalign.training.checkpoint import check_before_loading
from diffalign.training.device import start_accelerator
from diffalign.training.memory import described
from diffalign.training.optim import check_installed
from diffalign.training.preference.method import Preference


def train(config: TrainConfig, dry_run: bool = False) -> None:
    """Train a model on preference data: `diffalign train`."""
    with writing_folder(None if dry_run else config.run_dir, "run_dir"):
        _train(config, dry_run)


def _train(config: TrainConfig, dry_run: bool) -> None:
    config, device = settled(config), resolve_device(config.device)
    check_installed(config.optimizer)
    check_before_loading(config)
    dataset = PreferenceDataset(config.data.path)
    if dry_run:
        _describe(config, dataset, device)
        return
    accelerator = start_accelerator(config)
    resolved = {"train.mixed_precision": accelerator.mixed_precision}
    check_before_loading(config, resolved)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    note_other_base(config.tune.init, config.model)
    backbone = open_backbone(config.model, str(accelerator.device))
    check_guidance(config.data, dataset, backbone)
    # The processes fill the cache together, and wait for each other's files; no collective waits meanwhile.
    source = prepare_source(config.data, config.labels, dataset, backbone, say)
    if config.objective.kind.label_kind != "none" and not has_preference(source.rewards, source.mask).any():
        raise DiffalignError(
            f"data.path {config.data.path}: no group states a preference, there is nothing to learn; "
            "its scores may all be equal, or the groups may have one image each"
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
    validation = open_validation(wanted, backbone, device, config.seed, drawn)
    if config.data.cache != "off":
        backbone.drop_encoders(keep_vae=validation is not None, keep_text=config.data.cache == "latents")
    method = Preference(config, backbone, source, accelerator, say)
    resolved |= of_model(backbone, config.tune) | of_data(dataset, source)
    run_and_report(config, method, validation=validation, findings=findings, resolved=resolved)


def _describe(config: TrainConfig, dataset: PreferenceDataset, device: str) -> None:
    """Print what a run would do, from the files alone: nothing is written, no GPU memory is taken."""
    chosen, members, smaller = choose_groups(config.data, dataset)
    facts = dataset.facts(config.data.split)
    backbone = open_backbone(config.model, "cpu")
    check_guidance(config.data, dataset, backbone)
    epochs = config.train.steps * config.train.groups_per_step / len(chosen)
    say_block(resolved_yaml(config))
    for title, values in (
        ("model", backbone.facts()),
        ("dataset", facts),
        ("run", {
            "device": device,
            "groups used": f"{len(chosen)} of {members} images" + (f", {smaller} of them smaller" if smaller else ""),
            "images of a group in a step": config.data.group_size or members,
            "steps": f"{config.train.steps} x {config.train.groups_per_step} groups = {epochs:.2f} epochs",
        }),
    ):  # fmt: skip
        say(f"# {title}")
        for key, value in values.items():
            say(f"#   {key}: {value}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    memory = described(config, backbone, members, cuda=device != "cpu", processes=processes)  # uses the backbone up
    say("# memory of a process, predicted")
    for key, value in memory.items():
        say(f"#   {key}: {value}")
