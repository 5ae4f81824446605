"""`diffalign distill` on genuine (tiny, random) checkpoints: the run, its student in plain diffusers, and mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config import load_distill_config
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.training.prompt_source import PromptSource
from helpers.command_line import run
from helpers.distill_config import PROMPTS, config


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sdxl", "group: {axis: none, size: 1, scale: per_sample}\nstudent: {steps: 2}\n"),
        (
            "sd3",
            "group: {size: 2, advantage: scalar_rdm}\nstudent: {steps: 2, sampler: euler}\n"
            "reward: {terms: [{name: jpeg_compressibility}]}\n"
            "validation: {every: 1, prompts: PROMPTS, rewards: [{name: sharpness}]}\n",
        ),
        (
            "sd3",
            "tune: {kind: full}\ngroup: {size: 2}\nstudent: {steps: 2}\n"
            "reward: {terms: [{name: sharpness}], use: exponential, gradient_weight: 0.1}\n",
        ),
    ],
)
def test_a_student_in_plain_diffusers(
    family: str, more: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DiffusionPipeline

    model = request.getfixturevalue(f"{family}_dir")
    path = config(tmp_path, model, more.replace("PROMPTS", str(tmp_path / "prompts.txt")))
    full = "full" in more
    if full:
        path.write_text(path.read_text().replace("tune: {rank: 2, alpha: 2.0}\n", ""))
    assert run("distill", path, "--dry-run") == 0 and not (tmp_path / "run").exists()
    assert "times: 999, 499, -1" in capsys.readouterr().out if family == "sdxl" else True
    assert run("distill", path) == 0
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["dm"] == 0.0 < rows[1]["dm"]
    paces = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert all(0 < row["waiting"] < 1 and row["seconds"] > 0 for row in paces)
    before = (folder / "metrics.jsonl").read_bytes()
    assert run("distill", path) == 0 and (folder / "metrics.jsonl").read_bytes() == before  # the run is complete
    if "validation" in more:
        assert {"reward", "advantage_size", "diversity"} <= set(rows[0])
        judged = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        assert [row["step"] for row in judged] == [0, 1, 2] and (folder / "best").is_dir()

    pipeline = DiffusionPipeline.from_pretrained(folder / "student")
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((folder / "student" / "student.json").read_text())["call"]
    assert call["num_inference_steps"] == 2 and call["guidance_scale"] == 0.0
    text = (folder / "student" / "README.md").read_text()
    assert ("torch.manual_seed" in text) == full and (folder / "report.html").is_file()
    assert "num_inference_steps=2, guidance_scale=0.0" in text
    for file in (folder / "student").rglob("*.*"):  # a folder that may be published names no place of this machine
        assert str(tmp_path).encode() not in file.read_bytes() and str(model).encode() not in file.read_bytes(), file
    torch.manual_seed(0)
    image = pipeline("a red cube", generator=torch.Generator().manual_seed(1), **call).images[0]
    # The base with the LoRA and the student's scheduler draws the same.
    base = DiffusionPipeline.from_pretrained(model)
    base.set_progress_bar_config(disable=True)
    base.scheduler = pipeline.scheduler
    if full:
        base.register_modules(
            transformer=type(base.transformer).from_pretrained(folder / "weights", subfolder="transformer")
        )
    else:
        base.load_lora_weights(folder / "weights")
    torch.manual_seed(0)
    other = base("a red cube", generator=torch.Generator().manual_seed(1), **call).images[0]
    assert isinstance(image, Image.Image)
    assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


def test_prompts_are_encoded_once_or_as_they_come_up(sdxl_dir: Path, sd3_dir: Path) -> None:
    for folder in (sdxl_dir, sd3_dir):
        backbone = load_backbone(folder)
        rows = [PromptRow(text) for text in PROMPTS.splitlines()]
        cached, live = (PromptSource(backbone, rows, cache) for cache in (True, False))
        for name, values in cached.batch([2, 0]).items():
            torch.testing.assert_close(values, live.batch([2, 0])[name], rtol=1e-5, atol=1e-6)
        assert cached.unconditional.keys() == cached.batch([0]).keys() and len(set(cached.ids)) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("reward: {terms: [{name: sharpness}], use: raw}\n", "raw leaves no guidance"),
        ("reward: {terms: [{name: sharpness}]}\ngroup: {size: 1}\n", "compare the images of one prompt"),
        ("group: {axis: none}\n", "without an axis"),
        ("student: {steps: 2, times: [0.5]}\n", "1 times for 2 steps"),
        ("match: {low: 0.9, high: 0.5}\n", "low must lie below high"),
        ("student: {sampler: cps}\nvalidation: {every: 1, prompts: p}\n", "no CPS scheduler"),
        ("reward: {terms: [{name: sharpness}, {name: sharpness}]}\n", "named twice"),
        ("reward: {terms: [{name: sharpness}], use: exponential}\ngroup: {advantage: scalar_rdm}\n", "exactly one"),
        ("student: {sampler: euler}\nreward: {terms: [{name: sharpness}], policy_weight: 1.0}\n", "a stochastic step"),
        ("reward: {terms: [{name: sharpness}], policy_reuse: 1}\n", "further updates are PPO's"),
        ("reward: {gradient_weight: 1.0}\n", "no reward to take a gradient of"),
        ("tune: {kind: full, targets: [to_q]}\n", "targets choose where a LoRA goes"),
        ("optimizer: {warmup_steps: 5}\n", "does not end within train.steps=2"),
        ("studnet: {steps: 2}\n", "did you mean student"),
    ],
)
def test_mistakes_in_the_config(more: str, said: str, tmp_path: Path) -> None:
    path = config(tmp_path, tmp_path, "")
    key = more.split(":")[0]
    kept = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join(kept) + "\n" + more)
    with pytest.raises(DiffalignError, match=said) as caught:
        load_distill_config(path)
    assert "\n" not in str(caught.value)


def test_micro_batch_divides(tmp_path: Path) -> None:
    path = config(tmp_path, tmp_path)
    assert load_distill_config(path, ["train.groups_per_step=12"]).train.micro_batch == 6
    with pytest.raises(DiffalignError, match="does not divide"):
        load_distill_config(path, ["train.groups_per_step=12", "train.micro_batch=5"])


def test_a_model_that_takes_guidance_is_refused(
    tmp_path: Path, flux_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", config(tmp_path, flux_dir)) == 2
    assert "guidance is an input of the network" in capsys.readouterr().err


def test_other_verbs_point_to_the_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "student").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("model: {path: m}\nstudent: {steps: 4}\n")
    assert run("eval", run_dir, "prompts=testbed:test") == 2
    assert "a distilled student" in capsys.readouterr().err
    assert run("export", run_dir) == 2
    assert "a whole pipeline already" in capsys.readouterr().err
