"""Score a dataset's images into `scores/<reward>.parquet`, one image file at a time, with any number of processes."""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from PIL import Image

from diffalign import stopping
from diffalign.cluster import check_same
from diffalign.data.dataset import ImageRow, PreferenceDataset
from diffalign.data.own_parquet import IMAGES_MEND, PIECE_MEND, SCORES_MEND, open_parquet, read_columns, read_row_group
from diffalign.data.schema import score_schema
from diffalign.data.shared_tasks import WORK_FOLDER, Task, complete_all
from diffalign.data.writer import parquet_writer
from diffalign.errors import DiffalignError
from diffalign.files import reading
from diffalign.files.parse import parse_json
from diffalign.progress import OnImages
from diffalign.rewards import Reward
from diffalign.rewards.base import Prepared
from diffalign.rewards.batches import measure_batch, reason_of

Row = dict[str, Any]
BatchKey = tuple[int, int]
"""A batch: the number of its shard, and its own in it."""


class Shown(Protocol):
    """An image of a group, stored (`ImageRow`) or in memory."""

    @property
    def group_id(self) -> str: ...
    @property
    def index(self) -> int: ...

    def decode(self) -> Image.Image:
        """Return the image in RGB. Raises DiffalignError where it cannot be decoded."""


@dataclass(frozen=True)
class Asked:
    """An image, with its group's prompt and metadata."""

    row: Shown
    prompt: str
    metadata: dict[str, Any]


Remote = Callable[[Iterable[tuple[BatchKey, list[Asked]]], int], Iterator[tuple[BatchKey, list[Row]]]]
"""Scores batches elsewhere: takes (key, images) of each and about how many there are, and yields (key, rows)."""


@dataclass(frozen=True)
class OpenJudge:
    """Builds the worker of an actor. provenance: of the reward, as the driver knows it."""

    name: str
    open_reward: Callable[[], Reward]
    provenance: dict[str, Any]

    def __call__(self) -> "Judge":
        return Judge(self)


class Judge:
    """A reward in an actor."""

    def __init__(self, opened: OpenJudge) -> None:
        self.reward = opened.open_reward()
        check_same(f"reward {opened.name}", opened.provenance, self.reward.provenance())

    def __call__(self, asked: list[Asked], proven: bool) -> list[Row]:
        return score_asked(asked, self.reward, proven)


def score_images(
    dataset: PreferenceDataset,
    reward: Reward,
    batch_size: int = 64,
    on_progress: OnImages | None = None,
    remote: Remote | None = None,
) -> int:
    """Score every image as a stream; return how many this process scored. Complete scores are kept.

    An image that cannot be decoded or scored gets NaN and the reason; so does one whose prompt the reward cannot use.
    The file says which reward judged. remote: scores the batches elsewhere; then this process alone writes.

    Raises DiffalignError if the file holds scores of another version, of other weights or of other settings.
    """
    made_by = reward.provenance()
    path = dataset.folder / "scores" / f"{reward.name}.parquet"
    schema = score_schema(reward.columns, made_by)
    work = dataset.folder / WORK_FOLDER
    pieces = [work / "scores" / reward.name / shard.name for shard in dataset.shards]
    proven = False  # whether the reward has scored an image, so that whatever fails is that image's fault

    def piece_task(shard: int) -> Task:
        def make() -> None:
            nonlocal proven
            with parquet_writer(pieces[shard], schema) as writer:
                for rows in dataset.iter_shard(shard, batch_size):
                    scored = score_asked(_asked(dataset, rows), reward, proven)
                    proven = proven or any(math.isfinite(row[reward.columns[0]]) for row in scored)
                    if scored:
                        writer.write_table(pa.Table.from_pylist(scored, schema=schema))
                    stopping.check()  # a shard may take hours; what is kept are whole ones

        size = open_parquet(dataset.shards[shard], IMAGES_MEND).metadata.num_rows
        done = lambda: pieces[shard].is_file() or path.is_file()  # noqa: E731
        return Task(f"score-{reward.name}-{shard}", done, make, size)

    def merge() -> None:
        with parquet_writer(path, schema) as writer:
            for piece in pieces:
                file = open_parquet(piece, PIECE_MEND)
                for i in range(file.num_row_groups):
                    writer.write_table(read_row_group(piece, file, i, schema.names, PIECE_MEND))
        shutil.rmtree(work / "scores" / reward.name, ignore_errors=True)

    if path.is_file():
        _same_reward(path, made_by)
        return 0
    # Shard by shard, so that several processes share the work and a kill costs one shard at most; then one file.
    tasks = [piece_task(i) for i in range(len(pieces))]
    if remote is not None:
        missing = {i: pieces[i] for i, task in enumerate(tasks) if not task.done()}
        _score_remotely(dataset, missing, sum(tasks[i].size for i in missing), remote, schema, batch_size, on_progress)
        mine = sum(tasks[i].size for i in missing)
        complete_all(tasks, work / "locks")  # a shard without an image
    else:
        mine = complete_all(tasks, work / "locks", on_progress, kept="scores")
    complete_all([Task(f"score-{reward.name}", path.is_file, merge)], work / "locks")
    return mine


