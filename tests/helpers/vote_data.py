"""Images of one colour each, to vote on: a browser's pixel tells which image it shows."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data.prompts import PromptRow
from diffalign.data.writer import ImageWriter, write_groups
from helpers.files import json_lines

EVIL = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1> {{ 7 * 7 }}"


def colour(group: int, index: int) -> tuple[int, int, int]:
    """The colour of an image; no two of them share one."""
    return 10 + 5 * group, 20 + 40 * index, 100


def colour_of(name: str) -> list[int]:
    """The colour of the image that a log calls `g00003/1`."""
    group, index = name.split("/")
    return list(colour(int(group[1:]), int(index)))


def colours(folder: Path, groups: int, each: int = 2, side: int = 32) -> Path:
    """Write a dataset of groups whose images are drawn by `base` and `tuned` in turn; the first prompt is hostile."""
    rows = []
    with ImageWriter(folder) as writer:
        for g in range(groups):
            prompt = EVIL if g == 0 else f"prompt {g}"
            for k in range(each):
                image = Image.new("RGB", (side, side), colour(g, k))
                writer.write(f"g{g:05d}", k, image, ("base", "tuned")[k % 2], k, {})
            rows.append({
                "group_id": f"g{g:05d}", "prompt_id": PromptRow(prompt).prompt_id, "prompt": prompt, "preference": [],
                "split": "train", "metadata": {},
            })  # fmt: skip
    write_groups(folder, rows)
    return folder


def folder_of(path: Path, files: dict[str, str]) -> Path:
    """Write a folder of small images: name -> prompt, in a .txt beside it; "" for none."""
    for n, (name, prompt) in enumerate(files.items()):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (n, 0, 0)).save(path / name)
        if prompt:
            (path / name).with_suffix(".txt").write_text(prompt)
    return path


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Let no file of this process grow beyond `most` bytes: a write is cut there, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def kept(path: Path, rater: str) -> list[dict[str, Any]]:
    """What a log says a rater voted, undone votes taken away, without our reader."""
    rows = [row for row in json_lines(path) if row["rater"] == rater]
    undone = {row["undo"] for row in rows if "undo" in row}
    return [row for row in rows if "undo" not in row and row["id"] not in undone]
