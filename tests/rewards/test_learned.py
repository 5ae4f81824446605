"""Learnt rewards against independent ways to the same number, on small random weights in the published layouts.

No published weights are reachable here: what is tested is that, given a checkpoint, the score is the definition's.
HPSv2 and ImageReward beside their packages' own code: test_published_packages.py.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffalign.data.cut_prompts import cut_lines
from diffalign.errors import DiffalignError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.pixels import BOUND, CLIP_MEAN, CLIP_STD, crop_square, crop_square_tensor, letterbox, to_tensor
from helpers import pictures, tiny_rewards
from helpers.learned_inputs import IMAGES, PROMPTS


def cosines(clip: Path, prompts: list[str], centre: str) -> torch.Tensor:
    """Through CLIPModel.forward, one pair at a time. centre: where an odd margin of the crop goes; `floor` is transformers' PIL
    processor, `round` open_clip's transform."""
    import open_clip
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    transform = open_clip.image_transform(224, is_train=False)
    found = []
    for image, prompt in zip(IMAGES, prompts, strict=True):
        tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        floor = processor(images=[image], return_tensors="pt")["pixel_values"]
        pixels = floor if centre == "floor" else transform(image)[None]
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
    cosine = cosines(clip, [prefix + p for p in PROMPTS], "floor" if convention == "torchmetrics" else "round")
    formula = {"hessel": 2.5 * cosine.clamp(min=0), "torchmetrics": (100 * cosine).clamp(min=0)}.get(convention, cosine)
    reward = load_reward("clipscore", convention=convention, weights=clip)
    # 96 x 64 becomes 336 x 224 and 300 x 500 373 x 224: even and odd margins.
    assert reward.score(IMAGES, PROMPTS).numpy() == pytest.approx(formula.numpy(), abs=1e-4)
    assert reward.identity()["options"]["convention"] == convention


@pytest.fixture(scope="module")
def openclip(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """One network twice: in open_clip, which shares no code with transformers, and as a hub folder."""
    folder = tmp_path_factory.mktemp("openclip")
    model = tiny_rewards.openclip_model(folder / "config", "tiny-openai", seed=5, quick_gelu=True)
    return model, tiny_rewards.openclip_as_folder(model, folder / "clip", "quick_gelu")


@pytest.mark.parametrize("name", ["hessel", "torchmetrics", "cosine", "compbench", "pickscore", "aesthetic"])
def test_the_clip_family_beside_open_clip(name: str, openclip: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    """Images through open_clip's transform, prompts through its tokenizer, both through its network; then the formula."""
    import open_clip

    model, folder = openclip
    transform, tokenize = open_clip.image_transform(224, is_train=False), open_clip.get_tokenizer("tiny-openai")
    even = [image for image in IMAGES if image.size != (513, 259)]  # an odd margin goes elsewhere in transformers
    images = IMAGES if name in ("hessel", "cosine", "compbench", "aesthetic") else even
    prompts = ["a red cat", "two dogs and a very long story " * 12, "Größe, 3 Äpfel & a <b>dog</b>!", "red"][
        : len(images)
    ]
    before = "A photo depicts " if name == "hessel" else ""
    with torch.no_grad():
        seen = F.normalize(model.encode_image(torch.stack([transform(image) for image in images])), dim=-1)
        read = F.normalize(model.encode_text(tokenize([before + prompt for prompt in prompts])), dim=-1)
    cosine = (seen * read).sum(-1)
    if name == "aesthetic":
        head = tiny_rewards.aesthetic_head(tmp_path / "head.pth", 24)
        expected = seen
        for n in (0, 2, 4, 6, 7):
            expected = expected @ head[f"layers.{n}.weight"].T + head[f"layers.{n}.bias"]
        expected, ours = expected[:, 0], load_reward("aesthetic", weights=tmp_path / "head.pth", clip=folder)
    elif name == "pickscore":
        expected, ours = model.logit_scale.exp().detach() * cosine, load_reward("pickscore", weights=folder)
    else:
        expected = {"hessel": 2.5 * cosine.clamp(min=0), "torchmetrics": (100 * cosine).clamp(min=0)}.get(name, cosine)
        ours = load_reward("clipscore", convention=name, weights=folder)
    found = ours.score(images, prompts)
    scale = 100.0 if name == "torchmetrics" else max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() < 2e-6 * scale
    assert found.max() - found.min() > 0.01 * scale


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


def test_hpsv2(hps: tuple[Path, dict], rewards: dict[str, Reward], tmp_path: Path) -> None:
    """Through transformers' CLIP, another implementation of the same network."""
    import open_clip
    from transformers import CLIPModel

    model = tiny_rewards.openclip_model(tmp_path, "tiny-hps")
    model.load_state_dict(hps[1])
    copy = CLIPModel.from_pretrained(tiny_rewards.openclip_as_folder(model, tmp_path / "copy", "gelu")).eval()
    pixels = torch.stack([published_letterbox(image) for image in IMAGES])
    with torch.no_grad():
        out = copy(input_ids=open_clip.tokenize(PROMPTS), pixel_values=pixels)
    expected = F.cosine_similarity(out.text_embeds, out.image_embeds)
    found = rewards["hpsv2"].score(IMAGES, PROMPTS)
    assert found.numpy() == pytest.approx(expected.numpy(), abs=2e-6)
    assert rewards["hpsv2"].score([im.convert("RGBA") for im in IMAGES], PROMPTS).tolist() == found.tolist()


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


@pytest.mark.parametrize(
    ("name", "most"), [("pickscore", 75), ("clipscore", None), ("hpsv2", 75), ("imagereward", 33), ("sharpness", 999)]
)
def test_prompts_that_are_cut_are_counted(name: str, most: int | None, rewards: dict[str, Reward]) -> None:
    """A prompt is cut if its last word does not move the score. `most`: letters that fit beside beginning and end."""
    reward = rewards[name]
    prompts = [" ".join("abcdefg"[i % 7] for i in range(n)) for n in range(20, 84)]
    scores = reward.score([IMAGES[0]] * len(prompts), prompts).tolist()
    unmoved = [abs(a - b) < 1e-6 for a, b in pairwise(scores)] if reward.longest else [False] * (len(prompts) - 1)
    assert [reward.count_cut([prompt]) for prompt in prompts[1:]] == [int(cut) for cut in unmoved]
    assert any(unmoved) == bool(reward.longest)
    if most is not None:
        assert [reward.count_cut(["a " * n]) for n in (most, most + 1)] == [0, int(most < 999)]
    # Each prompt counts once, and one that is read in full not at all.
    assert reward.count_cut([prompts[-1]] * 3 + prompts[:1] * 2) == int(bool(reward.longest)) and not reward.count_cut(
        []
    )


def test_one_line_for_each_reward_that_cuts(rewards: dict[str, Reward]) -> None:
    long = "very " * 50 + "red"
    given = {"p": rewards["pickscore"], "i": rewards["imagereward"], "aesthetic": rewards["aesthetic"]}
    assert cut_lines(given, ["a cat", long, long, None]) == [
        "p reads 77 tokens of a prompt: 1 of 2 prompts are longer and were cut",
        "i reads 35 tokens of a prompt: 1 of 2 prompts are longer and were cut",
    ]
    assert cut_lines(given, ["a cat"]) == cut_lines(given, []) == []
