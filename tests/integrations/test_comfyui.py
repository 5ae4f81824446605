"""The ComfyUI node, called as ComfyUI calls nodes by its documented interface."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.errors import DiffalignError
from diffalign.rewards import REWARDS, load_reward
from helpers import pictures

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="integrations/ is in a checkout only")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """The folder, loaded as ComfyUI loads a folder of custom_nodes: a package under the name of its path."""
    name = str(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def run(module: ModuleType, node: Any = None, **inputs: Any) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Check a node's declarations and inputs as ComfyUI does, call its FUNCTION, and return what it shows and gives."""
    (kind,) = module.NODE_CLASS_MAPPINGS.values()
    declared = kind.INPUT_TYPES()
    assert set(declared) <= {"required", "optional", "hidden"} and set(declared["required"]) <= set(inputs)
    every = {**declared["required"], **declared["optional"]}
    for name, value in inputs.items():
        what = every[name][0]
        if isinstance(what, list):
            assert value in what
        else:
            assert isinstance(value, {"IMAGE": torch.Tensor, "STRING": str}[what])
    found = getattr(node or kind(), kind.FUNCTION)(**inputs)
    assert len(found["result"]) == len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES) and kind.OUTPUT_NODE
    for value, what in zip(found["result"], kind.RETURN_TYPES, strict=True):
        assert isinstance(value, {"IMAGE": torch.Tensor, "FLOAT": float, "STRING": str}[what])
    return found["ui"], found["result"]


def batch(count: int = 3) -> torch.Tensor:
    """Images of rising sharpness as ComfyUI has them: float [B, H, W, C] in [0, 1]."""
    images = []
    for i in range(count):
        noise = np.random.default_rng(i).normal(0, 4 * i, (40, 48, 3))
        images.append(torch.from_numpy(np.clip(np.asarray(pictures.smooth(i, 48, 40)) + noise, 0, 255)).float() / 255)
    return torch.stack(images)


def test_scores_are_those_of_the_reward(module: ModuleType) -> None:
    images = batch()
    shown, (best, score, text) = run(module, images=images, prompt="a cat", reward="sharpness")
    from PIL import Image

    same = [Image.fromarray((one * 255).round().byte().numpy()) for one in images]
    wanted = load_reward("sharpness").score(same, ["a cat"] * 3).tolist()
    assert [float(line) for line in text.splitlines()] == pytest.approx(wanted, rel=1e-5) and shown == {"text": [text]}
    assert score == max(wanted) and torch.equal(best, images[wanted.index(score)][None])


def test_every_reward_is_offered_under_its_name(module: ModuleType) -> None:
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)
    (kind,) = module.NODE_CLASS_MAPPINGS.values()
    names, settings = kind.INPUT_TYPES()["required"]["reward"]
    assert names == sorted(REWARDS) and settings["default"] in names


def test_options_and_a_second_call(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (kind,) = module.NODE_CLASS_MAPPINGS.values()
    node, inputs = kind(), {"images": batch(), "prompt": "", "reward": "jpeg_compressibility"}
    _, (_, first, _) = run(module, node, options="quality=50", **inputs)
    held = node._built[1]
    run(module, node, options="quality=50", **inputs)
    assert node._built[1] is held
    _, (_, other, _) = run(module, node, options="quality=95", **inputs)
    assert first > other and node._built[1] is not held
    with pytest.raises(DiffalignError, match="did you mean 'quality'"):
        run(module, node, options="qualty=9", **inputs)


def test_an_image_without_a_score_is_never_the_best(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(REWARDS["sharpness"]):  # type: ignore[misc]
        lost = (2,)

        def score(self, images: list[Any], prompts: list[str], metadata: Any = None) -> torch.Tensor:
            self.reasons = ["too sharp" if i in self.lost else "" for i in range(len(images))]
            return torch.tensor([math.nan if i in self.lost else float(i) for i in range(len(images))])

    monkeypatch.setitem(REWARDS, "sharpness", Picky)
    images = batch()
    _, (best, score, text) = run(module, images=images, prompt="", reward="sharpness")
    assert score == 1.0 and torch.equal(best, images[1:2]) and text == "0\n1\nno score: too sharp"
    monkeypatch.setattr(Picky, "lost", (0, 1, 2))
    with pytest.raises(ValueError, match="no image has a score: too sharp"):
        run(module, images=images, prompt="", reward="sharpness")
    with pytest.raises(ValueError, match="pickscore: no prompt"):
        run(module, images=images, prompt=" ", reward="pickscore")
