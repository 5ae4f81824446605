"""What only a GPU can show: the CPU's numbers again, and the kernels and number types that a CPU lacks. Skipped without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.attention import _xformers_computes
from diffalign.pipelines.generator import load_generator
from diffalign.rewards import load_reward
from helpers import command_line, tiny_rewards, toy
from helpers.tiny_training import Source

# Collected everywhere, so that an import of what no longer exists fails on any machine.
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FAMILIES = ("sd15", "sdxl", "sd3", "flux")


@pytest.fixture(autouse=True)
def _plain_float32() -> None:
    """TF32 keeps ten bits of a product; it would hide what is compared here."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def settings(folder: Path, run_dir: Path, device: str, **sections: dict[str, Any]) -> TrainConfig:
    plain: dict[str, Any] = {
        "run_dir": str(run_dir), "device": device, "model": {"path": str(folder)}, "data": {"path": "random"},
        "tune": {"rank": 4, "alpha": 4}, "objective": {"name": "dpo", "beta": 200.0}, "optimizer": {"lr": 0.01},
        "train": {"steps": 3, "groups_per_step": 2, "micro_batch": 2, "threads": 1, "mixed_precision": "no"},
        "checkpoint": {"every": 1}, "tracking": {"trackers": []},
    }  # fmt: skip
    for name, values in sections.items():
        plain[name] = {**plain.get(name, {}), **values}
    return TrainConfig.model_validate(plain)


def trained(config: TrainConfig) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Lines of metrics.jsonl, and the weights that were saved, by name."""
    AcceleratorState._reset_state(True)  # one process has one device and one precision, until it is told otherwise
    model = config.model
    backbone = load_backbone(
        Path(model.path), device=config.device, attention=model.attention, quantize=model.quantize,
        gradient_checkpointing=model.gradient_checkpointing, channels_last=model.channels_last,
        dtype={"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[model.dtype],
    )  # fmt: skip
    source = Source(load_backbone(Path(model.path)))
    toy.train(config, backbone=backbone, source=source, say=lambda _: None)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    (weights,) = (config.run_dir / "weights").rglob("*.safetensors")
    return [json.loads(line) for line in lines], load_file(weights)


def folder_of(family: str, request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{family}_dir")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_is_the_cpus(family: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = folder_of(family, request)
    # SGD-like: Adam turns the last bits of a gradient near zero into whole steps.
    given = {"tune": {"kind": kind}, "optimizer": {"lr": 1e-3, "eps": 1e-3}}
    (cpu, expected), (cuda, found) = (
        trained(settings(folder, tmp_path / device, device, **given)) for device in ("cpu", "cuda")
    )
    assert cuda[0]["loss"] == pytest.approx(np.log(2), rel=1e-4) and abs(cuda[0]["margin"]) < 1e-3
    for there, here in zip(cpu, cuda, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-3)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_run_goes_on_where_it_stopped(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = folder_of(family, request)
    whole = settings(folder, tmp_path / "whole", "cuda", train={"steps": 4, "mixed_precision": "bf16"})
    halves = settings(folder, tmp_path / "halves", "cuda", train={"steps": 4, "mixed_precision": "bf16"})
    rows, expected = trained(whole)
    trained(halves)
    shutil.rmtree(tmp_path / "halves" / "weights")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step-00000004")
    assert (tmp_path / "halves" / "checkpoints" / "step-00000003").is_dir()
    again, found = trained(halves)
    assert again == rows
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("bf16", "float32")])
def test_half_precision(
    family: str, precision: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The margin starts at exactly 0, and trained weights are kept in float32."""
    folder = folder_of(family, request)
    given = {"model": {"path": str(folder), "dtype": dtype}, "train": {"mixed_precision": precision}}
    rows, weights = trained(settings(folder, tmp_path / "run", "cuda", **given))
    assert rows[0]["margin"] == 0.0 and rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert rows[2]["drift"] > 0 and all(np.isfinite(row["loss"]) for row in rows)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_gradients_in_half_precision_are_those_of_float32(
    family: str, attention: str, request: pytest.FixtureRequest
) -> None:
    """Wrong backward kernels hide behind right forwards: cuDNN's attention made them up to 700 times too large here. The
    bound is that of the type: on a CPU too, the tiny FLUX loses 0.125 in bfloat16, the others about 0.01."""
    folder = folder_of(family, request)

    def gradient(device: str, dtype: torch.dtype, kernel: str) -> torch.Tensor:
        backbone = load_backbone(folder, device=device, dtype=dtype, attention=kernel)
        backbone.add_lora(4, 4, seed=0)
        x = torch.randn(4, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
        t = torch.tensor([0.2, 0.4, 0.6, 0.8], device=device) * backbone.process.span
        texts = backbone.encode_prompts(["a red cube", "snow", "two dogs", "a cat"])
        with backbone.role("policy"), torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            prediction = backbone.predict(x, t, texts)
        (prediction.float() - 1).square().mean().backward()
        grads = [p.grad for p in backbone.trainable().values() if p.grad is not None]
        return torch.cat([g.flatten().float().cpu() for g in grads])

    expected = gradient("cpu", torch.float32, "sdpa")
    found = gradient("cuda", torch.bfloat16, attention)
    assert float((found - expected).norm() / expected.norm()) < 0.2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["flash", "xformers"])
