"""A personal reward: the fit against a solver written out here, honest accuracy, and its use as a reward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from diffalign.data.dataset import PreferenceDataset
from diffalign.errors import DiffalignError
from diffalign.judge.personal import Choices, choices_in, choices_of, fit_taste
from diffalign.rewards import load_reward
from diffalign.rewards.features import NAMES, load_features
from diffalign.rewards.personal import Head
from diffalign.stages.personal import find_choices
from diffalign.voting.log import Vote, line_of
from helpers import pictures, tastes, tiny_rewards
from helpers.command_line import refused, run
from helpers.small_datasets import scored


def choices(n: int, seed: int = 0, per_prompt: int = 2) -> Choices:
    rng = np.random.default_rng(seed)
    wins = rng.choice([0.0, 0.5, 1.0], n, p=[0.45, 0.1, 0.45])
    return Choices(np.arange(n) * 2, np.arange(n) * 2 + 1, wins, [f"p{i // per_prompt}" for i in range(n)])


@pytest.mark.parametrize("width", [6, 150])
def test_the_head_is_the_minimum_of_the_written_out_loss(width: int) -> None:
    """More features than choices, too: they are solved in the space of the choices."""
    rng = np.random.default_rng(width)
    made = choices(70)
    seen = rng.normal(size=(140, width)) * rng.uniform(0.1, 5, width) + 3
    importance = rng.uniform(0.2, 1, width)
    seen[:, 1] = 7.0  # says nothing
    found = fit_taste(seen, importance, made, ridge=0.5)
    x = (seen[made.first] - seen[made.second]) / np.where(seen.std(0) > 0, seen.std(0), 1) * importance
    w = np.zeros(width)
    for _ in range(60):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + 0.5 * np.eye(width), x.T @ (p - made.wins) + 0.5 * w)
    expected = x @ w
    score = (seen - found.mean) @ found.weight
    assert score[made.first] - score[made.second] == pytest.approx(expected, abs=1e-5)
    assert found.mean == pytest.approx(seen.mean(0)) and found.weight[1] == 0


def test_what_is_held_out_is_not_seen() -> None:
    """Features that name the prompt explain every choice that was seen, and none of a prompt that was not."""
    made = choices(80, per_prompt=4)
    made = Choices(made.first, made.second, np.where(made.wins == 0.5, 1.0, made.wins), made.prompts)
    seen = np.zeros((160, 20))
    for i, prompt in enumerate(made.prompts):
        seen[2 * i + int(made.wins[i] < 0.5), int(prompt[1:])] = 1.0
    found = fit_taste(seen, np.ones(20), made)
    score = (seen - found.mean) @ found.weight
    assert ((score[made.first] > score[made.second]) == (made.wins > 0.5)).all()
    assert found.accuracy == 0.5 and found.loss == pytest.approx(np.log(2))


@pytest.mark.parametrize("blind", [False, True])
def test_a_taste_is_found_and_chance_is_not_taken_for_one(
    tmp_path: Path, blind: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tastes.judged(tmp_path / "mine", 120, blind=blind)
    assert run("judge", "personal", data, "features=pixels") == 0
    said = capsys.readouterr().out
    found = json.loads((data / "personal/human/personal.json").read_text())
    low, high = found["held_out"]["low"], found["held_out"]["high"]
    assert found["choices"] == 120 and found["prompts"] == 120
    assert (low < 0.5) if blind else (low > 0.7)
    assert ("not better than chance" in said) == blind and f"({low:.1%} to {high:.1%})" in said
    # New pictures, through the command: the order is that of the taste.
    rng = np.random.default_rng(9)
    new = [tastes.coloured(rng, 40) for _ in range(60)]
    score = load_reward("personal", weights=data / "personal/human").score(new, [""] * 60).numpy()
    agreement = np.corrcoef(score, [tastes.redness(image) for image in new])[0, 1]
    assert (abs(agreement) < 0.75) if blind else (agreement > 0.9)


def test_the_score_is_the_head_on_the_features(tmp_path: Path) -> None:
    """Read with safetensors alone; voted images score 0 on average."""
    data = tastes.judged(tmp_path / "mine", 10, each=4)
    assert run("judge", "personal", data, "features=pixels") == 0
    head = safetensors.numpy.load_file(data / "personal/human/personal.safetensors")
    images = [row.decode() for rows in PreferenceDataset(data).iter_images() for row in rows]
    features = load_features("pixels", {})
    seen = (
        features.embed(torch.stack([features.prepare(image) for image in images]), [""] * len(images)).double().numpy()
    )
    score = load_reward("personal", weights=data / "personal/human").score(images, [""] * len(images)).numpy()
    assert score == pytest.approx((seen - head["mean"]) @ head["weight"], abs=1e-5)
    assert abs(score.mean()) < 1e-3 and score.std() > 0.1


def test_equal_choices_give_equal_files_and_serve_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tastes.judged(tmp_path / "mine", 60)
    for name in ("a", "b"):
        assert run("judge", "personal", data, "features=pixels", f"out={tmp_path / name}") == 0
    for file in ("personal.json", "personal.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert run("score", data, "-r", f"personal:weights={tmp_path / 'a'}", "--into-dataset") == 0
    dataset = PreferenceDataset(data)
    assert dataset.scored_by("personal")["weights"].startswith("personal@")
    assert run("rank", data, "sources=[personal]") == 0  # more pictures can be ranked by it
    best = np.array([group["preference"][0] > 0.5 for group in map(dataset.group, range(60))])
    assert (best == [group[0] > 0.5 for group in dataset.human if group]).mean() > 0.8
    capsys.readouterr()
    assert run("rewards", "personal") == 0 and "weights" in capsys.readouterr().out


def test_votes_of_one_or_all_raters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = scored(tmp_path / "mine", {"x": [[0.1, 0.2, 0.3]] * 3})
    votes = [
        Vote("1", "t", "ann", "p0", ("g0/1", "g0/0"), ("m", "m"), "left"),
        Vote("2", "t", "ben", "p1", ("g1/0", "g1/2"), ("m", "m"), "both_bad"),
        Vote("3", "t", "ann", "p2", ("g2/2", "g2/0", "g2/1"), ("m",) * 3, "ranking", (2, 1, 2)),
        Vote("4", "t", "ann", "p2", ("g2/2", "g2/0"), ("m", "m"), "skip"),
    ]
    found = choices_in(votes, dataset)
    assert list(zip(found.first, found.second, found.wins, found.prompts, strict=True)) == [
        (1, 0, 1.0, "p0"), (3, 5, 0.5, "p1"), (8, 6, 0.0, "p2"), (8, 7, 0.5, "p2"), (6, 7, 1.0, "p2"),
    ]  # fmt: skip
    assert len(found) == 5 and found.ties == 2
    gone = [Vote("1", "t", "ann", "p", (name, "g0/0"), ("m", "m"), "left") for name in ("g9/0", "g0/7", "none")]
    assert len(choices_in(gone, dataset)) == 0
    by_score = choices_of(dataset, "x", "train")
    assert len(by_score) == 9 and set(by_score.wins) == {0.0}
    (tmp_path / "mine/votes.jsonl").write_text("".join(map(line_of, votes)))
    data = tmp_path / "mine"
    assert "3 choices between two images and 2 ties: at least 50" in refused(capsys, "judge", "personal", data)
    assert "0 choices between two images and 1 tie" in refused(capsys, "judge", "personal", data, "source=ben")
    both = find_choices(PreferenceDataset(data), "human", "train")
    assert len(both) == 5  # every group was voted on: the shares that follow from votes do not count a second time
    assert "it has human, ann, ben, x" in refused(capsys, "judge", "personal", data, "source=carl")


def test_too_few_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tastes.judged(tmp_path / "mine", 49)
    error = refused(capsys, "judge", "personal", data, "features=pixels")
    assert "49 choices between two images: at least 50 choices are needed" in error
    assert not (data / "personal").exists()
    assert "name the dataset first" in refused(capsys, "judge", "personal", "features=pixels")
    one = choices(60, per_prompt=60)
    with pytest.raises(DiffalignError, match="of one prompt"):
        fit_taste(np.zeros((120, 2)), np.ones(2), one)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Features of models of a few thousand random weights."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("towers")
    clip = tiny_rewards.clip_folder(folder / "clip")
    hps, _ = tiny_rewards.hps_checkpoint(folder / "hps")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    return {
        "pickscore": f"pickscore:weights={clip}",
        "clipscore": f"clipscore:weights={clip},convention=cosine",
        "hpsv2": f"hpsv2:weights={hps},architecture=tiny-hps",
        "vision": f"vision:weights={folder / 'vit'}",
    }


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2", "vision"])
def test_features_of_models(
    name: str, towers: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tastes.judged(tmp_path / "mine", 10, each=4)
    assert run("judge", "personal", data, f"features={towers[name]}", f"out={tmp_path / 'out'}") == 0
    reward = load_reward("personal", weights=tmp_path / "out")
    images, prompts = [pictures.smooth(1), pictures.smooth(2)], ["a cat", "a dog"]
    score = reward.score(images, prompts)
    assert score.isfinite().all() and score[0] != score[1]
    features = load_features(name, json.loads((tmp_path / "out/personal.json").read_text())["features"]["options"])
    assert len(features.importance(25)) == 25 and features.importance(25).square().sum() == pytest.approx(
        1 if name == "vision" else 2
    )
    assert reward.identity()["options"]["features"] == name and reward.reads == (
        () if name == "vision" else ("prompt",)
    )
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    pixels.requires_grad_(True)
    if name == "vision":
        with pytest.raises(DiffalignError, match="have no gradient"):
            reward.score_tensors(pixels, prompts)
        return
    found = reward.score_tensors(pixels, prompts)
    found.sum().backward()
    assert found.detach().numpy() == pytest.approx(score.numpy(), abs=0.05) and pixels.grad.abs().sum() > 0


def test_another_tower_is_noticed_and_a_moved_one_is_not(towers: dict[str, str], tmp_path: Path) -> None:
    clip = Path(towers["pickscore"].partition("weights=")[2])
    moved = tmp_path / "moved"
    shutil.copytree(clip, moved)
    data = tastes.judged(tmp_path / "mine", 10, each=4)
    assert run("judge", "personal", data, f"features=pickscore:weights={moved}", f"out={tmp_path / 'out'}") == 0
    moved.rename(tmp_path / "elsewhere")
    image = [pictures.smooth(1)]
    with pytest.raises(DiffalignError, match="does not exist"):
        load_reward("personal", weights=tmp_path / "out").score(image, ["a"])
    load_reward("personal", weights=tmp_path / "out", tower=tmp_path / "elsewhere").weights_id()
    other = tiny_rewards.clip_folder(tmp_path / "other", seed=4)
    with pytest.raises(DiffalignError, match="these are other ones"):
        load_reward("personal", weights=tmp_path / "out", tower=other).weights_id()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("personal.json", b"{}", "no 'format'"),
        ("personal.json", b'{"format": 9, "features": {}}', "of format 9"),
        ("personal.json", b'{"format": 1, "features": {"name": "pixels"}}', "no 'options'"),
        ("personal.safetensors", b"123", "is damaged"),
    ],
)
def test_damaged_heads(file: str, content: bytes, words: str, tmp_path: Path) -> None:
    Head(np.ones(79), np.zeros(79), np.ones(79), {"name": "pixels", "options": {}, "weights": "none"}).save(
        tmp_path / "out"
    )
    load_reward("personal", weights=tmp_path / "out")
    (tmp_path / "out" / file).write_bytes(content)
    with pytest.raises(DiffalignError, match=words):
        load_reward("personal", weights=tmp_path / "out")
    with pytest.raises(DiffalignError, match="holds no personal.json"):
        load_reward("personal", weights=tmp_path)
    with pytest.raises(DiffalignError, match="weights=FOLDER is needed"):
        load_reward("personal").score([pictures.smooth(1)], ["a"])


def test_pixel_features_by_hand() -> None:
    features = load_features("pixels", {})
    left, right = (220, 40, 40), (40, 40, 220)
    image = Image.new("RGB", (80, 40), left)
    image.paste(right, (40, 0, 80, 40))
    found = features.embed(features.prepare(image)[None], [""])[0].double().numpy()
    assert len(found) == len(features.importance(len(found))) == 79 and "pixels" in NAMES
    a, b = np.array(left) / 255, np.array(right) / 255
    assert found[:3] == pytest.approx((a + b) / 2, abs=1e-6)
    cells = found[3:51].reshape(3, 4, 4)
    assert cells[:, 2, 0] == pytest.approx((a - b) / 2, abs=1e-5)
    assert cells[:, 1, 3] == pytest.approx((b - a) / 2, abs=1e-5)
    assert found[51:54] == pytest.approx(np.abs(a - b) / 2, abs=2e-4)
    levels, hues = found[54:62], found[62:74]
    grey = np.array([0.299, 0.587, 0.114]) @ np.stack([a, b]).T * 7
    assert levels.sum() == pytest.approx(1) and levels @ np.arange(8) == pytest.approx(grey.mean(), abs=1e-5)
    chroma = 180 / 255  # red at 0 degrees, blue at 240: half of the picture each
    assert hues[0] == pytest.approx(chroma / 2, abs=1e-5) and hues[8] == pytest.approx(chroma / 2, abs=1e-5)
    assert hues[2] == pytest.approx(chroma / 4, abs=1e-5)  # 60 degrees from red, 180 from blue
    assert found[74] == pytest.approx(chroma, abs=1e-5)
    step = np.abs(np.diff(grey))[0] / 7
    assert found[76:78] == pytest.approx([step / 63, 0], abs=1e-6)
