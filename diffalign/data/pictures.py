"""Write a dataset's images as plain files for people to look at, with metadata.jsonl for programs."""

import json
import re
from pathlib import Path

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_export import suffix
from diffalign.files import make_folder, write_whole
from diffalign.files.facts import geneval_facts

LONGEST_NAME = 60


def write_pictures(dataset: PreferenceDataset, folder: Path) -> int:
    """Write every image that counts into `folder`, as it is stored, and return how many.

    A file is named by the number of its group, its prompt and its index, such as 0003-a-red-circle-1.png. `metadata.jsonl`
    has file_name, prompt, seed and GenEval's facts, so `diffalign score` finds what every reward reads.
    """
    make_folder(folder)
    digits = max(4, len(str(len(dataset))))
    lines = []
    for number in range(len(dataset)):
        row = dataset.group(number)
        slug = re.sub(r"[^A-Za-z0-9]+", "-", row["prompt"])[:LONGEST_NAME].strip("-").lower() or "image"
        for image in dataset.images(row["group_id"]):
            name = f"{number:0{digits}d}-{slug}-{image.index}.{suffix(image.data)}"
            (folder / name).write_bytes(image.data)
            caption = {
                "file_name": name,
                "prompt": row["prompt"],
                "seed": image.seed,
                **geneval_facts({"metadata": row["metadata"]}),
            }
            lines.append(json.dumps(caption) + "\n")
    write_whole(folder / "metadata.jsonl", "".join(lines))
    return len(lines)
