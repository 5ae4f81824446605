"""Pair two sets of images of the same prompts, by name and by prompt."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from diffalign.errors import DiffalignError
from diffalign.scoring.items import Item
from diffalign.terminal import counted


@dataclass(frozen=True)
class Pairing:
    """Rows of A and B that belong together, by prompt.

    how: "name", "prompt" or "name or prompt". unpaired: images left over. other_prompt: images whose name is on both
    sides with different prompts; the prompt counts for them.
    """

    how: str
    prompts: list[list[tuple[int, int]]]
    unpaired: int
    other_prompt: int = 0


def pair_up(a: list[Item], b: list[Item]) -> Pairing:
    """Pair images of equal names below their folders, and of equal prompts in the order of names where no name agrees.

    The kind of file does not matter, nor do folders where a file's own name is unique on both sides. A name with
    different prompts on the two sides tells nothing: such images are paired by prompt.

    Raises DiffalignError if nothing can be paired.
    """
    named = _by_name(a, b)
    pairs = {i: j for i, j in named.items() if len({a[i].prompt, b[j].prompt} - {None}) < 2}
    other_prompt, by_name, taken = len(named) - len(pairs), len(pairs), set(pairs.values())
    waiting: dict[str, list[int]] = {}
    for j, item in enumerate(b):
        if item.prompt and j not in taken:
            waiting.setdefault(item.prompt, []).append(j)
    for i, item in enumerate(a):
        if i not in pairs and item.prompt and waiting.get(item.prompt):
            pairs[i] = waiting[item.prompt].pop(0)
    if not pairs:
        raise DiffalignError("no image has the same name or the same prompt on both sides")
    both = "name or prompt" if other_prompt or len(pairs) > by_name else "name"
    # Images of one prompt are not independent, so the interval resamples prompts.
    prompts: dict[str, list[tuple[int, int]]] = {}
    for i, j in pairs.items():
        prompts.setdefault(a[i].prompt or b[j].prompt or a[i].name, []).append((i, j))
    unpaired = len(a) + len(b) - 2 * len(pairs)
    return Pairing(both if by_name else "prompt", list(prompts.values()), unpaired, other_prompt)


def _by_name(a: list[Item], b: list[Item]) -> dict[int, int]:
    """Return a row of B for each row of A of the same name: as it is, without its suffix, then without its folders.

    Equal names on one side, as those of two folders, are paired in their order if both sides have as many. Only names of
    files are shortened, and only where the rest is unique on both sides: rows of tables and datasets have numbers.
    """
    found: dict[int, int] = {}
    ways: tuple[tuple[Callable[[str], str], float], ...] = ((str, math.inf), (_stem, 1), (_file_stem, 1))
    for name, most in ways:
        sides: list[dict[str, list[int]]] = [{}, {}]
        for side, items, used in zip(sides, (a, b), (set(found), set(found.values())), strict=True):
            for i, item in enumerate(items):
                if i not in used and (most > 1 or item.path is not None):
                    side.setdefault(name(item.key), []).append(i)
        for key, rows in sides[0].items():
            if len(rows) == len(sides[1].get(key, ())) <= most:
                found |= zip(rows, sides[1][key], strict=True)
    return dict(sorted(found.items()))


def _stem(key: str) -> str:
    return key.removesuffix(PurePosixPath(key).suffix)


def _file_stem(key: str) -> str:
    return PurePosixPath(key).stem


def heading(pairing: Pairing) -> str:
    """Return what is compared: how many pairs, how they were found, and what was left out."""
    pairs = sum(len(p) for p in pairing.prompts)
    alone = f", {counted(pairing.unpaired, 'image')} without a partner" if pairing.unpaired else ""
    other = f", {counted(pairing.other_prompt, 'equal name')} with different prompts" if pairing.other_prompt else ""
    prompts = counted(len(pairing.prompts), "prompt")
    return f"{counted(pairs, 'pair')} by {pairing.how}, {prompts}{other}{alone}"
