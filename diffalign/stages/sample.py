"""`diffalign sample`: prompts to a folder of image groups."""

from pathlib import Path

from diffalign.config import SampleConfig
from diffalign.data.cut_prompts import cut_lines
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.pictures import write_pictures
from diffalign.data.sample import sample_groups
from diffalign.files.lock import writing_folder
from diffalign.progress import ImageProgress, say
from diffalign.stages.resolve import (
    check_guidance_scale,
    note_other_base,
    open_backbone,
    resolve_device,
    resolve_prompts,
    sampling_settings,
    settled,
    weights_digest,
)


def sample(config: SampleConfig, images: Path | None = None) -> None:
    """Draw groups of images for prompts into a dataset folder: `diffalign sample`; `images`: a folder of plain files, too."""
    with writing_folder(config.out, "out", shared=True):
        _sample(config)
    if images is not None:
        say(f"images:  {write_pictures(PreferenceDataset(config.out), images)} in {images}")


def _sample(config: SampleConfig) -> None:
    config = settled(config)
    backbone = open_backbone(config.model, resolve_device(config.device))
    check_guidance_scale(config.guidance_scale, backbone)
    # Record the name that the user gave: the folder of a shipped model differs from machine to machine.
    origin: dict[str, str | None] = {"model": config.model.path}
    if config.weights is not None:
        note_other_base(config.weights, config.model)
        backbone.load_weights(config.weights)
        origin["weights"] = weights_digest(Path(config.weights))
    prompts = resolve_prompts(config.prompts, config.n, config.seed)
    for line in cut_lines({"the model": backbone}, [row.prompt for row in prompts]):
        say(line)
    sample_groups(
        backbone,
        prompts,
        config.out,
        images_per_prompt=config.images_per_prompt,
        seed=config.seed,
        settings=sampling_settings(config),
        batch_size=config.batch_size,
        origin=origin,
        on_progress=ImageProgress().named("sampling"),
    )
    say(f"dataset: {config.out}")
