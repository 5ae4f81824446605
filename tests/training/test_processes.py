"""Runs as processes: killed at any moment and started again, or several at once, they compute the same."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.files import rows
from helpers.processes import command, environment, finish, torchrun

KILLS = 20 if os.environ.get("DIFFALIGN_SOAK") else 3


@pytest.mark.soak
def test_killed_runs_end_as_if_they_were_not(tmp_path: Path) -> None:
    """SIGKILL at a random moment, then the same command again: equal metrics, weights and optimiser, bit for bit."""
    straight = tmp_path / "straight"
    subprocess.run([sys.executable, *command(straight, 40, 4, 2)], env=environment(), check=True, capture_output=True)
    expected = (straight / "metrics.jsonl").read_bytes()
    rng = np.random.default_rng(int(os.environ.get("DIFFALIGN_SOAK_SEED", "0")))
    for trial in range(KILLS):
        run_dir = tmp_path / f"killed-{trial}"
        line = [sys.executable, *command(run_dir, 40, 4, 2, seconds=0.02)]
        process = subprocess.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (run_dir / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.05, 1.5))
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(line, env=environment(), check=True, capture_output=True)
        assert (run_dir / "metrics.jsonl").read_bytes() == expected
        for name in ("policy", "optimizer"):
            a, b = (load_file(d / f"checkpoints/step-00000040/{name}.safetensors") for d in (straight, run_dir))
            assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Validation is drawn by the main process while the other waits. It changes no number of the training of two, and what
    is validated and kept is what one process validates and keeps."""
    finish([sys.executable, *command(tmp_path / "one", 10, 4, 2), "2"])
    finish([*torchrun(), *command(tmp_path / "two", 10, 4, 2), "2"])
    finish([*torchrun(), *command(tmp_path / "unwatched", 10, 4, 2)])
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two) == 10
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for name in ("loss", "policy_error"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4)
    assert (tmp_path / "unwatched/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()
    assert not (tmp_path / "unwatched/validation.jsonl").exists()
    made = (tmp_path / "two/validation.jsonl").read_text()
    assert made == (tmp_path / "one/validation.jsonl").read_text()
    scores = [json.loads(line)["scores"]["weights.size"][0] for line in made.splitlines()]
    assert len(set(scores)) == 6 and max(scores[1:]) not in (scores[1], scores[-1])  # a best that could be missed
    best, same = (load_file(tmp_path / name / "best/weights.safetensors") for name in ("two", "one"))
    last = load_file(tmp_path / "two/weights/weights.safetensors")
    for key in best:
        assert torch.allclose(best[key], same[key], rtol=1e-4, atol=1e-6) and not torch.equal(best[key], last[key])


def test_two_processes_choose_the_same_groups_and_images(tmp_path: Path) -> None:
    """A curriculum over the groups, and the subset of their images that spreads most."""
    chosen = json.dumps(
        {
            "selection": {"groups": "curriculum", "phases": 2, "images": "variance", "sizes": [2, 4], "weight": "gap"},
            "labels": {"source": "scores.x"},
            "objective": {"name": "gdro", "beta": 2.0},
        }
    )
    finish([sys.executable, *command(tmp_path / "one", 10, 4, 2), "0", chosen])
    finish([*torchrun(), *command(tmp_path / "two", 10, 4, 2), "0", chosen])
    finish([sys.executable, *command(tmp_path / "all", 10, 4, 2)])
    one, two, unchosen = (rows(tmp_path / name) for name in ("one", "two", "all"))
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for name in ("loss", "policy_error"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4)
    assert [r["policy_error"] for r in unchosen] != pytest.approx([r["policy_error"] for r in one], rel=1e-2)
