"""Sampling groups of images into a dataset folder: the first stage of synthetic preference data."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffalign.data.prompts import PromptRow
from diffalign.data.writer import ImageWriter, write_groups
from diffalign.draws import draw
from diffalign.errors import DiffalignError

GROUPS_PER_SHARD = 32


def image_seed(seed: int, group_id: str, index: int) -> int:
    """The seed of one image, below 2^32: what torch's CPU generator can tell apart."""
    return int(draw(seed, "sample", group=group_id, member=index).integers(2**32))


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _same_plan(out: Path, plan: dict[str, Any], groups: list[tuple[str, PromptRow]]) -> None:
    """Remember what is sampled into `out`; shards of another plan must not be taken for this one's."""
    digest = hashlib.blake2b("\0".join(group for group, _ in groups).encode(), digest_size=12).hexdigest()
    text = json.dumps({**plan, "prompts": digest}, indent=1) + "\n"
    path = out / "sampling.json"
    if path.is_file() and path.read_text() != text:
        before, now = json.loads(path.read_text()), json.loads(text)
        key = next(k for k in now if before.get(k) != now[k])
        raise DiffalignError(
            f"{out} holds images sampled with {key}={before.get(key)!r}, not {now[key]!r}; choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def sample_groups(
    backbone: Any,
    prompts: list[PromptRow],
    out: Path,
    *,
    images_per_prompt: int,
    seed: int,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    split: str = "train",
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sample `images_per_prompt` images of every prompt into dataset `out`.

    Work goes shard by shard; a shard that is complete is not sampled again, so the same call goes on where it was
    stopped. Each image's noise depends on its own seed alone.
    """
    if images_per_prompt < 1:
        raise DiffalignError(f"images_per_prompt={images_per_prompt}: at least one image per prompt is needed")
    groups = [(f"{i:06d}-{row.prompt_id}", row) for i, row in enumerate(prompts)]
    provenance = {
        "model": backbone.path,
        "revision": backbone.revision,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    _same_plan(
        out,
        {**provenance, "seed": seed, "images_per_prompt": images_per_prompt, "height": height, "width": width},
        groups,
    )
    total, done = len(prompts) * images_per_prompt, 0
    for number, shard in enumerate(_chunks(groups, GROUPS_PER_SHARD)):
        name = f"part-{number:05d}"
        cells = [(group, row.prompt, k) for group, row in shard for k in range(images_per_prompt)]
        if not (out / "images" / f"{name}.parquet").is_file():
            with ImageWriter(out, name) as writer:
                for batch in _chunks(cells, batch_size):
                    seeds = [image_seed(seed, group, k) for group, _, k in batch]
                    images = backbone.sample(
                        [prompt for _, prompt, _ in batch],
                        seeds,
                        steps=steps,
                        guidance_scale=guidance_scale,
                        negative_prompt=negative_prompt,
                        height=height,
                        width=width,
                    )
                    for (group, _, k), image_seed_, image in zip(batch, seeds, images, strict=True):
                        writer.write(group, k, image, Path(backbone.path).name, image_seed_, provenance)
        done += len(cells)
        if on_progress:
            on_progress(done, total)
    write_groups(
        out,
        (
            {
                "group_id": group,
                "prompt_id": row.prompt_id,
                "prompt": row.prompt,
                "preference": [],
                "split": split,
                "metadata": row.metadata,
            }
            for group, row in groups
        ),
    )
