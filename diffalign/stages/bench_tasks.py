"""Turn `--task` and `--judge` into suites with prompts and judges, before anything is loaded or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.bench.suite import Suite, SuiteJudge
from diffalign.bench.suites import find_suite
from diffalign.data.plan import SynthPlan
from diffalign.data.prompts import PromptRow
from diffalign.data.suites import read_suite
from diffalign.data.suites_hub import HUB, ON_HUB, from_hub, read_hub_suite
from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, takes
from diffalign.rewards.vqa import questions_of
from diffalign.scoring.spec import RewardSpec, parse
from diffalign.stages.resolve import resolve_prompts
from diffalign.stages.resolve_rewards import build_reward

BATCH = 32
"""Images that a judge sees at once."""


@dataclass(frozen=True)
class BenchTask:
    """A suite that is to be drawn and judged. source: where its prompts came from. folder: its name below `out`."""

    suite: Suite
    rows: list[PromptRow]
    rewards: dict[str, Reward]
    source: str
    folder: str
    notes: tuple[str, ...] = ()
    batch_size: int = BATCH

    @property
    def digest(self) -> str:
        """A short hash of the prompts and their order."""
        return SynthPlan(tuple(self.rows), (), 0).digest()


def open_tasks(
    texts: Sequence[str], judges: Sequence[str], data: Path | None, n: int | None, device: str
) -> list[BenchTask]:
    """Return the suites that `--task NAME[:PATH],...` names, with their prompts and judges.

    judges: `--judge LABEL:key=value` or `LABEL=REWARD:...`. data: a folder with a folder for each suite. n: the number of
    prompts, at even steps. Raises DiffalignError for unknown names, absent prompts, and prompts that a judge cannot judge.
    """
    named = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if not named:
        raise DiffalignError("--task: name a suite; `diffalign bench suites` lists them")
    changed = [parse(text, "--judge") for text in judges]
    suites = [(find_suite(name), path) for name, _, path in (part.partition(":") for part in named)]
    names = [suite.name for suite, _ in suites]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DiffalignError(f"--task: {twice} is named twice")
    labels = {judge.label for suite, _ in suites for judge in suite.judges}
    if other := next((one.label for one in changed if one.label not in labels), None):
        raise DiffalignError(
            f"--judge {other}: none of these suites has such a judge; there are {', '.join(sorted(labels))}"
        )
    return [_open(suite, path, changed, data, n, device) for suite, path in suites]


def _open(
    suite: Suite, path: str, changed: Sequence[RewardSpec], data: Path | None, n: int | None, device: str
) -> BenchTask:
    rows, source = _prompts(suite, path, data)
    rows, total = suite.prepare(rows), len(rows)
    notes = [] if total == suite.published else [f"{source} has {total} prompts, the published suite {suite.published}"]
    folder = suite.name
    if n is not None and n < total:
        rows = [rows[int(i)] for i in np.unique(np.linspace(0, total - 1, n).round())]
        notes.append(f"{len(rows)} of {total} prompts: this is not the published protocol")
        folder = f"{suite.name}-n{n}"
    rewards = {judge.label: _reward(suite, judge, changed, rows, device) for judge in suite.judges}
    return BenchTask(suite, rows, rewards, source, folder, tuple(notes))


def _prompts(suite: Suite, path: str, data: Path | None) -> tuple[list[PromptRow], str]:
    """Return a suite's prompts, those that are there twice too, and where they came from."""
    if suite.prompts.startswith("testbed:"):
        if path:
            raise DiffalignError(f"--task {suite.name}:{path}: its prompts are in the package; leave the path out")
        return resolve_prompts(suite.prompts, None), suite.prompts
    if not path and data is not None:
        found = (data / suite.name, *sorted(data.glob(f"{suite.name}.*")))
        path = next((str(place) for place in found if place.exists()), "")
    if not path and suite.prompts in ON_HUB:
        path = HUB
    if not path:
        raise DiffalignError(
            f"--task {suite.name}: give its prompts, as in -t {suite.name}:PATH, or --data FOLDER with FOLDER/{suite.name}: "
            f"they are {suite.where}"
        )
    if from_hub(path):
        rows = read_hub_suite(suite.prompts, path, unique=False)
        return rows, rows[0].metadata["suite"]
    where = suite.locate(Path(path).expanduser())
    return read_suite(suite.prompts, where, unique=False), where.as_posix()


def _reward(
    suite: Suite, judge: SuiteJudge, changed: Sequence[RewardSpec], rows: list[PromptRow], device: str
) -> Reward:
    """Build a judge of a suite, with what `--judge` changes. Raises DiffalignError for one that cannot judge the suite."""
    name, options = judge.label, dict(judge.options)
    for spec in changed:
        if spec.label == judge.label:
            options = {**(options if spec.name == judge.label else {}), **spec.options}
            name = spec.name
    mine = [row for row in rows if not judge.kinds or row.metadata.get("tag") in judge.kinds]
    if judge.asks and takes(name, "most"):
        options["most"] = max((len(questions_of(row.metadata)) for row in mine), default=1) or 1
    reward = build_reward(name, options, device)
    if absent := [column for column in judge.columns if column not in reward.columns]:
        raise DiffalignError(
            f"--judge {judge.label}={name}: {suite.name} needs its column {absent[0]}, which it has not"
        )
    for row in mine:
        if reason := reward.reason_not_scorable(row.prompt, row.metadata):
            raise DiffalignError(
                f"{suite.name}: {judge.label} cannot judge {row.prompt!r}: {reason}; {suite.title} needs {suite.where}"
            )
    return reward
