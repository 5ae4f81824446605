"""LoRA: policy and reference, gradients, saving for plain diffusers, starting from a saved adapter, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines import Backbone, load_backbone
from diffalign.pipelines.adapters import adapter_parameters

FAMILIES = ["sd15_dir", "sdxl_dir", "sd3_dir", "flux_dir"]
SIZE = {"height": 64, "width": 64}  # FLUX's config does not say its own


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def inputs(backbone: Backbone) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    noisy = torch.randn(2, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.7, 0.2]) if backbone.process.span == 1.0 else torch.tensor([700.0, 20.0])
    return noisy, times, backbone.encode_prompts(["a red circle", "blue"])


def shake(backbone: Backbone, scale: float = 0.2) -> None:
    """Give the policy weights that matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.trainable().values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def both(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Reference first, then policy with a graph: the order of training."""
    arguments = inputs(backbone)
    with backbone.role("reference"), torch.no_grad():
        reference = backbone.predict(*arguments)
    return backbone.predict(*arguments), reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_fresh_policy_is_the_reference_bit_for_bit(folder: Path, dtype: torch.dtype, autocast: bool) -> None:
    backbone = load_backbone(folder, dtype=dtype)
    bare = backbone.predict(*inputs(backbone))
    backbone.add_lora(4, 8)
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.autocast("cpu", dtype=low, enabled=autocast):
        policy, reference = both(backbone)
    assert torch.equal(policy, reference) and policy.dtype == torch.float32
    assert autocast or torch.equal(reference, bare)
    assert {p.dtype for p in backbone.trainable().values()} == {torch.float32}
    policy.square().mean().backward()
    shake(backbone)
    with torch.autocast("cpu", dtype=low, enabled=autocast):
        policy, again = both(backbone)
    assert torch.equal(again, reference) and not torch.allclose(policy, reference, atol=1e-3)


def test_gradients_arrive_after_and_around_the_reference(folder: Path) -> None:
    """The policy's graph may be built before a reference forward and walked after it."""
    backbone = load_backbone(folder)
    backbone.add_lora(2, 2)
    shake(backbone)
    arguments = inputs(backbone)

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in backbone.trainable().items() if p.grad is not None}
        backbone.trunk.zero_grad()
        return found

    backbone.predict(*arguments).square().mean().backward()
    alone = gradients()
    policy = backbone.predict(*arguments)
    with backbone.role("reference"), torch.no_grad():
        backbone.predict(*arguments)
    policy.square().mean().backward()
    around = gradients()
    assert list(alone) == list(around) == list(backbone.trainable())
    assert all(torch.equal(alone[n], around[n]) for n in alone)
    assert sum(float(g.abs().sum()) > 0 for g in alone.values()) > 0.9 * len(alone)


def test_the_base_gets_no_gradient(folder: Path) -> None:
    backbone = load_backbone(folder)
    backbone.add_lora(2, 2)
    backbone.predict(*inputs(backbone)).square().mean().backward()
    with_gradient = {n for n, p in backbone.trunk.named_parameters() if p.grad is not None}
    assert with_gradient == set(backbone.trainable()) and all(".lora_" in n for n in with_gradient)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_gradient_checkpointing_gives_equal_gradients(folder: Path, tune: str) -> None:
    found = []
    for checkpointing in (False, True):
        backbone = load_backbone(folder, gradient_checkpointing=checkpointing)
        backbone.add_lora(2, 4) if tune == "lora" else backbone.enable_full()
        shake(backbone, 0.05)
        calls = count_block_calls(backbone)
        policy, reference = both(backbone)
        forwards = len(calls)
        (policy - reference).square().mean().backward()
        found.append((policy, {n: p.grad for n, p in backbone.trainable().items()}))
        # Checkpointed blocks run once more in backward: the switch took effect.
        assert (len(calls) > forwards) == checkpointing
    (plain, gradients), (checkpointed, again) = found
    assert torch.equal(plain, checkpointed)
    assert all(g is not None and torch.equal(g, again[n]) for n, g in gradients.items())


