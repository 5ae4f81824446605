"""Transparent pixels show white to whoever reads an image: score, datasets, training and judges, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.cache import plan_cache
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.imported import ImportedGroup, write_imported
from diffalign.data.score import score_images
from diffalign.files.images import decode
from diffalign.judge.forward import open_image
from diffalign.report.contact_sheet import small_picture
from diffalign.rewards import load_reward
from diffalign.stages.score import ScoreRequest, score
from helpers import pictures
from helpers.small_datasets import Encoder, quiet, settings

SIDE = 16
FLAT = np.full((SIDE, SIDE, 3), 255, np.uint8)
FLAT[:, : SIDE // 2] = (200, 40, 90)
GREY = np.where(np.arange(SIDE)[None, :, None] < SIDE // 2, 77, 255).astype(np.uint8).repeat(SIDE, 0).repeat(3, 2)


def layered(mode: str, hidden: int) -> Image.Image:
    """The left half opaque; the right half transparent over the value `hidden`, which nobody should see."""
    flat = GREY if mode.startswith("L") else FLAT
    colours = flat[..., :1] if mode.startswith("L") else flat
    alpha = np.zeros((SIDE, SIDE, 1), np.uint8)
    alpha[:, : SIDE // 2] = 255
    values = np.where(alpha > 0, colours, np.uint8(hidden))
    return Image.fromarray(np.concatenate([values, alpha], -1), mode)


def palette(hidden: int) -> Image.Image:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([200, 40, 90, hidden, hidden, hidden, 5, 5, 5])
    image.paste(0, (0, 0, SIDE // 2, SIDE))
    return image


def keyed(hidden: int) -> bytes:
    """A PNG of three channels in which one colour stands for transparency."""
    values = FLAT.copy()
    values[:, SIDE // 2 :] = hidden
    return pictures.encoded(Image.fromarray(values), "PNG", transparency=(hidden,) * 3)


CASES = {
    "RGBA png": lambda hidden: pictures.encoded(layered("RGBA", hidden), "PNG"),
    "LA png": lambda hidden: pictures.encoded(layered("LA", hidden), "PNG"),
    "palette png, one index": lambda hidden: pictures.encoded(palette(hidden), "PNG", transparency=1),
    "palette png, an alpha for each": lambda hidden: pictures.encoded(
        palette(hidden), "PNG", transparency=b"\xff\x00\xff"
    ),
    "RGB png with a colour key": keyed,
    "RGBA webp": lambda hidden: pictures.encoded(layered("RGBA", hidden), "WEBP", lossless=True, exact=True),
    "gif": lambda hidden: pictures.encoded(palette(hidden), "GIF", transparency=1),
    "RGBA tiff": lambda hidden: pictures.encoded(layered("RGBA", hidden), "TIFF"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_hidden_has_no_effect(name: str) -> None:
    for hidden in (0, 7, 128, 254):
        assert (np.asarray(decode(CASES[name](hidden))) == (GREY if name.startswith("LA") else FLAT)).all()


@pytest.mark.parametrize("name", CASES)
def test_white_for_every_reader(tmp_path: Path, name: str) -> None:
    data, flat = CASES[name](7), GREY if name.startswith("LA") else FLAT
    same = pictures.encoded(Image.fromarray(flat), "PNG")
    assert (np.asarray(decode(data)) == flat).all()
    # score, from a file
    for folder, content in (("in", data), ("flat", same)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(content)
        assert score(ScoreRequest([str(tmp_path / folder)], ["sharpness"], output=tmp_path / f"{folder}.jsonl")) == 0
    rows = [json.loads((tmp_path / f"{folder}.jsonl").read_text()) for folder in ("in", "flat")]
    assert rows[0]["sharpness"] == rows[1]["sharpness"]
    # a dataset, its scores, its contact sheet, and what training encodes
    found = []
    for folder, content in (("data", data), ("other", same)):
        write_imported([ImportedGroup("p", (content, same), (1.0, 0.0), "x")], tmp_path / folder)
        dataset = PreferenceDataset(tmp_path / folder)
        score_images(dataset, load_reward("sharpness"))
        (image, _) = dataset.images(dataset.column("group_id")[0])
        assert (np.asarray(image.decode()) == flat).all()
        latents = plan_cache(settings(cache="off"), dataset, [0], 2, Encoder()).latents(quiet).batch([0])[0]
        found.append((list(dataset.scores("sharpness").values()), small_picture(image.decode()), latents))
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])
    # a judge
    assert (np.asarray(open_image(tmp_path / "in" / "a.png")) == flat).all()
