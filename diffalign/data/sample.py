"""Draw the images of a plan into a dataset folder: the first stage of synthetic preference data.

.work/images/part-00003/00012.parquet   one batch, until its shard is complete
images/part-00003.parquet               a shard
sampling.json, failed.jsonl             the plan's settings; prompts that could not be drawn, and why
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from diffalign import stopping
from diffalign.data.own_parquet import PIECE_MEND, read_columns
from diffalign.data.plan import IMAGES_PER_SHARD, Cell, Part, Shard, SynthPlan, image_seed, remember
from diffalign.data.prompts import PromptRow
from diffalign.data.protocols import ImageSampler
from diffalign.data.schema import GROUPS_FILE, IMAGES, GroupRow, with_latents
from diffalign.data.shared_tasks import WORK_FOLDER, Task, complete_all
from diffalign.data.writer import ROWS_PER_GROUP, image_row, parquet_writer, regrouped, write_groups
from diffalign.errors import DiffalignError
from diffalign.files import reading, write_whole
from diffalign.files.parse import parse_json
from diffalign.pipelines.settings import SamplingSettings
from diffalign.progress import OnImages

__all__ = ["Drawn", "clean_up", "draw_part", "image_seed", "sample_groups", "write_planned_groups"]

RETRIES = 2
HOPELESS = 5  # after this many batches in a row without an image, the model is at fault, not the prompts
# Errors that one prompt may cause. Anything else, such as a full disk or Ctrl-C, is not the prompt's fault.
PROMPT_ERRORS = (RuntimeError, ValueError, IndexError, DiffalignError)


class Drawn(NamedTuple):
    """An image and, if it is to be stored, the latent [C, h, w] that it was decoded from."""

    image: Image.Image
    latent: np.ndarray | None = None


Draw = Callable[[list[str], list[int]], list[Drawn]]
"""Draws one image per prompt and seed."""


@dataclass(frozen=True)
class DrawnBatch:
    """What became of a batch. rows: of its images, as they are stored; failed: of cells that could not be drawn."""

    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]


BatchKey = tuple[Shard, int]
"""A batch of the plan: its shard, and its number in it."""
Remote = Callable[[Iterable[tuple[BatchKey, tuple[Cell, ...]]], int], Iterator[tuple[BatchKey, DrawnBatch]]]
"""Draws batches elsewhere: takes (key, cells) of each and their number, and yields (key, what became of it)."""


def draw_part(
    plan: SynthPlan,
    number: int,
    out: Path,
    draw: Draw,
    provenance: dict[str, Any],
    on_progress: OnImages | None = None,
    latents: bool = False,
) -> int:
    """Draw the images of generator `number` of `plan`; return how many this process drew.

    A batch that fails is retried `RETRIES` times, then cell by cell; cells that still fail go to `failed.jsonl` with
    the reason. Raises DiffalignError if nothing in a batch can be drawn, since then the prompts are not at fault.
    """
    files = _PartFiles(plan, number, out, latents)

    def task(key: BatchKey) -> Task:
        shard, i = key
        make = lambda: files.keep(key, draw_batch(draw, shard.batches[i], files.generator, provenance))  # noqa: E731
        return Task(f"{shard.name}-{i}", lambda: files.has(key), make, len(shard.batches[i]))

    mine = complete_all([task(key) for key in files.batches()], files.locks, on_progress, kept="images")
    files.merge()
    return mine


def draw_part_remotely(
    plan: SynthPlan,
    number: int,
    out: Path,
    remote: Remote,
    on_progress: OnImages | None = None,
    latents: bool = False,
) -> int:
    """Draw as `draw_part` does, but by `remote`; this process alone writes the files. Return how many were drawn."""
    files = _PartFiles(plan, number, out, latents)
    keys = files.batches()
    missing = [key for key in keys if not files.has(key)]
    total, mine = sum(_cells(key) for key in keys), 0
    done = total - sum(_cells(key) for key in missing)
    if on_progress:
        on_progress(done, total)
    answers = remote(((key, key[0].batches[key[1]]) for key in missing), len(missing))
    while True:
        with stopping.deferred():
            if (answer := next(answers, None)) is None:
                break
            files.keep(*answer)
        mine += _cells(answer[0])
        stopping.keep(f"{done + mine} of {total} images are")
        stopping.check()
        if on_progress:
            on_progress(done + mine, total)
    files.merge()
    return mine


def _cells(key: BatchKey) -> int:
    return len(key[0].batches[key[1]])


def draw_batch(draw: Draw, cells: tuple[Cell, ...], generator: str, provenance: dict[str, Any]) -> DrawnBatch:
    """Draw the cells of a batch. Raises DiffalignError if none can be drawn, unless all are of one prompt."""
    drawn, failed = _attempt(draw, cells, generator)
    rows = [
        image_row(cell.group_id, cell.index, d.image, generator, cell.seed, provenance, d.latent) for cell, d in drawn
    ]
    return DrawnBatch(rows, failed)


class _PartFiles:
    """The files of one generator's images."""

    def __init__(self, plan: SynthPlan, number: int, out: Path, latents: bool) -> None:
        self.out, self.generator = out, plan.parts[number].generator
        self.shards = list(plan.shards(number))
        self.schema = with_latents() if latents else IMAGES
        self.locks = out / WORK_FOLDER / "locks"
        self._lost: list[bool] = []

    def batches(self) -> list[BatchKey]:
        """Return all batches of the plan."""
        return [(shard, i) for shard in self.shards for i in range(len(shard.batches))]

    def has(self, key: BatchKey) -> bool:
        """Return whether a batch is done."""
        return _piece(self.out, *key).is_file() or _file(self.out, key[0]).is_file()

    def keep(self, key: BatchKey, batch: DrawnBatch) -> None:
        """Write a batch's images, and before them which cells failed."""
        # A model that draws nothing for several batches is broken; going on would only fill failed.jsonl.
        self._lost.append(not batch.rows)
        if all(self._lost[-HOPELESS:]) and len(self._lost) >= HOPELESS:
            reason = batch.failed[0]["reason"]
            raise DiffalignError(f"generator {self.generator} drew nothing {HOPELESS} times: {reason}")
        # The report first: a batch counts as done once its file exists.
        if batch.failed:
            _report(self.out, *key, batch.failed)
        with parquet_writer(_piece(self.out, *key), self.schema) as writer:
            writer.write_table(pa.Table.from_pylist(batch.rows, schema=self.schema))

    def merge(self) -> None:
        """Make one file of each shard's batches. They are deleted then, so at most one shard is on disk twice."""
        complete_all(
            [Task(s.name, _file(self.out, s).is_file, partial(self._merge, s)) for s in self.shards], self.locks
        )

    def _merge(self, shard: Shard) -> None:
        names = self.schema.names
        with parquet_writer(_file(self.out, shard), self.schema) as writer:
            pieces = (read_columns(_piece(self.out, shard, i), names, PIECE_MEND) for i in range(len(shard.batches)))
            for table in regrouped(pieces, ROWS_PER_GROUP):
                writer.write_table(table)
        shutil.rmtree(_piece(self.out, shard, 0).parent, ignore_errors=True)


