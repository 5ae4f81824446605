"""Score a dataset's images into `scores/<reward>.parquet`, one image file at a time, with any number of processes."""

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffalign import stopping
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


def score_images(
    dataset: PreferenceDataset,
    reward: Reward,
    batch_size: int = 64,
    on_progress: OnImages | None = None,
) -> int:
    """Score every image as a stream; return how many this process scored. Complete scores are kept.

    An image that cannot be decoded or scored gets NaN and the reason; so does one whose prompt the reward cannot use.
    The file says which reward judged. Raises DiffalignError if it holds scores of another version, of other weights or
    of other settings.
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
                    known = [row for row in rows if dataset.row(row.group_id) is not None]
                    scored = _score(dataset, known, reward, proven)
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
    mine = complete_all([piece_task(i) for i in range(len(pieces))], work / "locks", on_progress, kept="scores")
    complete_all([Task(f"score-{reward.name}", path.is_file, merge)], work / "locks")
    return mine


def unscored(dataset: PreferenceDataset, reward: str) -> Counter[str]:
    """Count the images without a score of a reward, by reason."""
    table = read_columns(dataset.folder / "scores" / f"{reward}.parquet", ["reason"], SCORES_MEND)
    return Counter(reason for reason in table["reason"].to_pylist() if reason)


def _score(dataset: PreferenceDataset, rows: list[ImageRow], reward: Reward, proven: bool) -> list[dict[str, Any]]:
    """Return the rows of the score file for these images. proven: as `measure_batch` takes it."""
    images: list[Prepared] = []
    prompts: list[str] = []
    facts: list[dict[str, Any]] = []
    broken: dict[int, str] = {}
    for i, row in enumerate(rows):
        group = dataset.group(dataset.row(row.group_id) or 0)
        if reason := reward.reason_not_scorable(group["prompt"], group["metadata"]):
            broken[i] = reason
            continue
        try:
            image = row.decode()
        except DiffalignError as error:
            broken[i] = str(error)
            continue
        try:
            images.append(reward.prepare(image))
        except Exception as error:  # an image that this reward cannot take; another reward may
            broken[i] = reason_of(error)
            continue
        prompts.append(group["prompt"])
        facts.append({**group["metadata"], "prompt": group["prompt"]})
    good = [i for i in range(len(rows)) if i not in broken]
    measured = measure_batch(reward, images, prompts, facts, proven) if images else []
    found = dict(zip(good, measured, strict=True))
    none = dict.fromkeys(reward.columns, math.nan)
    return [
        {
            "group_id": row.group_id,
            "index": row.index,
            **(found[i].values if i in found else none),
            "reason": found[i].reason if i in found else broken[i],
        }
        for i, row in enumerate(rows)
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
