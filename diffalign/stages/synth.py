"""`diffalign synth` and `diffalign rank` as functions of a checked config.

Phases: one generator in memory at a time, then one reward at a time, then the ranking. Every phase is work that any number of
processes share (`data/work.py`), so each of them simply runs all phases.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffalign import testbed
from diffalign.config import GeneratorSection, PromptSection, RankConfig, RankSection, SynthConfig
from diffalign.data.choose_members import Limit
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_card import write_own_card
from diffalign.data.plan import IMAGES_PER_SHARD, Part, SynthPlan, remember
from diffalign.data.prompts import PromptRow, hub_prompts, read_prompts, unique_prompts
from diffalign.data.rank import Rules, generator_warning, rank
from diffalign.data.sample import Draw, Drawn, clean_up, draw_part, drawn_already, write_planned_groups
from diffalign.data.score import score_images
from diffalign.data.shared_tasks import WORK_FOLDER, Task, complete_all, local_rank_and_world_size
from diffalign.data.writer import png_bytes
from diffalign.errors import DiffalignError
from diffalign.files import free_bytes, write_whole
from diffalign.pipelines.generator import Generator, load_generator
from diffalign.pipelines.schedulers import replace_scheduler
from diffalign.progress import ImageProgress
from diffalign.stages.data import write_sheet
from diffalign.stages.resolve import (
    loading_options,
    open_reward,
    resolve_device,
    resolve_prompts,
    say,
    weights_digest,
)

PROBE_BATCHES = 2
# As the models' pages name them.
LICENCES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-cascade": "stable-cascade-nc-community",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "openrail++",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "shapes-sd3": "apache-2.0",
    "shapes-sdxl": "apache-2.0",
}


def synth(config: SynthConfig, dry_run: bool = False) -> None:
    """`diffalign synth`: prompts, images, scores, preferences."""
    number, world = local_rank_and_world_size()
    device = resolve_device(config.device)
    if device == "cuda" and world > 1:
        device = f"cuda:{number}"
        torch.cuda.set_device(number)
    if config.threads:
        torch.set_num_threads(config.threads)
    plan = make_plan(config)
    if dry_run:
        estimate(config, plan, device)
        return
    out = config.out
    remember(out, _settings(config, plan))
    for part, section in enumerate(config.generators):
        if drawn_already(plan, part, out):
            say(f"{section.name}: all images are there")
            continue
        generator, provenance = _open(section, device)
        _same_model(out, section.name, provenance)
        draw = drawer(generator, section, config.latents)
        mine = draw_part(plan, part, out, draw, provenance, ImageProgress().named(section.name), config.latents)
        generator.close()
        say(f"{section.name}: this process drew {mine} images")
    write_planned_groups(plan, out, config.split)
    dataset = PreferenceDataset(out)
    _say_failures(out)
    for reward in config.rewards:
        scored = score_images(
            dataset, open_reward(reward), config.reward_batch, settings=reward.model_dump(exclude={"name"})
        )
        say(f"{reward.name}: this process scored {scored} images")
    if config.rewards:
        rank_stage(dataset, config.rank, [reward.name for reward in config.rewards])
    _card(out)
    if config.contact_sheet:
        sheet = out / "contact.html"
        make = lambda: write_sheet(PreferenceDataset(out), sheet, config.contact_sheet)  # noqa: E731
        complete_all([Task("sheet", sheet.is_file, make)], out / WORK_FOLDER / "locks")
    clean_up(out)
    say(f"dataset: {out}")


def make_plan(config: SynthConfig) -> SynthPlan:
    """Prompts x generators, from the config alone."""
    parts = [Part(g.name, g.images_per_prompt, g.batch_size) for g in config.generators]
    return SynthPlan(tuple(prompt_rows(config.prompts, config.seed)), tuple(parts), config.seed)


def prompt_rows(section: PromptSection, seed: int) -> list[PromptRow]:
    """The prompts that a config names."""
    kind, _, rest = section.source.partition(":")
    if kind == "hub":
        rows = hub_prompts(rest, section.column, section.split)
    elif kind == "testbed":
        rows = resolve_prompts(section.source, section.n, seed)
    else:
        rows = read_prompts(section.source, section.column, section.split)
    return (unique_prompts(rows) if section.unique else rows)[: section.n]


def drawer(generator: Generator, section: GeneratorSection, latents: bool) -> Draw:
    """What `draw_part` calls, with the section's settings."""

    def draw(prompts: list[str], seeds: list[int]) -> list[Drawn]:
        found = generator.draw(
            prompts,
            seeds,
            steps=section.steps,
            guidance_scale=section.guidance_scale,
            negative_prompt=section.negative_prompt,
            height=section.height,
            width=section.width,
            options=section.options,
            latents=latents,
        )
        return [Drawn(image, latent) for image, latent in found]

    return draw


