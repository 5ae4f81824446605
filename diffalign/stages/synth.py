"""`diffalign synth`: prompts to a ranked dataset.

Phases: one generator in memory at a time, then one reward at a time, then the ranking. Every phase is work that any number of
processes share (`data/shared_tasks.py`), so each of them simply runs all phases.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from diffalign.cluster import LOCAL, Engine, open_engine
from diffalign.config import RewardSection, SynthConfig
from diffalign.data.cut_prompts import PromptReader, cut_lines
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_card import GENERATOR_MEND
from diffalign.data.plan import IMAGES_PER_SHARD, Cell, Part, SynthPlan, remember
from diffalign.data.sample import (
    BatchKey,
    DrawnBatch,
    clean_up,
    draw_part,
    draw_part_remotely,
    drawn_already,
    write_planned_groups,
)
from diffalign.data.score import OpenJudge, score_images, unscored
from diffalign.data.score import Remote as RemoteScores
from diffalign.data.shared_tasks import WORK_FOLDER, Task, complete_all, local_rank_and_world_size
from diffalign.data.writer import png_bytes
from diffalign.errors import DiffalignError
from diffalign.files import free_bytes, read_json, write_whole
from diffalign.files.lock import writing_folder
from diffalign.files.remote import check_writable, is_address, join, upload
from diffalign.progress import ImageProgress, say
from diffalign.rewards import Reward
from diffalign.stages.data import write_sheet
from diffalign.stages.drawing import OpenPainter, drawer, provenance_of
from diffalign.stages.rank import rank_dataset, write_card_once
from diffalign.stages.resolve import open_generator, resolve_dtype, resolve_prompts
from diffalign.stages.resolve_rewards import open_reward, process_device

Result = TypeVar("Result")

PROBE_BATCHES = 2
REASONS_SHOWN = 5
LATER_KEYS = ("lora_text_encoders", "config")
"""Keys of a model that the plans of earlier folders lack."""


def synth(config: SynthConfig, dry_run: bool = False) -> None:
    """Make a ranked dataset from prompts: `diffalign synth`. dry_run: print time, disk and cost, and write nothing."""
    if dry_run and config.engine != LOCAL:
        raise DiffalignError(f"engine={config.engine}: --dry-run measures this machine; use engine=local with it")
    if config.upload and not is_address(config.upload):
        raise DiffalignError(f"upload={config.upload}: no address, such as s3://bucket/data")
    if config.upload and not dry_run:
        check_writable(join(config.upload, "dataset"))
    if config.threads:
        torch.set_num_threads(config.threads)
    # On a cluster this process alone writes the folder.
    with (
        writing_folder(None if dry_run else config.out, "out", shared=config.engine == LOCAL),
        open_engine(config.engine, config.device, config.actors) as engine,
    ):
        _synth(config, dry_run, engine)


def _synth(config: SynthConfig, dry_run: bool, engine: Engine | None) -> None:
    device = process_device("cpu" if engine else config.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if engine:
        models = [engine.call(resolve_dtype, section.model, engine.device) for section in config.generators]
    else:
        models = [resolve_dtype(section.model, device) for section in config.generators]
    parts = [s.model_copy(update={"model": m}) for s, m in zip(config.generators, models, strict=True)]
    config = config.model_copy(update={"generators": parts})
    plan = make_plan(config)
    rewards = [open_reward(section, device) for section in config.rewards]  # weights load with the first image
    _check_rewards(config, plan, rewards)
    if dry_run:
        estimate(config, plan, device)
        return
    out = config.out
    remember(out, _settings(config, plan))

    # Draw, one generator in memory at a time.
    for part in range(len(config.generators)):
        _draw_part(config, plan, part, device, engine)
    write_planned_groups(plan, out, config.split)
    _print_failures(out)

    # Score, one reward in memory at a time.
    dataset = PreferenceDataset(out)
    for section in config.rewards:
        reward = rewards.pop(0)
        remote = None if engine is None else _remote_scores(engine, section, reward)
        scored = score_images(dataset, reward, config.reward_batch, remote=remote)
        _say_cut(plan, section.name, reward)
        del reward  # before the next one loads
        say(f"{section.name}: this process scored {scored} images")
        for reason, count in unscored(dataset, section.label).most_common(REASONS_SHOWN):
            say(f"{section.name}: {count} images have no score: {reason}")

    # Rank, and describe what came out.
    if config.rewards:
        rank_dataset(dataset, config.rank, [section.label for section in config.rewards])
    write_card_once(out)
    if config.contact_sheet:
        sheet = out / "contact.html"
        make = lambda: write_sheet(PreferenceDataset(out), sheet, config.contact_sheet)  # noqa: E731
        complete_all([Task("sheet", sheet.is_file, make)], out / WORK_FOLDER / "locks")
    if config.upload:
        _send(out, config.upload)
    clean_up(out)
    say(f"dataset: {out}")


def _send(out: Path, address: str) -> None:
    """Copy the dataset to an address; one process of several does."""
    done = out / WORK_FOLDER / "uploaded"

    def make() -> None:
        upload(out, address)
        done.touch()

    complete_all([Task("upload", done.is_file, make)], out / WORK_FOLDER / "locks")
    say(f"uploaded: {address}")


def _say_cut(plan: SynthPlan, name: str, reader: PromptReader) -> None:
    """Say how many prompts a generator or a reward reads in part only; one process of several does."""
    if local_rank_and_world_size()[0] == 0:
        for line in cut_lines({name: reader}, [row.prompt for row in plan.prompts]):
            say(line)


def _remote_scores(engine: Engine, section: RewardSection, reward: Reward) -> RemoteScores:
    """Return what scores batches in actors with a reward of the same weights."""
    opened = OpenJudge(section.name, partial(open_reward, section, engine.device), reward.provenance())
    return partial(engine.run, opened)


def _draw_part(config: SynthConfig, plan: SynthPlan, part: int, device: str, engine: Engine | None) -> None:
    """Draw the images of one generator, as far as other processes or an earlier command have not."""
    section, out = config.generators[part], config.out
    if drawn_already(plan, part, out):
        say(f"{section.name}: all images are drawn already")
        return
    progress = ImageProgress().named(section.name)
    if engine is not None:
        count = draw_part_remotely(plan, part, out, _Nodes(engine, config, plan, part), progress, config.latents)
        say(f"{section.name}: the cluster drew {count} images")
        return
    generator = open_generator(section, device)
    provenance = provenance_of(section, generator)
    _check_same_model(out, section.name, provenance)
    _say_cut(plan, section.name, generator)
    draw = drawer(generator, section, config.latents)
    count = draw_part(plan, part, out, draw, provenance, progress, config.latents)
    generator.close()
    say(f"{section.name}: this process drew {count} images")


@dataclass(frozen=True)
class _Nodes:
    """Draws the batches of one generator in actors, and checks that all of them have the dataset's model."""

    engine: Engine
    config: SynthConfig
    plan: SynthPlan
    part: int

    def __call__(
        self, orders: Iterable[tuple[BatchKey, tuple[Cell, ...]]], count: int
    ) -> Iterator[tuple[BatchKey, DrawnBatch]]:
        section = self.config.generators[self.part]
        prompts = tuple(row.prompt for row in self.plan.prompts)
        opened = OpenPainter(section, self.engine.device, self.config.latents, prompts)
        seen = False
        for key, drawn in self.engine.run(opened, orders, count):
            _check_same_model(self.config.out, section.name, drawn.provenance)
            for line in () if seen else drawn.cut:
                say(line)
            seen = True
            yield key, drawn.batch


