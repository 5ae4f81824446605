"""The stages of a judge of images: data of the embedded world, training, a teacher's distributions, evaluation."""

import json
from pathlib import Path

from diffalign.errors import DiffalignError
from diffalign.judge.records import write_records
from diffalign.stages import say
from diffalign.testbed import judged


def judge_data(out: Path, split: str, groups: int, images: int, raters: int, seed: int) -> None:
    """`diffalign testbed judge-data`: images/, pairs.jsonl, ratings.jsonl and data.json, which says how they were made."""
    made = {"split": split, "groups": groups, "images": images, "raters": raters, "seed": seed}
    told = out / "data.json"
    if told.is_file():
        if json.loads(told.read_text()) != made:
            raise DiffalignError(f"{out}: holds other data ({told.read_text().strip()}); choose another folder")
        say(f"{out}: is complete")
        return
    if out.exists() and any(out.iterdir()) and not (out / "images").is_dir():
        raise DiffalignError(f"{out}: is not empty; choose another folder")
    (out / "images").mkdir(parents=True, exist_ok=True)
    pairs, rated = [], []
    for pictures, own_pairs, own_rated in judged.records(
        judged.judged_groups(split, groups, images, seed), raters, seed
    ):
        for picture, row in zip(pictures, own_rated, strict=True):
            picture.save(out / row["image"])
        pairs += own_pairs
        rated += own_rated
    write_records(out / "pairs.jsonl", pairs)
    write_records(out / "ratings.jsonl", rated)
    told.write_text(json.dumps(made) + "\n")  # last: it says that the rest is whole
    say(f"{out}: {len(rated)} images, {len(pairs)} pairs")
