"""The plan of batches: it follows from the images alone, so whoever works on it finds the same numbers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.scoring.plan import Batch
from diffalign.scoring.processes import Processes
from diffalign.scoring.run import score_items
from diffalign.scoring.sources import Prompting, collect
from diffalign.scoring.store import Store
from helpers import pictures
from helpers.counting_reward import Counting, run


class Mixing(Counting):
    """Scores that depend on the batch, as the last bits of a network's do."""

    def measure(self, images: list[Image.Image], prompts: list[str], metadata: Any = None) -> dict[str, torch.Tensor]:
        found = super().measure(images, prompts, metadata)
        return {**found, "brightness": found["brightness"] + found["brightness"].mean()}


class Alone(Processes):
    """One of two processes, whose other one does not answer; it reads all images, to know their hashes."""

    def share(self, things: list[Any]) -> list[Any]:
        return super().share(things) if isinstance(things[0], Batch) else things

    def gather(self, thing: Any) -> list[Any]:
        return [thing]


def test_processes_share_batches_and_not_images(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 11)
    items = collect([str(tmp_path / "in")], Prompting("p"))

    def scores(processes: Processes) -> tuple[dict[str, float], list[int]]:
        reward = Mixing()
        rows = score_items(items, {"r": reward}, Store(None), batch_size=4, processes=processes).rows
        return {row["image"]: row["r"] for row in rows if row["r.identity"]}, reward.batches

    whole, batches = scores(Processes())
    first, second = scores(Alone(0, 2)), scores(Alone(1, 2))
    assert batches == [4, 4, 3] and first[1] == [4, 3] and second[1] == [4]
    assert first[0] | second[0] == whole and not first[0].keys() & second[0].keys()


def test_what_a_kill_left_over_is_scored_in_the_same_batches(tmp_path: Path) -> None:
    """Also where a batch holds an image that cannot be decoded, which is tried again each time."""
    pictures.folder(tmp_path / "in", 11)
    truncated = tmp_path / "in" / "001.png"
    truncated.write_bytes(truncated.read_bytes()[:-40])
    for name, stops in (("straight", ()), ("killed", (1, 1))):
        for stop in (*stops, None):
            with suppress(KeyboardInterrupt):
                run([tmp_path / "in"], tmp_path / f"{name}.jsonl", Mixing(stop))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_new_images_among_old_ones_share_batches(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 12)
    run([tmp_path / "in"], tmp_path / "o.jsonl")
    for i in range(0, 12, 4):  # one in each batch
        pictures.smooth(i).save(tmp_path / "in" / f"{i:03d}.png")
    assert run([tmp_path / "in"], tmp_path / "o.jsonl")[1].batches == [3]
