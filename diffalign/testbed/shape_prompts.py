"""Make prompts of GenEval's six kinds about the world of shapes, with the metadata that decides whether an image obeys.

Every prompt states a *combination* (which objects, how many, which colours, which relation). Combinations, not strings,
are split into train, validation and test, kind by kind, so a held-out prompt shares neither its words nor its meaning
with any training prompt. `a circle left of a square` and `a square right of a circle` are one combination.
"""

import hashlib
import itertools
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np

from diffalign.errors import DiffalignError
from diffalign.testbed.scenes import COLORS, SHAPES, Scene, place

TAGS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS: dict[str, float] = {"test": 0.25, "validation": 0.10, "train": 0.65}
RELATIONS: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS: dict[int, str] = {2: "two", 3: "three", 4: "four"}

Metadata = dict[str, Any]


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def _named(shape: str, color: str | None) -> str:
    return f"a {color} {shape}" if color else f"a {shape}"


def _clause(shape: str, count: int = 1, color: str | None = None) -> Metadata:
    return {"class": shape, "count": count} | ({"color": color} if color else {})


def prompt_text(include: list[Metadata]) -> str:
    """Return the prompt that GenEval-style clauses stand for."""
    first, last = include[0], include[-1]
    if first["count"] > 1:
        color = first["color"] + " " if "color" in first else ""
        return f"{NUMBERS[first['count']]} {color}{plural(first['class'])}"
    named = [_named(c["class"], c.get("color")) for c in include]
    if "position" in last:
        return f"{named[1]} {last['position'][0]} {named[0]}"
    return " and ".join(named)


def _metadata(tag: str, include: list[Metadata], exclude: list[Metadata] | None = None) -> Metadata:
    return {"tag": tag, "include": include, "prompt": prompt_text(include)} | ({"exclude": exclude} if exclude else {})


def _single(shape: str, color: str | None) -> Metadata:
    return _metadata("colors" if color else "single_object", [_clause(shape, 1, color)])


def _pair(first: tuple[str, str | None], second: tuple[str, str | None]) -> Metadata:
    return _metadata("color_attr" if first[1] else "two_object", [_clause(s, 1, c) for s, c in (first, second)])


def _count(shape: str, count: int, color: str | None) -> Metadata:
    # GenEval marks too many objects by an excluded count of one more.
    return _metadata("counting", [_clause(shape, count, color)], [_clause(shape, count + 1)])


def _position(subject: tuple[str, str | None], relation: str, target: tuple[str, str | None]) -> Metadata:
    # GenEval lists the target first; the subject's position refers to it by index.
    include = [_clause(target[0], 1, target[1]), _clause(subject[0], 1, subject[1]) | {"position": [relation, 0]}]
    return _metadata("position", include)


def combinations(tag: str) -> list[list[Metadata]]:
    """Return every combination of a kind, each as the list of its wordings."""
    colors, pairs = list(COLORS), list(itertools.combinations(SHAPES, 2))
    two_colors = list(itertools.permutations(colors, 2))
    none: list[tuple[str | None, str | None]] = [(None, None)]
    makers: dict[str, Callable[[], list[list[Metadata]]]] = {
        "single_object": lambda: [[_single(s, None)] for s in SHAPES],
        "two_object": lambda: [[_pair((a, None), (b, None)), _pair((b, None), (a, None))] for a, b in pairs],
        "counting": lambda: [[_count(s, n, c)] for s in SHAPES for n in NUMBERS for c in [None, *colors]],
        "colors": lambda: [[_single(s, c)] for s in SHAPES for c in colors],
        "position": lambda: [
            [_position((a, ca), r, (b, cb)), _position((b, cb), RELATIONS[r], (a, ca))]
            for (a, b), r, (ca, cb) in itertools.product(pairs, RELATIONS, [*none, *two_colors])
        ],
        "color_attr": lambda: [
            [_pair((a, ca), (b, cb)), _pair((b, cb), (a, ca))]
            for (a, b), (ca, cb) in itertools.product(pairs, two_colors)
        ],
    }
    return makers[tag]()


def _rank(combination: list[Metadata]) -> bytes:
    return hashlib.blake2b(combination[0]["prompt"].encode(), digest_size=8).digest()


@cache
def _ordered(tag: str) -> list[list[Metadata]]:
    # Cached: a judge's training draws prompts one by one, and making them each time took longer than the model.
    return sorted(combinations(tag), key=_rank)


def combinations_of(split: str, tag: str) -> list[list[Metadata]]:
    """Return a kind's combinations in one split, in an order that depends only on their words.

    The order must not change: the splits depend on it. Raises DiffalignError for another split.
    """
    ordered = _ordered(tag)
    start = 0
    for name, share in SPLITS.items():
        end = len(ordered) if name == "train" else start + max(1, round(share * len(ordered)))
        if name == split:
            return ordered[start:end]
        start = end
    raise DiffalignError(f"split {split!r} of the embedded world does not exist; use one of {', '.join(SPLITS)}")


def draw_prompts(split: str, n: int, seed: int = 0) -> list[Metadata]:
    """Return `n` different prompts of a split, spread evenly over the six kinds as far as a kind has enough.

    They are GenEval metadata: `{"tag", "include", "exclude", "prompt"}`. Raises DiffalignError if the split has fewer
    than `n`.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split) if split in SPLITS else 99])
    wordings = {tag: [w for c in combinations_of(split, tag) for w in c] for tag in TAGS}
    for tag in TAGS:
        wordings[tag] = [wordings[tag][i] for i in rng.permutation(len(wordings[tag]))]
    available = sum(map(len, wordings.values()))
    if n > available:
        raise DiffalignError(f"the {split} split of the embedded world has {available} prompts; {n} were asked for")
    chosen: list[Metadata] = []
    depth = 0
    while len(chosen) < n:
        chosen += [wordings[tag][depth] for tag in TAGS if depth < len(wordings[tag])]
        depth += 1
    return deepcopy(chosen[:n])


def scene_for(metadata: Metadata, rng: np.random.Generator) -> Scene:
    """Return a random scene that obeys a prompt; colours that the prompt leaves open are random."""

    def color() -> str:
        return str(rng.choice(list(COLORS)))

    include = metadata["include"]
    kinds = [(c["class"], c.get("color") or color()) for c in include for _ in range(c["count"])]
    relation = include[-1].get("position", [None])[0]
    return place(kinds, rng, relation)


def misdescribed(metadata: Metadata, rng: np.random.Generator, share: float) -> str:
    """Return a caption in which each attribute is random with probability `share`, as in web captions."""

    def noisy(clause: Metadata) -> Metadata:
        clause = dict(clause)
        choices: dict[str, list[Any]] = {"class": list(SHAPES), "color": list(COLORS)}
        if clause["count"] > 1:
            choices["count"] = list(NUMBERS)
        for key, values in choices.items():
            if key in clause and rng.random() < share:
                clause[key] = values[rng.integers(len(values))]
        if "position" in clause and rng.random() < share:
            clause["position"] = [list(RELATIONS)[rng.integers(len(RELATIONS))], 0]
        return clause

    return prompt_text([noisy(c) for c in metadata["include"]])
