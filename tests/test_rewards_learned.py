"""Learnt rewards against independent ways to the same number, on small random weights in the published layouts.

No published weights are reachable here: what is tested is that, given a checkpoint, the score is the definition's.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pictures
import pytest
import tiny_rewards
import torch
from PIL import Image
from torch.nn import functional as F

from diffalign.errors import DiffalignError
from diffalign.rewards import REWARDS, Reward, load_reward
from diffalign.rewards.pixels import BOUND, CLIP_MEAN, CLIP_STD, crop_square, crop_square_tensor, letterbox, to_tensor

PROMPTS = ["a red cat", "two dogs and a very long story " * 12, "a red cat", ""]
SHAPES = [(96, 64), (300, 500), (224, 224), (513, 259)]
IMAGES = [pictures.smooth(i, *size) for i, size in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rewards.clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    return tiny_rewards.hps_checkpoint(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("blip")
    return folder, tiny_rewards.imagereward_checkpoint(folder)


@pytest.fixture(scope="module")
def rewards(
    clip: Path, hps: tuple[Path, dict], blip: tuple[Path, dict], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Reward]:
    head = tmp_path_factory.mktemp("head") / "head.pth"
    tiny_rewards.aesthetic_head(head, 24)
    return {
        "pickscore": load_reward("pickscore", weights=clip),
        "clipscore": load_reward("clipscore", weights=clip),
        "hpsv2": load_reward("hpsv2", weights=hps[0], architecture="tiny-hps"),
        "imagereward": load_reward("imagereward", weights=blip[0], tokenizer=blip[0]),
        "aesthetic": load_reward("aesthetic", weights=head, clip=clip),
        "sharpness": load_reward("sharpness"),
    }


# --- parity ----------------------------------------------------------------------------------------------------


def cosines(clip: Path, prompts: list[str], centre: str) -> torch.Tensor:
    """Through CLIPModel.forward and the processor that works on PIL pictures, one pair at a time."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    found = []
    for image, prompt in zip(IMAGES, prompts, strict=True):
        tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        found.append(F.cosine_similarity(out.text_embeds, out.image_embeds)[0])
    return torch.stack(found)


def test_pickscore(clip: Path, rewards: dict[str, Reward]) -> None:
    from transformers import CLIPModel

    scale = CLIPModel.from_pretrained(clip).logit_scale.exp().item()
    expected = scale * cosines(clip, PROMPTS, "floor")
    assert rewards["pickscore"].score(IMAGES, PROMPTS).numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    # By hand: cos = 5 / sqrt(26), times 100.
    a, b = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 4.0, 1.0])
    assert 100 * F.cosine_similarity(a, b, dim=0).item() == pytest.approx(98.0580675691, rel=1e-6)
    assert torch.tensor([21.4, 20.9]).softmax(0).tolist() == pytest.approx([0.6224593312, 0.3775406688], rel=1e-5)


@pytest.mark.parametrize("convention", ["hessel", "torchmetrics", "cosine", "compbench"])
def test_clipscore_conventions(clip: Path, convention: str) -> None:
    prefix = "A photo depicts " if convention == "hessel" else ""
    cosine = cosines(clip, [prefix + p for p in PROMPTS], "floor")
    formula = {"hessel": 2.5 * cosine.clamp(min=0), "torchmetrics": (100 * cosine).clamp(min=0)}.get(convention, cosine)
    reward = load_reward("clipscore", convention=convention, weights=clip)
    # 96 x 64 becomes 336 x 224 and 300 x 500 373 x 224: even and odd margins; the odd one lies one pixel elsewhere in clip.
    tolerance = {"torchmetrics": 1e-4}.get(convention, 2e-2)
    assert reward.score(IMAGES, PROMPTS).numpy() == pytest.approx(formula.numpy(), abs=tolerance)
    assert reward.identity()["options"]["convention"] == convention


