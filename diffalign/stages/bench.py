"""`diffalign bench`: draw the images of published suites with one model, judge them, and form the suites' own scores.

<out>/bench.json                  all results, with versions, judges, notes and the cells of every score
<out>/<suite>/                    a dataset folder with the suite's images; <suite>-nN where -n limits the prompts
<out>/<suite>/judged-<judge>.jsonl  what each judge said, as `diffalign score` writes it
<out>/bench.html                  the same as a page
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.bench.measures import JudgedImage
from diffalign.bench.page import write_page
from diffalign.bench.results import check_same, keep_suite, results_table, versions
from diffalign.bench.suite import SuiteJudge
from diffalign.config import BenchConfig
from diffalign.data.schema import GROUPS_FILE
from diffalign.errors import DiffalignError
from diffalign.files.lock import writing_folder
from diffalign.pipelines import Backbone
from diffalign.progress import ImageProgress, say, say_aside
from diffalign.redaction import redacted
from diffalign.scoring.items import Item
from diffalign.scoring.run import score_items
from diffalign.scoring.score_summary import faults
from diffalign.scoring.sources import collect
from diffalign.scoring.store import Store
from diffalign.scoring.thumbnails import thumbnail
from diffalign.stages.bench_tasks import BenchTask, open_tasks
from diffalign.stages.checks import check_weights
from diffalign.stages.dry_run import print_config, print_facts, print_where
from diffalign.stages.resolve import sampling_settings, settled
from diffalign.stages.resolve_rewards import resolve_device
from diffalign.stages.sample import check_drawing_weights, draw_groups, open_drawing
from diffalign.terminal import counted, show_table

PICTURES = 12
"""Images of a suite in the page."""


@dataclass(frozen=True)
class BenchRequest:
    """The options of `diffalign bench` as the user gave them."""

    tasks: list[str]
    judges: list[str]
    data: Path | None = None
    n: int | None = None
    dry_run: bool = False


def bench(config: BenchConfig, request: BenchRequest) -> None:
    """Draw and judge suites: `diffalign bench`. Raises DiffalignError before anything is drawn for what can be known then."""
    with writing_folder(None if request.dry_run else config.out, "out"):
        _bench(settled(config), request)


def _bench(config: BenchConfig, request: BenchRequest) -> None:
    # Refuse before a model is loaded: prompts, judges, weights.
    check_drawing_weights(config)
    device = resolve_device(config.device)
    tasks = open_tasks(request.tasks, request.judges, request.data, request.n, device)
    said = {
        f"{t.folder} {label}": words
        for t in tasks
        for label, words in check_weights(t.rewards, request.dry_run).items()
    }
    if request.dry_run:
        _print_plan(config, tasks, said, device)
        return
    check_same(config.out, "sampling", _sampling(config))
    # All images first, so that model and judges are not in memory together.
    model = _draw(config, tasks)
    results: dict[str, Any] = {}
    for task in tasks:
        suite = _judge(task, config.out / task.folder)
        results = keep_suite(config.out, model, _sampling(config), task.folder, suite)
        show_table(results_table(task.folder, suite))
        for note in suite["notes"]:
            say(f"note: {note}")
    pictures = {name: _pictures(config.out / name) for name in results["suites"]}
    say(f"results: {config.out / 'bench.json'}, {write_page(config.out / 'bench.html', results, pictures)}")


def _print_plan(config: BenchConfig, tasks: list[BenchTask], said: Mapping[str, str], device: str) -> None:
    print_config(config)
    images = {task.folder: len(task.rows) * task.suite.images_per_prompt for task in tasks}
    print_facts("run", {
        "device": device,
        "images": f"{sum(images.values())} in all, of the model's own size unless height and width are given",
        "time": "unknown; it is shown once the first images are drawn",
    })  # fmt: skip
    for task in tasks:
        facts = {
            "images": f"{images[task.folder]}: {counted(len(task.rows), 'prompt')} x {task.suite.images_per_prompt}",
            "prompts": task.source,
            "protocol": task.suite.protocol,
        }
        facts |= {f"judge {label}": said[f"{task.folder} {label}"] for label in task.rewards}
        facts |= {f"deviation {n}": text for n, text in enumerate(task.suite.deviations, start=1)}
        facts |= {f"note {n}": text for n, text in enumerate(task.notes, start=1)}
        print_facts(f"{task.suite.title} ({task.folder})", facts)
    print_where(config.model, {})


def _sampling(config: BenchConfig) -> dict[str, Any]:
    """Return the settings that decide the images besides model and prompts."""
    return {**asdict(sampling_settings(config)), "seed": config.seed, "batch_size": config.batch_size}


def _draw(config: BenchConfig, tasks: list[BenchTask]) -> dict[str, Any]:
    """Draw the images of all suites that are not there yet; return what bench.json says of the model."""
    backbone, origin = open_drawing(config)
    found = _model(config, backbone, origin)
    check_same(config.out, "model", found)
    for task in tasks:
        draw_groups(
            config, backbone, origin, task.rows, config.out / task.folder, task.suite.images_per_prompt, task.folder
        )
    del backbone
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _model(config: BenchConfig, backbone: Backbone, origin: Mapping[str, str | None]) -> dict[str, Any]:
    weights = None if config.weights is None else config.weights.as_posix()
    return {
        "path": config.model.path,
        "revision": backbone.revision,
        "fingerprint": backbone.source.content_fingerprint(),
        "dtype": config.model.dtype,
        "weights": weights,
        "weights_digest": origin.get("weights"),
    }


def _judge(task: BenchTask, folder: Path) -> dict[str, Any]:
    """Judge a suite's images; return what bench.json holds of the suite."""
    items = collect([str(folder)])
    values: list[dict[str, float]] = [{} for _ in items]
    for judge in task.suite.judges:
        mine = [i for i, item in enumerate(items) if not judge.kinds or item.metadata.get("tag") in judge.kinds]
        if mine:
            for i, row in zip(mine, _scores(task, judge, [items[i] for i in mine], folder), strict=True):
                values[i] |= row
    # An image that a judge could not judge counts in none of the scores that read that judge.
    judged = [JudgedImage(_place(item), item.metadata, row) for item, row in zip(items, values, strict=True)]
    suite, failed = task.suite, len(task.rows) - len({image.prompt for image in judged})
    notes = [
        *task.notes,
        *([f"{counted(failed, 'prompt')} could not be drawn: {folder}/failed.jsonl"] if failed else []),
    ]
    return {
        "title": suite.title,
        "source": suite.source,
        "prompts_from": task.source,
        "prompts": len(task.rows),
        "published": suite.published,
        "digest": task.digest,
        "images_per_prompt": suite.images_per_prompt,
        "images": len(items),
        "protocol": suite.protocol,
        "deviations": list(suite.deviations),
        "notes": notes,
        "judges": {label: redacted(reward.identity()) for label, reward in task.rewards.items()},
        "versions": versions(),
        "scores": {measure.name: measure.as_dict() for measure in suite.form(judged) if measure.cells},
    }