def unscored(dataset: PreferenceDataset, reward: str) -> Counter[str]:
    """Count the images without a score of a reward, by reason."""
    table = read_columns(dataset.folder / "scores" / f"{reward}.parquet", ["reason"], SCORES_MEND)
    return Counter(reason for reason in table["reason"].to_pylist() if reason)


def _score_remotely(
    dataset: PreferenceDataset,
    pieces: dict[int, Path],
    total: int,
    remote: Remote,
    schema: pa.Schema,
    batch_size: int,
    on_progress: OnImages | None,
) -> None:
    """Write the pieces of shards, each as soon as all of its batches are scored, in their order."""
    counts: dict[int, int] = {}  # of batches, once a shard is read to its end
    found: dict[int, dict[int, list[Row]]] = {shard: {} for shard in pieces}

    def orders() -> Iterator[tuple[BatchKey, list[Asked]]]:
        for shard in pieces:
            number = -1
            for number, rows in enumerate(dataset.iter_shard(shard, batch_size)):
                yield (shard, number), _asked(dataset, rows)
            counts[shard] = number + 1

    if on_progress:
        on_progress(0, total)
    answers, done = remote(orders(), -(-total // batch_size)), 0
    while True:
        with stopping.deferred():
            if (answer := next(answers, None)) is None:
                break
            (shard, number), scored = answer
            found[shard][number] = scored
        done += len(scored)
        if on_progress:
            on_progress(done, total)
        # The answer to a shard's last batch may come before its end is known.
        for shard in [s for s, n in counts.items() if s in found and len(found[s]) == n]:
            _write_piece(pieces[shard], found.pop(shard), schema)
        stopping.check()
    for shard in [s for s in found if counts.get(s)]:
        _write_piece(pieces[shard], found.pop(shard), schema)


def _write_piece(piece: Path, batches: dict[int, list[Row]], schema: pa.Schema) -> None:
    with parquet_writer(piece, schema) as writer:
        for _, scored in sorted(batches.items()):
            if scored:
                writer.write_table(pa.Table.from_pylist(scored, schema=schema))


def _asked(dataset: PreferenceDataset, rows: list[ImageRow]) -> list[Asked]:
    """Return the images whose group is in groups.parquet, with what is asked about them."""
    found = []
    for row in rows:
        if (place := dataset.row(row.group_id)) is not None:
            group = dataset.group(place)
            found.append(Asked(row, group["prompt"], group["metadata"]))
    return found


def score_asked(asked: list[Asked], reward: Reward, proven: bool) -> list[Row]:
    """Return the rows of the score file for these images. proven: as `measure_batch` takes it."""
    images: list[Prepared] = []
    prompts: list[str] = []
    facts: list[dict[str, Any]] = []
    broken: dict[int, str] = {}
    for i, one in enumerate(asked):
        if reason := reward.reason_not_scorable(one.prompt, one.metadata):
            broken[i] = reason
            continue
        try:
            image = one.row.decode()
        except DiffalignError as error:
            broken[i] = str(error)
            continue
        try:
            images.append(reward.prepare(image))
        except Exception as error:  # an image that this reward cannot take; another reward may
            broken[i] = reason_of(error)
            continue
        prompts.append(one.prompt)
        facts.append({**one.metadata, "prompt": one.prompt})
    good = [i for i in range(len(asked)) if i not in broken]
    measured = measure_batch(reward, images, prompts, facts, proven) if images else []
    found = dict(zip(good, measured, strict=True))
    none = dict.fromkeys(reward.columns, math.nan)
    return [
        {
            "group_id": one.row.group_id,
            "index": one.row.index,
            **(found[i].values if i in found else none),
            "reason": found[i].reason if i in found else broken[i],
        }
        for i, one in enumerate(asked)
    ]


def _same_reward(path: Path, made_by: dict[str, Any]) -> None:
    """Refuse scores of another version, other weights or other settings. Files without a note are accepted."""
    note = (open_parquet(path, SCORES_MEND).schema_arrow.metadata or {}).get(b"diffalign")
    with reading(path, mend=SCORES_MEND):
        before = dict(parse_json(note)) if note else made_by
    # An older note does not say what really judged, so only its version can be compared.
    compared = ("version", "weights", "settings") if before.get("format") == made_by["format"] else ("version",)
    changed = next((key for key in compared if before.get(key) != made_by[key]), None)
    if changed:
        raise DiffalignError(
            f"{path} was scored with {changed}={before.get(changed)!r}, now it is {made_by[changed]!r}; delete the file to "
            "score again"
        )
