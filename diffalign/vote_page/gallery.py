"""Find what can be voted on: a dataset, a folder of images that share prompts, two folders, or trained runs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from diffalign.data.containers import FileOrigin, Origin
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.schema import GROUPS_FILE
from diffalign.errors import DiffalignError
from diffalign.files import read_json
from diffalign.files.paths import inside, member_name, own_file
from diffalign.scoring.items import Item
from diffalign.scoring.pairing import heading, pair_up
from diffalign.scoring.sources import collect
from diffalign.terminal import counted
from diffalign.voting.log import VOTES_FILE
from diffalign.voting.questions import Group

EVALUATION = "eval.json"
BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Gallery:
    """What is voted on.

    groups: images of one prompt. origins: where the bytes of their images are, in the same order. log: the file of the
    votes. about: one line that says what this is. dataset: the folder, if it is one. taken: names that no rater may have.
    """

    groups: list[Group]
    origins: list[list[Origin]]
    log: Path
    about: str
    dataset: Path | None = None
    taken: tuple[str, ...] = ()

    @cached_property
    def origin_of(self) -> dict[str, Origin]:
        """Image's name -> where its bytes are."""
        pairs = zip(self.groups, self.origins, strict=True)
        return {name: origin for group, own in pairs for name, origin in zip(group.images, own, strict=True)}


def open_gallery(sources: Sequence[Path], log: Path | None = None) -> Gallery:
    """Return what one source or two hold; no image is read.

    log: the file of the votes; without it, it lies in the dataset or folder, or beside the two folders. Raises
    DiffalignError where nothing can be compared.
    """
    for source in sources:
        if not source.exists():
            raise DiffalignError(f"{source}: no such file or folder")
    gallery = _open(sources, log)
    if log is None:  # a link in a folder of others might lead to any file
        own_file(gallery.log.parent, gallery.log)
    return gallery


def _open(sources: Sequence[Path], log: Path | None) -> Gallery:
    if len(sources) == 1 and (sources[0] / GROUPS_FILE).is_file():
        return _dataset(sources[0], log)
    if len(sources) == 1 and not (sources[0] / EVALUATION).is_file():
        return _folder(sources[0], log)
    if len(sources) > 2:
        raise DiffalignError(f"{len(sources)} sources: give a dataset, a folder, or two folders to compare")
    return _two(sources, log)


def _dataset(folder: Path, log: Path | None) -> Gallery:
    dataset = PreferenceDataset(folder)
    models = dataset.generators()
    members: dict[str, list[Item]] = {}
    for item in collect([str(folder)]):
        assert item.group is not None  # it comes from a dataset folder
        members.setdefault(item.group[0], []).append(item)
    several = [group for group in members.values() if len(group) > 1]
    _refuse_none(several, folder, "no group of the dataset has two images")
    groups = [
        Group(
            items[0].prompt or "",
            tuple(item.key for item in items),
            tuple(models[item.group] for item in items if item.group),
        )
        for items in several
    ]
    about = f"{folder}: {_sizes(groups)}"
    origins = [[item.origin for item in items] for items in several]
    return Gallery(groups, origins, log or folder / VOTES_FILE, about, folder, tuple(dataset.rewards()))


def _folder(folder: Path, log: Path | None) -> Gallery:
    log = log or (folder if folder.is_dir() else folder.parent) / VOTES_FILE
    by_prompt: dict[str, list[Item]] = {}
    without = 0
    for item in collect([str(folder)]):
        if item.prompt and item.prompt.strip():
            by_prompt.setdefault(item.prompt, []).append(item)
        else:
            without += 1
    several = {prompt: items for prompt, items in by_prompt.items() if len(items) > 1}
    alone = len(by_prompt) - len(several)
    why = "no two images share a prompt" + (f" ({counted(without, 'image')} without one)" if without else "")
    _refuse_none(several, folder, f"{why}; write a.txt beside a.png, or give two folders with equal names")
    groups = [
        Group(prompt, tuple(_name(item, log) for item in items), tuple(_model(item, folder) for item in items))
        for prompt, items in several.items()
    ]
    left_out = f"; left out: {without} without a prompt, {alone} alone with theirs" if without or alone else ""
    origins = [[item.origin for item in items] for items in several.values()]
    return Gallery(groups, origins, log, f"{folder}: {_sizes(groups)}{left_out}")


