"""`diffalign data convert | inspect | export` and `diffalign cache`, and the contact sheet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.config import TrainConfig
from diffalign.config.synth import split_problem
from diffalign.data.buckets import describe
from diffalign.data.cache import plan_cache
from diffalign.data.convert import import_pairs, open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import export
from diffalign.data.dataset_summary import summarise_dataset
from diffalign.data.imported import Report, write_imported
from diffalign.data.training_source import choose_groups
from diffalign.errors import DiffalignError
from diffalign.files import check_place
from diffalign.files.lock import writing_folder
from diffalign.progress import say, say_aside
from diffalign.report.contact_sheet import small_picture, write_contact_sheet
from diffalign.stages.resolve import open_backbone, settled
from diffalign.stages.resolve_rewards import process_device

FAULTS_SHOWN = 20


def write_sheet(dataset: PreferenceDataset, path: Path, groups: int, facts: dict[str, Any] | None = None) -> None:
    """Write a contact sheet of `groups` groups spread evenly over the dataset, each from best to worst."""
    rewards = {name: dataset.score_array(name) for name in dataset.rewards()}
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(groups, len(dataset))).astype(int))
    shown = [_group(dataset, int(i), rewards) for i in chosen]
    write_contact_sheet(path, dataset.folder.name, facts if facts is not None else summarise_dataset(dataset), shown)


def inspect(folder: Path, html: Path | None = None, groups: int = 100) -> dict[str, Any]:
    """Print what a dataset holds, and return it: `diffalign data inspect`. html: also write a contact sheet there."""
    if html is not None:
        check_place(html)
    dataset = PreferenceDataset(folder)
    facts = summarise_dataset(dataset)
    width = max(map(len, facts))
    for key, value in facts.items():
        say(f"{key:{width}}  {value}")
    if html is not None:
        write_sheet(dataset, html, groups, facts)
        say(f"contact sheet: {html}")
    return facts


def pairs(sources: list[Path], out: Path, split: list[str]) -> None:
    """Write your own pairs as a dataset into `out`: `diffalign pairs`. split: as `read_splits` takes it."""
    with writing_folder(out, "--out"):
        report = import_pairs(sources, out, read_splits(split))
    _print_counted(report)
    say(f"{report.groups} pairs in {out}{_split_counts(report)}; train on them with data.path={out}")


def read_splits(given: list[str]) -> dict[str, float] | None:
    """Return the shares of splits from words such as `validation=0.1`; None for none.

    Raises DiffalignError for words of another form, and for shares that leave nothing to train.
    """
    splits: dict[str, float] = {}
    for word in given:
        name, _, share = word.partition("=")
        try:
            splits[name.strip()] = float(share)
        except ValueError:
            raise DiffalignError(f"--split {word}: should be a name and a share, such as validation=0.1") from None
    if problem := split_problem(splits):
        raise DiffalignError(f"--split {' '.join(given)}: {problem}")
    return splits or None


def _split_counts(report: Report) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in sorted(report.splits.items()))
    return f" ({counts})" if len(report.splits) > 1 else ""


def _print_counted(report: Report) -> None:
    for reason, count in report.counted.items():
        say(f"{count} rows skipped: {reason}")
    if report.unlabelled:
        say(f"{report.unlabelled} images have no label, or none that is a finite number: kept, in no pair")


def convert(sources: list[Path], out: Path, form: str | None = None, split: list[str] | None = None) -> Report:
    """Convert another dataset into `out`: `diffalign data convert`. Broken rows are reported and skipped.

    split: as `read_splits` takes it.
    """
    splits = read_splits(split or [])
    with writing_folder(out, "--out"):
        name, rows = open_rows(sources, form)
        report = write_imported(rows, out, splits=splits)
    for fault in report.faults[:FAULTS_SHOWN]:
        say_aside(f"{fault.where}: {fault.reason}")
    if report.faults:
        more = f", the first {FAULTS_SHOWN} above" if len(report.faults) > FAULTS_SHOWN else ""
        say_aside(f"{len(report.faults)} broken rows were skipped{more}")
    _print_counted(report)
    found = f"{report.groups} groups, {report.images} images in {out}{_split_counts(report)}"
    say(f"{name}: {found}; train on them with data.path={out}")
    return report


def export_data(folder: Path, out: Path, form: str, pairs: str) -> dict[str, int]:
    """Export a dataset and return the rows of each split: `diffalign data export`."""
    with writing_folder(out, "--out"):
        counts = export(PreferenceDataset(folder), out, form, pairs)
    for split, count in counts.items():
        say(f"{split}: {count} rows")
    say(f"{form}: {out}")
    return counts


def cache(config: TrainConfig, dry_run: bool = False) -> None:
    """Encode what `diffalign train` would encode before its first step: `diffalign cache`. dry_run: print its size only."""
    config, dataset = settled(config), PreferenceDataset(config.data.folder)
    chosen, members, _ = choose_groups(config.data, dataset)
    backbone = open_backbone(config.model, "cpu" if dry_run else process_device(config.device))
    plan = plan_cache(config.data, dataset, chosen, members, backbone)
    if plan.mode == "off":
        raise DiffalignError("data.cache=off: nothing is encoded beforehand; set data.cache=all or latents")
    missing = plan.missing()
    if not missing:
        say(f"cache: complete, in {plan.folder}")
        return
    sizes = ", ".join(f"{count} at {size}" for size, count in describe(plan.frames.sizes).items())
    needed = sum(missing.values()) / 1e9
    say(f"cache: {needed:.3g} GB for {len(chosen)} groups of {members} images ({sizes}), in {plan.folder}")
    plan.check_space()
    if not dry_run:
        plan.latents()
        plan.embeddings()


def _group(dataset: PreferenceDataset, i: int, rewards: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return group `i` as the contact sheet shows it, best image first; `rewards`: scores of all images, by name."""
    row = dataset.group(i)
    members = dataset.members(row["group_id"])
    ranked = row["preference"] if row["preference"] and len(row["preference"]) == len(members) else []
    shares = dict(zip(members, ranked, strict=False))
    images = []
    for place in range(int(dataset.image_index.starts[i]), int(dataset.image_index.starts[i + 1])):
        image = dataset.image_at(place)
        shown: dict[str, Any] = {"image": None, "reason": "", "generator": image.generator, "seed": image.seed}
        try:
            shown["image"] = small_picture(image.decode())
        except DiffalignError:
            shown["reason"] = "unreadable"
        scores = {name: _number(values[place]) for name, values in rewards.items()}
        shown |= {"index": image.index, "preference": shares.get(image.index), "scores": scores}
        images.append({**shown, "counts": image.index in members})
    images.sort(key=lambda one: (not one["counts"], -(one["preference"] or 0.0), one["index"]))
    return {"prompt": row["prompt"], "split": row["split"], "dropped": row["dropped"], "images": images}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
