"""Weights of learnt rewards: missing, broken, of an older kind, and their identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.rewards import REWARDS, Reward, load_reward
from helpers import tiny_rewards
from helpers.learned_inputs import IMAGES, PROMPTS


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
    assert words in str(told.value) and f"name the copy: {name}:weights=PATH" in str(told.value)
    assert "\n" not in str(told.value) and "nowhere" in str(told.value)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("imagereward", ("weights",), "google-bert/bert-base-uncased|imagereward:tokenizer=PATH"),
        ("aesthetic", ("weights",), "openai/clip-vit-large-patch14|aesthetic:clip=PATH"),
        ("hpsv3", ("weights",), "Qwen/Qwen2-VL-7B-Instruct|hpsv3:base=PATH"),
        ("geneval", ("weights",), "openai/clip-vit-large-patch14|geneval:clip=PATH"),
        ("geneval", (), "facebook/mask2former-swin-small-coco-instance|geneval:weights=PATH"),
    ],
)
def test_so_are_the_parts_beside_the_weights(
    name: str, given: tuple[str, ...], words: str, blip: tuple[Path, dict], clip: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before anything is scored, and with the option that gives that part."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    local = {"imagereward": blip[0] / "ImageReward.pt", "geneval": clip}.get(name, tmp_path / "any.pt")
    (tmp_path / "any.pt").write_bytes(b"any")
    with pytest.raises(DiffalignError) as told:
        load_reward(name, **dict.fromkeys(given, local)).identity()
    assert all(word in str(told.value) for word in words.split("|")), told.value


def test_a_tokenizer_does_not_bring_its_models_weights(
    blip: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str]] = {}

    def download(repo: str, *, revision: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.setdefault(repo, []).extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "any.pt").write_bytes(b"any")
    load_reward("imagereward", weights=blip[0]).identity()
    load_reward("hpsv3", weights=tmp_path / "any.pt").identity()
    load_reward("pickscore").identity()
    assert set(asked) == {
        "google-bert/bert-base-uncased", "Qwen/Qwen2-VL-7B-Instruct", "yuvalkirstain/PickScore_v1",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    }  # fmt: skip
    assert [repo for repo, wanted in asked.items() if "*.safetensors" in wanted] == ["yuvalkirstain/PickScore_v1"]
    # A repository without safetensors is asked for its older checkpoint.
    assert [repo for repo, wanted in asked.items() if "pytorch_model*.bin" in wanted] == ["yuvalkirstain/PickScore_v1"]


def test_folders_of_an_older_kind_and_broken_ones(clip: Path, rewards: dict[str, Reward], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(clip / "model.safetensors")
    for part in clip.iterdir():
        if part.suffix != ".safetensors":
            (tmp_path / part.name).write_bytes(part.read_bytes())

    def score() -> torch.Tensor:
        return load_reward("pickscore", weights=tmp_path).score(IMAGES[:1], PROMPTS[:1])

    with pytest.raises(DiffalignError, match="cannot be loaded as CLIPModel: .*no file named model.safetensors"):
        score()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.equal(score(), rewards["pickscore"].score(IMAGES[:1], PROMPTS[:1]))
    torch.save({"x": Path}, tmp_path / "pytorch_model.bin")  # a pickle of something that is no tensor
    with pytest.raises(DiffalignError, match="cannot be loaded as CLIPModel"):
        score()
    (tmp_path / "pytorch_model.bin").unlink()
    state.pop("logit_scale")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DiffalignError, match="does not fit CLIPModel: 1 tensor is missing; first logit_scale"):
        score()


def test_wrong_weights_are_named(clip: Path, hps: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="does not exist; it should be HPS_v2.1_compressed.pt of xswu/HPSv2"):
        load_reward("hpsv2", weights=tmp_path).identity()
    with pytest.raises(DiffalignError, match="holds no model; it should be a folder with the files of yuvalkirstain"):
        load_reward("pickscore", weights=tmp_path).identity()
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
    asked = {"url": "http://localhost:9/v1", "model": "any"}
    needed = {"vlm_judge": asked, "group_judge": asked}
    for name, kind in REWARDS.items():
        if not kind.differentiable and name not in ("geneval", "remote"):  # a served reward is asked first
            with pytest.raises(DiffalignError, match="is not differentiable"):
                load_reward(name, **needed.get(name, {})).score_tensors(torch.rand(1, 3, 8, 8), ["x"])
