"""The plan of a synthetic dataset: which image comes from which prompt, generator and seed, and what is done together.

A cell is one image. Cells of a generator are cut into shards (one file of images) and shards into batches (one call of the
model), by the plan alone: since the batch decides the last bits of its images, and the seed the noise, neither the number
of processes nor a kill changes a byte.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data.prompts import PromptRow
from diffalign.data.shared_tasks import WORK_FOLDER, Task, complete_all
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.files import write_whole

IMAGES_PER_SHARD = 256


@dataclass(frozen=True)
class Cell:
    group_id: str
    prompt: str
    index: int
    seed: int


@dataclass(frozen=True)
class Shard:
    """One file of images and the batches that fill it."""

    number: int
    batches: tuple[tuple[Cell, ...], ...]

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}"


@dataclass(frozen=True)
class Part:
    """What one generator gives to every group: `images_per_prompt` images, drawn `batch_size` at a time."""

    generator: str
    images_per_prompt: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise DiffalignError(f"images_per_prompt={self.images_per_prompt}: at least one image per prompt is needed")


@dataclass(frozen=True)
class SynthPlan:
    """Prompts x generators. The images of a group are numbered through: the first generator's, then the second's."""

    prompts: tuple[PromptRow, ...]
    parts: tuple[Part, ...]
    seed: int

    @property
    def groups(self) -> list[tuple[str, PromptRow]]:
        return [(f"{i:06d}-{row.prompt_id}", row) for i, row in enumerate(self.prompts)]

    @property
    def images(self) -> int:
        return len(self.prompts) * sum(part.images_per_prompt for part in self.parts)

    def shards(self, part: int) -> Iterator[Shard]:
        """The shards of generator `part`; numbers go on from generator to generator."""
        before, this = self.parts[:part], self.parts[part]
        first = sum(p.images_per_prompt for p in before)
        number = self._first_shard(part)
        for some in _chunks(self.groups, _groups_per_shard(this)):
            cells = [
                Cell(group, row.prompt, k, image_seed(self.seed, group, k))
                for group, row in some
                for k in range(first, first + this.images_per_prompt)
            ]
            yield Shard(number, tuple(tuple(batch) for batch in _chunks(cells, this.batch_size)))
            number += 1

    def shard_names(self, part: int) -> list[str]:
        """Names of the files of generator `part`."""
        return [f"part-{n:05d}" for n in range(self._first_shard(part), self._first_shard(part + 1))]

    def _first_shard(self, part: int) -> int:
        return sum(_count(len(self.prompts), _groups_per_shard(p)) for p in self.parts[:part])

    def digest(self) -> str:
        """Short hash of the prompts, which are too many to write down twice."""
        return hashlib.blake2b("\0".join(g for g, _ in self.groups).encode(), digest_size=12).hexdigest()


def image_seed(seed: int, group_id: str, index: int) -> int:
    """The seed of one image, below 2^32: what torch's CPU generator can tell apart."""
    return int(draw(seed, "sample", group=group_id, member=index).integers(2**32))


def remember(out: Path, settings: dict[str, Any]) -> None:
    """Write down what is drawn into `out`, or refuse if it holds images of other settings."""
    text = json.dumps(settings, indent=1) + "\n"
    path = out / "sampling.json"
    out.mkdir(parents=True, exist_ok=True)
    complete_all([Task("plan", path.is_file, lambda: write_whole(path, text))], out / WORK_FOLDER / "locks")
    if path.read_text(encoding="utf-8") != text:
        before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        key = next((k for k in {**now, **before} if before.get(k) != now.get(k)), "other settings")
        raise DiffalignError(
            f"{out} holds images sampled with {key}={before.get(key)!r}, not {now.get(key)!r}; choose another folder"
        )


def _groups_per_shard(part: Part) -> int:
    return max(1, IMAGES_PER_SHARD // part.images_per_prompt)


def _count(items: int, size: int) -> int:
    return -(-items // size)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