def test_attention_kernels(family: str, kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "xformers":
        pytest.importorskip("xformers.ops")
        if not _xformers_computes():
            with pytest.raises(DiffalignError, match="no kernel for this torch"):
                load_backbone(folder_of(family, request), device="cuda", attention=kind)
            return
    folder = folder_of(family, request)
    plain, other = (
        load_backbone(folder, device="cuda", dtype=torch.bfloat16, attention=name) for name in ("sdpa", kind)
    )
    x = torch.randn(2, plain.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    t = torch.tensor([0.3, 0.8], device="cuda") * plain.process.span
    texts = plain.encode_prompts(["a red cube", "snow"])
    other.trunk.requires_grad_(True)
    with torch.autocast("cuda", torch.bfloat16):
        expected, found = plain.predict(x, t, texts), other.predict(x, t, texts)
    found.square().mean().backward()
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert all(p.grad is None or p.grad.isfinite().all() for p in other.trunk.parameters())


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantised_bases_are_the_cpus(
    family: str, quantize: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = folder_of(family, request)
    model = {"path": str(folder), "quantize": quantize}
    (cpu, _), (cuda, _) = (
        trained(settings(folder, tmp_path / device, device, model=model)) for device in ("cpu", "cuda")
    )
    assert cuda[0]["margin"] == 0.0
    for there, here in zip(cpu, cuda, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=0.02)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [({"name": "adamw8bit"}, "full"), ({"offload": True}, "full"), ({"name": "adafactor"}, "lora")],
)
def test_optimisers(optimizer: dict[str, Any], kind: str, sd3_dir: Path, tmp_path: Path) -> None:
    if optimizer.get("name") == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    given = {"tune": {"kind": kind}, "optimizer": {"lr": 1e-3, **optimizer}}
    rows, _ = trained(settings(sd3_dir, tmp_path / "run", "cuda", **given))
    assert rows[2]["drift"] > 0
    if optimizer.get("offload"):
        given["optimizer"] = {"lr": 1e-3}
        plain, _ = trained(settings(sd3_dir, tmp_path / "plain", "cuda", **given))
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], rel=1e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_compiled_blocks_train_alike(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = folder_of(family, request)
    model = {"path": str(folder), "compile": True}
    rows, _ = trained(settings(folder, tmp_path / "compiled", "cuda", model=model))
    plain, _ = trained(settings(folder, tmp_path / "plain", "cuda"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], rel=0.02)


@pytest.mark.parametrize("base", ["shapes-sdxl", "shapes-sd3"])
def test_samples_are_the_cpus(base: str) -> None:
    from diffalign import testbed

    texts = ["a red circle", "two blue squares", "a green triangle left of a yellow circle", "a circle"]
    found = {}
    for device in ("cpu", "cuda"):
        generator = load_generator(testbed.model_path(base), device=device)
        images = [image for image, _ in generator.draw(texts, [1, 2, 3, 4], steps=8, guidance_scale=4.0)]
        found[device] = np.stack([np.asarray(image, float) for image in images])
    assert np.abs(found["cpu"] - found["cuda"]).mean() < 0.5


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward"])
def test_rewards_are_the_cpus(name: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    if name == "pickscore":
        given = {"weights": tiny_rewards.clip_folder(tmp_path / "clip")}
    elif name == "hpsv2":
        given = {"weights": tiny_rewards.hps_checkpoint(tmp_path / "hps")[0], "architecture": "tiny-hps"}
    elif name == "imagereward":
        folder = tmp_path / "blip"
        folder.mkdir()
        tiny_rewards.imagereward_checkpoint(folder)
        given = {"weights": folder, "tokenizer": folder}
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (80, 64, 3), dtype=np.uint8)) for _ in range(3)]
    texts = ["a red cube", "snow", "two dogs"]
    cpu, cuda = (load_reward(name, device=device, **given) for device in ("cpu", "cuda"))
    expected, found = cpu.measure(images, texts, [{}] * 3), cuda.measure(images, texts, [{}] * 3)
    for column, values in expected.items():
        torch.testing.assert_close(found[column].cpu(), values, rtol=1e-3, atol=1e-4)


