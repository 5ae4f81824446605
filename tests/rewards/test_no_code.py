"""No code from a model's folder is run or asked for: not even on a terminal where somebody answers "y"."""

from __future__ import annotations

import json
import os
import pty
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.rewards.judge import load_judge
from helpers import tiny_rewards, tiny_vlm
from helpers.learned_inputs import IMAGES, PROMPTS

CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoTokenizer",
    "AutoImageProcessor",
)


def on_a_terminal(action: Callable[[], object]) -> str:
    """Run an action in a forked process that has a terminal, type "y" there; return what it wrote, and its error."""
    child, terminal = pty.fork()
    if child == 0:
        sys.stdin, sys.stdout = open(0), open(1, "w", buffering=1)  # noqa: SIM115 (until the process ends)
        sys.stderr = sys.stdout
        try:
            action()
            print("DONE")
        except DiffalignError as error:
            print("REFUSED", error)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.write(terminal, b"y\ny\ny\n")
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # Linux says so when the child has closed its side
        pass
    os.waitpid(child, 0)
    os.close(terminal)
    return written.decode()


def infect(folder: Path, config: str) -> None:
    """Let a config of the folder name a module beside it, which leaves a file where it is imported."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    path = folder / config
    content = json.loads(path.read_text()) if path.is_file() else {}
    content["auto_map"] = dict.fromkeys(CLASSES, "evil.Evil")
    if config == "config.json":
        content["model_type"] = "evil"
    else:
        content |= {"processor_class": "EvilProcessor", "tokenizer_class": "Evil", "image_processor_type": "Evil"}
    path.write_text(json.dumps(content))


def score(name: str, option: str, folder: Path, **options: object) -> object:
    return load_reward(name, **{option: folder}, **options).score(IMAGES[:1], PROMPTS[:1])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole folders beside which an infected one is tried."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_rewards.clip_folder(folder / "clip")
    tiny_rewards.imagereward_checkpoint(folder / "blip")
    tiny_rewards.aesthetic_head(folder / "head.pth", 24)
    return folder


LOADERS: dict[str, Callable[[Path, Path], object]] = {
    "vqascore": lambda folder, _: score("vqascore", "weights", folder),
    "unifiedreward": lambda folder, _: score("unifiedreward", "weights", folder),
    "zreward": lambda folder, _: score("zreward", "weights", folder),
    "judge": lambda folder, _: load_judge(folder),
    "pickscore": lambda folder, _: score("pickscore", "weights", folder),
    "pickscore's tokenizer": lambda folder, whole: score("pickscore", "tokenizer", folder, weights=whole / "clip"),
    "imagereward's tokenizer": lambda folder, whole: score("imagereward", "tokenizer", folder, weights=whole / "blip"),
    "aesthetic's CLIP": lambda folder, whole: score("aesthetic", "clip", folder, weights=whole / "head.pth"),
    "hpsv3's base": lambda folder, whole: score("hpsv3", "base", folder, weights=whole / "head.pth"),
    "geneval's detector": lambda folder, whole: load_reward(
        "geneval", weights=folder, clip=whole / "clip"
    ).detector.detect(IMAGES[:1]),
}


@pytest.mark.parametrize("config", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("loader", LOADERS)
def test_code_is_refused_on_a_terminal(loader: str, config: str, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if loader in ("vqascore", "unifiedreward", "zreward", "judge", "hpsv3's base"):
        tiny_vlm.qwen_folder(folder)
    else:
        tiny_rewards.clip_folder(folder)
    infect(folder, config)
    written = on_a_terminal(lambda: LOADERS[loader](folder, weights))
    assert not (folder / "ran").exists() and "[y/N]" not in written
    lines = [line for line in written.splitlines() if line.strip() and line.strip() != "y"]
    assert len(lines) == 1 and lines[0].startswith("REFUSED"), written
    assert f"{config} names code of its own (auto_map)" in lines[0]


def test_kernels_of_the_hub_are_refused(tmp_path: Path) -> None:
    folder = tiny_rewards.clip_folder(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        config["text_config"][key] = "somebody/kernel"
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(DiffalignError, match=rf"config\.json names code of its own \({key}\)"):
            score("pickscore", "weights", folder)
        config["text_config"][key] = "eager"
    (folder / "config.json").write_text(json.dumps(config))
    score("pickscore", "weights", folder)
