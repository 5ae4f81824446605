"""The reward `zreward`: rubrics, what a judge's folder keeps, and the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.judge import Judge, load_judge
from diffalign.rewards.judge_prompt import SETTINGS, Wording
from diffalign.rewards.pixels import to_tensor
from diffalign.rewards.rubric import DIMENSIONS, load_rubrics
from diffalign.rewards.score_distribution import LEVELS
from helpers import pictures
from helpers.judge_inputs import IMAGES, PROMPTS, RUBRICS, one_line


def test_rubrics(tmp_path: Path) -> None:
    ours = load_rubrics()
    assert tuple(ours) == DIMENSIONS == ("alignment", "realism", "aesthetics", "plausibility")
    for text in ours.values():
        assert all(f"Level {k}:" in text for k in range(1, 6)) and len(text) > 400
    (tmp_path / "colour.txt").write_text("Dimension: colour.\n", encoding="utf-8")
    mine = load_rubrics(["alignment", tmp_path / "colour.txt", f"realism={tmp_path / 'colour.txt'}"])
    assert mine == {"alignment": ours["alignment"], "colour": "Dimension: colour.", "realism": "Dimension: colour."}
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Maßstab".encode("latin-1"))
    for bad, words in (
        (["beauty"], "neither one of alignment"),
        (["alignment", "alignment"], "given twice"),
        ([tmp_path / "empty.txt"], "0 characters"),
        ([tmp_path / "latin.txt"], "not UTF-8 text"),
        ([f"a b={tmp_path / 'colour.txt'}"], "letters, digits"),
        ([], "no dimension"),
    ):
        with pytest.raises(DiffalignError, match=words) as told:
            load_rubrics(bad)
        one_line(told)


def test_a_judge_keeps_its_words(tmp_path: Path, judges: dict[str, Judge]) -> None:
    was = judges["qwen2_vl"]
    wording = Wording(question="Prompt: {prompt}\n", ask="{rubric} {how}", marker="Answer:\n")
    judge = Judge(was.model, was.processor, labels="letters", rubrics=RUBRICS, wording=wording)
    judge.save(tmp_path)
    again = load_judge(tmp_path)
    assert (again.labels, again.rubrics, again.wording) == ("letters", RUBRICS, wording)
    with torch.no_grad():
        expected = judge.distribution(IMAGES, PROMPTS)
        assert torch.equal(again.distribution(IMAGES, PROMPTS).probabilities, expected.probabilities)
    reward = load_reward("zreward", weights=tmp_path)
    assert reward.dimensions == ("alignment", "realism") and reward.options()["labels"] == "letters"
    assert torch.allclose(reward.score(IMAGES, PROMPTS), expected.aggregate())
    (tmp_path / SETTINGS).write_text('{"labels": "digits"}')
    with pytest.raises(DiffalignError, match=r"judge.json: needs labels \(digits, letters\), rubrics"):
        load_judge(tmp_path)
    with pytest.raises(DiffalignError, match="question has no {prompt}"):
        Wording(question="Rate it.")


def test_zreward(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "colour.txt").write_text("Dimension: colour. Level 5: right.", encoding="utf-8")
    options: dict[str, Any] = {
        "weights": folders["qwen2_vl"],
        "dimensions": f"alignment+colour={tmp_path / 'colour.txt'}",
    }
    reward = load_reward("zreward", mix="alignment=3+colour=1", **options)
    measured = reward.measure(IMAGES, PROMPTS)
    assert tuple(measured) == reward.columns
    assert all(v.shape == (3,) for v in measured.values())
    assert reward.columns[:5] == ("zreward", "alignment", "alignment_spread", "colour", "colour_spread")
    assert len(reward.columns) == 5 + 18
    assert reward.columns[5] == "alignment@1.0"
    assert reward.columns[-1] == "colour@5.0"
    for name in ("alignment", "colour"):
        bins = torch.stack([measured[f"{name}@{level:.1f}"] for level in LEVELS], 1)
        assert torch.allclose(bins.sum(1), torch.ones(3), atol=1e-6)
        assert torch.allclose(bins @ torch.tensor(LEVELS), measured[name], atol=1e-5)
    assert torch.allclose(measured["zreward"], 0.75 * measured["alignment"] + 0.25 * measured["colour"], atol=1e-5)
    assert torch.allclose(reward.score(IMAGES, PROMPTS), measured["zreward"])
    assert reward.distribution(IMAGES, PROMPTS).probabilities.shape == (3, 2, 9)
    # The tensor path: the same number without a resize, a gradient to the pixels, none to the frozen weights.
    image = pictures.smooth(4, 56, 56)
    pixels = to_tensor(image)[None].requires_grad_()
    found = reward.score_tensors(pixels, ["a cat"])
    assert found.shape == (1,)
    assert found.item() == pytest.approx(reward.score([image], ["a cat"]).item(), abs=1e-5)
    found.sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad != 0).float().mean() > 0.9
    assert all(p.grad is None and not p.requires_grad for p in reward.network.parameters())
    with pytest.raises(DiffalignError, match=r"float \[B, 3, H, W\]"):
        reward.score_tensors(torch.rand(1, 3, 8, 8), ["a", "b"])
    # Other words, labels or weights of dimensions are another reward; a score must not be taken for theirs.
    known = [
        load_reward("zreward", **{**options, **more}).identity()
        for more in ({}, {"mix": "colour=1"}, {"labels": "letters"}, {"dimensions": "alignment"})
    ]
    assert all(a != b for i, a in enumerate(known) for b in known[:i])
    (tmp_path / "colour.txt").write_text("Dimension: colour. Level 5: vivid.", encoding="utf-8")
    assert load_reward("zreward", **options).identity() != known[0]
    reward.free()
    assert torch.allclose(reward.score(IMAGES[:1], PROMPTS[:1]), measured["zreward"][:1], atol=1e-5)
    for more, words in (
        ({"mix": "beauty=1"}, "'beauty'"),
        ({"mix": "alignment"}, "NAME=WEIGHT"),
        ({"labels": "roman"}, "'roman'"),
    ):
        with pytest.raises(DiffalignError, match=words):
            load_reward("zreward", **{**options, **more})


def test_bins_are_written_but_not_summarised(folders: dict[str, Path], tmp_path: Path) -> None:
    import csv

    from typer.testing import CliRunner

    from diffalign.cli import app

    source, out = pictures.folder(tmp_path / "images", 2), tmp_path / "scores.csv"
    spec = f"zreward:weights={folders['qwen2_vl']},dimensions=alignment"
    done = CliRunner().invoke(app, ["score", str(source), "--reward", spec, "--output", str(out)])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert sum(float(rows[0][f"zreward.alignment@{level:.1f}"]) for level in LEVELS) == pytest.approx(1, abs=1e-5)
    assert "zreward.alignment_spread" in done.output and "@4.5" not in done.output
