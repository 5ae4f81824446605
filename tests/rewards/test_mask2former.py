"""GenEval's detector: the steps after the network by hand, and the whole on small random weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.mask2former import COLORS, LABELS, Mask2FormerDetector, cut_out, extent, instances
from helpers import pictures, tiny_rewards

PUBLISHED_PROCESSOR = {
    "_max_size": 1333, "do_normalize": True, "do_reduce_labels": False, "do_rescale": True, "do_resize": True,
    "feature_extractor_type": "MaskFormerFeatureExtractor", "ignore_index": 255, "image_mean": [0.48500001430511475,
    0.4560000002384186, 0.4059999883174896], "image_processor_type": "MaskFormerImageProcessor",
    "image_std": [0.2290000021457672, 0.2239999920129776, 0.22499999403953552], "num_labels": 80, "resample": 2,
    "rescale_factor": 0.00392156862745098, "size": {"height": 384, "width": 384}, "size_divisor": 32,
}  # fmt: skip
"""What preprocessor_config.json of Facebook's Mask2Former folders says: every image to 384 x 384."""


def logits(*rows: list[float]) -> torch.Tensor:
    """Class logits from probabilities, "no object" last."""
    return torch.tensor(rows).log()


def test_instances_follow_mmdets_head() -> None:
    # Two queries, two classes. Masks of 4 x 4 on an input of 16 x 16 of which 16 x 12 are picture, shown at 32 x 24.
    classes = logits([0.7, 0.2, 0.1], [0.05, 0.15, 0.8])
    masks = torch.full((2, 4, 4), -8.0)
    masks[0, 0:2, 0:2] = 4.0
    masks[1, 3, :] = 2.0
    found = instances(classes, masks, (16, 16), (16, 12), (32, 24))
    assert [label for label, _, _ in found] == [0, 1, 1, 0]
    scores = [score for _, score, _ in found]
    _, score, mask = found[0]
    assert mask.shape == (32, 24)
    # Confidence is 0.7 times the mean probability inside the mask, which lies below sigmoid(4) for the soft rim.
    assert 0.7 * 0.5 < score < 0.7 * torch.tensor(4.0).sigmoid().item()
    assert scores[1] == pytest.approx(score * 0.2 / 0.7)  # the same query under its second class
    x1, y1, x2, y2 = extent(mask)
    # 2 of 4 cells of 8 px each, on 24 x 32
    assert (x1, y1) == (0, 0)
    assert 14 <= x2 <= 19
    assert 14 <= y2 <= 19
    assert mask[:12, :12].all()
    assert not mask[20:, :].any()


def test_empty_masks_are_no_objects() -> None:
    assert instances(logits([0.7, 0.2, 0.1]), torch.full((1, 4, 4), -8.0), (16, 16), (16, 16), (8, 8)) == []


def test_extent_and_cut_out() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:9, 10:16] = True
    mask[6, 10] = False
    assert extent(mask) == (10, 5, 16, 9)
    crop = cut_out(Image.new("RGB", (30, 20), (200, 30, 30)), mask, extent(mask))
    assert crop.size == (6, 4)
    assert crop.getpixel((1, 1)) == (200, 30, 30) and crop.getpixel((0, 1)) == (153, 153, 153)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    path = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=8, num_labels=80,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PUBLISHED_PROCESSOR))
    return path, tiny_rewards.clip_folder(tmp_path_factory.mktemp("clip"))


