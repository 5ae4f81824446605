"""attention: sdpa | flash | xformers takes effect on UNets and SD3, seen from inside the attention call."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.pipelines import Backbone, attention, load_backbone
from diffalign.rewards import load_reward
from helpers import tiny_rewards

FAMILIES = ["sd15_dir", "sdxl_dir", "sd3_dir"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def predict(backbone: Backbone) -> torch.Tensor:
    noisy = torch.randn(1, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.5] if backbone.family == "sd3" else [500.0])
    return backbone.predict(noisy, times, backbone.encode_prompts(["a red circle"]))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """(flash allowed, maths allowed) at each call of torch's attention."""
    seen: list[tuple[bool, bool]] = []
    original = F.scaled_dot_product_attention

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return original(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def test_flash_allows_only_the_flash_kernel(folder: Path, kernels: list[tuple[bool, bool]]) -> None:
    plain, flash = load_backbone(folder), load_backbone(folder, attention="flash")
    texts = len(kernels)
    expected = predict(plain)
    free = kernels[texts:]
    kernels.clear()
    found = predict(flash)
    restricted = [k for k in kernels if k == (True, False)]
    layers = sum(1 for name, _ in flash.trunk.named_modules() if name.endswith(("attn", "attn1", "attn2")))
    assert (True, False) not in free and len(restricted) == layers > 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.backends.cuda.math_sdp_enabled()


def test_flash_holds_when_checkpointing_repeats_the_forward(sd3_dir: Path, kernels: list[tuple[bool, bool]]) -> None:
    backbone = load_backbone(sd3_dir, attention="flash", gradient_checkpointing=True)
    backbone.add_lora(2, 2)
    loss = predict(backbone).square().mean()
    kernels.clear()
    loss.backward()
    assert kernels == [(True, False)] * 2


def test_flash_that_cannot_run_says_so(sd15_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    backbone = load_backbone(sd15_dir, attention="flash")
    noisy, embeds = torch.zeros(1, 4, 8, 8), backbone.encode_prompts(["a"])
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    with pytest.raises(DiffalignError, match="flash kernel cannot run here"):
        backbone.predict(noisy, torch.tensor([1.0]), embeds)


def test_xformers_is_refused_where_it_cannot_run(sd15_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(DiffalignError, match="xformers is not installed"):
        load_backbone(sd15_dir, attention="xformers")
    pretend_xformers(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DiffalignError, match="xformers needs a CUDA device"):
        load_backbone(sd15_dir, attention="xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "_xformers_computes", lambda: False)
    with pytest.raises(DiffalignError, match="has no kernel for this torch and GPU"):
        load_backbone(sd15_dir, attention="xformers")


def pretend_xformers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An xformers whose kernel is torch's, to watch the switch on a CPU. Returns the list of its calls."""
    calls: list[int] = []

    def kernel(query: Any, key: Any, value: Any, attn_bias: Any = None, op: Any = None, scale: Any = None) -> Any:
        calls.append(1)
        # xformers takes [B, L, D] or [B, L, heads, D]
        many = query.dim() == 4
        q, k, v = (x.transpose(1, 2) if many else x for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2) if many else out

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    vars(package)["ops"], vars(ops)["memory_efficient_attention"] = ops, kernel
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    from diffusers.models import attention_processor

    monkeypatch.setattr(attention_processor, "xformers", package, raising=False)
    monkeypatch.setattr(attention, "_xformers_computes", lambda: True)  # asks a GPU
    return calls


def test_xformers_computes_every_attention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = predict(load_backbone(folder))
    calls = pretend_xformers(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backbone = load_backbone(folder, attention="xformers")
    found = predict(backbone)
    layers = sum(1 for name, _ in backbone.trunk.named_modules() if name.endswith(("attn", "attn1", "attn2")))
    assert len(calls) == layers > 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_cudnns_kernel_is_never_chosen(sd3_dir: Path, tmp_path: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_backbone(sd3_dir)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_reward("pickscore", weights=tiny_rewards.clip_folder(tmp_path)).measure(
        [Image.new("RGB", (8, 8))], ["snow"], [{}]
    )
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_unknown_kind_is_refused(sd3_dir: Path) -> None:
    with pytest.raises(DiffalignError, match="unknown kind 'sage'; choose one of sdpa, xformers, flash"):
        load_backbone(sd3_dir, attention="sage")


@pytest.mark.parametrize(
    ("queries", "keys", "width", "dtype", "wanted"),
    [
        (4096, 4096, 64, torch.bfloat16, True),
        (4608, 4608, 128, torch.bfloat16, True),
        (4096, 77, 64, torch.bfloat16, False),
        (4429, 4429, 64, torch.bfloat16, False),
        (192, 192, 64, torch.bfloat16, False),
        (128, 128, 16, torch.bfloat16, False),
        (4096, 4096, 64, torch.float16, False),
        (4096, 4096, 64, torch.float32, False),
    ],
)
def test_cudnn_is_for_shapes_without_a_known_fault(
    queries: int, keys: int, width: int, dtype: torch.dtype, wanted: bool
) -> None:
    rule = attention.CudnnRule()
    assert rule.fits(queries, keys, width, dtype) == wanted
    rule.allowed = False
    assert not rule.fits(queries, keys, width, dtype)


def test_cudnn_is_allowed_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens alone; with 128 tokens of the prompt in joint attention; not with 77 of them, in float32 or after a fault."""
    from diffusers import SD3Transformer2DModel

    allowed: list[bool] = []
    original = F.scaled_dot_product_attention

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model: Any = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=1, attention_head_dim=64,
        joint_attention_dim=8, caption_projection_dim=64, pooled_projection_dim=8, pos_embed_max_size=32,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    assert attention.set_attention(model, "sdpa") is None
    rule = attention.set_attention(model, "cudnn")
    assert rule is not None

    def calls(dtype: torch.dtype, tokens: int) -> list[bool]:
        allowed.clear()
        with torch.no_grad():
            model.to(dtype)(
                hidden_states=torch.zeros(1, 4, 8, 16, dtype=dtype), timestep=torch.ones(1),
                encoder_hidden_states=torch.zeros(1, tokens, 8, dtype=dtype), pooled_projections=torch.zeros(1, 8, dtype=dtype),
            )  # fmt: skip
        return list(allowed)

    assert calls(torch.bfloat16, 128) == [True, True, True]  # joint, the first block's second, joint
    assert calls(torch.bfloat16, 77) == [False, True, False]
    assert calls(torch.float32, 128) == [False] * 3
    rule.allowed = False
    assert calls(torch.bfloat16, 128) == [False] * 3
    assert not torch.backends.cuda.cudnn_sdp_enabled()
