"""Make one dataset of real and generated images of the same prompts, for objectives that tell them apart (DDO)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow
from diffalign.data.schema import GROUPS_FILE, GroupRow
from diffalign.data.writer import ImageWriter, write_groups
from diffalign.errors import DiffalignError

RealImage = tuple[PromptRow, Callable[[], bytes]]
"""A prompt and its real image, encoded; read only when it is written."""


def write_real_against_generated(real: Sequence[RealImage], drawn: PreferenceDataset, out: Path) -> int:
    """Write groups of one real image (preference 1) and the images of `drawn` of the same prompt (0); return how many.

    An existing dataset is kept. A prompt that occurs several times uses its real images in turn. Raises DiffalignError
    for a prompt of `drawn` without a real image.
    """
    if (out / GROUPS_FILE).is_file():
        return len(PreferenceDataset(out))
    waiting: dict[str, list[Callable[[], bytes]]] = {}
    for row, image in real:
        waiting.setdefault(row.prompt, []).append(image)
    rows: list[GroupRow] = []
    with ImageWriter(out) as writer:
        for i in range(len(drawn)):
            group = drawn.group(i)
            name, real_ones = group["group_id"], waiting.get(group["prompt"], [])
            if not real_ones:
                raise DiffalignError(f"{drawn.folder}: no real image of the prompt {group['prompt']!r}")
            writer.write(name, 0, real_ones.pop(0)(), "real", 0, {})
            made = drawn.images(name)
            for place, one in enumerate(made, start=1):
                writer.write(name, place, one.data, one.generator, one.seed, {})
            roles = [1.0] + [0.0] * len(made)
            rows.append({**group, "preference": roles, "human": roles, "members": None, "dropped": None})
    return write_groups(out, rows)