def mmdets_input(image: Image.Image) -> np.ndarray:
    """Resize, normalise and pad as the test pipeline of mmdet's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco, with OpenCV.

    img_scale (1333, 800), keep_ratio, mean and std in levels, Pad to multiples of 32: float32 [3, H, W].
    """
    import cv2

    levels = np.asarray(image)
    height, width = levels.shape[:2]
    scale = min(1333 / max(height, width), 800 / min(height, width))
    resized = cv2.resize(levels, (int(width * scale + 0.5), int(height * scale + 0.5)), interpolation=cv2.INTER_LINEAR)
    normal = (resized - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    height, width = resized.shape[:2]
    return np.pad(normal, ((0, -height % 32), (0, -width % 32), (0, 0))).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("size", "height", "width"),  # of the network's input, before the padding
    [
        ((512, 512), 800, 800),
        ((1024, 1024), 800, 800),
        ((1344, 768), 762, 1333),
        ((768, 1344), 1333, 762),
        ((640, 480), 800, 1067),
        ((1500, 100), 89, 1333),
        ((101, 67), 800, 1206),
    ],
)
def test_the_input_is_mmdets(
    folders: tuple[Path, Path], size: tuple[int, int], height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Mask2FormerDetector(weights=folders[0], clip=folders[1])
    detector._load()
    seen: list[torch.Tensor] = []
    network = detector._network
    monkeypatch.setattr(network, "forward", lambda pixel_values: seen.append(pixel_values) or EMPTY)
    image = pictures.smooth(8, *size)
    assert detector.detect([image]) == [[]]
    pixels, expected = seen[0][0].numpy(), mmdets_input(image)
    assert pixels.shape == expected.shape == (3, height + -height % 32, width + -width % 32)
    assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
    # OpenCV interpolates with weights of 11 bits, so a value may differ by one level.
    levels = np.abs(pixels - expected) * np.array([58.395, 57.12, 57.375])[:, None, None]
    assert levels.max() < 1.01 and levels.mean() < 0.15


EMPTY = SimpleNamespace(class_queries_logits=torch.zeros(1, 8, 81), masks_queries_logits=torch.full((1, 8, 8, 8), -9.0))


def test_detector_end_to_end(folders: tuple[Path, Path]) -> None:
    weights, clip = folders
    detector = Mask2FormerDetector(weights=weights, clip=clip, threshold=0.0)
    images = [pictures.smooth(1, 90, 60), pictures.smooth(2, 40, 100)]
    found = detector.detect(images)
    assert all(found)
    assert len(found[0]) <= 100
    for image, objects in zip(images, found, strict=True):
        for thing in objects:
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= image.width
            assert 0 <= y1 < y2 <= image.height
            assert thing.label in LABELS
            assert thing.color in COLORS
            assert 0 < thing.score < 1
    assert detector.detect(images[::-1]) == found[::-1]
    assert Mask2FormerDetector(weights=weights, clip=clip, threshold=0.5).detect(images)[0] == [
        thing for thing in found[0] if thing.score > 0.5
    ]


def test_colours_are_a_zero_shot_classifier(folders: tuple[Path, Path]) -> None:
    from torch.nn import functional as F

    detector = Mask2FormerDetector(weights=folders[0], clip=folders[1])
    clip = load_reward("clipscore", convention="cosine", weights=folders[1])
    crop = pictures.smooth(3)
    means = []
    for color in COLORS:
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        means.append(F.normalize(torch.stack([clip.embed_prompts([t])[0] for t in texts]).mean(0), dim=0))
    image = clip.embed_images(clip.prepare(crop)[None])[0]
    expected = COLORS[int((torch.stack(means) @ image).argmax())]
    assert detector._colors([crop], ["dog"]) == [expected]


def test_colours_are_the_evaluators(tmp_path: Path) -> None:
    """The evaluator asks open_clip's ViT-L/14, with OpenAI's weights and so QuickGELU; the detector asks transformers' CLIP.
    Equal weights give equal logits: prompts through both tokenizers, crops through both transforms, both networks."""
    import open_clip
    from torch.nn import functional as F

    model = tiny_rewards.openclip_model(tmp_path / "config", "tiny-quickgelu", quick_gelu=True)
    folder = tiny_rewards.openclip_as_folder(model, tmp_path / "clip", "quick_gelu")
    detector = Mask2FormerDetector(clip=folder)
    transform, tokenize = open_clip.image_transform(224, is_train=False), open_clip.get_tokenizer("tiny-quickgelu")
    crops = [pictures.smooth(i, *size) for i, size in enumerate([(40, 91), (300, 200), (77, 76), (513, 259)])]
    for label in ("computer mouse", "teddy bear", "tv"):
        texts = [
            [f"a photo of a {c} {label}", f"a photo of a {c}-colored {label}", f"a photo of a {c} object"]
            for c in COLORS
        ]
        with torch.no_grad():
            means = torch.stack([F.normalize(model.encode_text(tokenize(t)), dim=-1).mean(0) for t in texts])
            seen = F.normalize(model.encode_image(torch.stack([transform(crop) for crop in crops])), dim=-1)
        logits = 100 * seen @ F.normalize(means, dim=-1).T
        ours = detector._clip.embed_images(torch.stack([detector._clip.prepare(crop) for crop in crops]))
        assert (100 * ours @ detector._classifier(label).T - logits).abs().max() < 1e-4
        assert detector._colors(crops, [label] * len(crops)) == [COLORS[i] for i in logits.argmax(1).tolist()]
    wrong = tiny_rewards.openclip_as_folder(model, tmp_path / "gelu", "gelu")
    with pytest.raises(DiffalignError, match="computes with gelu; OpenAI's CLIP needs hidden_act quick_gelu"):
        Mask2FormerDetector(clip=wrong)._colors(crops, ["tv"] * len(crops))


def test_geneval_uses_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    reward = load_reward("geneval", weights=folders[0], clip=folders[1])
    facts = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    measured = reward.measure([pictures.smooth(1)], ["a photo of a dog"], [facts])
    assert set(measured) == {"dense", "official", "exact", "server"}
    assert "mask2former" in reward.identity()["weights"] and len(LABELS) == 80 == len(set(LABELS))
    config = json.loads((folders[0] / "config.json").read_text())
    config["id2label"] = {"0": "dog"}
    config["label2id"] = {"dog": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folders[0] / "model.safetensors").read_bytes())
    with pytest.raises(DiffalignError, match="knows 1 classes, not COCO's 80"):
        load_reward("geneval", weights=tmp_path, clip=folders[1]).score([pictures.smooth(1)], ["a"], [facts])
