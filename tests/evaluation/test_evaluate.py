"""Paired comparison against numbers computed here, and images that are never another model's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from diffalign import progress
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare, pool
from diffalign.evaluation.evaluate import EvaluationPlan, Sampler, comparison_table, evaluate, load_scores
from diffalign.evaluation.quality import corrected, diversity

PROMPTS = [PromptRow(f"prompt {i}", {"tag": "counting" if i % 2 else "colors"}) for i in range(6)]
PLAN = EvaluationPlan(PROMPTS, seeds=3, seed=5, batch_size=4)


class Brightness:
    """Scores the mean grey; NaN for pictures of the value 200."""

    def measure(self, images: list[Image.Image], prompts: list[str], facts: list[dict[str, Any]]) -> dict[str, Any]:
        values = [float(np.asarray(i).mean()) for i in images]
        return {"mean": torch.tensor([float("nan") if v == 200 else v / 255 for v in values])}


class Grey:
    """Draws grey squares whose value depends on seed and model."""

    def __init__(self, shift: int) -> None:
        self.shift, self.drawn = shift, 0

    def __call__(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        self.drawn += len(prompts)
        return [Image.new("RGB", (4, 4), (s % 100 + self.shift,) * 3) for s in seeds]


def run(out: Path, base: Sampler, tuned: Sampler, name: str = "t", **options: Any) -> dict[str, Any]:
    identities = {"base": "b", "tuned": name, **options.pop("identity", {})}
    rewards, plan = {"brightness": Brightness()}, options.pop("plan", PLAN)
    return evaluate(base=base, tuned=tuned, plan=plan, rewards=rewards, out=out, identities=identities, **options)


def test_compare_against_plain_numpy() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(200, 4))
    tuned = base + 0.2 + 0.5 * rng.normal(size=base.shape)
    c = compare(base, tuned)
    change = (tuned - base).mean(1)
    assert c.prompts == 200
    assert c.base == pytest.approx(base.mean())
    assert c.difference == pytest.approx(change.mean())
    assert c.win_rate == pytest.approx((tuned > base).mean())
    half = 1.96 * change.std(ddof=1) / np.sqrt(200)  # the normal interval, which the bootstrap must come close to
    assert c.low == pytest.approx(change.mean() - half, abs=0.1 * half)
    assert c.high == pytest.approx(change.mean() + half, abs=0.1 * half)


def test_prompts_are_resampled_not_images() -> None:
    """Sixteen copies of an image tell no more than one."""
    rng = np.random.default_rng(1)
    base, tuned = rng.normal(size=(2, 50, 1))
    one, many = compare(base, tuned), compare(np.repeat(base, 16, 1), np.repeat(tuned, 16, 1))
    assert (many.low, many.high) == pytest.approx((one.low, one.high))


def test_no_difference_is_no_difference() -> None:
    same = np.random.default_rng(2).normal(size=(20, 2))
    c = compare(same, same)
    assert (c.difference, c.low, c.high, c.win_rate) == (0.0, 0.0, 0.0, 0.5)


def test_nan_is_left_out_on_both_sides() -> None:
    base = np.array([[1.0, np.nan], [1.0, 3.0], [np.nan, np.nan]])
    tuned = np.array([[2.0, 9.0], [np.nan, 4.0], [1.0, 1.0]])
    c = compare(base, tuned)
    assert (c.prompts, c.base, c.tuned, c.win_rate) == (2, 2.0, 3.0, 1.0)
    with pytest.raises(DiffalignError, match="no image was scored for both"):
        compare(base[2:], tuned[2:])
    with pytest.raises(DiffalignError, match="cannot be paired"):
        compare(base, tuned[:2])


def test_pool() -> None:
    assert pool([np.zeros((5, 2)), np.ones((5, 3))]).shape == (5, 5)


def test_evaluation_on_disk(tmp_path: Path) -> None:
    base, tuned = Grey(0), Grey(10)
    result = run(tmp_path, base, tuned)
    assert base.drawn == tuned.drawn == 18
    overall = result["scores"]["brightness.mean"]
    assert list(overall) == ["all", "colors", "counting"] and overall["counting"]["prompts"] == 3
    assert overall["all"]["difference"] == pytest.approx(10 / 255) and overall["all"]["win_rate"] == 1.0
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    assert (load_scores(tmp_path, "tuned", "brightness.mean") - load_scores(tmp_path, "base", "brightness.mean")) == (
        pytest.approx(10 / 255)
    )
    run(tmp_path, base, tuned)
    assert base.drawn == tuned.drawn == 18  # nothing changed, nothing is drawn again


def test_another_model_is_drawn_anew(tmp_path: Path) -> None:
    base = Grey(0)
    run(tmp_path, base, Grey(10))
    result = run(tmp_path, base, Grey(20), name="other weights")
    assert base.drawn == 18
    assert result["scores"]["brightness.mean"]["all"]["difference"] == pytest.approx(20 / 255)


def test_runs_share_the_base_images(tmp_path: Path) -> None:
    base = Grey(0)
    for name in ("one", "two"):
        run(tmp_path / name, base, Grey(10), base_folder=tmp_path / "base")
    assert base.drawn == 18


def test_unscored_images_are_null_on_disk(tmp_path: Path) -> None:
    run(tmp_path, Grey(0), lambda prompts, seeds: [Image.new("RGB", (4, 4), (200 if s % 2 else 9,) * 3) for s in seeds])
    lines = (tmp_path / "eval" / "scores.jsonl").read_text()
    assert "NaN" not in lines and "null" in lines
    assert np.isnan(load_scores(tmp_path, "tuned", "brightness.mean")).any()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(tmp_path: Path, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    plan = EvaluationPlan([*PROMPTS, *PROMPTS], seeds=1)
    console.print(comparison_table(run(tmp_path, Grey(0), Grey(10), plan=plan)))
    text = console.export_text()
    assert "+0.039 to +0.039" in text
    assert "…" not in text
    assert "100.0%" in text
    assert " ".join(text.split()).count("too few prompts (6)") == 2 or width == 80  # the kinds
    assert max(map(len, text.splitlines())) <= width and "brightness.mean" in text and "  counting" in text


def test_several_weights_against_one_base(tmp_path: Path) -> None:
    base = Grey(0)
    others = {"step-10": Grey(20), "step-20": Grey(30)}
    result = run(tmp_path, base, Grey(10), others=others, identity={"step-10": "a", "step-20": "b"})
    assert base.drawn == 18  # drawn once for all
    rises = {m: c["brightness.mean"]["all"]["difference"] for m, c in result["others"].items()}
    assert rises == pytest.approx({"step-10": 20 / 255, "step-20": 30 / 255})
    assert result["scores"]["brightness.mean"]["all"]["difference"] == pytest.approx(10 / 255)
    assert (
        load_scores(tmp_path, "step-20", "brightness.mean") > load_scores(tmp_path, "base", "brightness.mean")
    ).all()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(comparison_table(result))
    assert "step-20: brightness.mean" in (text := console.export_text())
    assert "diversity" in text
    assert "…" not in text


def test_diversity_against_plain_numpy(tmp_path: Path) -> None:
    values = np.array([[0, 100, 200], [50, 50, 50]])
    for p in range(2):
        for k in range(3):
            Image.new("RGB", (64, 64), (int(values[p, k]),) * 3).save(tmp_path / f"{p}-{k}.png")
    found = diversity(lambda p, k: tmp_path / f"{p}-{k}.png", 2, 3)
    assert found[:, 0].tolist() == pytest.approx([(100 + 100 + 200) / 3 / 255, 0.0])
    assert np.isnan(diversity(lambda p, k: tmp_path / f"{p}-{k}.png", 2, 1)).all()


def test_the_corrected_score() -> None:
    """GDRO's GenEval row of FLUX: 0.66 x (3.428 - 3) + 0.2."""
    scores = {"geneval.dense": np.array([[0.66]]), "u.style": np.array([[3.4]]), "u.coherence": np.array([[3.456]])}
    found = corrected(scores, "geneval.dense", ["u.style", "u.coherence"])
    assert found[0, 0] == pytest.approx(0.66 * 0.428 + 0.2)
    with pytest.raises(DiffalignError, match="no score 'hps'; there are geneval.dense"):
        corrected(scores, "hps", [])


def test_time_per_image_counts_from_the_models_own_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        now[0] += len(prompts)  # a second an image
        return [Image.new("L", (8, 8), 9) for _ in prompts]

    evaluate(
        base=draw,
        tuned=draw,
        plan=PLAN,
        rewards={"r": Brightness()},
        out=tmp_path,
        identities={"base": "a", "tuned": "b"},
        on_progress=progress.ImageProgress(),
    )
    told = capsys.readouterr().out
    assert "base: 18/18 images, 1.000 s each" in told and "tuned: 18/18 images, 1.000 s each" in told