def drawn_already(plan: SynthPlan, number: int, out: Path) -> bool:
    """Return whether all shards of a generator exist, so that its model need not be loaded."""
    return all((out / "images" / f"{name}.parquet").is_file() for name in plan.shard_names(number))


def write_planned_groups(plan: SynthPlan, out: Path, split: str = "train") -> None:
    """Write `groups.parquet` without the prompts that some generator could not draw; list those in `failed.jsonl`."""
    groups, failures = out / GROUPS_FILE, out / "failed.jsonl"

    def make() -> None:
        reports = sorted((out / WORK_FOLDER / "failed").glob("*.jsonl"))
        lines = [line for report in reports for line in report.read_text(encoding="utf-8").splitlines()]
        if lines:
            write_whole(failures, "\n".join(lines) + "\n")
        with reading(out / WORK_FOLDER / "failed", mend=PIECE_MEND):
            dead = {parse_json(line)["group_id"] for line in lines}
        write_groups(out, (_group(g, row, split) for g, row in plan.groups if g not in dead))

    complete_all([Task("groups", groups.is_file, make)], out / WORK_FOLDER / "locks")


def clean_up(out: Path) -> None:
    """Delete the files of unfinished work."""
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)


def sample_groups(
    backbone: ImageSampler,
    prompts: list[PromptRow],
    out: Path,
    *,
    images_per_prompt: int,
    seed: int,
    settings: SamplingSettings,
    batch_size: int,
    split: str = "train",
    origin: dict[str, str | None] | None = None,
    facts: dict[str, Any] | None = None,
    latents: bool = False,
    on_progress: OnImages | None = None,
) -> None:
    """Sample `images_per_prompt` images of every prompt from one model into dataset `out`.

    This is a plan with one generator. Batches that exist are not drawn again, so the same call resumes. Each image's
    noise depends on its own seed alone. `origin`: replaces the model's path and revision in the provenance. `facts`: what else
    stands there, which follows from the rest. latents: keep the latent of each image beside it.
    """
    plan = SynthPlan(tuple(prompts), (Part(Path(backbone.path).name, images_per_prompt, batch_size),), seed)
    drawn_with = asdict(settings)
    size = {side: drawn_with.pop(side) for side in ("height", "width")}
    provenance: dict[str, Any] = {"model": backbone.path, "revision": backbone.revision, **(origin or {}), **drawn_with}
    decisive = {**provenance, "seed": seed, "images_per_prompt": images_per_prompt, **size}
    decisive |= {"batch_size": batch_size, "images_per_shard": IMAGES_PER_SHARD, "prompts": plan.digest()}
    if latents:
        decisive["latents"] = True
    remember(out, decisive)

    def draw(texts: list[str], seeds: list[int]) -> list[Drawn]:
        if latents:
            return [Drawn(image, latent) for image, latent in backbone.sample_with_latents(texts, seeds, settings)]
        return [Drawn(image) for image in backbone.sample(texts, seeds, settings)]

    draw_part(plan, 0, out, draw, provenance | (facts or {}), on_progress, latents)
    write_planned_groups(plan, out, split)
    clean_up(out)


