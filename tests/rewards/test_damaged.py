"""Damaged, foreign and hostile files where a reward's weights should be: one line each, and nothing else on the terminal."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.rewards import load_reward
from helpers import tiny_rewards, tiny_vlm
from helpers.learned_inputs import IMAGES, PROMPTS
from helpers.refusals import refused


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def saved(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "empty": raw(b""),
    "cut": half,
    "zeros": raw(bytes(4096)),
    "junk": raw(bytes(range(256)) * 40),
    "text": raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    "html": raw(b"<!doctype html><title>404</title>"),
    "pickle": raw(pickle.dumps({"a": 1})),
    "code": raw(pickle.dumps(Evil())),
    "code in torch's format": saved({"state_dict": Evil()}),
    "integer keys": saved({"state_dict": {1: torch.ones(2)}}),
    "a list": saved([torch.ones(2)]),
    "a tensor": saved(torch.ones(2)),
    "nothing": saved({}),
    "other tensors": saved({"state_dict": {"a": torch.ones(2)}}),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoints(
    damage: str, suffix: str, hps: tuple[Path, dict], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        shutil.copy(hps[0], path)
    else:
        save_file(hps[1], path)
    CHECKPOINTS[damage](path)

    def score() -> object:
        return load_reward("hpsv2", weights=path, architecture="tiny-hps").score(IMAGES[:1], PROMPTS[:1])

    refused(score, capfd, str(path))
    assert not Path("ran").exists()


def test_shapes_of_another_model(hps: tuple[Path, dict], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = {name: value[..., :-1] if value.ndim > 1 else value for name, value in hps[1].items()}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    refused(
        lambda: load_reward("hpsv2", weights=tmp_path / "w.pt", architecture="tiny-hps").score(IMAGES[:1], PROMPTS[:1]),
        capfd, "does not fit the model",
    )  # fmt: skip
    tiny_rewards.aesthetic_head(tmp_path / "head.pth", 7)
    folder = tiny_rewards.clip_folder(tmp_path / "clip")
    refused(
        lambda: load_reward("aesthetic", weights=tmp_path / "head.pth", clip=folder).score(IMAGES[:1], PROMPTS[:1]),
        capfd, "does not fit the model",
    )  # fmt: skip


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return damage


def config(**changes: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        for part in (content, content.get("text_config", {})):
            part.pop("layer_types", None)  # it follows the number of layers
            part.update({key: value for key, value in changes.items() if key in part})
        path.write_text(json.dumps(content))

    return damage


def written(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def index(names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        keys = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        content = {"metadata": {}, "weight_map": dict.fromkeys(keys, names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty weights": (written("model.safetensors", ""), "is damaged or no safetensors file"),
    "cut weights": (lambda folder: half(folder / "model.safetensors"), "is damaged or no safetensors file"),
    "junk weights": (written("model.safetensors", "junk" * 99), "is damaged or no safetensors file"),
    "no tensors": (tensors(lambda _: {}), "tensors are missing"),
    "one is missing": (tensors(lambda state: dict(list(state.items())[1:])), "1 tensor is missing; first"),
    "renamed": (tensors(lambda state: {f"x{k}": v for k, v in state.items()}), "tensors are missing; first"),
    "misshapen": (
        tensors(lambda state: {k: v[:-1].clone() if v.ndim == 2 else v for k, v in state.items()}),
        "tensors are of another shape; first",
    ),
    "no layers": (config(num_hidden_layers=0), "left over, so the config describes another model"),
    "fewer layers": (config(num_hidden_layers=1), "left over, so the config describes another model"),
    "minus one layers": (config(num_hidden_layers=-1), ""),
    "more layers": (config(num_hidden_layers=3), "tensors are missing; first"),
    "text for a number": (config(hidden_size="wide"), "cannot be loaded as"),
    "width 0": (config(hidden_size=0), ""),
    "a list for a config": (written("config.json", "[]"), ""),
    "half a config": (written("config.json", '{"model_type": '), "config.json is not valid JSON"),
    "a deep config": (written("config.json", "[" * 99999), "config.json is not valid JSON"),
    "an unknown kind": (written("config.json", '{"model_type": "nothing"}'), ""),
    "an index of a pickle": (index("pytorch_model.bin"), "only .safetensors files beside it are read"),
    "an index of a file elsewhere": (index("../other.safetensors"), "only .safetensors files beside it are read"),
    "an index of a system file": (index("../../../../etc/passwd"), "only .safetensors files beside it are read"),
    "an index of nothing": (index("gone.safetensors"), "names gone.safetensors, which is missing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("folders")
    return {
        "pickscore": tiny_rewards.clip_folder(folder / "clip"),
        "vqascore": tiny_vlm.qwen_folder(folder / "qwen"),
    }


@pytest.mark.parametrize("name", ["pickscore", "vqascore"])
@pytest.mark.parametrize("damage", FOLDERS)
def test_folders(
    name: str, damage: str, folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders[name], folder)
    change, words = FOLDERS[damage]
    change(folder)
    refused(lambda: load_reward(name, weights=folder).score(IMAGES[:1], PROMPTS[:1]), capfd, words, str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 99999, "\0", '{"tokenizer_class": 3}'])
def test_processors(content: str, folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["vqascore"], folder)
    (folder / "tokenizer.json").write_text(content)
    refused(lambda: load_reward("vqascore", weights=folder).score(IMAGES[:1], PROMPTS[:1]), capfd, str(folder))
    refused(lambda: load_reward("zreward", weights=folder).score(IMAGES[:1], PROMPTS[:1]), capfd, str(folder))