def count_block_calls(backbone: Backbone) -> list[str]:
    calls: list[str] = []
    for name, module in backbone.trunk.named_modules():
        if name.endswith(("attn1.to_q", "attn.to_q")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_roles_nest_and_survive_errors(folder: Path) -> None:
    backbone = load_backbone(folder)
    backbone.add_lora(2, 2)
    shake(backbone)
    policy, reference = both(backbone)
    with torch.no_grad(), backbone.role("reference"):
        with backbone.role("policy"):
            assert torch.equal(backbone.predict(*inputs(backbone)), policy)
        assert torch.equal(backbone.predict(*inputs(backbone)), reference)
    with pytest.raises(KeyError), backbone.role("reference"):
        raise KeyError
    assert torch.equal(backbone.predict(*inputs(backbone)), policy)
    with pytest.raises(ValueError, match="unknown role 'critic'"), backbone.role("critic"):
        pass


def test_lora_start_depends_on_the_seed_only(sd3_dir: Path) -> None:
    weights = []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(noise)
        backbone = load_backbone(sd3_dir)
        backbone.add_lora(4, 4, seed=seed)
        weights.append({n: p.detach() for n, p in backbone.trainable().items()})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert any(not torch.equal(weights[0][n], weights[2][n]) for n in weights[0])
    a = torch.cat([w.flatten() for n, w in weights[0].items() if "lora_A" in n])
    assert float(a.std()) == pytest.approx(1 / 4, rel=0.1)
    assert all(float(w.abs().max()) == 0 for n, w in weights[0].items() if "lora_B" in n)


@pytest.mark.parametrize("alpha", [8, 7])
def test_saved_lora_gives_the_same_image_in_plain_diffusers(folder: Path, alpha: int, tmp_path: Path) -> None:
    """Alpha differs from rank and is written into the weights: exactly where alpha / rank is a power of 2, else rounded."""
    from diffusers import DiffusionPipeline

    def close(image: Any) -> bool:
        if alpha == 8:
            return bool(image.tobytes() == tuned.tobytes())
        return int(np.abs(np.asarray(image, np.int16) - np.asarray(tuned, np.int16)).max()) <= 1

    backbone = load_backbone(folder)
    backbone.add_lora(2, alpha)
    base = backbone.sample(["a cat"], [5], steps=3, guidance_scale=3.0, **SIZE)[0]
    shake(backbone)
    tuned = backbone.sample(["a cat"], [5], steps=3, guidance_scale=3.0, **SIZE)[0]
    with backbone.role("reference"):
        assert backbone.sample(["a cat"], [5], steps=3, guidance_scale=3.0, **SIZE)[0].tobytes() == base.tobytes()
    assert not close(base)
    backbone.save_weights(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    plain = DiffusionPipeline.from_pretrained(folder)
    plain.load_lora_weights(tmp_path)
    generator = [torch.Generator().manual_seed(5)]
    image = plain(["a cat"], generator=generator, num_inference_steps=3, guidance_scale=3.0, **SIZE,
                  **backbone.sampling_options()).images[0]  # fmt: skip
    assert close(image)

    again = load_backbone(folder)
    again.load_weights(tmp_path)
    assert close(again.sample(["a cat"], [5], steps=3, guidance_scale=3.0, **SIZE)[0])


def test_lora_of_a_bf16_base_is_saved_and_loaded_in_float32(sdxl_dir: Path, tmp_path: Path) -> None:
    backbone = load_backbone(sdxl_dir, dtype=torch.bfloat16)
    backbone.add_lora(2, 4)
    shake(backbone)
    backbone.save_weights(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "pytorch_lora_weights.safetensors").values()} == {torch.float32}
    again = load_backbone(sdxl_dir, dtype=torch.bfloat16)
    again.load_weights(tmp_path)
    ours, theirs = (adapter_parameters(b.trunk, "policy") for b in (backbone, again))
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())
    assert not again.trainable()