def _check_rewards(config: SynthConfig, plan: SynthPlan, rewards: list[Reward]) -> None:
    """Say before anything is drawn how many prompts a reward cannot score; refuse a reward that can score none."""
    for section, reward in zip(config.rewards, rewards, strict=True):
        reasons = [reward.reason_not_scorable(row.prompt, row.metadata) for row in plan.prompts]
        found = Counter(reason for reason in reasons if reason)
        total, reason = sum(found.values()), next(iter(found), "")
        if total == len(reasons):
            raise DiffalignError(
                f"rewards: {section.name} cannot score any prompt of {config.prompts.source}: {reason}"
            )
        if total:
            say(f"{section.name}: {total} of {len(reasons)} prompts cannot be scored, the first: {reason}")


def make_plan(config: SynthConfig) -> SynthPlan:
    """Return the plan of all images, prompts times generators."""
    parts = [Part(g.name, g.images_per_prompt, g.batch_size) for g in config.generators]
    wanted = config.prompts
    rows = resolve_prompts(
        wanted.source, wanted.n, config.seed, column=wanted.column, split=wanted.split, unique=wanted.unique
    )
    return SynthPlan(tuple(rows), tuple(parts), config.seed)


def estimate(config: SynthConfig, plan: SynthPlan, device: str) -> None:
    """Print the time, disk and cost of a run, from a batch or two of each generator and reward. Nothing is written.

    Raises DiffalignError where the images do not fit on the disk.
    """
    _, world = local_rank_and_world_size()
    say(f"{len(plan.prompts)} prompts, {plan.images} images")
    probes = [_probe_generator(config, plan, part, device) for part in range(len(config.generators))]
    seconds, size = sum(probe.seconds for probe in probes), sum(probe.bytes for probe in probes)
    images = [image for probe in probes for image in probe.images]
    seconds += sum(_probe_reward(section, plan, images, device) for section in config.rewards)

    free = free_bytes(config.out)
    say(f"time: {duration(seconds / world)} on {world} process{'es' if world > 1 else ''}, without loading the models")
    say(f"disk: {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
    if config.price_per_hour is not None:
        say(f"cost: {seconds / 3600 * config.price_per_hour:.2f} at {config.price_per_hour:g} an hour and process")
    if size > free:
        raise DiffalignError(f"out {config.out}: {size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")


@dataclass(frozen=True)
class Probe:
    """What all images of a generator cost, and the prompts and images of its last probed batch."""

    seconds: float
    bytes: float
    images: list[tuple[str, Image.Image]]


def _probe_generator(config: SynthConfig, plan: SynthPlan, part: int, device: str) -> Probe:
    """Draw the first batches of a generator. The last one counts: the first pays for what is set up once."""
    section = config.generators[part]
    generator = open_generator(section, device)
    draw = drawer(generator, section, config.latents)
    batches = [batch for shard in plan.shards(part) for batch in shard.batches][:PROBE_BATCHES]
    timings = [timed(partial(draw, [c.prompt for c in batch], [c.seed for c in batch])) for batch in batches]
    generator.close()
    batch, (taken, drawn) = batches[-1], timings[-1]
    seconds = taken / len(batch)
    size = sum(len(png_bytes(d.image)) + (0 if d.latent is None else 2 * d.latent.size) for d in drawn) / len(drawn)
    count = len(plan.prompts) * section.images_per_prompt
    say(f"  {section.name}: {count} images, {seconds:.3g} s and {size / 1e6:.3g} MB each")
    images = [(cell.prompt, d.image) for cell, d in zip(batch, drawn, strict=True)]
    return Probe(seconds * count, size * count, images)


def _probe_reward(section: RewardSection, plan: SynthPlan, images: list[tuple[str, Image.Image]], device: str) -> float:
    """Return the seconds that a reward needs for all images of the plan."""
    facts = {row.prompt: {**row.metadata, "prompt": row.prompt} for row in plan.prompts}
    reward = open_reward(section, device)
    images = [(p, image) for p, image in images if not reward.reason_not_scorable(p, facts[p])]
    if not images:
        say(f"  {section.name}: none of the drawn prompts can be scored, so its time is not in the estimate")
        return 0.0
    prompts = [prompt for prompt, _ in images]
    measure = partial(reward.measure, [image for _, image in images], prompts, [facts[p] for p in prompts])
    seconds = [timed(measure)[0] for _ in range(PROBE_BATCHES)][-1] / len(images)
    say(f"  {section.name}: {seconds:.3g} s an image")
    return seconds * plan.images


def timed(action: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that an action takes, work on the GPU included, and its result."""
    start = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def duration(seconds: float) -> str:
    """Return a duration in words, such as `5 min`."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _check_same_model(out: Path, name: str, provenance: dict[str, Any]) -> None:
    """Refuse to continue a dataset with a model that has changed since its first image."""
    path = out / "generators" / f"{name}.json"
    text = json.dumps(provenance, indent=1, sort_keys=True) + "\n"
    complete_all([Task(f"model-{name}", path.is_file, lambda: write_whole(path, text))], out / WORK_FOLDER / "locks")
    before = read_json(path, GENERATOR_MEND, "licence")
    # `vae` and `noise` follow from the others, and older folders lack them.
    compared = [key for key in provenance if key not in ("licence", "vae", "noise")]
    changed = next((key for key in compared if before.get(key) != provenance[key]), None)
    if changed:
        raise DiffalignError(
            f"generator {name}: images were drawn with {changed}={before.get(changed)!r}, now it is "
            f"{provenance[changed]!r}; pin model.revision, or choose another folder"
        )


def _settings(config: SynthConfig, plan: SynthPlan) -> dict[str, Any]:
    """Return what decides the images; sampling.json keeps it, and the same folder takes no other."""
    keys = {"model", "prior", "weights", "scheduler", "steps", "guidance_scale", "negative_prompt", "height", "width"}
    keys |= {"images_per_prompt", "batch_size", "options", "name"}
    generators = [section.model_dump(mode="json", include=keys) for section in config.generators]
    for section, given in zip(generators, config.generators, strict=True):
        # A later key counts where it says something else than was done then.
        former = given.model.former_values()
        section["model"] = {
            key: value
            for key, value in section["model"].items()
            if key not in ("token", "local_files_only") and (key not in LATER_KEYS or value != former[key])
        }
    return {
        "generators": generators,
        "seed": config.seed,
        "prompts": plan.digest(),
        "latents": config.latents,
        "threads": config.threads,
        "images_per_shard": IMAGES_PER_SHARD,
    }


def _print_failures(out: Path) -> None:
    """Print how many images could not be drawn, and where the reasons are."""
    failures = out / "failed.jsonl"
    if failures.is_file():
        lines = failures.read_text(encoding="utf-8").splitlines()
        say(f"{len(lines)} images could not be drawn, and their prompts are left out; reasons: {failures}")
