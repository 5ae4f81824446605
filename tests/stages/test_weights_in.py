"""Trained weights of any kind serve every verb: a checkpoint as the weights of the run, a foreign LoRA as one of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.generator import load_generator
from diffalign.stages.resolve import weights_digest
from helpers import tiny_training, toy
from helpers.command_line import run
from helpers.lora_files import UNET, as_kohya, deltas, merged, predict, write

SMALL = ["n=2", "images_per_prompt=1", "steps=2", "height=32", "width=32", "device=cpu"]


def trained(folder: Path, run_dir: Path, kind: str = "lora", **train: Any) -> Path:
    """A run of three steps with a checkpoint after each."""
    backbone = load_backbone(folder, max_sequence_length=12)
    config = tiny_training.config_for(folder, run_dir, 3, checkpoint={"every": 1, "keep": 3})
    tune = {"kind": kind} if kind == "full" else {"rank": 4, "alpha": 8.0}
    changed = {"tune": config.tune.model_copy(update=tune), "train": config.train.model_copy(update=train)}
    config = config.model_copy(update=changed)
    toy.train(config, backbone=backbone, source=tiny_training.Source(backbone), say=lambda _: None)
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, sd3_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "lora": trained(sd3_dir, folder / "lora"),
        "full": trained(sd3_dir, folder / "full", "full"),
        "average": trained(sd3_dir, folder / "average", ema_decay=0.5),
    }


def sampling(out: Path, model: Path) -> list[object]:
    """Arguments of `diffalign sample` that draw two small pictures into a folder."""
    config = out.parent / f"{out.name}.yaml"
    config.write_text(f"kind: sample\nmodel: {{path: {model}}}\nprompts: testbed:test\nout: {out}\n")
    return [config, *SMALL]


def sampled(out: Path, model: Path, weights: Path) -> list[bytes]:
    assert run("sample", *sampling(out, model), f"weights={weights}") == 0
    return [path.read_bytes() for path in sorted((out / "images").glob("*.parquet"))]


@pytest.mark.parametrize("kind", ["lora", "full", "average"])
def test_checkpoints_sample_as_the_weights_do(kind: str, runs: dict[str, Path], sd3_dir: Path, tmp_path: Path) -> None:
    """Step 3 holds what weights/ holds, and step 1 does not."""
    out = {
        name: load_backbone(sd3_dir, max_sequence_length=12)
        for name in ("weights", "checkpoints/step-00000003", "checkpoints/step-00000001")
    }
    for name, backbone in out.items():
        backbone.load_weights(runs[kind] / name)
    whole, last, first = (predict(backbone) for backbone in out.values())
    assert torch.equal(whole, last) and not torch.equal(whole, first)
    generator = load_generator(sd3_dir, max_sequence_length=12)
    generator.load_weights(runs[kind] / "checkpoints/step-00000003")
    assert torch.equal(predict(generator.backbone), whole)


def test_the_verbs_take_checkpoints(
    runs: dict[str, Path], sd3_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "lora"
    shutil.copytree(runs["lora"], run_dir)
    last = run_dir / "checkpoints/step-00000003"
    assert sampled(tmp_path / "a", sd3_dir, last) == sampled(tmp_path / "b", sd3_dir, last)
    for form in ("diffusers", "merged"):
        assert run("export", last, "--format", form, "--out", tmp_path / form) == 0
        assert run("export", run_dir, "--format", form, "--out", tmp_path / f"{form}-run") == 0
        ours, theirs = (
            {p.relative_to(f).as_posix(): load_file(p) for p in sorted(f.rglob("*.safetensors"))}
            for f in (tmp_path / form, tmp_path / f"{form}-run")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[f][k]) for f in ours for k, value in ours[f].items())
    capsys.readouterr()
    assert run("export", last, "--best", "--out", tmp_path / "x") == 2
    assert "is a checkpoint; give the run's directory, or leave --best out" in capsys.readouterr().err


def test_checkpoints_are_trained_on(runs: dict[str, Path], sd3_dir: Path) -> None:
    wanted = load_backbone(sd3_dir, max_sequence_length=12)
    wanted.load_weights(runs["lora"] / "weights")
    backbone = load_backbone(sd3_dir, max_sequence_length=12)
    backbone.add_lora(4, 8.0, init=runs["lora"] / "checkpoints/step-00000003")
    assert torch.equal(predict(backbone), predict(wanted)) and backbone.trainable()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "policy.safetensors").write_bytes(b"junk"), "is damaged or no safetensors file"),
        (lambda f: (f / "policy.safetensors").unlink(), "is damaged or no safetensors file"),
        (lambda f: (f / "state.json").write_text("[" * 9999), "is no checkpoint of an image model"),
        (lambda f: (f / "state.json").write_text("{}"), "is no checkpoint of an image model"),
        (lambda f: (f / "state.json").write_text('{"config": {"tune": {"kind": "lora"}}}'), "is no checkpoint of an image"),
        (lambda f: save_file({"x": torch.ones(2)}, f / "policy.safetensors"), "the checksum of policy.safetensors differs"),
    ],
)  # fmt: skip
def test_damaged_checkpoints(
    damage: Any, words: str, runs: dict[str, Path], sd3_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    shutil.copytree(runs["lora"] / "checkpoints/step-00000003", checkpoint)
    damage(checkpoint)
    assert run("sample", *sampling(tmp_path / "out", sd3_dir), f"weights={checkpoint}") == 2
    seen = capsys.readouterr()
    assert words in seen.err and len(seen.err.splitlines()) == 1


@pytest.mark.parametrize("kind", ["lora", "full", "average"])
def test_a_flipped_byte_of_a_checkpoint_is_found(
    kind: str, runs: dict[str, Path], sd3_dir: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    shutil.copytree(runs[kind] / "checkpoints/step-00000003", checkpoint)
    file = checkpoint / ("ema.safetensors" if kind == "average" else "policy.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DiffalignError, match="is damaged .*checksum"):
        load_backbone(sd3_dir, max_sequence_length=12).load_weights(checkpoint)


def test_damaged_weights_have_no_digest(runs: dict[str, Path], tmp_path: Path) -> None:
    """What `eval` and `sample` hash before they draw, or load."""
    shutil.copytree(runs["lora"] / "weights", tmp_path / "weights")
    file = tmp_path / "weights/pytorch_lora_weights.safetensors"
    whole = weights_digest(tmp_path / "weights")
    assert whole == weights_digest(tmp_path / "weights") != weights_digest(runs["average"] / "weights")
    for content in (b"", b"junk" * 9, file.read_bytes()[:-1]):
        file.write_bytes(content)
        for path in (tmp_path / "weights", file):
            with pytest.raises(DiffalignError, match="is damaged or no safetensors file"):
                weights_digest(path)


def test_checkpoints_of_another_model_are_refused(
    runs: dict[str, Path], sd15_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("lora", "full"):
        weights = runs[kind] / "checkpoints/step-00000003"
        assert run("sample", *sampling(tmp_path / kind, sd15_dir), f"weights={weights}") == 2
        assert len(capsys.readouterr().err.splitlines()) <= 2  # a note of the other base may stand before


def test_foreign_files_and_their_bases(
    sd15_dir: Path, sd3_dir: Path, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = deltas(load_backbone(sd15_dir), UNET, (1, 3))
    file = write(tmp_path / "lora", as_kohya(layers), "theirs.safetensors", ss_sd_model_name="anime.safetensors")
    sampled(tmp_path / "a", sd15_dir, file / "theirs.safetensors")
    assert "says that it was made for anime.safetensors; it is loaded into" in capsys.readouterr().out
    assert sampled(tmp_path / "b", sd15_dir, file)
    backbone = load_backbone(sd15_dir)
    backbone.load_weights(file)
    assert (predict(backbone) - merged(sd15_dir, layers)).abs().max() < 1e-5

    # The same widths, another model: nothing but the run's own config knows.
    shutil.copytree(sd3_dir, tmp_path / "other")
    sampled(tmp_path / "c", tmp_path / "other", runs["lora"] / "weights")
    assert f"weights was trained on {sd3_dir}, and is loaded into {tmp_path / 'other'}" in capsys.readouterr().out
    sampled(tmp_path / "d", sd3_dir, runs["lora"] / "weights")
    assert "note:" not in capsys.readouterr().out
