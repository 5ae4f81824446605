"""docs/python.md: every block of Python runs, in the order of the page, in one process."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers import pictures, tiny_rewards
from helpers.processes import environment

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BEFORE = """
from pathlib import Path

import open_clip

from diffalign.stages import evaluate, sample, train

open_clip.add_model_config(Path("sizes"))  # ViT-H-14, but tiny
# The configs are checked for real; the stages themselves would take minutes.
train.train = lambda config, dry_run: None
sample.sample = lambda config, images: None
evaluate.evaluate = lambda config: {"weights": str(config.weights), "reward": config.reward.name}
"""
AFTER = """
assert result == {"weights": "runs/sdxl/weights", "reward": "pickscore"} and str(folder) == "drawn"
assert Path("scores.jsonl").read_text().count("pickscore.identity") == 3
print("the page ran")
"""


def in_cache(home: Path, repository: str) -> Path:
    """Return the folder of a repository in a cache of the hub, where `huggingface_hub` finds it offline."""
    place = home / "hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_the_page_runs(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 8
    # Tiny weights under the names of the real ones.
    home = tmp_path / "cache"
    tiny_rewards.clip_folder(in_cache(home, "yuvalkirstain/PickScore_v1"))
    hps, _ = tiny_rewards.hps_checkpoint(tmp_path / "tiny")
    (tmp_path / "weights").mkdir()
    for folder in (in_cache(home, "xswu/HPSv2"), tmp_path / "weights"):
        shutil.copy(hps, folder / "HPS_v2.1_compressed.pt")
    (tmp_path / "sizes").mkdir()
    shutil.copy(tmp_path / "tiny" / "tiny-hps.json", tmp_path / "sizes" / "ViT-H-14.json")
    (tmp_path / "samples").mkdir()
    for i in range(3):
        pictures.smooth(i).save(tmp_path / "samples" / f"{i}.png")
    (tmp_path / "sample.yaml").write_text("model: {path: shapes-sd3}\nprompts: testbed:test\nout: drawn\n")
    (tmp_path / "runs" / "sdxl").mkdir(parents=True)
    (tmp_path / "runs" / "sdxl" / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\n")

    (tmp_path / "page.py").write_text("\n".join([BEFORE, *blocks, AFTER]))
    done = subprocess.run(
        [sys.executable, "page.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0 and done.stdout.endswith("the page ran\n"), done.stderr[-3000:]