def rank_stage(dataset: PreferenceDataset, section: RankSection, rewards: list[str], shuffle: bool = False) -> None:
    """Rank, and write what was done to ranking.json; once, whatever the number of processes. The same again does nothing."""
    sources = section.sources or rewards
    settings = {**section.model_dump(mode="json", include=set(RankSection.model_fields)), "sources": sources}
    settings |= {"shuffle": shuffle, "scored_by": {name: dataset.scored_by(name) for name in _rewards_of(sources)}}
    path = dataset.folder / "ranking.json"
    rules = Rules(
        aggregate=section.aggregate,
        weights=section.weights,
        min_gap=section.min_gap,
        choose=section.choose,
        k=section.k,
        limits=tuple(Limit(limit.source, limit.min, limit.max) for limit in section.limits),
        duplicates=section.duplicates,
        splits=section.splits,
        seed=section.seed,
    )

    def done() -> bool:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["settings"] == settings

    def make() -> None:
        report = rank(dataset, sources, section.seed if shuffle else None, rules)
        (dataset.folder / "contact.html").unlink(missing_ok=True)  # it shows the old order
        if (dataset.folder / "sampling.json").is_file():
            (dataset.folder / "README.md").unlink(missing_ok=True)
        write_whole(path, json.dumps({"settings": settings, "report": report}, indent=1) + "\n")

    complete_all([Task("rank", done, make)], dataset.folder / WORK_FOLDER / "locks")
    report = json.loads(path.read_text(encoding="utf-8"))["report"]
    dropped = "".join(f"; {n} dropped ({why})" for why, n in report["dropped"].items())
    say(f"ranked {report['groups']} groups by {', '.join(sources)}{dropped}; {report['images']} images count")
    if report["without_preference"]:
        say(f"{report['without_preference']} groups state no preference (all equal)")
    if warning := generator_warning(report["generator_explains"]):
        say(warning)


def rank_again(config: RankConfig) -> None:
    """`diffalign rank`."""
    dataset = PreferenceDataset(config.data)
    rank_stage(dataset, config, dataset.rewards(), config.shuffle)
    if (config.data / "sampling.json").is_file():  # `diffalign synth` wrote the card; a folder of others keeps its own
        _card(config.data)
    clean_up(config.data)


def _card(out: Path) -> None:
    """README.md: what the dataset is, and under which licences of its generators it stands."""
    make = lambda: write_own_card(PreferenceDataset(out))  # noqa: E731
    complete_all([Task("card", (out / "README.md").is_file, make)], out / WORK_FOLDER / "locks")


