"""A run directory as training and evaluation leave it, made without either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCRIPT = '<script>alert("x")</script> "a\' onerror=alert(1)'


def comparison(difference: float) -> dict[str, float]:
    return {
        "prompts": 3, "base": 0.25, "tuned": 0.25 + difference, "difference": difference, "low": difference - 0.1,
        "high": difference + 0.1, "win_rate": 0.61, "win_low": 0.5, "win_high": 0.7,
    }  # fmt: skip


def make_run(folder: Path, prompt: str = "a red cube", seed: int = 0) -> Path:
    """A run directory with metrics and an evaluation of three prompts; the second's tuned image was not scored."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [{"step": s, "loss": float(0.7 - s / 100 + rng.normal() / 50), "lr": 1e-3} for s in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = f"run_dir: x  # {SCRIPT}\nobjective: {{name: dpo, beta: 10.0}}\nseed: {seed}\n"
    (folder / "config.yaml").write_text(text)
    images = {m: str(folder / "eval" / "images" / m) for m in ("base", "tuned")}
    lines = []
    for m, path in images.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        for p in range(3):
            Image.new("RGB", (64, 64), (60 * p, 90, 200)).save(Path(path) / f"{p:05d}-0.png")
            score = None if (m, p) == ("tuned", 1) else p / 10 + (0.2 if m == "tuned" else 0)
            lines.append({"model": m, "prompt": prompt, "seed": 7, "index": [p, 0], "geneval.dense": score})
    (folder / "eval" / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result: dict[str, Any] = {"seed": 0, "seeds": 1, "prompts": [prompt] * 3, "images": images}
    result["scores"] = {"geneval.dense": {"all": comparison(0.2), SCRIPT: comparison(-0.3)}}
    (folder / "eval.json").write_text(json.dumps(result))
    return folder
