"""Full fine-tuning: a float32 policy beside a frozen copy of what was loaded."""

from pathlib import Path

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.pipelines import Backbone, load_backbone

FAMILIES = ["sd15_dir", "sdxl_dir", "sd3_dir"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def predict(backbone: Backbone, module: torch.nn.Module | None = None) -> torch.Tensor:
    noisy = torch.randn(2, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.7, 0.2]) if backbone.family == "sd3" else torch.tensor([700.0, 20.0])
    return backbone.predict(noisy, times, backbone.encode_prompts(["a red circle", "blue"]), module)


def train_a_little(backbone: Backbone) -> None:
    for parameter in backbone.trainable().values():
        parameter.data *= 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_policy_is_the_reference_until_it_trains(folder: Path, dtype: torch.dtype) -> None:
    """A bf16 checkpoint's policy is float32: equal bits under bf16 autocast, in which such a run trains."""
    backbone = load_backbone(folder, dtype=dtype)
    backbone.enable_full()
    assert {p.dtype for p in backbone.trainable().values()} == {torch.float32}
    assert len(backbone.trainable()) == len(list(backbone.trunk.parameters()))

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        # A new autocast block each time: within one, torch keeps the low-precision copies of weights.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            with backbone.role("reference"), torch.no_grad():
                reference = predict(backbone)
            return predict(backbone), reference

    policy, reference = both()
    assert torch.equal(policy, reference)
    policy.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in backbone.trainable().values())
    train_a_little(backbone)
    moved, still = both()
    assert torch.equal(still, reference) and not torch.allclose(moved, reference, atol=1e-2)


def test_saved_trunk_loads_in_diffusers_and_here(folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(folder)
    backbone.enable_full(keep_reference=False)
    train_a_little(backbone)
    backbone.save_weights(tmp_path)
    names = sorted(f.name for f in (tmp_path / backbone.trunk_name).iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    plain = type(backbone.trunk).from_pretrained(tmp_path, subfolder=backbone.trunk_name)
    assert all(torch.equal(p, backbone.trunk.state_dict()[n]) for n, p in plain.state_dict().items())

    again = load_backbone(folder)
    again.load_weights(tmp_path)
    image = backbone.sample(["a cat"], [1], steps=2, guidance_scale=2.0)[0]
    assert again.sample(["a cat"], [1], steps=2, guidance_scale=2.0)[0].tobytes() == image.tobytes()
    assert load_backbone(folder).sample(["a cat"], [1], steps=2, guidance_scale=2.0)[0].tobytes() != image.tobytes()


def test_init_moves_policy_and_reference(sd3_dir: Path, tmp_path: Path) -> None:
    first = load_backbone(sd3_dir)
    first.enable_full(keep_reference=False)
    train_a_little(first)
    first.save_weights(tmp_path)
    second = load_backbone(sd3_dir)
    second.enable_full(init=tmp_path)
    with second.role("reference"):
        assert torch.equal(predict(second), predict(first))
    assert torch.equal(predict(second), predict(first))


def test_a_bf16_model_samples_after_full_training(folder: Path) -> None:
    backbone = load_backbone(folder, dtype=torch.bfloat16)
    backbone.enable_full()
    train_a_little(backbone)
    pixels = backbone.sample(["a cat"], [1], steps=2, guidance_scale=2.0, output_type="pt")
    with backbone.role("reference"):
        reference = backbone.sample(["a cat"], [1], steps=2, guidance_scale=2.0, output_type="pt")
    assert bool(torch.isfinite(pixels).all()) and not torch.equal(pixels, reference)
    bare = load_backbone(folder, dtype=torch.bfloat16)
    assert torch.equal(bare.sample(["a cat"], [1], steps=2, guidance_scale=2.0, output_type="pt"), reference)


def test_a_wrapper_stands_in_for_the_policy_only(sd3_dir: Path) -> None:
    backbone = load_backbone(sd3_dir)
    backbone.enable_full()
    calls: list[int] = []

    class Wrapper(torch.nn.Module):
        """Forwards to the trunk, as DistributedDataParallel does."""

        def forward(self, *arguments: object, **options: object) -> object:
            calls.append(1)
            return backbone.trunk(*arguments, **options)

    wrapper = Wrapper()
    assert torch.equal(predict(backbone, wrapper), predict(backbone)) and calls == [1]
    with backbone.role("reference"), pytest.raises(RuntimeError, match="pass no module"):
        predict(backbone, wrapper)


def test_refusals(sd15_dir: Path, sdxl_dir: Path, tmp_path: Path) -> None:
    backbone = load_backbone(sd15_dir)
    backbone.enable_full(keep_reference=False)
    with pytest.raises(DiffalignError, match="the reference was not kept"), backbone.role("reference"):
        pass
    with pytest.raises(RuntimeError, match="already has trained weights"):
        backbone.enable_full()
    backbone.save_weights(tmp_path)
    with pytest.raises(DiffalignError, match="these weights do not fit the model"):
        load_backbone(sdxl_dir).load_weights(tmp_path)