def estimate(config: SynthConfig, plan: SynthPlan, device: str) -> None:
    """`--dry-run`: draw and score a batch or two of each kind, and multiply. Nothing is written.

    The first batch of a model is not counted where there is a second one: it pays for what is set up once.
    """
    _, world = local_rank_and_world_size()
    seconds, size, images = 0.0, 0.0, []
    say(f"{len(plan.prompts)} prompts, {plan.images} images")
    for part, section in enumerate(config.generators):
        generator, _ = _open(section, device)
        draw = drawer(generator, section, config.latents)
        count = len(plan.prompts) * section.images_per_prompt
        batches = [batch for shard in plan.shards(part) for batch in shard.batches][:PROBE_BATCHES]
        taken: list[float] = []
        drawn: list[Drawn] = []
        for batch in batches:
            each, drawn = timed(partial(draw, [c.prompt for c in batch], [c.seed for c in batch]))
            taken.append(each / len(batch))
        pictures = [png_bytes(d.image) for d in drawn]
        latent = sum(2 * d.latent.size for d in drawn if d.latent is not None) / len(drawn)
        each_size = sum(map(len, pictures)) / len(pictures) + latent
        images += [(batches[-1][i].prompt, d.image) for i, d in enumerate(drawn)]
        seconds, size = seconds + taken[-1] * count, size + each_size * count
        say(f"  {section.name}: {count} images, {taken[-1]:.3g} s and {each_size / 1e6:.3g} MB each")
        generator.close()
    facts = {row.prompt: {**row.metadata, "prompt": row.prompt} for row in plan.prompts}
    prompts = [prompt for prompt, _ in images]
    for judge in config.rewards:
        measure = partial(open_reward(judge).measure, [i for _, i in images], prompts, [facts[p] for p in prompts])
        each = [timed(measure)[0] for _ in range(PROBE_BATCHES)][-1] / len(images)
        seconds += each * plan.images
        say(f"  {judge.name}: {each:.3g} s an image")
    free = free_bytes(config.out)
    say(f"time: {duration(seconds / world)} on {world} process{'es' if world > 1 else ''}, without loading the models")
    say(f"disk: {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
    if config.price_per_hour is not None:
        say(f"cost: {seconds / 3600 * config.price_per_hour:.2f} at {config.price_per_hour:g} an hour and process")
    if size > free:
        raise DiffalignError(f"out {config.out}: {size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that an action takes, work on the GPU included, and its result."""
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _open(section: GeneratorSection, device: str) -> tuple[Generator, dict[str, Any]]:
    """The model of a section, and what is written beside each of its images."""
    model = section.model
    path = str(testbed.model_path(model.path)) if model.path in testbed.MODELS else model.path
    options = loading_options(model)
    generator = load_generator(path, dtype=getattr(torch, model.dtype), device=device, prior=section.prior, **options)
    if section.weights is not None:
        generator.load_weights(section.weights)
    if section.scheduler is not None:
        replace_scheduler(generator.pipeline, section.scheduler.name, section.scheduler.options)
    provenance: dict[str, Any] = {**generator.facts(), "model": model.path}
    provenance |= section.model_dump(
        mode="json", include={"steps", "guidance_scale", "negative_prompt", "height", "width", "options", "prior"}
    )
    provenance["licence"] = section.licence or LICENCES.get(model.path)
    provenance["scheduler_options"] = section.scheduler.options if section.scheduler else {}
    provenance["weights"] = None if section.weights is None else folder_digest(section.weights)
    return generator, provenance


def _same_model(out: Path, name: str, provenance: dict[str, Any]) -> None:
    """A model that has changed since the first image was drawn must not draw the rest."""
    path = out / "generators" / f"{name}.json"
    text = json.dumps(provenance, indent=1, sort_keys=True) + "\n"
    complete_all([Task(f"model-{name}", path.is_file, lambda: write_whole(path, text))], out / WORK_FOLDER / "locks")
    before = json.loads(path.read_text(encoding="utf-8"))
    # `vae` follows from the fingerprint, and older folders lack it.
    judged = [key for key in provenance if key not in ("licence", "vae")]
    changed = next((key for key in judged if before.get(key) != provenance[key]), None)
    if changed:
        raise DiffalignError(
            f"generator {name}: images were drawn with {changed}={before.get(changed)!r}, now it is "
            f"{provenance[changed]!r}; pin model.revision, or choose another folder"
        )


def _settings(config: SynthConfig, plan: SynthPlan) -> dict[str, Any]:
    """What decides the images: written into sampling.json, and must stay the same."""
    told = {"model", "prior", "weights", "scheduler", "steps", "guidance_scale", "negative_prompt", "height", "width"}
    told |= {"images_per_prompt", "batch_size", "options", "name"}
    generators = [section.model_dump(mode="json", include=told) for section in config.generators]
    for section in generators:
        section["model"] = {k: v for k, v in section["model"].items() if k not in ("token", "local_files_only")}
    return {
        "generators": generators,
        "seed": config.seed,
        "prompts": plan.digest(),
        "latents": config.latents,
        "threads": config.threads,
        "images_per_shard": IMAGES_PER_SHARD,
    }


def _rewards_of(sources: list[str]) -> list[str]:
    return sorted({source.partition(".")[0] for source in sources})


def _say_failures(out: Path) -> None:
    failures = out / "failed.jsonl"
    if failures.is_file():
        lines = failures.read_text(encoding="utf-8").splitlines()
        say(f"{len(lines)} images could not be drawn, their prompts are set aside; reasons: {failures}")


def folder_digest(weights: Path) -> str:
    """Hash of the weights in a folder."""
    if not any(weights.rglob("*.safetensors")):
        raise DiffalignError(f"weights {weights}: no .safetensors file in it")
    return weights_digest(weights)
