"""Plan a synthetic dataset: which image comes from which prompt, generator and seed, and what is drawn together.

A cell is one image. The cells of a generator are divided into shards (one file of images) and shards into batches (one
call of the model), by the plan alone. The batch decides the last bits of its images and the seed decides the noise, so
neither the number of processes nor a kill changes a byte.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from diffalign.data.prompts import PromptRow
from diffalign.data.shared_tasks import WORK_FOLDER, Task, complete_all
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.files import make_folder, read_json, reading, write_whole

T = TypeVar("T")
IMAGES_PER_SHARD = 256


@dataclass(frozen=True)
class Cell:
    """One image to draw."""

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
        """The file's name without suffix."""
        return f"part-{self.number:05d}"


@dataclass(frozen=True)
class Part:
    """The share of one generator: `images_per_prompt` images for every group, `batch_size` in one call."""

    generator: str
    images_per_prompt: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise DiffalignError(f"images_per_prompt={self.images_per_prompt}: at least one image per prompt is needed")


@dataclass(frozen=True)
class SynthPlan:
    """Prompts times generators. A group's images are numbered through: first those of the first generator, and so on."""

    prompts: tuple[PromptRow, ...]
    parts: tuple[Part, ...]
    seed: int

    @property
    def groups(self) -> list[tuple[str, PromptRow]]:
        """(group id, prompt) of every group."""
        return [(f"{i:06d}-{row.prompt_id}", row) for i, row in enumerate(self.prompts)]

    @property
    def images(self) -> int:
        """How many images there are in all."""
        return len(self.prompts) * sum(part.images_per_prompt for part in self.parts)

    def shards(self, part: int) -> Iterator[Shard]:
        """Yield the shards of generator `part`; shard numbers continue from one generator to the next."""
        before, this = self.parts[:part], self.parts[part]
        first = sum(p.images_per_prompt for p in before)
        number = self._first_shard(part)
        for some in chunks(self.groups, _groups_per_shard(this)):
            cells = [
                Cell(group, row.prompt, k, image_seed(self.seed, group, k))
                for group, row in some
                for k in range(first, first + this.images_per_prompt)
            ]
            yield Shard(number, tuple(tuple(batch) for batch in chunks(cells, this.batch_size)))
            number += 1

    def shard_names(self, part: int) -> list[str]:
        """Return the names of generator `part`'s files, without suffix."""
        return [f"part-{n:05d}" for n in range(self._first_shard(part), self._first_shard(part + 1))]

    def _first_shard(self, part: int) -> int:
        return sum(_count(len(self.prompts), _groups_per_shard(p)) for p in self.parts[:part])

    def digest(self) -> str:
        """Return a short hash of the prompts, for sampling.json."""
        return hashlib.blake2b("\0".join(g for g, _ in self.groups).encode(), digest_size=12).hexdigest()


def image_seed(seed: int, group_id: str, index: int) -> int:
    """Return the seed of one image, below 2^32: torch's CPU generator reads no more bits."""
    return int(draw(seed, "sample", group=group_id, member=index).integers(2**32))


def remember(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings into `out`/sampling.json, or raise DiffalignError if it holds images of other settings."""
    text = json.dumps(settings, indent=1) + "\n"
    path = out / "sampling.json"
    make_folder(out)
    complete_all([Task("plan", path.is_file, lambda: write_whole(path, text))], out / WORK_FOLDER / "locks")
    before, now = read_json(path, "restore it from a copy, or choose another folder"), json.loads(text)
    if before != now:
        with reading(path, mend="restore it from a copy, or choose another folder"):
            before = dict(before)
        key = next((k for k in {**now, **before} if before.get(k) != now.get(k)), "other settings")
        raise DiffalignError(
            f"{out} holds images sampled with {key}={before.get(key)!r}, not {now.get(key)!r}; choose another folder"
        )


def _groups_per_shard(part: Part) -> int:
    return max(1, IMAGES_PER_SHARD // part.images_per_prompt)


def _count(items: int, size: int) -> int:
    return -(-items // size)


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
