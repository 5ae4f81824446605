"""Real images for self-play and for a critic: rendered scenes of the embedded world, or images of a dataset."""

import json
from collections.abc import Callable
from pathlib import Path

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow
from diffalign.data.real_against_generated import RealImage
from diffalign.data.writer import png_bytes
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.files import write_whole
from diffalign.stages.resolve import resolve_prompts
from diffalign.testbed.scenes import render
from diffalign.testbed.shape_prompts import scene_for


def real_images(source: str, prompts: str, n: int | None, seed: int) -> list[RealImage]:
    """Return prompts with a real image each, at most `n`.

    source: "testbed" renders a scene for each of `prompts`, with `seed`; else a dataset folder, of which the first image of
    every group of the training split is taken. Raises DiffalignError for prompts that describe no scene.
    """
    if source == "testbed":
        rows = resolve_prompts(prompts, n, seed)
        if any("include" not in row.metadata for row in rows):
            raise DiffalignError(
                f"data.real=testbed: {prompts} does not describe scenes; use data.prompts=testbed:train"
            )
        return [(row, _scene(row, place, seed)) for place, row in enumerate(rows)]
    dataset = PreferenceDataset(Path(source))
    return [_stored(dataset, i) for i in dataset.split("train")[:n]]


def prompts_file(rows: list[PromptRow], path: Path) -> Path:
    """Write prompts as a .jsonl that `diffalign sample` reads, and return `path`."""
    write_whole(path, "".join(json.dumps({"prompt": row.prompt, **row.metadata}) + "\n" for row in rows))
    return path


def _scene(row: PromptRow, place: int, seed: int) -> Callable[[], bytes]:
    return lambda: png_bytes(render(scene_for(row.metadata, draw(seed, "scene", inner=place))))


def _stored(dataset: PreferenceDataset, i: int) -> RealImage:
    group = dataset.group(i)
    return PromptRow(group["prompt"], group["metadata"]), lambda: dataset.images(group["group_id"])[0].data
