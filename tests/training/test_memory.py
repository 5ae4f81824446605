"""Memory predicted part by part, against the tensors of a real (tiny) model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.pipelines import load_backbone
from diffalign.training.cuda_rules import LiveBytes
from diffalign.training.memory import optimizer_bytes, predict_memory
from diffalign.training.optim import build_optimizer
from diffalign.training.preference.policy import build_objective, prepare_policy
from helpers import toy
from helpers.tiny_training import Source, config_for


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value.values() for t in tensors(v)] if isinstance(value, dict) else []


def real(backbone: Any, config: Any) -> dict[str, int]:
    """Bytes of the tensors that a step of the real model has."""
    source = Source(backbone)
    frozen = sum(t.nbytes for t in [*backbone.trunk.parameters(), *backbone.trunk.buffers()])
    prepare_policy(config, backbone, build_objective(config.objective))
    trained = list(backbone.trainable().values())
    optimizer = build_optimizer(config.optimizer, trained)
    t = torch.tensor([0.3, 0.8])
    backbone.predict(source.latents[0][:2], t, {k: v[:2] for k, v in source.conditioning.items()}).sum().backward()
    full = config.tune.kind == "full"
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer.step()
    held = sum(t.nbytes for p in trained for t in tensors(optimizer.state[p]))
    whole = sum(t.nbytes for t in [*backbone.trunk.parameters(), *backbone.trunk.buffers()])
    moving = sum(p.nbytes for p in backbone.followers().values()) if config.tune.reference == "ema" else 0
    return {
        "weights": whole if full else frozen,
        "reference": moving or (frozen if full else 0),
        "adapters": 0 if full else whole - frozen - moving,
        "gradients": gradients,
        "optimiser": held,
        "average": sum(p.nbytes for p in trained) if config.train.ema_decay else 0,
    }


@pytest.mark.parametrize("reference", ["init", "ema"])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_parts_are_those_of_the_real_model(tune: str, reference: str, sd3_dir: Path, tmp_path: Path) -> None:
    config = config_for(sd3_dir, tmp_path, 1)
    config = config.model_copy(
        update={
            "tune": config.tune.model_copy(update={"kind": tune, "reference": reference}),
            "train": config.train.model_copy(update={"ema_decay": 0.5}),
        }
    )
    # Loaded in 16 bits, and trained in 32.
    one, other = (load_backbone(sd3_dir, dtype=torch.bfloat16) for _ in range(2))
    conditioning = {name: value[:1] for name, value in Source(one).conditioning.items()}
    found = predict_memory(config, one, (2, 16, 8, 8), conditioning, cuda=True)
    with torch.autocast("cpu", torch.bfloat16):
        held = real(other, config)
    assert {name: found[name] for name in held} == held
    assert found["activations"] > 0 and found["host"] == 0
    assert found["peak"] == sum(size for name, size in found.items() if name not in ("peak", "host"))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
def test_optimisers_keep_what_is_counted(name: str) -> None:
    weights = [nn.Parameter(torch.ones(shape)) for shape in [(64, 128), (3, 5), (7,), (8, 4, 3, 3)]]
    optimizer = build_optimizer(toy.toy_config(Path("r"), optimizer={"name": name}).optimizer, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = 0
    for weight in weights:
        # bitsandbytes' tables of 256 values are the same ones for all tensors.
        kept = {key: value for key, value in optimizer.state[weight].items() if key not in ("qmap1", "qmap2", "RMS")}
        held += sum(t.nbytes for t in tensors(kept))
    assert optimizer_bytes(name, weights) == held


def test_bytes_alive_at_the_fullest_moment() -> None:
    given = torch.ones(1000)
    with LiveBytes() as live:
        live.ignore([given])
        first = given + 1  # 4,000 bytes
        second = first * 2  # 8,000
        view = second[:10]  # nothing new
        del first
        third = view + 1  # 4,040
        given.add_(1)
        del second, view, third
    assert live.peak == 8000 and live.now == 0


def test_accumulated_gradients_are_there_from_the_second_micro_batch_on(sd3_dir: Path, tmp_path: Path) -> None:
    peaks = []
    for groups in (2, 4):
        config = config_for(sd3_dir, tmp_path, 1)
        config = config.model_copy(
            update={
                "tune": config.tune.model_copy(update={"kind": "full"}),
                "train": config.train.model_copy(update={"groups_per_step": groups}),
            }
        )
        backbone = load_backbone(sd3_dir)
        conditioning = {name: value[:1] for name, value in Source(backbone).conditioning.items()}
        peaks.append(predict_memory(config, backbone, (2, 16, 8, 8), conditioning, cuda=True))
    assert peaks[1]["activations"] > peaks[0]["activations"] and peaks[1]["gradients"] == peaks[0]["gradients"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_counts_for_less(precision: str, sdxl_dir: Path, tmp_path: Path) -> None:
    found = []
    kinds: tuple[Any, ...] = (False, "attention", True)
    for checkpointing in kinds:
        config = config_for(sdxl_dir, tmp_path, 1)
        config = config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": precision})})
        backbone = load_backbone(sdxl_dir, gradient_checkpointing=checkpointing)
        conditioning = backbone.encode_prompts([""])
        found.append(predict_memory(config, backbone, (2, 4, 32, 32), conditioning, cuda=False))
    plain, attention, saved = found
    assert saved["activations"] < 0.8 * plain["activations"]
    assert saved["activations"] <= attention["activations"] < 0.9 * plain["activations"]
    for less in (attention, saved):
        assert {**less, "activations": 0, "peak": 0} == {**plain, "activations": 0, "peak": 0}