def as_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's names to those of transformers' CLIPModel: another implementation of the same network."""
    found = {"logit_scale": state["logit_scale"]}
    pairs = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
    }
    found |= {new: state[old] for old, new in pairs.items()}
    found |= {"visual_projection.weight": state["visual.proj"].T, "text_projection.weight": state["text_projection"].T}
    for old, new in (("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm"),
                     ("ln_final", "text_model.final_layer_norm")):  # fmt: skip
        found |= {f"{new}.{part}": state[f"{old}.{part}"] for part in ("weight", "bias")}
    for old, new in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for n in range(2):
            a, b = f"{old}.resblocks.{n}", f"{new}.encoder.layers.{n}"
            for part in ("weight", "bias"):
                qkv = state[f"{a}.attn.in_proj_{part}"].chunk(3)
                found |= {f"{b}.self_attn.{x}_proj.{part}": v for x, v in zip("qkv", qkv, strict=True)}
                found[f"{b}.self_attn.out_proj.{part}"] = state[f"{a}.attn.out_proj.{part}"]
                for i in (1, 2):
                    found[f"{b}.layer_norm{i}.{part}"] = state[f"{a}.ln_{i}.{part}"]
                found[f"{b}.mlp.fc1.{part}"] = state[f"{a}.mlp.c_fc.{part}"]
                found[f"{b}.mlp.fc2.{part}"] = state[f"{a}.mlp.c_proj.{part}"]
    return found


def published_letterbox(image: Image.Image) -> torch.Tensor:
    """The transform of the hpsv2 package, written down again with torchvision."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as T

    pixels = T.to_tensor(image.convert("RGB"))
    scale = 224 / max(pixels.shape[1:])
    size = [round(side * scale) for side in pixels.shape[1:]]
    pixels = T.resize(pixels, size, InterpolationMode.BICUBIC) if scale != 1 else pixels
    left, top = 224 - size[1], 224 - size[0]
    padded = T.pad(pixels, [left // 2, top // 2, left - left // 2, top - top // 2], fill=0)
    return T.normalize(padded, CLIP_MEAN, CLIP_STD)


def test_hpsv2(hps: tuple[Path, dict], rewards: dict[str, Reward]) -> None:
    import open_clip
    from transformers import CLIPConfig, CLIPModel

    shared = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    }
    model = CLIPModel(
        CLIPConfig(
            text_config={**shared, "vocab_size": 49408, "eos_token_id": 2},
            vision_config={**shared, "image_size": 224, "patch_size": 32},
            projection_dim=24,
        )
    ).eval()
    missing, extra = model.load_state_dict(as_transformers(hps[1]), strict=False)
    assert not extra and all(m.endswith("position_ids") for m in missing)
    pixels = torch.stack([published_letterbox(image) for image in IMAGES])
    with torch.no_grad():
        out = model(input_ids=open_clip.tokenize(PROMPTS), pixel_values=pixels)
    expected = F.cosine_similarity(out.text_embeds, out.image_embeds)
    found = rewards["hpsv2"].score(IMAGES, PROMPTS)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=2e-6)
    assert rewards["hpsv2"].score([im.convert("RGBA") for im in IMAGES], PROMPTS).tolist() == found.tolist()


