"""The keys that save memory: what they change in the model, that they change nothing else, and what cannot go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from diffalign.config import load_distill_config, load_judge_config, load_reward_gradient_config
from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.quantize import Int8Linear, as_shapes, number_of_weights, quantize_blocks
from diffalign.training.memory import stored_bytes
from diffalign.training.offload import OffloadedAdamW
from diffalign.training.preference.policy import compiles
from helpers import toy
from helpers.files import rows
from helpers.tiny_training import Source, config_for


def first_two(source: Source) -> dict[str, torch.Tensor]:
    return {name: value[:2] for name, value in source.conditioning.items()}


@pytest.mark.parametrize(("kind", "far"), [("int8", 0.02), ("nf4", 0.25)])
def test_lora_on_a_quantised_base(kind: str, far: float, sd3_dir: Path, tmp_path: Path) -> None:
    plain, backbone = load_backbone(sd3_dir), load_backbone(sd3_dir, quantize=kind)
    layers = [m for block in backbone.trunk.transformer_blocks for m in block.modules()]
    wanted = Int8Linear if kind == "int8" else nn.Linear
    assert not any(type(m) is nn.Linear for m in layers)
    assert sum(type(m).__name__ == ("Int8Linear" if kind == "int8" else "Linear4bit") for m in layers) == sum(
        type(m) is nn.Linear for block in plain.trunk.transformer_blocks for m in block.modules()
    )
    assert any(isinstance(m, wanted) for m in layers) and type(backbone.trunk.proj_out) is nn.Linear
    assert backbone.facts()["parameters"] == plain.facts()["parameters"]

    source = Source(plain)
    noisy, t = source.latents[0][:2], torch.tensor([0.3, 0.8])
    with torch.no_grad():
        exact, found = (b.predict(noisy, t, first_two(source)) for b in (plain, backbone))
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < far

    model = {"path": str(sd3_dir), "quantize": kind}
    config = config_for(sd3_dir, tmp_path / "run", 3, optimizer={"lr": 0.01}).model_copy(
        update={"model": toy.toy_config(tmp_path, model=model).model}
    )
    toy.train(config, backbone=backbone, source=source, say=lambda _: None)
    log = rows(tmp_path / "run")
    assert log[0]["margin"] == 0.0 and log[0]["drift"] == 0.0 and log[2]["drift"] > 0
    plain.pipeline.load_lora_weights(tmp_path / "run" / "weights")  # diffusers' own, on the unquantised model
    with torch.no_grad():
        tuned = plain.pipeline.transformer(
            noisy,
            encoder_hidden_states=source.conditioning["prompt_embeds"][:2],
            pooled_projections=source.conditioning["pooled_prompt_embeds"][:2],
            timestep=1000 * t,
        ).sample
        ours = backbone.predict(noisy, t, first_two(source))
    # The LoRA moves both models alike.
    moved = (tuned - exact).norm()
    assert moved > 0 and (tuned - exact - (ours - found)).norm() < 2 * far * moved


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_layers_follow_autocast(kind: str) -> None:
    """A float32 norm before them must not make their output, and all that follows, float32."""
    block = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    quantize_blocks(nn.ModuleList([block]), kind, ["Sequential"], torch.device("cpu"))
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.bfloat16


def test_4_bits_have_their_size_without_weights() -> None:
    """Layers on the meta device, as a published model is planned from, against those that bitsandbytes makes."""
    counted = []
    for device in ("cpu", "meta"):
        block = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 64, bias=False)).to(device, torch.bfloat16)
        trunk = nn.ModuleList([block])
        quantize_blocks(trunk, "nf4", ["Sequential"], torch.device(device))
        counted.append((stored_bytes(trunk), number_of_weights(trunk)))
        as_shapes(trunk)
        assert block.to("meta")(torch.empty(2, 300, device="meta", dtype=torch.bfloat16)).shape == (2, 64)
    assert counted[0] == counted[1] and counted[0][1] == 300 * 200 + 200 + 200 * 64


def test_int8_is_its_numbers_and_their_gradient() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6, requires_grad=True)
    quantised = Int8Linear.of(layer)
    weight = layer.weight.detach()
    scale = weight.abs().max(dim=1, keepdim=True).values / 127
    assert torch.equal(quantised.weight, (weight / scale).round().to(torch.int8))
    assert float((quantised.weight * quantised.scale - weight).abs().max() / scale.max()) <= 0.5001
    out = quantised(x)
    assert torch.allclose(out, x @ (quantised.weight * quantised.scale).T + layer.bias, atol=1e-6)
    out.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, (quantised.weight * quantised.scale).sum(0).expand(3, -1), atol=1e-6)


def test_full_fine_tuning_of_a_quantised_base_is_refused(sd3_dir: Path) -> None:
    with pytest.raises(DiffalignError, match=r"quantised weights cannot train; set model\.quantize=none"):
        load_backbone(sd3_dir, quantize="int8").enable_full()


def test_channels_last_predicts_the_same(sd15_dir: Path, sd3_dir: Path) -> None:
    plain, backbone = load_backbone(sd15_dir), load_backbone(sd15_dir, channels_last=True)
    convolution = backbone.trunk.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last) and not convolution.is_contiguous()
    source = Source(plain)
    arguments = (source.latents[0][:2], torch.tensor([300, 800]), first_two(source))
    with torch.no_grad():
        exact, once, again = (b.predict(*arguments) for b in (plain, backbone, backbone))
    assert torch.equal(once, again) and torch.allclose(once, exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(DiffalignError, match=r"model\.channels_last: .* has no UNet"):
        load_backbone(sd3_dir, channels_last=True)


def test_offloaded_averages_change_nothing(tmp_path: Path) -> None:
    for name, offload, goals in (("plain", False, (6,)), ("offloaded", True, (6,)), ("resumed", True, (4, 6))):
        for steps in goals:
            config = toy.toy_config(tmp_path / name, optimizer={"offload": offload}, train={"steps": steps})
            toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=lambda _: None)
    plain = [row["loss"] for row in rows(tmp_path / "plain")]
    assert len(set(plain)) == 6
    for name in ("offloaded", "resumed"):
        assert [row["loss"] for row in rows(tmp_path / name)] == plain
        one, other = ((tmp_path / n / "weights" / "weights.safetensors").read_bytes() for n in ("plain", name))
        assert one == other


def test_offloaded_averages_lie_in_the_hosts_memory_after_loading() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = OffloadedAdamW(weights, lr=0.1)
    weights[0].grad = torch.ones(3)  # the other has no gradient, and so no averages
    optimizer.step()
    fresh = OffloadedAdamW(weights, lr=0.5)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.1 and weights[1] not in fresh.state
    kept, loaded = optimizer.state[weights[0]], fresh.state[weights[0]]
    assert all(torch.equal(loaded[key], kept[key]) and loaded[key] is not kept[key] for key in kept)
    with pytest.raises(ValueError, match="no closure"):
        fresh.step(lambda: 0.0)


@pytest.mark.soak
def test_compiled_blocks_are_compiled_once(sd3_dir: Path, soak: bool) -> None:
    """Policy and reference in turns, two sizes of image: no graph is made after the first step with each size.

    The short form traces and counts the same graphs without generating code for them.
    """
    from torch._dynamo.utils import counters

    plain, backbone = load_backbone(sd3_dir), load_backbone(sd3_dir)
    source = Source(plain)
    for b in (plain, backbone):
        b.add_lora(4, 4)
        b.trunk.train()
    backbone.compile_blocks(dynamic=True, backend="inductor" if soak else "eager")

    def step(b: Any, side: int) -> torch.Tensor:
        noisy = torch.randn(2, 16, side, 12 - side // 2, generator=torch.Generator().manual_seed(side))
        t = torch.tensor([0.3, 0.8])
        with torch.no_grad(), b.role("reference"):
            reference = b.predict(noisy, t, first_two(source))
        with b.role("policy"):
            policy = b.predict(noisy, t, first_two(source))
        (policy - reference - 1).square().mean().backward()
        return policy.detach()

    counters.clear()
    for side in (8, 4):
        assert torch.allclose(step(backbone, side), step(plain, side), atol=1e-5)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for side in (8, 4, 8, 4, 4, 8):
        step(backbone, side)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_unet_in_16_bits_has_no_breaks(checkpointing: bool, sdxl_dir: Path) -> None:
    """Transformer blocks and resnets, new copies of the adapter in every step, roles in turns: traced in the first step."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    backbone = load_backbone(sdxl_dir, dtype=torch.bfloat16, gradient_checkpointing=checkpointing)
    backbone.add_lora(2, 2)
    backbone.trunk.train()
    backbone.compute_low()
    backbone.compile_blocks(backend="eager")
    conditioning = first_two(Source(backbone))
    counters.clear()
    graphs = []
    for _ in range(3):
        noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([300.0, 800.0])
        with torch.no_grad(), backbone.role("reference"):
            reference = backbone.predict(noisy, t, conditioning)
        with backbone.role("policy"):
            policy = backbone.predict(noisy, t, conditioning)
        (policy - reference - 1).square().mean().backward()
        for weight in backbone.trainable().values():
            weight.data -= 1e-3
        graphs.append(counters["stats"]["unique_graphs"])
    kinds = {type(m).__name__ for m in backbone.trunk.modules() if m._compiled_call_impl is not None}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert dict(counters["graph_break"]) == {}
    assert 0 < graphs[0] == graphs[1] == graphs[2]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("wanted", "cuda", "steps", "more", "compiled"),
    [
        (True, False, 1, {}, True),
        (False, True, 10**6, {}, False),
        ("auto", True, 2000, {}, True),
        ("auto", True, 1999, {}, False),
        ("auto", False, 2000, {}, False),
        ("auto", True, 2000, {"quantize": "int8"}, False),
    ],
)
def test_compiling_pays_in_long_runs(
    wanted: Any, cuda: bool, steps: int, more: dict[str, Any], compiled: bool, tmp_path: Path
) -> None:
    config = toy.toy_config(tmp_path, model={"path": "toy", "compile": wanted, **more}, train={"steps": steps})
    assert compiles(config, cuda=cuda) == compiled


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"quantize": "nf4"}, "tune": {"kind": "full"}}, "quantised weights cannot train"),
        ({"model": {"quantize": "int8", "compile": True}}, "quantised layers are not compiled"),
        ({"optimizer": {"offload": True, "name": "adafactor"}}, "offload serves adamw"),
        ({"train": {"shard": "fsdp2"}}, "a LoRA leaves little to cut"),
        ({"train": {"shard": "fsdp2"}, "tune": {"kind": "full"}, "optimizer": {"offload": True}}, "adamw without off"),
        ({"train": {"shard": "fsdp2", "images_per_pass": 1}, "tune": {"kind": "full"}}, "train.micro_batch=1"),
        ({"train": {"shard": "fsdp2"}, "tune": {"kind": "full"}, "reference": {"store": "k"}}, "reference.store=null"),
        ({"train": {"shard": "fsdp2"}, "tune": {"kind": "full"}, "model": {"compile": True}}, "leave one of them out"),
        (
            {
                "train": {"shard": "fsdp2"},
                "tune": {"kind": "full"},
                "validation": {"every": 5, "prompts": "p.txt", "rewards": [{"name": "clip"}]},
            },
            "validation.every=null",
        ),
        (
            {"train": {"shard": "fsdp2", "mixed_precision": "fp16"}, "tune": {"kind": "full"}, "device": "cuda"},
            "no loss scaling",
        ),
    ],
)
def test_what_cannot_go_together(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        toy.toy_config(tmp_path, **sections)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantize=int8", "quantised weights cannot train"),
        ("model.compile=true", "compile serves"),
        ("optimizer={offload: true, name: adafactor}", "offload serves adamw"),
    ],
)
def test_other_loops_refuse_the_same(override: str, message: str) -> None:
    loops = (
        (load_distill_config, "shapes_sd3_gndm"),
        (load_reward_gradient_config, "shapes_sd3_reward_gradient"),
    )
    for load, recipe in loops:
        with pytest.raises(DiffalignError, match=message):
            load(recipe, ["tune={kind: full}", override])


def test_judges_refuse_to_offload_what_is_small() -> None:
    with pytest.raises(DiffalignError, match="offload serves adamw"):
        load_judge_config("shapes_judge_gdso", ["optimizer={offload: true, name: adafactor}"])
