"""`diffalign sample`: prompts to a folder of image groups."""

from pathlib import Path
from typing import Any

from diffalign.config import BenchConfig, SampleConfig
from diffalign.data.cut_prompts import cut_lines
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.pictures import write_pictures
from diffalign.data.prompts import PromptRow
from diffalign.data.sample import sample_groups
from diffalign.errors import DiffalignError
from diffalign.files.lock import writing_folder
from diffalign.pipelines import Backbone
from diffalign.progress import ImageProgress, say
from diffalign.stages.dry_run import print_config, print_facts, print_where
from diffalign.stages.resolve import (
    check_guidance_scale,
    note_other_base,
    open_backbone,
    resolve_prompts,
    sampling_settings,
    settled,
    weights_digest,
)
from diffalign.stages.resolve_rewards import resolve_device


def sample(config: SampleConfig, images: Path | None = None, dry_run: bool = False) -> None:
    """Draw groups of images for prompts into a dataset folder: `diffalign sample`; `images`: a folder of plain files, too."""
    rows = resolve_prompts(config.prompts, config.n, config.seed)
    check_drawing_weights(config)
    if dry_run:
        print_config(config)
        print_facts("run", {
            "device": resolve_device(config.device),
            "images": f"{len(rows) * config.images_per_prompt}: {len(rows)} prompts x {config.images_per_prompt}",
            "time": "unknown; it is shown once the first images are drawn",
        })  # fmt: skip
        print_where(config.model, {})
        return
    with writing_folder(config.out, "out", shared=True):
        _sample(config, rows)
    if images is not None:
        say(f"images:  {write_pictures(PreferenceDataset(config.out), images)} in {images}")


def check_drawing_weights(config: SampleConfig | BenchConfig) -> None:
    """Raise DiffalignError where the weights that a config names do not exist."""
    if config.weights is not None and not Path(config.weights).exists():
        raise DiffalignError(f"weights {config.weights}: no such folder; give a run's weights/, or null")


def _sample(config: SampleConfig, rows: list[PromptRow]) -> None:
    config = settled(config)
    backbone, origin = open_drawing(config)
    draw_groups(config, backbone, origin, rows, config.out, config.images_per_prompt)
    say(f"dataset: {config.out}")


def open_drawing(config: SampleConfig | BenchConfig) -> tuple[Backbone, dict[str, str | None]]:
    """Load the model of a settled config with its weights; return it, and what the provenance of its images says of it."""
    backbone = open_backbone(config.model, resolve_device(config.device))
    check_guidance_scale(config.guidance_scale, backbone)
    # Record the name that the user gave: the folder of a shipped model differs from machine to machine.
    origin: dict[str, str | None] = {"model": config.model.path}
    if config.weights is not None:
        note_other_base(config.weights, config.model)
        backbone.load_weights(config.weights)
        origin["weights"] = weights_digest(Path(config.weights))
    return backbone, origin


def draw_groups(
    config: SampleConfig | BenchConfig,
    backbone: Backbone,
    origin: dict[str, str | None],
    rows: list[PromptRow],
    out: Path,
    images_per_prompt: int,
    what: str = "sampling",
) -> None:
    """Draw groups of images for prompts into the dataset folder `out`. what: the name of the work in its progress."""
    for line in cut_lines({"the model": backbone}, [row.prompt for row in rows]):
        say(line)
    settings = sampling_settings(config)
    facts: dict[str, Any] = {"noise": backbone.noise_record(settings)}
    latents = isinstance(config, SampleConfig) and config.latents
    if latents:
        facts["vae"] = backbone.vae_fingerprint()
    sample_groups(
        backbone,
        rows,
        out,
        images_per_prompt=images_per_prompt,
        seed=config.seed,
        settings=settings,
        batch_size=config.batch_size,
        origin=origin,
        facts=facts,
        latents=latents,
        on_progress=ImageProgress().named(what),
    )
