"""The lean LoRA forward against peft's own, and role switches that do not search the trunk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffalign.pipelines import load_backbone
from diffalign.pipelines.adapters import adapter_layers, use_adapter
from diffalign.pipelines.lean_lora import lean_class, make_lean, use_peft_forward


def outputs(backbone: Any, low: torch.dtype | None) -> dict[str, Tensor]:
    """Predictions of both roles, and the policy's gradients."""
    times = torch.tensor([0.7, 0.2]) if backbone.process.span == 1.0 else torch.tensor([700.0, 20.0])
    noisy = torch.randn(2, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = (noisy, times, backbone.encode_prompts(["a red circle", "blue"]))
    with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        with torch.no_grad(), backbone.role("reference"):
            reference = backbone.predict(*arguments)
        policy = backbone.predict(*arguments)
    policy.square().mean().backward()
    gradients = {n: p.grad for n, p in backbone.trainable().items() if p.grad is not None}
    backbone.trunk.zero_grad()
    return {"reference": reference, "policy": policy.detach(), **gradients}


@pytest.mark.parametrize("family", ["sdxl_dir", "sd3_dir"])
@pytest.mark.parametrize(
    ("dtype", "low", "alpha"),
    [
        (torch.float32, None, 4),
        (torch.float32, None, 6),
        (torch.float32, torch.bfloat16, 4),
        (torch.bfloat16, torch.bfloat16, 6),
        (torch.bfloat16, None, 4),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_pefts_to_the_bit(
    family: str, dtype: torch.dtype, low: Any, alpha: float, request: pytest.FixtureRequest
) -> None:
    backbone = load_backbone(request.getfixturevalue(family), dtype=dtype)
    backbone.add_lora(4, alpha)
    generator = torch.Generator().manual_seed(1)
    for weight in backbone.trainable().values():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    assert {type(m) for m in adapter_layers(backbone.trunk)} == {lean_class()}
    lean = outputs(backbone, low)
    use_peft_forward(backbone.trunk)
    peft = outputs(backbone, low)
    assert list(lean) == list(peft) and len(lean) == 2 + len(backbone.trainable())
    assert [name for name in lean if not torch.equal(lean[name], peft[name])] == []


def layer_with(**settings: Any) -> tuple[nn.Module, Any]:
    """A network of one linear layer with two adapters, and that layer."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    network: nn.Module = nn.Sequential(nn.Linear(6, 5))
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **settings)
        network = inject_adapter_in_model(config, network, name)
    make_lean(network)
    layer: Any = network[0]  # type: ignore[index]
    layer.set_adapter(["one"])
    return network, layer


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_is_not_plain_is_pefts(settings: dict[str, Any]) -> None:
    network, layer = layer_with(**settings)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    lean = network(x)
    use_peft_forward(network)
    torch.manual_seed(1)
    assert torch.equal(lean, network(x))


def test_states_of_a_layer_are_pefts() -> None:
    network, layer = layer_with()
    x = torch.randn(3, 6)

    def found() -> list[Tensor]:
        results = [network(x)]
        layer.set_adapter(["one", "two"])
        results.append(network(x))
        layer.set_adapter(["two"])
        results.append(network(x))
        layer.scale_layer(0.5)
        results.append(network(x))
        layer.unscale_layer(0.5)
        layer.merge(adapter_names=["one"])
        results.append(network(x))
        layer.unmerge()
        layer.enable_adapters(False)
        results.append(network(x))
        layer.enable_adapters(True)
        layer.set_adapter(["one"])
        return results

    before = {n: p.clone() for n, p in network.named_parameters()}
    lean = found()
    network.load_state_dict(before)  # merging rounds
    use_peft_forward(network)
    assert [torch.equal(a, b) for a, b in zip(lean, found(), strict=True)] == [True] * len(lean)
    assert len({tuple(out.flatten().tolist()) for out in lean}) == len(lean)  # six different states


def test_hooks_of_the_frozen_layer_run() -> None:
    network, layer = layer_with()
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    network(torch.randn(3, 6))
    assert seen == [1]


def test_a_role_switch_does_not_search_the_trunk(sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(sdxl_dir)
    backbone.add_lora(2, 2)
    with backbone.role("reference"):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("searched"))
        with backbone.role("reference"), backbone.role("policy"):
            pass


def test_layers_of_a_later_adapter_switch_too(sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    backbone.add_lora(2, 2, targets=["attn.to_q"])
    with backbone.role("reference"):
        few = len(adapter_layers(backbone.trunk))
    trunk: Any = backbone.trunk
    from peft import LoraConfig

    trunk.add_adapter(LoraConfig(r=2, target_modules=["attn.to_k"], init_lora_weights=False), adapter_name="late")
    with use_adapter(backbone.trunk, None):
        layers = adapter_layers(backbone.trunk)
        assert len(layers) == 2 * few and all(vars(m)["_disable_adapters"] for m in layers)
    assert not any(vars(m)["_disable_adapters"] for m in layers)


def test_a_copy_of_a_trunk_switches_its_own_layers(sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    backbone.add_lora(2, 2)
    with backbone.role("reference"):
        pass
    twin = copy.deepcopy(backbone.trunk)
    with use_adapter(twin, None):
        assert all(vars(m)["_disable_adapters"] for m in twin.modules() if isinstance(m, lean_class()))
        assert not any(vars(m)["_disable_adapters"] for m in adapter_layers(backbone.trunk))
