"""`diffalign data inspect`, the contact sheet, and `diffalign cache`, through the command line."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign import files
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow
from diffalign.data.writer import ImageWriter, png_bytes, write_groups
from diffalign.stages import data
from helpers.command_line import run

EVIL = '<script>alert("x")</script> & "a dog"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two groups of three; one prompt is hostile, one picture is cut short."""
    out = tmp_path / "data"
    rng = np.random.default_rng(0)
    with ImageWriter(out) as writer:
        for group in ("a", "b"):
            for k in range(3):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                data = png_bytes(image)[:99] if (group, k) == ("b", 1) else png_bytes(image)
                writer.write(group, k, data, "m", k, {})
    rows = [
        {
            "group_id": g,
            "prompt_id": PromptRow(p).prompt_id,
            "prompt": p,
            "preference": v,
            "split": "train",
            "metadata": {},
        }
        for g, p, v in (("a", EVIL, [0.5, 0.0, 1.0]), ("b", "two cats", [0.5, 0.5, 0.5]))
    ]
    write_groups(out, rows)
    return out


def test_inspect_and_the_contact_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "inspect", folder, "--html", tmp_path / "sheet.html") == 0
    said = capsys.readouterr().out
    assert re.search(r"groups +2\n", said)
    assert re.search(r"sizes +32x32: 5, unreadable: 1", said)
    assert re.search(r"ranked +2 groups, 1 without a preference", said)
    assert re.search(r"tied pairs +50\.0%", said)
    html = (tmp_path / "sheet.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "http" not in html.replace("http-equiv", "")
    assert html.count("data:image/png") == 5
    assert "unreadable" in html
    assert "no preference" in html
    first = html[html.index("alert") : html.index("two cats")]
    assert re.findall(r"<b>([\d.]+)</b><span class=\"note\">#(\d)", first) == [
        ("1.00", "2"),
        ("0.50", "0"),
        ("0.00", "1"),
    ]


class Encoder:
    """What the cache needs of a backbone: 8 x 8 pixels a latent, prompts of five numbers."""

    default_resolution, pixel_multiple, vae_scale_factor, latent_channels, max_side = 32, 8, 8, 3, None

    def fingerprint(self) -> str:
        return "weights"

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8)

    longest = 77

    def count_cut(self, prompts: list[str]) -> int:
        return 0

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.ones(len(prompts), 5)}

    def encode_unconditional(self) -> dict[str, torch.Tensor]:
        return self.encode_prompts([""])


def test_the_cache_ahead_of_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "open_backbone", lambda *_: Encoder())
    write_groups(folder, [PreferenceDataset(folder).group(0)])
    (tmp_path / "c.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\ndevice: cpu\nmodel: {{path: m}}\ndata: {{path: {folder}, resolution: 32}}\n"
    )
    assert run("cache", tmp_path / "c.yaml", "--dry-run") == 0
    size = float(capsys.readouterr().out.split("cache: ")[1].split()[0]) * 1e9
    assert size == pytest.approx(2 * (3 * 3 * 4 * 4 + 2 * 5), rel=0.01)  # float16: three latents; one prompt and none
    assert not (folder / "cache").exists()
    assert run("cache", tmp_path / "c.yaml") == 0
    tensors = [value for path in (folder / "cache").rglob("*.safetensors") for value in load_file(path).values()]
    assert sum(value.nbytes for value in tensors) == pytest.approx(size, rel=0.01)
    capsys.readouterr()
    assert run("cache", tmp_path / "c.yaml") == 0 and "complete" in capsys.readouterr().out
    shutil.rmtree(folder / "cache")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(1000, 999, 1))
    assert run("cache", tmp_path / "c.yaml", "--dry-run") == 2
    assert "are needed, 1e-09 GB are free" in capsys.readouterr().err