def _two(sources: Sequence[Path], log: Path | None) -> Gallery:
    """Return the pairs of two folders, of two runs, or of one run's base and tuned model."""
    if len(sources) == 1:
        run = sources[0]
        sides = {BASE: _of_run(run, BASE), TUNED: _of_run(run, TUNED)}
        log = log or run / VOTES_FILE
    else:
        sides = dict(zip(_distinct(sources), map(_side, sources), strict=True))
        log = log or _beside(sources)
    a, b = sides.values()
    both = {item.name for item in a} & {item.name for item in b}
    if both:
        raise DiffalignError(f"{min(both)!r} is on both sides; give two different folders")
    pairing = pair_up(a, b)
    models = list(sides)
    groups, origins = [], []
    for pairs in pairing.prompts:
        items = [item for i, j in pairs for item in (a[i], b[j])]
        groups.append(
            Group(
                items[0].prompt or items[1].prompt or "",
                tuple(_name(item, log) for item in items),
                tuple(models) * len(pairs),
                tuple((2 * n, 2 * n + 1) for n in range(len(pairs))),
            )
        )
        origins.append([item.origin for item in items])
    return Gallery(groups, origins, log, heading(pairing))


def _side(source: Path) -> list[Item]:
    return _of_run(source, TUNED) if (source / EVALUATION).is_file() else collect([str(source)])


def _of_run(run: Path, model: str) -> list[Item]:
    """Return the images that the evaluation of a run drew with one model, named `00012-0.png` by prompt and seed."""
    result = read_json(run / EVALUATION, "run `diffalign eval` again", "prompts", "images")
    folder = inside(run, f"eval/images/{model}")
    folder = folder if folder.is_dir() else Path(str(result["images"].get(model, folder)))
    found = []
    for place, prompt in enumerate(result["prompts"]):
        found += [
            Item(path.as_posix(), path.name, FileOrigin(path), prompt)
            for path in sorted(folder.glob(f"{place:05d}-*.png"))
            if path.resolve().parent == folder.resolve()
        ]
    if not found:
        raise DiffalignError(f"{run}: its evaluation has no image of the model {model}; run `diffalign eval` again")
    return found


def _refuse_none(found: Sequence[object] | dict[str, list[Item]], folder: Path, why: str) -> None:
    if not found:
        raise DiffalignError(f"{folder}: {why}")


def _name(item: Item, log: Path) -> str:
    """Return the name of an image in the log: its path relative to the log's folder, whether it lies in a file or not."""
    above = f"{log.parent.as_posix()}/"
    return item.name[len(above) :] if item.name.startswith(above) else os.path.relpath(item.name, log.parent)


def _model(item: Item, folder: Path) -> str:
    """Return what drew an image of a folder: the folder below it, or its own name."""
    above = PurePosixPath(item.key.partition("#")[0]).parent.as_posix()
    return folder.resolve().name if above == "." else above


def _distinct(sources: Sequence[Path]) -> list[str]:
    """Return a name for each source, the shortest end of its path that tells them apart."""
    parts = [source.resolve().parts for source in sources]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise DiffalignError(f"{sources[0]} and {sources[1]} are the same folder; give two")


def _beside(sources: Sequence[Path]) -> Path:
    """Return the log of two sources: beside the first of them, with both names, whatever their order."""
    first, second = sorted(Path(os.path.normpath(source.absolute())) for source in sources)
    return first.parent / f"votes-{member_name(first.name)}-{member_name(second.name)}.jsonl"


def _sizes(groups: Sequence[Group]) -> str:
    images = sum(len(group.images) for group in groups)
    return f"{counted(images, 'image')} of {counted(len(groups), 'prompt')}"
