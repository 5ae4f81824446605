"""The noise that made each image of a dataset, for `noise: tracked`: it follows from the image's seed.

`sample`, `synth` and `rounds` write into each image's provenance whether its seed gives all of its noise, with the model's
family, the shape of the noise and the sampler (`pipelines/drawn_noise.py`). Images from elsewhere say nothing about it.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError
from diffalign.files.parse import parse_json

NOT_STATED = "nothing is stated about it: it is from elsewhere, or was drawn by an earlier version"
Record = dict[str, object]


def noise_records(dataset: PreferenceDataset) -> list[Record]:
    """Return what is stated about the noise of each image, in the order of `image_index`; {} where nothing is.

    Raises DiffalignError for a provenance that is no JSON.
    """
    known: dict[str, Record] = {}

    def read(text: str | None) -> Record:
        if text not in known:
            try:
                found = parse_json(text or "{}").get("noise", {})
            except (ValueError, AttributeError) as error:
                raise DiffalignError(
                    f"{dataset.folder}: the provenance of an image is not JSON ({error}); make the dataset again"
                ) from error
            known[text or ""] = found if isinstance(found, dict) else {}
        return known[text or ""]

    return [read(text) for text in dataset.image_column("provenance")]


def noise_words(dataset: PreferenceDataset) -> str:
    """Return for how many images the seed gives all of the noise, and why it does not for others."""
    records = noise_records(dataset)
    exact = sum(record.get("exact") is True for record in records)
    rest = Counter(str(record.get("reason") or NOT_STATED) for record in records if record.get("exact") is not True)
    return "; ".join(
        [f"known for {exact} of {len(records)} images", *(f"{n}: {why}" for why, n in rest.most_common(3))]
    )


def tracked_seeds(
    dataset: PreferenceDataset, rows: Sequence[int], members: int, family: str, shapes: Sequence[tuple[int, ...]]
) -> Tensor:
    """Return the seeds of the images of groups, [G, members] int64, -1 where a group has fewer.

    rows: of groups.parquet; family: of the model that trains; shapes [C, h, w]: of each group's latents. Raises DiffalignError
    where the noise of an image is not known, or is that of another family or size.
    """
    records, stored = noise_records(dataset), dataset.image_column("seed")
    ids = dataset.column("group_id")
    seeds = torch.full((len(rows), members), -1, dtype=torch.int64)
    wrong: Counter[str] = Counter()
    for at, (row, shape) in enumerate(zip(rows, shapes, strict=True)):
        indices = dataset.members(ids[row])[:members]
        places = dataset.image_index.find(np.full(len(indices), row), np.array(indices, dtype=np.int64))
        for slot, place in enumerate(places):
            record = records[int(place)]
            if reason := _reason(record, family, shape):
                wrong[reason] += 1
            seeds[at, slot] = int(stored[int(place)])
    if wrong:
        why, count = wrong.most_common(1)[0]
        raise DiffalignError(
            f"noise=tracked: the noise of {sum(wrong.values())} images in {dataset.folder} is of no use ({count}: {why}); "
            "draw the images with `diffalign sample` or `synth` from this model, or set noise=shared"
        )
    return seeds


def _reason(record: Record, family: str, shape: tuple[int, ...]) -> str:
    """Return why the noise of an image cannot be used by a model of this family at latents of this shape; "" if it can."""
    if record.get("exact") is not True:
        return str(record.get("reason") or NOT_STATED)
    if record.get("family") != family:
        return f"it is of the family {record.get('family')}, and the model of {family}"
    if record.get("shape") != list(shape):
        drawn = record.get("shape")
        return f"it has the shape {drawn}, and the latents {list(shape)}: data.resolution is another one"
    return ""