def _attempt(
    draw: Draw, cells: tuple[Cell, ...], generator: str
) -> tuple[list[tuple[Cell, Drawn]], list[dict[str, Any]]]:
    """Return what could be drawn of a batch, and the failures."""

    def tried(some: tuple[Cell, ...]) -> list[Drawn] | str:
        reason = ""
        for _ in range(1 + RETRIES):
            try:
                return draw([c.prompt for c in some], [c.seed for c in some])
            except torch.OutOfMemoryError as error:
                # A smaller batch would change the images' last bits, so only the user may choose it.
                raise DiffalignError(
                    f"generator {generator}: the GPU's memory does not hold a batch of {len(some)}; set its batch_size "
                    "lower (and choose another folder: the batch decides the last bits of its images)"
                ) from error
            except PROMPT_ERRORS as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return reason

    whole = tried(cells)
    if not isinstance(whole, str):
        return list(zip(cells, whole, strict=True)), []
    singles = [(cell, tried((cell,)) if len(cells) > 1 else whole) for cell in cells]
    failed = [(cell, result) for cell, result in singles if isinstance(result, str)]
    if len(failed) == len(cells) and len({cell.prompt for cell in cells}) > 1:
        raise DiffalignError(f"generator {generator} could draw no image of a whole batch: {failed[0][1]}")
    lines = [
        {"group_id": c.group_id, "index": c.index, "generator": generator, "prompt": c.prompt, "reason": reason}
        for c, reason in failed
    ]
    return [(cell, result[0]) for cell, result in singles if not isinstance(result, str)], lines


def _report(out: Path, shard: Shard, batch: int, failures: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(failure) + "\n" for failure in failures)
    write_whole(out / WORK_FOLDER / "failed" / f"{shard.name}-{batch:05d}.jsonl", text)


def _file(out: Path, shard: Shard) -> Path:
    return out / "images" / f"{shard.name}.parquet"


def _piece(out: Path, shard: Shard, batch: int) -> Path:
    return out / WORK_FOLDER / "images" / shard.name / f"{batch:05d}.parquet"


def _group(group: str, row: PromptRow, split: str) -> GroupRow:
    return {
        "group_id": group,
        "prompt_id": row.prompt_id,
        "prompt": row.prompt,
        "preference": [],
        "split": split,
        "metadata": row.metadata,
    }
