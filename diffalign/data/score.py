"""Scoring a dataset's images into `scores/<reward>.parquet`."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from PIL import Image

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.schema import score_schema
from diffalign.data.writer import replacing
from diffalign.errors import DiffalignError


def score_images(
    dataset: PreferenceDataset, reward: Any, batch_size: int = 64, on_progress: Callable[[int], None] | None = None
) -> int:
    """Score every image, streaming; returns how many. A file that is complete already is left as it is.

    An image that cannot be decoded or scored gets NaN and the reason.
    """
    path = dataset.folder / "scores" / f"{reward.name}.parquet"
    if path.is_file():
        return 0
    schema = score_schema(reward.columns)
    prompts = dict(zip(dataset.column("group_id"), range(len(dataset)), strict=True))
    done = 0
    with replacing(path, schema) as writer:
        for rows in dataset.iter_images(batch_size):
            images: list[Image.Image] = []
            broken: dict[int, str] = {}
            for i, row in enumerate(rows):
                try:
                    images.append(row.decode())
                except DiffalignError as error:
                    broken[i] = str(error)
            good = [i for i in range(len(rows)) if i not in broken]
            groups = [dataset.group(prompts[rows[i].group_id]) for i in good]
            facts = [{**g["metadata"], "prompt": g["prompt"]} for g in groups]
            measured = reward.measure(images, [g["prompt"] for g in groups], facts) if images else {}
            reasons = dict(zip(good, reward.reasons, strict=True)) if images else {}
            place = {i: n for n, i in enumerate(good)}
            table = [
                {
                    "group_id": row.group_id,
                    "index": row.index,
                    **{c: float(measured[c][place[i]]) if i in place else float("nan") for c in reward.columns},
                    "reason": broken.get(i) or reasons.get(i, ""),
                }
                for i, row in enumerate(rows)
            ]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))
            done += len(rows)
            if on_progress:
                on_progress(done)
    return done
