"""Turn what a reader of other people's data yields into a dataset folder."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal

from diffalign.data.absent_labels import FEWER_THAN_TWO
from diffalign.data.choose_members import split_of
from diffalign.data.containers import Origin
from diffalign.data.prompts import PromptRow
from diffalign.data.schema import CONDITIONS, GROUPS_FILE, GroupRow
from diffalign.data.writer import ImageWriter, write_groups
from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable, decode, read_file
from diffalign.files.paths import NOT_PLAIN, is_plain_name

IMAGES_PER_FILE = 4096


ImportedImage = bytes | Path | Origin
LabelKind = Literal["preference", "rank", "score"]


@dataclass(frozen=True)
class ImportedGroup:
    """A group as it stands in somebody's files. images: encoded bytes, or where they are; they are read when the group is
    written. preference: a value an image, NaN for one without a label, or () where nobody gave any.
    """

    prompt: str
    images: tuple[ImportedImage, ...]
    preference: tuple[float, ...]
    where: str
    generators: tuple[str, ...] = ()
    split: str = "train"
    metadata: dict[str, Any] = field(default_factory=dict)
    condition: ImportedImage | None = None
    """The image that these are edits of."""


@dataclass(frozen=True)
class SkippedRow:
    """A skipped row. `fault`: report file and row; otherwise only count the reason."""

    where: str
    reason: str
    fault: bool = True


@dataclass
class Report:
    """What became of the rows. unlabelled: images that were kept without a label beside others with one."""

    groups: int = 0
    unlabelled: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    images: int = 0
    counted: Counter[str] = field(default_factory=Counter)
    faults: list[SkippedRow] = field(default_factory=list)


class _Part:
    """The files of one part of a dataset that is being written: images, and condition images once there is one."""

    def __init__(self, out: Path, number: int) -> None:
        self.out, self.name, self.written = out, f"part-{number:05d}", 0
        self.images = ImageWriter(out, self.name).__enter__()
        self._conditions: ImageWriter | None = None

    @property
    def conditions(self) -> ImageWriter:
        if self._conditions is None:
            self._conditions = ImageWriter(self.out, self.name, CONDITIONS).__enter__()
        return self._conditions

    def close(self, error: BaseException | None = None) -> None:
        """Complete the files, or leave none behind after an error."""
        for writer in (self.images, self._conditions):
            if writer is not None:
                writer.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)


def write_imported(
    rows: Iterable[ImportedGroup | SkippedRow], out: Path, strict: bool = False, splits: dict[str, float] | None = None
) -> Report:
    """Write a dataset; images are kept byte for byte. A broken row is skipped, or is an error if `strict`.

    splits: share of the prompts in each split except `train`, which gets the rest. Groups that the files themselves put
    into another split than `train` stay there.

    Raises DiffalignError if `out` holds a dataset already, or if no row gives a group.
    """
    if (out / GROUPS_FILE).exists():
        raise DiffalignError(f"{out} holds a dataset already; choose another folder")
    report = Report()
    groups: list[GroupRow] = []
    part: _Part | None = None
    files = 0
    try:
        for row in rows:
            kept = row if isinstance(row, SkippedRow) else _loaded(row)
            if isinstance(kept, SkippedRow):
                if kept.fault and strict:
                    raise DiffalignError(f"{kept.where}: {kept.reason}")
                if kept.fault:
                    report.faults.append(kept)
                else:
                    report.counted[kept.reason] += 1
                continue
            # A new file after IMAGES_PER_FILE images, so that none grows without bound.
            if part is not None and part.written >= IMAGES_PER_FILE:
                part.close()
                part = None
            if part is None:
                part, files = _Part(out, files), files + 1
            if splits and kept.split == "train":
                kept = replace(kept, split=split_of(kept.prompt, splits, 0))
            groups.append(_write(part, kept, len(groups)))
            report.splits[kept.split] += 1
            report.unlabelled += sum(not isfinite(value) for value in kept.preference)
            part.written += len(kept.images)
            report.images += len(kept.images)
    except BaseException as error:
        if part is not None:
            part.close(error)
        raise
    if part is None:
        first = f"; the first: {report.faults[0].where}: {report.faults[0].reason}" if report.faults else ""
        counted = "".join(f"; {n} rows: {reason}" for reason, n in report.counted.items())
        raise DiffalignError(f"no row gives a group of images{counted}{first}")
    part.close()
    report.groups = write_groups(out, groups)
    return report


def vote_shares_of_ranks(ranks: list[float]) -> tuple[float, ...]:
    """Return preferences from ranks (1 is the best): the share of the others that are ranked worse.

    An image without a rank (NaN) gets none and is nobody's other.
    """
    others = max(sum(map(isfinite, ranks)) - 1, 1)
    return tuple(sum(other > rank for other in ranks) / others if isfinite(rank) else nan for rank in ranks)


def preference_of(labels: Sequence[object], kind: LabelKind) -> tuple[float, ...]:
    """Return the preference of a group's images from their labels as somebody wrote them.

    kind: `preference` is kept as it is, `rank` (1 is the best) and `score` (higher is better) become vote shares. A label
    that is missing, no number, NaN or infinite is absent: NaN. Raises DiffalignError for a preference outside [0, 1].
    """
    numbers = [nan if (number := finite_number(label)) is None else number for label in labels]
    if kind != "preference":
        return vote_shares_of_ranks(numbers if kind == "rank" else [-number for number in numbers])
    if not all(0 <= number <= 1 for number in numbers if isfinite(number)):
        raise DiffalignError(f"preference out of range: {[n for n in numbers if isfinite(n)]}; it lies in [0, 1]")
    return tuple(numbers)


def finite_number(value: object) -> float | None:
    """Return a finite number, also from text such as "8,5"; None for anything else."""
    try:
        text = value.replace(",", ".") if isinstance(value, str) and value.count(",") == 1 else value
        number = float(text) if isinstance(text, int | float | str) and not isinstance(text, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _loaded(row: ImportedGroup) -> ImportedGroup | SkippedRow:
    """Return the row with its files read and checked, or why it is skipped."""
    if row.preference and sum(map(isfinite, row.preference)) < 2:
        return SkippedRow(row.where, FEWER_THAN_TWO, fault=False)
    if not is_plain_name(row.split):
        return SkippedRow(row.where, f"split {row.split!r} {NOT_PLAIN}")
    loaded = []
    condition = [] if row.condition is None else [row.condition]
    for n, image in enumerate([*row.images, *condition]):
        name = image.name if isinstance(image, Path) else f"image {n}" if n < len(row.images) else "condition"
        try:
            data = read_file(image) if isinstance(image, Path) else image if isinstance(image, bytes) else image.read()
        except Unreadable as error:
            return SkippedRow(row.where, f"{name}: {error}")
        try:
            decode(data)
        except Unreadable as error:
            return SkippedRow(row.where, f"{name} is not a complete image ({error})")
        loaded.append(data)
    images = tuple(loaded[: len(row.images)])
    return replace(row, images=images, condition=loaded[-1] if condition else None)


def _write(part: _Part, row: ImportedGroup, number: int) -> GroupRow:
    prompt = PromptRow(row.prompt)
    group = f"{number:07d}-{prompt.prompt_id}"
    for index, image in enumerate(row.images):
        generator = row.generators[index] if row.generators else "imported"
        assert isinstance(image, bytes)
        part.images.write(group, index, image, generator, 0, {"from": Path(row.where).name})
    if isinstance(row.condition, bytes):
        part.conditions.write(group, 0, row.condition, "", 0, {"from": Path(row.where).name})
    labelled = [index for index, value in enumerate(row.preference) if isfinite(value)]
    return {
        "group_id": group,
        "prompt_id": prompt.prompt_id,
        "prompt": row.prompt,
        "preference": [row.preference[index] for index in labelled],
        "split": row.split,
        "metadata": row.metadata,
        "members": labelled if len(labelled) < len(row.preference) else None,
        "human": list(row.preference) or None,
    }
