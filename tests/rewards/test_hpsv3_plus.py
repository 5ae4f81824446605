"""HPSv3++ at tiny width, against its rule written by hand, and against its published network where that can be had.

The published code is no package. DIFFALIGN_HPSV3_PLUS may name a checkout of github.com/PlantPotatoOnMoon/HPSv3-PlusPlus,
whose network then judges the same inputs.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.hpsv3 import ASK, TOKEN
from diffalign.rewards.hpsv3_plus import HPSv3Plus
from diffalign.rewards.pixels import to_tensor
from helpers import pictures
from helpers.tiny_vlm import qwen_folder

IMAGES = [pictures.smooth(1, 96, 64), pictures.smooth(2, 60, 60), pictures.smooth(3, 120, 50)]
PROMPTS = ["a cat", "a much longer prompt with <|im_end|> in it", "dogs"]
CHECKOUT = os.environ.get("DIFFALIGN_HPSV3_PLUS")
HEADS = {
    "rm_head.0": (1024, 32), "rm_head.3": (16, 1024), "rm_head.5": (2, 16), "cond_encoder.0": (256, 2),
    "cond_encoder.2": (256, 256), "film_gen.0": (32, 256), "film_gen.2": (64, 32), "cap_encoder.proj": (256, 32),
    "cap_encoder.pool_attn": (1, 256), "cap_encoder.out_proj": (1, 256),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder(tmp_path_factory.mktemp("qwen3"), "qwen3_vl", noise=0.3)


@pytest.fixture(scope="module")
def state(base: Path) -> dict[str, Tensor]:
    """A checkpoint with the published names: transformers 4.57's, with one row more for the reward token."""
    generator = torch.Generator().manual_seed(3)
    found = load_file(base / "model.safetensors")
    words = "model.language_model.embed_tokens.weight"
    rows = len(load_reward("hpsv3_plus", weights=base, base=base).processor.tokenizer)  # type: ignore[attr-defined]
    found[words] = torch.cat([found[words][:rows], torch.randn(1, 32, generator=generator)])
    for name, (out, into) in HEADS.items():
        found[f"{name}.weight"] = torch.randn(out, into, generator=generator) / into**0.5
        found[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1
    return found


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.save({"model": state}, folder / "hpsv3++.pth")
    return folder


def features(base: Path, state: dict[str, Tensor], image: Image.Image, prompt: str) -> tuple[np.ndarray, Any]:
    """The features at the reward token, of one sample, and the model's inputs; the words stand in the test itself."""
    from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLModel

    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens([TOKEN], special_tokens=True)
    model = Qwen3VLModel(Qwen3VLConfig.from_pretrained(base))
    model.resize_token_embeddings(len(processor.tokenizer))
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    for name, buffer in model.eval().named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    question = HPSv3Plus.instruction.replace("{prompt}", prompt.replace("<|im_end|>", " ")) + ASK
    written = (
        f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    # multiples of 28 with at least 200,704 pixels, by the published smart_resize
    sides = {(96, 64): (560, 392), (60, 60): (448, 448), (120, 50): (700, 308)}[image.size]
    sized = image.resize(sides, Image.Resampling.BICUBIC)
    inputs = processor(text=[written], images=[[sized]], return_tensors="pt")
    place = (inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids(TOKEN)).nonzero()[0, 0]
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0, place].numpy().astype(np.float64), inputs


def by_hand(state: dict[str, Tensor], x: np.ndarray, progress: float) -> tuple[float, float, float]:
    """The published rule for one image, in float64."""
    held = {k: v.double().numpy() for k, v in state.items()}

    def layer(name: str, value: np.ndarray) -> np.ndarray:
        return held[f"{name}.weight"] @ value + held[f"{name}.bias"]

    capability = 1 / (1 + np.exp(-layer("cap_encoder.out_proj", layer("cap_encoder.proj", x))[0]))
    hidden = layer("cond_encoder.0", np.array([capability, progress]))
    erf = np.array([math.erf(v / math.sqrt(2)) for v in hidden])
    condition = layer("cond_encoder.2", hidden * (1 + erf) / 2)
    scale, shift = np.split(layer("film_gen.2", np.maximum(layer("film_gen.0", condition), 0)), 2)
    hidden = np.maximum(layer("rm_head.0", x * (1 + scale) + shift), 0)
    mean, log_sigma = layer("rm_head.5", np.maximum(layer("rm_head.3", hidden), 0))
    return float(mean), float(np.exp(log_sigma)), float(capability)


@pytest.mark.parametrize("progress", [0.0, 0.7])
def test_the_published_rule(base: Path, weights: Path, state: dict[str, Tensor], progress: float) -> None:
    reward = load_reward("hpsv3_plus", weights=weights, base=base, progress=progress)
    measured = reward.measure(IMAGES, PROMPTS)
    for i, (image, prompt) in enumerate(zip(IMAGES, PROMPTS, strict=True)):
        wanted = by_hand(state, features(base, state, image, prompt)[0], progress)
        assert [measured[c][i].item() for c in reward.columns] == pytest.approx(wanted, abs=2e-5)
    assert measured["hpsv3_plus"].std() > 0.005 and measured["capability"].std() > 1e-3
    # A score does not depend on the images beside it.
    alone = reward.measure(IMAGES[:1], PROMPTS[:1])
    assert alone["hpsv3_plus"].item() == pytest.approx(measured["hpsv3_plus"][0].item(), abs=1e-5)
    assert ("progress" in str(reward.identity())) == (progress > 0)


def test_the_gradient(base: Path, weights: Path) -> None:
    reward = load_reward("hpsv3_plus", weights=weights, base=base)
    for size, bound in (((448, 448), 0.02), ((96, 64), 0.05)):
        image = pictures.smooth(4, *size)
        pixels = to_tensor(image)[None].requires_grad_()
        found = reward.score_tensors(pixels, ["a cat"])
        assert found.item() == pytest.approx(reward.score([image], ["a cat"]).item(), abs=bound)
        (gradient,) = torch.autograd.grad(found.sum(), pixels)
        assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.9


def test_refuses_what_does_not_fit(base: Path, weights: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="progress 1.5; a number from 0 to 1"):
        load_reward("hpsv3_plus", progress=1.5)
    torch.save({k: v for k, v in state.items() if k != "film_gen.2.bias"}, tmp_path / "hpsv3++.pth")
    with pytest.raises(DiffalignError, match="film_gen.2.bias is missing"):
        load_reward("hpsv3_plus", weights=tmp_path, base=base).score(IMAGES[:1], PROMPTS[:1])
    other = qwen_folder(tmp_path / "other", "qwen2_vl")
    with pytest.raises(DiffalignError, match="is a qwen2_vl; base= must be Qwen/Qwen3-VL-8B-Instruct"):
        load_reward("hpsv3_plus", weights=weights, base=other).score(IMAGES[:1], PROMPTS[:1])


@pytest.mark.skipif(not CHECKOUT, reason="DIFFALIGN_HPSV3_PLUS names no checkout of HPSv3-PlusPlus")
def test_the_published_network(base: Path, weights: Path, state: dict[str, Tensor]) -> None:
    from transformers import AutoProcessor, Qwen3VLConfig

    assert CHECKOUT is not None
    file = Path(CHECKOUT) / "hpsv3" / "model" / "qwen3vl_rm.py"
    spec = importlib.util.spec_from_file_location("published_hpsv3_plus", file)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    tokenizer.add_tokens([TOKEN], special_tokens=True)
    network = module.Qwen3VLRewardModelFiLMHybrid(
        Qwen3VLConfig.from_pretrained(base), special_token_ids=[len(tokenizer) - 1], rm_head_type="ranknet"
    )
    network.resize_token_embeddings(len(tokenizer))
    full = {**state, "lm_head.weight": network.state_dict()["lm_head.weight"]}
    network.load_state_dict(full, strict=True)
    network.config.pad_token_id = tokenizer.pad_token_id
    for name, buffer in network.eval().named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    ours = load_reward("hpsv3_plus", weights=weights, base=base, progress=0.4).measure(IMAGES, PROMPTS)
    for i, (image, prompt) in enumerate(zip(IMAGES, PROMPTS, strict=True)):
        _, inputs = features(base, state, image, prompt)
        with torch.no_grad():
            mean, log_sigma = network(**inputs, iter_values=torch.tensor([0.4]))["logits"][0].tolist()
        assert ours["hpsv3_plus"][i].item() == pytest.approx(mean, abs=2e-5)
        assert ours["sigma"][i].item() == pytest.approx(math.exp(log_sigma), rel=1e-4)