def _scores(task: BenchTask, judge: SuiteJudge, items: list[Item], folder: Path) -> Iterator[dict[str, float]]:
    """Yield the columns of one judge for each item, NaN where it gave none; the same command judges only what is new."""
    label, reward = judge.label, task.rewards[judge.label]
    with Store(folder / f"judged-{label}.jsonl") as store:
        scores = score_items(
            items,
            {label: reward},
            store,
            batch_size=task.batch_size,
            workers=min(8, os.cpu_count() or 1),
            on_progress=ImageProgress(say_aside),
        )
        store.finish(scores.rows, [folder.as_posix()])
    for line in faults(scores):
        say_aside(f"not judged: {line}")
    if not any(math.isfinite(row[label]) for row in scores.rows):
        raise DiffalignError(
            f"{task.folder}: {label} judged none of {counted(len(items), 'image')}; the lines above say why"
        )
    names = {label if k == 0 else f"{label}.{name}" for k, name in enumerate(reward.columns)}
    yield from ({name: float(row[name]) for name in names} for row in scores.rows)


def _place(item: Item) -> int:
    """Return the place of an item's prompt in the suite, which its group's name begins with."""
    assert item.group is not None  # the images of a dataset folder
    return int(item.group[0].partition("-")[0])


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """Return (prompt, image) of the first images of prompts at even steps."""
    if not (folder / GROUPS_FILE).is_file():
        return []
    first = [item for item in collect([str(folder)]) if item.group is not None and item.group[1] == 0]
    chosen = first[:: max(1, len(first) // PICTURES)][:PICTURES]
    return [(item.prompt or "", thumbnail(item)) for item in chosen]
