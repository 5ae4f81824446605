"""HPSv2, HPSv3 and ImageReward beside the published packages' own code (see oracles.py), on the same random checkpoint.

Each package opens the file, tokenises, runs its network and gives its number; ours gets the same file and the same prompt.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from diffalign.rewards import load_reward
from helpers import oracles, pictures, tiny_rewards

PROMPTS = ["a red cat", "two dogs and a very long story " * 12, "Größe, 3 Äpfel & a <b>dog</b>!", "red dog"]
# Portrait, landscape, square, enlarged and reduced, margins odd and even.
SHAPES = [(96, 64), (300, 500), (256, 256), (513, 259), (64, 900), (1024, 768)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for i, size in enumerate(SHAPES):
        paths.append(folder / f"{i}.png")
        pictures.smooth(i, *size).save(paths[-1])
    return paths


def test_hpsv2(files: list[Path], tmp_path: Path) -> None:
    checkpoint, _ = tiny_rewards.hps_checkpoint(tmp_path)
    package = oracles.hpsv2(tiny_rewards.HPS)
    ours = load_reward("hpsv2", weights=checkpoint, architecture="tiny-hps")
    images = [Image.open(path) for path in files]
    found = []
    for prompt in PROMPTS:
        theirs = [float(v) for v in package.score([str(path) for path in files], prompt, cp=str(checkpoint))]
        found += theirs
        assert ours.score(images, [prompt] * len(files)).numpy() == pytest.approx(theirs, abs=2e-6)
    assert max(found) - min(found) > 0.1  # numbers that are all alike would agree about nothing
    # Two of the package's faults, which docs/rewards.md tells: ours scores these.
    for broken in (images[0].convert("RGBA"), Image.new("RGB", (224, 100))):
        with pytest.raises(RuntimeError):
            package.score(broken, "a", cp=str(checkpoint))
        assert ours.score([broken], ["a"]).isfinite().all()


def test_imagereward(files: list[Path], tmp_path: Path) -> None:
    from transformers import BertTokenizer

    state = tiny_rewards.imagereward_checkpoint(tmp_path)
    package = oracles.imagereward(tmp_path, BertTokenizer.from_pretrained(tmp_path), **tiny_rewards.IMAGEREWARD)
    package.load_state_dict(state)  # strict: the checkpoint is the package's, name by name
    ours = load_reward("imagereward", weights=tmp_path, tokenizer=tmp_path)
    images = [Image.open(path) for path in files]
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            _, theirs = package.inference_rank(prompt, [str(path) for path in files])
        assert theirs == pytest.approx([package.score(prompt, str(path)) for path in files], abs=1e-5)
        found += theirs
        assert ours.score(images, [prompt] * len(files)).numpy() == pytest.approx(theirs, abs=2e-5)
    assert max(found) - min(found) > 0.1
    # The gradient as well, through the package's own way to it.
    tokens = package.blip.tokenizer(
        PROMPTS[0], padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    pixels = ours.prepare(images[0])[None].requires_grad_()
    reward = package.score_gard(tokens["input_ids"], tokens["attention_mask"], pixels)
    (wanted,) = torch.autograd.grad(reward.sum(), pixels)
    (gradient,) = torch.autograd.grad(ours.forward(pixels, PROMPTS[:1]).sum(), pixels)
    assert (gradient - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-7


@pytest.fixture(scope="module")
def hpsv3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that the package itself wrote, beside a base model in the published layout."""
    folder = tmp_path_factory.mktemp("hpsv3")
    oracles.hpsv3("make", folder)
    return folder


def test_hpsv3(files: list[Path], hpsv3: Path) -> None:
    images = [Image.open(path) for path in files]
    prompts = (PROMPTS * 2)[: len(files)]
    request = {"files": [str(path) for path in files], "prompts": prompts, "dtype": "bfloat16"}
    batches = [[0, 1, 2, 3, 4, 5], [4, 1], *([i] for i in range(6))]
    theirs = oracles.hpsv3("score", hpsv3, batches=batches, widen=True, **request)
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 3e-2)):
        ours = load_reward("hpsv3", weights=hpsv3, base=hpsv3 / "base", dtype=dtype)
        for batch, wanted in zip(batches, theirs["scores"], strict=True):
            found = ours.measure([images[i] for i in batch], [prompts[i] for i in batch])
            assert found["hpsv3"].numpy() == pytest.approx([row[0] for row in wanted], abs=bound)
            assert found["sigma"].log().numpy() == pytest.approx([row[1] for row in wanted], abs=bound)
        frequencies = {name: b for name, b in ours.network.named_buffers() if name.endswith(".inv_freq")}
        assert frequencies["base.language_model.rotary_emb.inv_freq"].tolist() == theirs["language"]
        assert frequencies["base.visual.rotary_pos_emb.inv_freq"].tolist() == theirs["vision"]
        assert {b.dtype for b in frequencies.values()} == {torch.float32}
    scores = [row[0] for row in theirs["scores"][0]]
    assert max(scores) - min(scores) > 0.1
    # As published, bfloat16 throughout: as close as bfloat16 brings the package to its own numbers in float32.
    published = oracles.hpsv3("score", hpsv3, batches=batches[2:], widen=False, **request)["scores"]
    assert [p[0][0] for p in published] == pytest.approx([t[0][0] for t in theirs["scores"][2:]], abs=3e-2)


def test_a_missing_oracle_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles, "FOLDER", tmp_path)
    monkeypatch.setattr(oracles, "HPSV3", tmp_path)
    with pytest.raises(oracles.OraclesMissing, match="`make oracles` installs"):
        oracles.hpsv2(tiny_rewards.HPS)
    with pytest.raises(oracles.OraclesMissing, match="`make oracles` installs"):
        oracles.hpsv3("make", tmp_path)
