"""What saves memory changes no number that it should not, and the prediction counts what is really there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from bitsandbytes.functional import dequantize_4bit
from pydantic import ValidationError
from test_training_models import Source, config_for

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.objectives import OBJECTIVES
from diffalign.pipelines import load_backbone
from diffalign.pipelines.quantize import Int8Linear, number_of_weights
from diffalign.training.footprint import LiveBytes, optimizer_bytes, predict_memory, step_peak, stored_bytes, to_meta
from diffalign.training.loop import train
from diffalign.training.offload import OffloadedAdamW
from diffalign.training.optim import build_optimizer

QUANTISED = ["int8", "nf4"]


def changed(config: TrainConfig, **sections: dict[str, Any]) -> TrainConfig:
    update = {name: vars(config)[name].model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_lora_trains_on_a_quantised_base(kind: str, sd3_dir: Path, tmp_path: Path) -> None:
    """The margin begins at exactly 0, the LoRA learns, and its file serves the unquantised model."""
    backbone = load_backbone(sd3_dir, quantize=kind)
    whole = load_backbone(sd3_dir)
    assert number_of_weights(backbone.trunk) == number_of_weights(whole.trunk)
    assert stored_bytes(backbone.trunk) < 0.8 * stored_bytes(whole.trunk)
    config = config_for(sd3_dir, tmp_path, 2, optimizer={"lr": 1e-2})
    result = train(config, backbone=backbone, source=Source(backbone), say=lambda _: None)
    assert result.metrics["drift"] > 0 and (tmp_path / "weights" / "pytorch_lora_weights.safetensors").is_file()
    whole.load_weights(tmp_path / "weights")


def test_int8_is_within_half_a_step_and_has_the_right_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(48, 24)
    small = Int8Linear.of(layer)
    step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    unpacked = small.weight * small.scale
    assert ((unpacked - layer.weight).abs() <= step / 2 + 1e-7).all() and int(small.weight.abs().max()) == 127
    x = torch.randn(3, 48, generator=generator, requires_grad=True)
    out = small(x)
    out.square().sum().backward()
    assert torch.allclose(out, x @ unpacked.T + layer.bias, atol=1e-6)
    assert x.grad is not None and torch.allclose(x.grad, 2 * out @ unpacked, atol=1e-5)


def test_nf4_is_bitsandbytes_own(sd3_dir: Path) -> None:
    name = "transformer_blocks.0.attn.to_q"
    small: Any = load_backbone(sd3_dir, quantize="nf4").trunk.get_submodule(name)
    plain: Any = load_backbone(sd3_dir).trunk.get_submodule(name)
    restored = dequantize_4bit(small.weight.data, small.weight.quant_state)
    assert 0 < float((restored - plain.weight).abs().max()) < 0.2 * float(plain.weight.abs().max())


def test_full_tuning_of_a_quantised_base_is_refused(sd3_dir: Path) -> None:
    with pytest.raises(DiffalignError, match="quantised weights cannot train"):
        load_backbone(sd3_dir, quantize="int8").enable_full()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"quantize": "nf4"}, "tune": {"kind": "full"}}, "quantised weights cannot train"),
        ({"optimizer": {"name": "adafactor", "offload": True}}, "offload serves adamw"),
        ({"train": {"shard": "fsdp2"}}, "little to cut"),
        ({"train": {"shard": "fsdp2"}, "tune": {"kind": "full"}, "optimizer": {"offload": True}}, "without offload"),
    ],
)
def test_combinations_that_cannot_work(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        toy.toy_config(tmp_path, **sections)


def test_channels_last_is_for_unets(sdxl_dir: Path, sd3_dir: Path) -> None:
    """Another order in memory, the same network."""
    last, plain = load_backbone(sdxl_dir, channels_last=True), load_backbone(sdxl_dir)
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = plain.encode_prompts(["a cat", "a dog"])
    a, b = (backbone.predict(noisy, torch.tensor([500.0, 20.0]), words) for backbone in (last, plain))
    assert torch.allclose(a, b, atol=1e-4)
    unet: Any = last.trunk
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(DiffalignError, match=r"model.channels_last: .* has no UNet"):
        load_backbone(sd3_dir, channels_last=True)


def test_offloaded_adamw_is_fused_adamw() -> None:
    """Bit for bit, through a saved state as well."""
    start = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (5, 700)]
    runs = []
    for kind in (torch.optim.AdamW, OffloadedAdamW):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        fused = {"fused": True} if kind is torch.optim.AdamW else {}
        optimizer = kind(weights, lr=0.1, weight_decay=0.1, **fused)
        for step in range(4):
            if step == 2:
                state = optimizer.state_dict()
                optimizer = kind(weights, lr=0.1, weight_decay=0.1, **fused)
                optimizer.load_state_dict(state)
            for weight in weights:
                weight.grad = torch.sin(weight.detach() * (step + 1))
            optimizer.step()
        runs.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
def test_optimiser_bytes_are_those_of_its_state(name: str, tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7,), (64, 128), (20, 3, 3, 3))]
    optimizer = build_optimizer(toy.toy_config(tmp_path, optimizer={"name": name}).optimizer, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = 0
    for state in optimizer.state.values():
        # bitsandbytes' tables of 256 values are shared by all tensors.
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and not k.startswith("qmap")}
        held += sum(tensor.nbytes for tensor in tensors.values())
    assert optimizer_bytes(name, weights) == held


def test_live_bytes_rise_and_fall() -> None:
    with LiveBytes() as live:
        a = torch.zeros(256)
        b = a + 1
        view = b[:4]
        del a
        assert live.now == 1024 and live.peak == 2048
        del b
        assert live.now == 1024  # the view holds it
        del view
        assert live.now == 0


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_prediction_by_parts_is_what_is_there(tune: str, sdxl_dir: Path, tmp_path: Path) -> None:
    """Weights, gradients, optimiser and average exactly; activations as a real step on the CPU makes them."""
    config = config_for(sdxl_dir, tmp_path, 1)
    config = changed(config, tune={"kind": tune}, train={"ema_decay": 0.9, "micro_batch": 2})
    real = load_backbone(sdxl_dir)
    words = real.encode_prompts(["a cat"])
    parts = predict_memory(config, load_backbone(sdxl_dir), (4, 4, 8, 8), words, cuda=False)
    assert parts["peak"] == sum(parts.values()) - parts["peak"] - parts["host"]
    frozen = sum(p.nbytes for p in real.trunk.parameters())
    train(config, backbone=real, source=Source(real), say=lambda _: None)
    trained = list(real.trainable().values())
    numbers = sum(p.numel() for p in trained)
    assert parts["weights"] == frozen
    assert parts["reference"] == (frozen if tune == "full" else 0)
    assert parts["adapters"] == (0 if tune == "full" else sum(p.nbytes for p in trained))
    assert parts["gradients"] == parts["average"] == 4 * numbers
    assert parts["optimiser"] == 8 * numbers + 4 * len(trained)
    assert parts["activations"] > 0 and OBJECTIVES["dpo"].needs_reference


def test_checkpointing_lowers_the_predicted_activations(sd3_dir: Path) -> None:
    peaks = []
    for saving in (False, True):
        backbone = load_backbone(sd3_dir, gradient_checkpointing=saving)
        words = backbone.encode_prompts(["a cat"])
        to_meta(backbone)
        backbone.add_lora(4, 4.0)
        backbone.trunk.train()
        peaks.append(step_peak(backbone, (8, 16, 8, 8), words, reference=True, autocast=None)[0])
    assert peaks[1] < 0.8 * peaks[0]
