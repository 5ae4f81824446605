"""Full fine-tuning cut over two processes computes what one process does, and its files are anyone's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_runs import TORCHRUN, environment

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.training.sharding import shard

PROGRAM = Path(__file__).parent / "sharded_run.py"


def finish(line: list[str]) -> None:
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_sharded_processes_equal_one_and_resume(sd3_dir: Path, tmp_path: Path) -> None:
    """Two processes stop after two steps and go on; one process runs straight through."""
    finish([sys.executable, str(PROGRAM), str(sd3_dir), str(tmp_path / "one"), "none", "4"])
    finish([*TORCHRUN, str(PROGRAM), str(sd3_dir), str(tmp_path / "two"), "fsdp2", "2", "4"])
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two) == 4 and two[0]["margin"] == 0.0 and two[3]["drift"] > 0
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for name in ("loss", "policy_error"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4)
    # Whole tensors under the names of an uncut model, in checkpoints and in diffusers' layout.
    for name in ("policy", "optimizer", "ema"):
        a, b = (load_file(tmp_path / d / "checkpoints/step-00000004" / f"{name}.safetensors") for d in ("one", "two"))
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[k].float(), b[k].float(), rtol=1e-3, atol=1e-5) for k in a), name
    loaded = load_backbone(sd3_dir)
    loaded.load_weights(tmp_path / "two" / "weights")
    kept = load_file(tmp_path / "two" / "checkpoints/step-00000004/ema.safetensors")
    assert all(torch.equal(value, kept[k]) for k, value in loaded.trunk.named_parameters())
    assert '"_class_name": "SD3Transformer2DModel"' in (tmp_path / "two/weights/transformer/config.json").read_text()


def test_a_process_alone_is_told(sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    backbone.enable_full()
    with pytest.raises(DiffalignError, match=r"train.shard=fsdp2: one process has nothing"):
        shard(backbone)