@pytest.mark.parametrize("alpha", [8, 6])
def test_init_fills_policy_and_a_frozen_reference(folder: Path, alpha: int, tmp_path: Path) -> None:
    """Bit for bit where alpha / rank is a power of 2; else a file's weights are rounded to float32's last bit."""

    def same(one: Backbone, other: Backbone) -> None:
        ours, theirs = (adapter_parameters(backbone.trunk, "policy") for backbone in (one, other))
        assert set(ours) == set(theirs)
        for name, parameter in ours.items():
            torch.testing.assert_close(theirs[name], parameter, rtol=0 if alpha == 8 else 2e-7, atol=0)

    first = load_backbone(folder)
    first.add_lora(2, alpha)
    shake(first)
    started, _ = both(first)
    first.save_weights(tmp_path / "sft")

    backbone = load_backbone(folder)
    backbone.add_lora(2, alpha, init=tmp_path / "sft")
    policy, reference = both(backbone)
    assert torch.equal(policy, reference) and (alpha != 8 or torch.equal(policy, started))
    same(backbone, first)
    names = set(backbone.trainable())
    assert names == set(first.trainable()) and not any(".reference." in n for n in names)
    policy.square().mean().backward()
    assert all(p.grad is not None for p in backbone.trainable().values())
    shake(backbone)
    moved, still = both(backbone)
    assert torch.equal(still, reference) and not torch.allclose(moved, started, atol=1e-3)

    backbone.save_weights(tmp_path / "dpo")
    last = load_backbone(folder)
    last.load_weights(tmp_path / "dpo")
    same(last, backbone)
    assert alpha != 8 or torch.equal(last.predict(*inputs(last)), moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "has rank 2 and alpha 6, the config says 4 and 6; set tune.rank: 2 and tune.alpha: 6"),
        ({"alpha": 2}, "has rank 2 and alpha 6, the config says 2 and 2"),
        ({"targets": ["attn.to_q"]}, "already decides the layers"),
        ({"init": "nowhere"}, "no LoRA weights at nowhere"),
    ],
)
def test_init_refuses_what_the_config_contradicts(
    sd3_dir: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    first = load_backbone(sd3_dir)
    first.add_lora(2, 6)
    first.save_weights(tmp_path)
    arguments = {"rank": 2, "alpha": 6, "init": tmp_path} | options
    with pytest.raises(DiffalignError, match=message):
        load_backbone(sd3_dir).add_lora(**arguments)


def test_targets_choose_the_layers(sdxl_dir: Path) -> None:
    backbone = load_backbone(sdxl_dir)
    backbone.add_lora(2, 2, targets=["attn2.to_q", "proj_in"])
    layers = {n.split(".lora_")[0].split(".", 3)[-1] for n in backbone.trainable()}
    assert all(layer.endswith(("attn2.to_q", "proj_in")) for layer in layers) and len(layers) > 1


@pytest.mark.parametrize("targets", [["to_q", "to_typo"], ["nothing"], ["down_blocks"], [""]])
def test_targets_that_match_nothing_are_refused(sd15_dir: Path, targets: list[str]) -> None:
    with pytest.raises(DiffalignError, match=r"tune\.targets: no layer of this model matches"):
        load_backbone(sd15_dir).add_lora(2, 2, targets=targets)


def test_impossible_requests_are_refused(sd15_dir: Path) -> None:
    backbone = load_backbone(sd15_dir)
    with pytest.raises(DiffalignError, match=r"tune\.rank: 0"):
        backbone.add_lora(0, 2)
    backbone.add_lora(2, 2)
    with pytest.raises(RuntimeError, match="already has trained weights"):
        backbone.add_lora(2, 2)


def test_weights_of_another_model_are_refused(sd15_dir: Path, sdxl_dir: Path, sd3_dir: Path, tmp_path: Path) -> None:
    other = load_backbone(sdxl_dir)
    other.add_lora(2, 2)
    other.save_weights(tmp_path / "xl")
    with pytest.raises(DiffalignError, match="adapts unet, but only a LoRA of this model's transformer"):
        load_backbone(sd3_dir).load_weights(tmp_path / "xl")
    with pytest.raises(DiffalignError, match="this LoRA does not fit the model"):
        load_backbone(sd15_dir).load_weights(tmp_path / "xl")
    with pytest.raises(DiffalignError, match="the folder does not exist"):
        load_backbone(sd3_dir).load_weights(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffalignError, match="no LoRA weights at"):
        load_backbone(sd3_dir).load_weights(tmp_path / "empty")


def test_damaged_and_foreign_lora_files_are_refused(sd3_dir: Path, tmp_path: Path) -> None:
    backbone = load_backbone(sd3_dir)
    backbone.add_lora(2, 2)
    backbone.save_weights(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    save_file({**state, "text_encoder.layer.lora_A.weight": torch.zeros(2, 16)}, file)
    with pytest.raises(DiffalignError, match="adapts text encoders too"):
        load_backbone(sd3_dir).load_weights(tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DiffalignError, match="is damaged or no safetensors file"):
        load_backbone(sd3_dir).load_weights(tmp_path)
    (tmp_path / "old.bin").write_bytes(b"pickle")
    with pytest.raises(DiffalignError, match=r"is not a \.safetensors file"):
        load_backbone(sd3_dir).load_weights(tmp_path / "old.bin")
