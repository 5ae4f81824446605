"""Declare what a suite is: its prompts, how many images it draws, what judges them, and how its scores are formed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffalign.bench.measures import JudgedImage, Measure
from diffalign.data.prompts import PromptRow

Forming = Callable[[Sequence[JudgedImage]], list[Measure]]
"""Forms the scores of a suite from its judged images, the headline first."""


@dataclass(frozen=True)
class SuiteJudge:
    """A reward that judges a suite's images.

    label: its name in the results; what `--judge` names. columns: those that the suite reads besides the score. kinds: the
    tags of the prompts that it judges, all where empty. asks: whether it answers the questions of a prompt.
    """

    label: str
    options: Mapping[str, object] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    asks: bool = False


@dataclass(frozen=True)
class Suite:
    """A published suite.

    prompts: of `diffalign.data.suites`, or `testbed:SPLIT`. published: number of prompts. where: where they are to be had.
    inside: where the prompts are in a clone of that repository. protocol: what is drawn and how it is scored, in a line.
    deviations: what is not as published. prepare: adds to the prompts what the judges read, such as questions.
    """

    name: str
    title: str
    source: str
    prompts: str
    published: int
    where: str
    images_per_prompt: int
    judges: tuple[SuiteJudge, ...]
    protocol: str
    form: Forming
    deviations: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    prepare: Callable[[list[PromptRow]], list[PromptRow]] = lambda rows: rows

    def locate(self, path: Path) -> Path:
        """Return where the prompts are: `path`, or their place in a clone of the suite's repository."""
        found = (path / place for place in self.inside)
        return next((place for place in found if place.exists()), path) if path.is_dir() else path


def by_tag(
    images: Sequence[JudgedImage], column: str, *, scale: float = 1.0, digits: int = 4, prefix: str = ""
) -> list[Measure]:
    """Return the mean of a column over the images of each tag, in the suite's order."""
    return [
        Measure.of(
            prefix + tag,
            ((i.prompt, tag, i.values[column]) for i in images if i.tag == tag and column in i.values),
            scale=scale,
            digits=digits,
        )
        for tag in dict.fromkeys(image.tag for image in images)
    ]