def oracle_imagereward(
    s: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """BLIP's ViT and BERT with cross-attention in plain tensor algebra, from the paper's code's names."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias, -1)
        return weights @ v

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    v = "blip.visual_encoder"
    kernel = s[f"{v}.patch_embed.proj.weight"]
    patches = pixels.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ kernel.flatten(1).T + s[f"{v}.patch_embed.proj.bias"]
    x = torch.cat([s[f"{v}.cls_token"].expand(len(x), -1, -1), x], 1) + s[f"{v}.pos_embed"]
    for n in range(2):  # one head: 64 wide
        b = f"{v}.blocks.{n}"
        q, k, value = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{b}.attn.proj", attend(q, k, value))
        x = x + linear(f"{b}.mlp.fc2", gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x, 1e-6))))
    seen = norm(f"{v}.norm", x, 1e-6)
    t = "blip.text_encoder"
    y = (
        s[f"{t}.embeddings.word_embeddings.weight"][ids]
        + s[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    )
    y = norm(f"{t}.embeddings.LayerNorm", y, 1e-12)
    bias = torch.where(mask.bool(), 0.0, -1e9)[:, None, :]
    for n in range(2):
        b = f"{t}.encoder.layer.{n}"
        for part, source, hidden in (("attention", None, bias), ("crossattention", seen, 0.0)):
            a = f"{b}.{part}"
            of = y if source is None else source
            mixed = attend(
                linear(f"{a}.self.query", y), linear(f"{a}.self.key", of), linear(f"{a}.self.value", of), hidden
            )
            y = norm(f"{a}.output.LayerNorm", linear(f"{a}.output.dense", mixed) + y, 1e-12)
        inner = gelu(linear(f"{b}.intermediate.dense", y))
        y = norm(f"{b}.output.LayerNorm", linear(f"{b}.output.dense", inner) + y, 1e-12)
    z = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        z = linear(f"mlp.layers.{place}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward(blip: tuple[Path, dict], rewards: dict[str, Reward]) -> None:
    from transformers import BertTokenizer

    folder, state = blip
    tokens = BertTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = torch.stack([(crop_square(image, 224, "round") - mean) / std for image in IMAGES])
    expected = oracle_imagereward(state, pixels, tokens["input_ids"], tokens["attention_mask"])
    found = rewards["imagereward"].score(IMAGES, PROMPTS)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    assert len(set(found.tolist())) == 4
    # The constants alone: (1.5 - mean) / std and so on.
    assert [(x - 0.16717362830052426) / 1.0333394966054072 for x in (1.5, -2.0)] == pytest.approx(
        [1.2898242795, -2.0972522927]
    )


def test_aesthetic_needs_quickgelu(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    state = tiny_rewards.aesthetic_head(tmp_path / "head.pth", 24)
    reward = load_reward("aesthetic", weights=tmp_path / "head.pth", clip=clip)
    model = CLIPModel.from_pretrained(clip).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = torch.stack([(crop_square(image, 224, "round") - mean) / std for image in IMAGES])

    def by_hand(model: CLIPModel) -> np.ndarray:
        with torch.no_grad():
            x = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        x = x / x.norm(dim=-1, keepdim=True)
        for place in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
        return x[:, 0].numpy()

    found = reward.score(IMAGES, PROMPTS).numpy()
    assert found == pytest.approx(by_hand(model), abs=1e-4)
    wrong = tiny_rewards.clip_folder(tmp_path / "gelu", activation="gelu")  # the same weights
    assert np.abs(by_hand(CLIPModel.from_pretrained(wrong).eval()) - found).max() > 1e-3
    with pytest.raises(DiffalignError, match="computes with gelu; OpenAI's CLIP needs hidden_act quick_gelu"):
        load_reward("aesthetic", weights=tmp_path / "head.pth", clip=wrong).score(IMAGES, PROMPTS)


# --- preprocessing and its differentiable twin --------------------------------------------------------------------


def test_letterbox_geometry() -> None:
    for width, height, rows, columns in ((1024, 768, 28, 0), (640, 480, 28, 0), (1920, 1080, 49, 0), (300, 600, 0, 56)):
        boxed = letterbox(torch.ones(3, height, width), 224)
        assert boxed.shape == (3, 224, 224)
        inner = boxed[:, rows : 224 - rows, columns : 224 - columns]
        assert inner.min() > 0.9 and boxed.sum() == pytest.approx(inner.sum().item())
    black = (torch.zeros(3) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    assert black.tolist() == pytest.approx([-1.7922625337, -1.7520971282, -1.4802197688], rel=1e-5)
    square = torch.rand(3, 224, 224)
    assert torch.equal(letterbox(square, 224), square)
    assert letterbox(torch.ones(3, 100, 224), 224).shape == (3, 224, 224)  # the original forgets to pad this one


@pytest.mark.parametrize("size", [(512, 512), (640, 480), (96, 64), (300, 900), (513, 259)])
@pytest.mark.parametrize("rounding", ["floor", "round"])
def test_crops_agree_within_the_bound(size: tuple[int, int], rounding: str) -> None:
    image = pictures.smooth(5, *size)
    exact, floating = crop_square(image, 224, rounding), crop_square_tensor(to_tensor(image)[None], 224, rounding)[0]
    assert (exact - floating).abs().max() <= BOUND


TENSOR_BOUND = {
    "pickscore": 0.05,
    "clipscore": 2e-3,
    "hpsv2": 1e-5,
    "imagereward": 0.05,
    "aesthetic": 0.02,
    "sharpness": 1e-5,
}
"""Largest difference of `score_tensors` and `score` here; HPSv2 and sharpness have one path, the others an 8-bit resize."""


@pytest.mark.parametrize("name", TENSOR_BOUND)
def test_gradients_reach_the_pixels(name: str, rewards: dict[str, Reward]) -> None:
    reward = rewards[name]
    assert reward.differentiable
    exact = reward.score(IMAGES, PROMPTS)
    for image, prompt, score in zip(IMAGES, PROMPTS, exact, strict=True):
        pixels = to_tensor(image)[None].requires_grad_()
        found = reward.score_tensors(pixels, [prompt])
        assert found.shape == (1,) and found.dtype == torch.float32
        assert abs(found.item() - score.item()) <= TENSOR_BOUND[name], (found.item(), score.item())
        if name != "clipscore" or score > 0:  # 2.5 max(cos, 0) is flat below 0
            (gradient,) = torch.autograd.grad(found.sum(), pixels)
            assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward"])
def test_batches_change_nothing(name: str, rewards: dict[str, Reward]) -> None:
    reward = rewards[name]
    together = reward.score(IMAGES, PROMPTS)
    alone = torch.cat([reward.score([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    assert together.numpy() == pytest.approx(alone.numpy(), abs=1e-4)
    reward.free()
    assert reward.score(IMAGES, PROMPTS).tolist() == together.tolist()


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pickscore", "model.safetensors and its config of https://huggingface.co/yuvalkirstain/PickScore_v1"),
        ("hpsv2", "HPS_v2.1_compressed.pt of https://huggingface.co/xswu/HPSv2"),
        ("imagereward", "ImageReward.pt of https://huggingface.co/THUDM/ImageReward"),
        ("aesthetic", "aesthetic-model.pth of https://huggingface.co/trl-lib/ddpo-aesthetic-predictor"),
    ],
)
def test_unreachable_weights_are_named(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DiffalignError) as told:
        load_reward(name, revision="nowhere").identity()
    assert words in str(told.value) and f"--reward {name}:weights=PATH" in str(told.value)
    assert "\n" not in str(told.value) and "nowhere" in str(told.value)


def test_wrong_weights_are_named(clip: Path, hps: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="does not exist; it should be HPS_v2.1_compressed.pt of xswu/HPSv2"):
        load_reward("hpsv2", weights=tmp_path).identity()
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(DiffalignError, match="does not fit the model: .* is missing"):
        load_reward("hpsv2", weights=tmp_path, architecture="tiny-hps").score(IMAGES[:1], PROMPTS[:1])
    torch.save({"state_dict": Path}, tmp_path / "HPS_v2.1_compressed.pt")  # a pickle of something that is no tensor
    with pytest.raises(DiffalignError, match=r"cannot be loaded without running code .* safetensors\.torch\.save_file"):
        load_reward("hpsv2", weights=tmp_path, architecture="tiny-hps").score(IMAGES[:1], PROMPTS[:1])
    with pytest.raises(DiffalignError, match="dtype 'float8'"):
        load_reward("hpsv2", dtype="float8")
    with pytest.raises(DiffalignError, match="unknown option 'reelase'; did you mean 'release'"):
        load_reward("hpsv2", reelase="2.0")


def test_identity_follows_the_weights(clip: Path, tmp_path: Path) -> None:
    other = tiny_rewards.clip_folder(tmp_path / "other", seed=1)
    a, b = (load_reward("pickscore", weights=folder).identity() for folder in (clip, other))
    assert a != b and a == load_reward("pickscore", weights=clip).identity()
    assert load_reward("pickscore", weights=clip, dtype="bfloat16").identity() != a


def test_not_differentiable_is_said() -> None:
    for name, kind in REWARDS.items():
        if not kind.differentiable and name not in ("geneval",):
            with pytest.raises(DiffalignError, match="is not differentiable"):
                load_reward(name).score_tensors(torch.rand(1, 3, 8, 8), ["x"])
