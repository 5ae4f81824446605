"""The verbs of a judge, from an empty folder to a table, at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffalign.cli import app
from diffalign.judge.evaluation import by_dimension, table
from diffalign.judge.forward import Sample
from diffalign.judge.predict import Thinking, predict
from diffalign.judge.records import Rated, read_taught
from diffalign.rewards.judge import load_judge
from diffalign.testbed.judge_base import judge_tokenizer, noisy_level, samples


def call(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_from_nothing_to_a_table(tmp_path: Path) -> None:
    data, base, run = tmp_path / "data", tmp_path / "base", tmp_path / "run"
    assert call("testbed", "judge-data", data, "--groups", "6", "--split", "validation")[0] == 0
    assert call("testbed", "judge-base", "student", base, "--steps", "2")[0] == 0
    asked = ("--max-tokens", "3", "--traces", "1", "--batch-size", "8")
    assert call("judge-distributions", base, data / "ratings.jsonl", *asked)[0] == 0
    taught = read_taught(data / "distributions.jsonl")
    assert len(taught) == 24
    code, output = call("judge-distributions", base, data / "ratings.jsonl", *asked)
    assert code == 2
    assert "is there already" in output
    code, output = call(
        "judge-distributions", base, data / "ratings.jsonl", "--out", tmp_path / "elsewhere.jsonl", *asked
    )
    assert code == 2
    assert "where the images are" in output
    words = (
        "judge", "shapes_judge_risd", f"run_dir={run}", f"model.path={base}", f"data.distributions={data}/distributions.jsonl",
        "train.steps=2", "optimizer.warmup_steps=0", "train.records_per_step=4", "train.micro_batch=2", "tracking.trackers=[]",
    )  # fmt: skip
    code, output = call(*words)
    assert code == 0, output
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert "risd" in (run / "README.md").read_text()
    code, output = call("judge-eval", run / "weights", data / "ratings.jsonl", "--out", tmp_path / "eval.json")
    assert code == 0
    assert "margin HPA" in output
    assert "| plausibility |" in output
    rows = json.loads((tmp_path / "eval.json").read_text())["measures"]
    assert rows["all"]["images"] == 24
    assert rows["all"]["tokens"] == 1.0
    assert set(rows) == {"all", "alignment", "realism", "plausibility"}
    assert call("judge-eval", run / "weights", data / "pairs.jsonl")[0] == 0
    scored = tmp_path / "scores.jsonl"
    reward = f"zreward:weights={run / 'weights'}"
    assert call("score", data / "images", "-r", reward, "--prompt", "a circle", "-o", scored)[0] == 0
    first = json.loads(scored.read_text().splitlines()[0])
    sample = Sample("a circle", "realism", Path(first["image"]))
    (expected,) = predict(load_judge(run / "weights"), [sample], Thinking(traces=0), 0).probabilities
    found = [first[f"zreward.realism@{level:.1f}"] for level in np.linspace(1, 5, 9)]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    code, output = call("judge-eval", run / "weights", data / "nothing.jsonl")
    assert code == 2
    assert "no such file" in output


def test_a_perfect_judge_measures_as_one() -> None:
    levels = np.linspace(1, 5, 9)
    rated = [
        Rated(f"prompt {i // 3}", "realism", Path(), (float(levels[(3 * i + i // 3) % 9]),) * 3) for i in range(12)
    ]
    probabilities = np.eye(9)[[int(2 * one.score - 2) for one in rated]]
    row = by_dimension(rated, probabilities)["all"]
    assert row["plcc"] == pytest.approx(1)
    assert row["hpa"] == 1
    assert row["margin_hpa"] == 1
    assert row["crps"] == 0
    assert row["calibration_error"] == 0
    assert row["pairs"] == 12
    assert "| perfect | 1.0000 |" in table({"perfect": row})


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = judge_tokenizer()
    for one in samples(0, 0, 60):
        words = one.reasons.split()
        assert len(tokenizer(one.reasons)["input_ids"]) == len(words), one.reasons
        assert tokenizer.decode(tokenizer(one.reasons)["input_ids"]) == one.reasons


def test_a_base_has_scores_that_are_noise_in_the_share_that_was_said() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([noisy_level(5.0, 0.6, rng) for _ in range(4000)])
    assert (drawn < 5).mean() == pytest.approx(0.6 * 5 / 9, abs=0.03)


def test_a_judge_is_saved_with_its_words(tmp_path: Path) -> None:
    from diffalign.testbed.judge_base import RUBRICS, WORDING, untrained_judge

    untrained_judge("student").save(tmp_path / "judge")
    again = load_judge(tmp_path / "judge")
    assert again.wording == WORDING
    assert again.rubrics == RUBRICS
    assert type(again.model).__name__.startswith("Qwen3VL")
