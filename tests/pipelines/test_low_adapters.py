"""LoRA in 16 bits under float32 weights: equal to autocast's casts, rounded once, and gone after the pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.pipelines import load_backbone
from diffalign.pipelines.adapters import adapter_layers
from diffalign.pipelines.low_adapters import current, installed, lowered

FAMILIES = ["sd15_dir", "sdxl_dir", "sd3_dir", "flux_dir"]


def arguments(backbone: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    times = torch.tensor([0.7, 0.2]) if backbone.process.span == 1.0 else torch.tensor([700.0, 20.0])
    noisy = torch.randn(2, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return noisy, times, backbone.encode_prompts(["a red circle", "blue"])


def low_backbone(folder: Path, alpha: float = 2, shaken: bool = True, **options: Any) -> Any:
    backbone = load_backbone(folder, dtype=torch.bfloat16, **options)
    backbone.add_lora(2, alpha)
    backbone.trunk.train()
    backbone.compute_low()
    generator = torch.Generator().manual_seed(1)
    for weight in backbone.trainable().values():
        weight.data += 0.1 * shaken * torch.randn(weight.shape, generator=generator)
    return backbone


def gradients(backbone: Any) -> dict[str, Tensor]:
    backbone.predict(*arguments(backbone)).square().mean().backward()
    found = {n: p.grad for n, p in backbone.trainable().items()}
    backbone.trunk.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fresh_policy_is_the_reference_to_the_bit(
    family: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    backbone = low_backbone(
        request.getfixturevalue(family), alpha=5, shaken=False, gradient_checkpointing=checkpointing
    )
    for name, weight in backbone.trainable().items():
        if ".lora_A." in name:
            weight.data.normal_()
    with torch.no_grad(), backbone.role("reference"):
        reference = backbone.predict(*arguments(backbone))
    policy = backbone.predict(*arguments(backbone))
    assert policy.requires_grad and torch.equal(policy, reference)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_float32_and_those_of_float32_to_rounding(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    backbone = low_backbone(folder, alpha=3)
    low = gradients(backbone)
    backbone.lowers_adapters = False
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(backbone)
    backbone.trunk.float()
    wide = gradients(backbone)
    assert all(g is not None and g.dtype == torch.float32 for g in low.values())
    ours, autocasts, exact = (torch.cat([found[n].flatten() for n in low]) for found in (low, cast, wide))
    assert 0 < float((ours - exact).norm()) < 1.5 * float((autocasts - exact).norm())
    assert float(nn.functional.cosine_similarity(ours, exact, dim=0)) > 0.98


@pytest.mark.parametrize("kind", [True, "attention"])
def test_checkpointed_gradients_are_equal_to_the_bit(sdxl_dir: Path, sd3_dir: Path, kind: Any) -> None:
    """Backward repeats a block after the pass has ended, with the same copies."""
    for folder in (sdxl_dir, sd3_dir):
        plain, again = (gradients(low_backbone(folder, gradient_checkpointing=c)) for c in (False, kind))
        assert list(plain) == list(again)
        assert [n for n in plain if not torch.equal(plain[n], again[n])] == []


def test_copies_hold_the_scale_and_do_not_outlive_the_pass(sd3_dir: Path) -> None:
    backbone = low_backbone(sd3_dir, alpha=5)  # alpha / rank = 2.5
    layers: list[Any] = list(adapter_layers(backbone.trunk))
    pairs = lowered(backbone.trunk, torch.bfloat16)
    assert [layer for layer, _ in pairs] == layers
    for layer, (down, up) in pairs:
        assert torch.equal(down, layer.lora_A["policy"].weight.bfloat16())
        assert torch.equal(up, (2.5 * layer.lora_B["policy"].weight).bfloat16())
    with backbone.role("reference"):
        assert lowered(backbone.trunk, torch.bfloat16) == []
    with installed(backbone.trunk, pairs):
        assert layers[0].low is pairs[0][1]
    backbone.predict(*arguments(backbone))
    assert current(backbone.trunk) == [] and all(layer.low is None for layer in layers)
    # Weights that have moved are copied again.
    layers[0].lora_A["policy"].weight.data += 1
    assert not torch.equal(lowered(backbone.trunk, torch.bfloat16)[0][1][0], pairs[0][1][0])


def test_gradients_are_scaled_in_float32(sd3_dir: Path) -> None:
    """What comes back in 16 bits is not rounded a second time by alpha / rank."""
    backbone = low_backbone(sd3_dir, alpha=5)
    layer, (down, up) = lowered(backbone.trunk, torch.bfloat16)[0]
    generator = torch.Generator().manual_seed(0)
    above = [torch.randn(copy.shape, generator=generator).bfloat16() for copy in (down, up)]
    torch.autograd.backward([down, up], above)
    weights: Any = layer
    assert torch.equal(weights.lora_A["policy"].weight.grad, above[0].float())
    assert torch.equal(weights.lora_B["policy"].weight.grad, 2.5 * above[1].float())


def test_a_step_of_gradients_adds_up_in_float32(sd3_dir: Path) -> None:
    """Two micro-batches: the sum of what each gives alone, without rounding to 16 bits in between."""
    backbone = low_backbone(sd3_dir)
    one = gradients(backbone)
    for _ in range(2):
        backbone.predict(*arguments(backbone)).square().mean().backward()
    for name, weight in backbone.trainable().items():
        assert torch.equal(weight.grad, one[name] + one[name])