def run(*arguments: object) -> int:
    AcceleratorState._reset_state(True)
    return command_line.run(*arguments)


@pytest.mark.parametrize(
    ("verb", "recipe", "given"),
    [
        (
            "distill",
            "shapes_sd3_gndm",
            ("n=8", "train.groups_per_step=2", "train.micro_batch=2", "save_pipeline=false"),
        ),
        ("reward-gradient", "shapes_sd3_reward_gradient", ("n=8", "train.images_per_step=4", "train.micro_batch=4")),
    ],
)
def test_the_other_loops_are_the_cpus(verb: str, recipe: str, given: tuple[str, ...], tmp_path: Path) -> None:
    rows = {}
    for device in ("cpu", "cuda"):
        common = ("train.steps=2", "validation.every=null", "tracking.trackers=[]", "train.mixed_precision=no")
        assert run(verb, recipe, f"run_dir={tmp_path / device}", f"device={device}", *common, *given) == 0
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        rows[device] = [json.loads(line) for line in lines]
    for name, value in rows["cpu"][0].items():
        assert rows["cuda"][0][name] == pytest.approx(value, rel=2e-2, abs=1e-4), name


def test_a_judge_learns_as_on_the_cpu(tmp_path: Path) -> None:
    data, base = tmp_path / "data", tmp_path / "base"
    assert run("testbed", "judge-data", data, "--groups", 6, "--split", "validation") == 0
    assert run("testbed", "judge-base", "student", base, "--steps", 2) == 0
    for method, more in (("sft", ()), ("gdso", ("rollout.max_tokens=3", "rollout.traces=2"))):
        losses = {}
        for device in ("cpu", "cuda"):
            folder = tmp_path / f"{method}-{device}"
            given = (
                f"run_dir={folder}", f"model.path={base}", f"device={device}", f"data.pairs={data}/pairs.jsonl",
                f"method={method}", "train.steps=2", "train.records_per_step=4", "train.micro_batch=2",
                "tracking.trackers=[]", "train.mixed_precision=no", *more,
            )  # fmt: skip
            assert run("judge", "shapes_judge_gdso", *given) == 0
            losses[device] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        # Traces are drawn from the devices' own logits: a rounding may choose another token, after which all differs.
        assert np.isfinite(losses["cuda"])
        if method == "sft":
            assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)
