"""`import diffalign`: light to import, the command line's code behind it, and mistakes in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffalign
from diffalign.config import TrainConfig, load_config
from diffalign.errors import DiffalignError
from diffalign.rewards import load_reward
from diffalign.stages import evaluate, sample, train
from helpers import pictures
from helpers.processes import environment
from helpers.served import Slow

SHAPE = r"image 0: shape .*; \[H, W\], \[H, W, C\] or \[C, H, W\] with 1, 3 or 4 channels"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_the_import_is_light_and_names_are_real() -> None:
    heavy = "{'torch', 'numpy', 'pyarrow', 'pydantic', 'typer', 'PIL'} & set(sys.modules)"
    code = f"import sys, diffalign; assert not {heavy}, {heavy}; print([diffalign.__version__, *dir(diffalign.api)])"
    code = code.replace("diffalign.api", "__import__('diffalign.api').api")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    for name in diffalign.__all__:
        assert getattr(diffalign, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'scores'"):
        diffalign.scores  # type: ignore[attr-defined]  # noqa: B018


# --- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "height", "width"),
    [
        (noise(20, 30, 3), 20, 30),
        (noise(3, 20, 30), 20, 30),
        (noise(20, 30), 20, 30),
        (noise(1, 20, 30), 20, 30),
        (noise(20, 30, 4), 20, 30),
        (noise(2, 20, 30, 3), 20, 30),
        (noise(3, 20, 3), 3, 20),  # both ends could be channels: last in an array ...
        (torch.from_numpy(noise(3, 20, 3)), 20, 3),  # ... and first in a tensor
        (torch.rand(2, 3, 20, 30, dtype=torch.bfloat16), 20, 30),
        ([torch.rand(20, 30), Image.new("L", (30, 20))], 20, 30),
    ],
)
def test_shapes(images: Any, height: int, width: int) -> None:
    table = diffalign.score(images, "x", rewards="helpers.counting_reward:Counting")
    assert table.failed == 0 and set(table["counting.width"]) == {float(width)}, height


def test_floats_are_rounded_to_8_bits() -> None:
    levels = noise(8, 8, 3)
    off = (levels + np.linspace(-0.4, 0.4, 8)[:, None, None]) / 255  # also a little below 0 and above 1
    table = diffalign.score([levels, off], "x", rewards="helpers.counting_reward:Counting")
    assert table["sha256"][0] == table["sha256"][1] and table["image"] == ["image 0", "image 1"]


def test_images_of_pillow_are_seen_as_files_are(tmp_path: Path) -> None:
    """Turned by EXIF, transparency on white, 16 bits, CMYK and palettes, or the same reason."""
    good, _ = pictures.hostile(tmp_path / "in")
    paths = [tmp_path / "in" / name for name in sorted(good) if "udcff" not in name]
    opened = [Image.open(path) for path in paths]
    rewards = "helpers.counting_reward:Counting"
    of_files, of_images = (diffalign.score(images, "x", rewards=rewards) for images in (paths, opened))
    assert len(paths) > 5 and of_images["counting"] == of_files["counting"]


def test_what_cannot_be_scored_has_no_number_and_a_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [noise(8, 8, 3), noise(8, 8, 3) * 1.0, np.full((8, 8), np.nan), tmp_path / "broken.png", noise(8, 8, 3)]
    prompts = ["a", "b", "c", "d", "odd"]
    table = diffalign.score(images, prompts, rewards=["helpers.counting_reward:Counting", "sharpness"])
    assert np.isfinite(table["counting"]).tolist() == [True, False, False, False, False]
    assert np.isfinite(table["sharpness"]).tolist() == [True, False, False, False, True]
    assert table.failed == 4 and table["counting.reason"][4] == "odd prompt"
    for number, words in ((1, "float pixels from 0 to 249"), (2, "NaN"), (3, "not an image of a known format")):
        assert words in table["reason"][number]
    shown = repr(table)
    assert "5 images" in shown and "not scored: image 1: float pixels" in shown and "1 of 5" in shown
    assert len(table.rows) == 5 and "counting.identity" not in table


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": noise(8, 8, 2)}, SHAPE),
        ({"images": noise(2, 8, 8, 5)}, SHAPE),
        ({"images": noise(8, 8, 3).astype(np.int64)}, "image 0: pixels are int64; uint8, or float from 0 to 1"),
        ({"images": [noise(8, 8), 3]}, "image 1: int is no image; give a path"),
        ({"images": []}, "images: none is given"),
        ({"images": None}, "image 0: NoneType is no image; give a path"),
        ({"images": b"P6 1 1 255"}, "image 0: bytes is no image; give a path"),
        ({"images": {"a": noise(8, 8, 3)}}, "image 0: dict is no image; give a path"),
        ({"images": ""}, "an image source is empty; name a file or folder"),
        ({"images": torch.zeros(3, 8, 8, device="meta")}, "image 0: a tensor on device meta or a sparse one"),
        ({"images": torch.zeros(3, 8, 8).to_sparse()}, "image 0: a tensor on device meta or a sparse one"),
        ({"images": "nowhere/"}, "nowhere/: no such file or folder"),
        ({"prompts": ["a", "b"]}, "prompts: 2 for 1 image;"),
        ({"prompts": 5}, "prompts: int is no list; give a list with one text for each image"),
        ({"prompts": [5]}, "prompts: that of image 0 is int; give a text"),
        ({"metadata": []}, "metadata: 0 for 1 image;"),
        ({"metadata": "x"}, "metadata: str is no list; give a list with one mapping for each image"),
        ({"metadata": ["x"]}, "metadata: that of image 0 is str; give a mapping"),
        ({"rewards": []}, "rewards: none is given"),
        ({"rewards": None}, "rewards: NoneType is no reward"),
        ({"rewards": [5]}, "rewards: int is no reward"),
        ({"batch_size": 0}, "batch_size: 0; give a whole number of at least 1"),
        ({"batch_size": "x"}, "batch_size: 'x'; give a whole number"),
        ({"workers": 0}, "workers: 0; give a whole number"),
        ({"rewards": "sharpnes"}, "did you mean 'sharpness'"),
        ({"rewards": {"weights": "x"}}, "has no name; write"),
        ({"rewards": {"name": "sharpness", "wide": 1}}, "reward sharpness: unknown option 'wide'"),
        ({"rewards": ["sharpness", "sharpness"]}, "^rewards: two are called 'sharpness'"),
        ({"rewards": "a b=sharpness"}, "^rewards 'a b=sharpness': write NAME"),
        ({"rewards": "sharpness:wide"}, "^rewards 'sharpness:wide': option 'wide' is not key=value"),
        (
            {"rewards": {"name": "sharpness", "label": "prompt"}},
            "^rewards 'sharpness': prompt is a column of every table",
        ),
        ({"prompts": None, "rewards": "pickscore"}, "pickscore: no image has a prompt; give prompts="),
        ({"device": "tpu"}, "device tpu: unknown; one of auto, cpu, cuda"),
        ({"output": "x.txt"}, "^output x.txt: unknown suffix"),
        ({"output": ""}, "a folder; name a file"),
    ],
)
def test_mistakes_are_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(DiffalignError, match=said):
        diffalign.score(**{"images": noise(8, 8, 3), "prompts": "x", "rewards": "sharpness"} | given)


@pytest.mark.parametrize("prompts", ["abc", ["a"], ["a", "b", "c", "d"], []])
def test_a_reward_wants_one_prompt_for_each_image(prompts: Any) -> None:
    reward = diffalign.load_reward("sharpness")
    with pytest.raises(DiffalignError, match="for 3 images; give a list with one for each image"):
        reward.score([Image.new("RGB", (8, 8))] * 3, prompts)


# --- rewards and files -----------------------------------------------------------------------------------------


def test_rewards_by_text_section_and_object() -> None:
    rewards = [
        "jpeg_compressibility",
        {"name": "jpeg_compressibility", "label": "own", "options": {"quality": 50}},
        {"name": "jpeg_compressibility", "label": "flat", "quality": 50},
        load_reward("sharpness"),
    ]
    table = diffalign.score(noise(32, 32, 3), rewards=rewards)
    assert table.labels == ["jpeg_compressibility", "own", "flat", "sharpness"]
    assert table["own"] == table["flat"] != table["jpeg_compressibility"]
    built = diffalign.load_reward({"name": "jpeg_compressibility"}, quality=50)
    assert built.score([Image.fromarray(noise(32, 32, 3))], ["x"]).tolist() == table["own"]
    geneval = diffalign.load_reward("geneval", detector="shapes")  # resolved as by the command
    assert type(geneval.detector).__name__ == "ShapeDetector"  # type: ignore[attr-defined]


def test_a_built_reward_that_is_alone_stays_loaded() -> None:
    """Else a loop over batches would load its weights again for each."""
    reward = Slow(2.0)
    assert diffalign.score(noise(8, 9, 3), "x", rewards=reward)["slow"] == [18.0]
    assert reward.loaded == {2.0}
    diffalign.score(noise(8, 9, 3), "x", rewards=[reward, "sharpness"])
    assert reward.loaded == set()


def test_the_output_is_that_of_the_command_and_is_read_again(tmp_path: Path) -> None:
    pictures.folder(tmp_path / "in", 3)
    out = tmp_path / "scores.jsonl"
    first = diffalign.score(tmp_path / "in", "x", rewards="sharpness", output=out)
    kept = out.read_bytes()
    counted = diffalign.score([noise(8, 8, 3)], "x", rewards="sharpness", output=out)
    assert len(out.read_text().splitlines()) == 4 and len(counted["image"]) == 1  # rows of other images stay
    again = diffalign.score(tmp_path / "in", "x", rewards="sharpness", output=out)
    assert again["sharpness"] == first["sharpness"] and out.read_bytes().startswith(kept[:100])


def test_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pytest.importorskip("pandas")
    table = diffalign.score(noise(2, 8, 8, 3), "x", rewards="sharpness")
    made = table.to_pandas()
    assert isinstance(made, frame.DataFrame) and list(made["sharpness.reason"]) == ["", ""]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DiffalignError, match="pandas is not installed; pip install pandas"):
        table.to_pandas()


# --- train, sample, evaluate -----------------------------------------------------------------------------------


def test_stages_get_the_config_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(train, "train", lambda config, dry_run: calls.append((config, dry_run)))
    monkeypatch.setattr(sample, "sample", lambda config, images: calls.append((config, images)))
    monkeypatch.setattr(evaluate, "evaluate", lambda config: calls.append((config, None)) or {"scores": {}})
    run = diffalign.train("shapes_sd3_dpo", data="d", run_dir=tmp_path / "r", train={"steps": 7}, seed=3, dry_run=True)
    by_words = load_config("shapes_sd3_dpo", ["data.path=d", f"run_dir={tmp_path}/r", "train.steps=7", "seed=3"])
    assert run == tmp_path / "r" and calls[0] == (by_words, True)
    assert diffalign.train(by_words) == run and calls[1] == (by_words, False)

    (tmp_path / "s.yaml").write_text("model: {path: shapes-sd3}\nprompts: testbed:test\nout: o\n")
    assert diffalign.sample(tmp_path / "s.yaml", n=2, weights=None, images="plain") == Path("o")
    assert calls[2][0].n == 2 and calls[2][1] == Path("plain")

    run.mkdir()
    (run / "config.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {path: d}\n")
    assert diffalign.evaluate(run, prompts="p.txt", reward={"name": "hpsv2", "options": {"release": "2.0"}}) == {
        "scores": {}
    }
    evaluated = calls[3][0]
    assert evaluated.weights == run / "weights" and evaluated.reward.options == {"release": "2.0"}


def test_mistakes_in_a_config() -> None:
    with pytest.raises(DiffalignError, match="unknown key train.stepz; did you mean steps"):
        diffalign.train("sdxl_dpo", train={"stepz": 3})
    with pytest.raises(
        DiffalignError, match="dict is no config of `diffalign train`; give a file, a recipe or a config"
    ):
        diffalign.train({"train": {}})  # type: ignore[arg-type]
    given = TrainConfig.model_validate({"run_dir": "r", "model": {"path": "m"}, "data": {"path": "d"}})
    with pytest.raises(DiffalignError, match="seed=3: a config is given; change it with model_copy"):
        diffalign.train(given, seed=3)
