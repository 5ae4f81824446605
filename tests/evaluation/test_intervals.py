"""No interval from fewer than 8 prompts, and no colour or word that claims more than the interval does."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from diffalign.config import RoundsConfig
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.evaluate import EvaluationPlan, summarise
from diffalign.intervals import Interval, bootstrap, interval_in
from diffalign.report.images import Candidate
from diffalign.report.model_card import write_card
from diffalign.report.render import verdicts, write_report
from diffalign.report.runs import read_run
from diffalign.scoring.compare_folders import comparison_table, outcomes
from diffalign.scoring.human_agreement import Choice, agree, agreement_table
from diffalign.scoring.pairing import pair_up
from diffalign.stages import rounds
from helpers.run_directory import comparison, make_run
from helpers.scored_items import made

FEW = "too few prompts ({}) for an interval"


def shown(table: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_interval_is_the_bootstraps() -> None:
    """Against a loop over resamples, with a seed of its own."""
    values = np.random.default_rng(0).normal(0.2, 1, size=(60, 2))
    rng = np.random.default_rng(9)
    means = [values[rng.integers(60, size=60)].mean(0) for _ in range(4000)]
    for found, column in zip(bootstrap(values), np.array(means).T, strict=True):
        assert (found.low, found.high) == pytest.approx(np.quantile(column, [0.025, 0.975]), abs=0.02)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 30])
def test_seven_prompts_have_no_interval_and_eight_have_one(count: int) -> None:
    rng = np.random.default_rng(count)
    c = compare(rng.normal(size=(count, 4)), rng.normal(3, size=(count, 4)))
    assert c.prompts == count and np.isfinite([c.difference, c.win_rate]).all()
    for interval in (c.interval, c.win_interval, bootstrap(rng.normal(size=(count, 1)))[0]):
        assert (interval.low is None) == (interval.high is None) == (count < 8)
        assert (interval.words() == FEW.format(count)) == (count < 8)
    # However large the difference, nothing is claimed from few prompts.
    assert c.interval.tone == ("good" if count >= 8 else "")
    assert c.interval.verdict() == ("better" if count >= 8 else "too few prompts to tell")
    json.loads(json.dumps(c.as_dict()), parse_constant=lambda name: pytest.fail(name))


def test_a_kind_of_few_prompts_has_none_beside_one_of_many() -> None:
    rng = np.random.default_rng(0)
    tags = ["a"] * 20 + ["b"] * 3 + ["c"]
    prompts = [PromptRow(str(i), {"tag": tag}) for i, tag in enumerate(tags)]
    scores = {m: {"r": rng.normal(size=(24, 2))} for m in ("base", "tuned")}
    found = summarise(scores, EvaluationPlan(prompts, seeds=2))["r"]
    assert {kind: interval_in(c).low is not None for kind, c in found.items()} == {
        "all": True, "a": True, "b": False, "c": False
    }  # fmt: skip


def test_a_kind_without_scores_costs_only_itself() -> None:
    values = np.array([[1.0], [2.0], [np.nan]])
    prompts = [PromptRow(str(i), {"tag": tag}) for i, tag in enumerate("aab")]
    scores = {"base": {"r": values}, "tuned": {"r": values[::-1]}}
    assert list(summarise(scores, EvaluationPlan(prompts, seeds=1))["r"]) == ["all", "a"]
    with pytest.raises(DiffalignError, match="r: no image was scored for both models"):
        summarise({"base": {"r": values}, "tuned": {"r": values * np.nan}}, EvaluationPlan(prompts, seeds=1))


def test_images_of_few_prompts_are_few_however_many() -> None:
    """Seven prompts with 50 images each are seven prompts, in each of the tables of `score`."""
    values, prompts = [float(i) for i in range(350)], [f"p{i % 7}" for i in range(350)]
    a, b = made(values, [*prompts]), made([v + 1 for v in values], [*prompts], side="b")
    table = shown(comparison_table(outcomes(a, b, pair_up(a.items, b.items))))
    assert FEW.format(7) in re.sub(r"\s+", " ", table) and "+1.0000 to" not in table
    choices = [Choice(i, i + 7, 1, prompts[i]) for i in range(343)]
    assert agree(choices, a, "r").interval.words() == FEW.format(7)
    assert FEW.format(7) in re.sub(r"\s+", " ", shown(agreement_table(choices, a)))


@pytest.mark.parametrize(
    ("difference", "prompts", "words", "tone"),
    [
        (0.2, 3, "Too few prompts to tell", ""),
        (-0.2, 7, "Too few prompts to tell", ""),
        (0.2, 8, "Better than the base", "good"),
        (-0.2, 200, "Worse than the base", "bad"),
        (0.05, 200, "No difference seen", ""),
        (-0.05, 8, "No difference seen", ""),
    ],
)
def test_the_report_says_first_what_can_be_told(
    tmp_path: Path, difference: float, prompts: int, words: str, tone: str
) -> None:
    """The ends of an interval that an earlier version wrote for few prompts are not shown either."""
    folder = make_run(tmp_path / "run")
    result = json.loads((folder / "eval.json").read_text())
    result["scores"] = {"r": {"all": {**comparison(difference), "prompts": prompts}}}
    (folder / "eval.json").write_text(json.dumps(result))
    page = write_report(folder).read_text()
    first_screen = page.split("<h2>")[0]
    assert f'<b class="{tone}">{words}.</b>' in first_screen
    claims = set(re.findall(r'class="(good|bad)">', page.replace('<b class="good">Nothing found', "")))
    assert claims == ({tone} if tone else set())
    ends = f"{difference - 0.1:+.3f} to {difference + 0.1:+.3f}"
    options = {"base": "shapes-sdxl", "adapter": True, "usage": "", "files": {}, "generators": {}}
    card = write_card(read_run(folder), tmp_path, **options)
    for text in (page, card.read_text()):
        assert (ends in text) == (prompts >= 8) and (FEW.format(prompts) in text) == (prompts < 8)


@pytest.mark.parametrize(
    ("low", "high", "side"), [(0.0, 0.1, 0), (1e-9, 0.1, 1), (-0.1, 0.0, 0), (-0.2, -0.1, -1), (float("nan"), 1.0, 0)]
)
def test_zero_at_the_edge_is_no_difference(low: float, high: float, side: int) -> None:
    interval = Interval(100, low, high)
    assert interval.side() == side and bool(interval.tone) == bool(side)


def test_a_verdict_names_score_and_prompts() -> None:
    (one,) = verdicts([Candidate("tuned", Path(), {"r": {"all": {**comparison(0.2), "prompts": 40}}}, "tuned")])
    assert (
        one["reason"]
        == "r changed by +0.200 over 40 held-out prompts, 95% interval +0.100 to +0.300, which excludes 0."
    )


@pytest.mark.parametrize("prompts", [1, 7, 8, 64])
def test_the_table_of_rounds(
    tmp_path: Path, prompts: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ends that an earlier version wrote into round.json for few prompts are not shown either."""
    monkeypatch.setattr(rounds, "write_reports", lambda runs, out: out)
    done = [{"round": 1, "column": "r", "weights": "w", **comparison(0.125), "prompts": prompts}]
    rounds._summary(RoundsConfig.model_construct(out=tmp_path), done)
    said = capsys.readouterr().out
    interval = "+0.025 to +0.225" if prompts >= 8 else FEW.format(prompts)
    assert f"round 1: 0.3750 (+0.125 against the base, 95%: {interval})" in said


def test_labels_without_prompts_are_groups() -> None:
    scores = made([1.0, 2.0, 3.0], [None] * 3)
    found = agree([Choice(0, 1, 1, "c.csv:2"), Choice(1, 2, -1, "c.csv:3")], scores, "r")
    assert found.interval.words() == "too few groups (2) for an interval"
