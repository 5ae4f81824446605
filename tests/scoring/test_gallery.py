"""The gallery's file: what it holds, where its thumbnails lie, and what it links. tests/browser/ has what it does."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.scoring import thumbnails
from diffalign.scoring.gallery import link_to, shown_name, write_gallery
from diffalign.scoring.items import FileOrigin, Item
from diffalign.scoring.run import Scores
from helpers import pictures
from helpers.page import Tags

EVIL = '</script><script>alert("x")</script> "a\' onerror=alert(1)'


def scored(folder: Path, count: int, prompt: str = "a cat") -> Scores:
    """Scores of `count` noisy images in a folder; the last has none."""
    folder.mkdir(parents=True, exist_ok=True)
    items, rows = [], []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (300, 300, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg", quality=70)
        items.append(Item(f"{folder.as_posix()}/{i}.jpg", f"{i}.jpg", FileOrigin(folder / f"{i}.jpg"), prompt))
        value = math.nan if i == count - 1 else i / 3
        rows.append({"image": items[i].name, "reason": "", "r": value, "r.reason": "" if i < count - 1 else EVIL})
    return Scores(rows, {"r": ("r",)}, items=items)


def images(page: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Tags(page.read_text()).scripts[0])["images"]
    return found


def test_only_our_script_may_run(tmp_path: Path) -> None:
    """The policy has the hash of the one script, so none runs that a prompt brought, and nothing is fetched."""
    write_gallery(tmp_path / "p.html", scored(tmp_path / "in", 3, EVIL))
    html = (tmp_path / "p.html").read_text()
    page = Tags(html)
    assert [name for name, _ in page.tags].count("script") == 2 and EVIL not in html
    policy = next(a["content"] or "" for _, a in page.tags if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "eval" not in policy
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search(r"url\(|@import|https?://", html)
    (first, *_, last) = images(tmp_path / "p.html")
    assert first["prompt"] == EVIL and first["values"] == [0.333333333] and last["values"] == [None]
    assert last["reason"] == EVIL


def test_thumbnails_of_many_lie_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "INSIDE", 5)
    monkeypatch.setattr(thumbnails, "BESIDE", 12 * 4000)
    page, beside = tmp_path / "my page.html", tmp_path / "my page_thumbnails"
    write_gallery(page, scored(tmp_path / "in", 5))
    assert not beside.exists() and all(i["thumbnail"].startswith("data:image/jpeg") for i in images(page))
    write_gallery(page, scored(tmp_path / "in", 12))
    (beside / "mine.txt").write_text("mine")
    files = sorted(beside.glob("*.webp"))
    assert len(files) == 12 and all(file.stat().st_size <= 4000 for file in files)
    assert {f"my%20page_thumbnails/{file.name}" for file in files} == {i["thumbnail"] for i in images(page)}
    with Image.open(files[0]) as one:
        assert one.format == "WEBP" and max(one.size) < 256  # noise has to shrink
    # Of a page that is written again only its own thumbnails stay, and nobody else's file goes.
    write_gallery(page, scored(tmp_path / "in", 7))
    assert len(list(beside.glob("*.webp"))) == 7 and (beside / "mine.txt").read_text() == "mine"
    write_gallery(page, scored(tmp_path / "in", 3))
    assert [file.name for file in beside.iterdir()] == ["mine.txt"]


def test_a_link_in_the_place_of_the_thumbnails_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "INSIDE", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "p_thumbnails").symlink_to(tmp_path / "mine")
    with pytest.raises(DiffalignError, match="p_thumbnails: a link"):
        write_gallery(tmp_path / "p.html", scored(tmp_path / "in", 2))
    assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "p.html").exists()


@pytest.mark.parametrize(
    ("name", "key", "shown"),
    [
        ("samples/a/0.png", "a/0.png", "samples/a/0.png"),
        ("/home/me/samples/a/0.png", "a/0.png", "samples/a/0.png"),
        ("/home/me/samples/a.tar#x/0.png", "a.tar#x/0.png", "samples/a.tar#x/0.png"),
        ("/home/me/0.png", "0.png", "0.png"),
        ("/home/me/a/0.png", "me/a/0.png", "0.png"),
        ("/home/me/data/0.png", "elsewhere.png", "0.png"),
        ("0.png", "0.png", "0.png"),
    ],
)
def test_names_keep_the_folders_below_the_source(
    name: str, key: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert shown_name(Item(name, key, FileOrigin(Path(name)))) == shown


@pytest.mark.parametrize(
    ("image", "page", "link"),
    [
        ("/home/me/in/a b#1.png", "/home/me/out/p.html", "../in/a%20b%231.png"),
        ("/home/me/in/0.png", "/home/me/p.html", "in/0.png"),
        ("/data/x/0.png", "/data/p.html", "x/0.png"),
        ("/home/me/in/0.png", "/tmp/p.html", ""),
        ("/home/me/in/0.png", "/home/you/p.html", ""),
    ],
)
def test_a_link_does_not_say_who_works_there(image: str, page: str, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert link_to(Item(image, "x", FileOrigin(Path(image))), Path(page)) == link


def test_five_thousand_detailed_images_stay_below_20_mb() -> None:
    """The worst case by the rule: each thumbnail as large as it may be, and 300 bytes of text."""
    room = max(thumbnails.LEAST, min(thumbnails.MOST, thumbnails.BESIDE // 5000))
    assert 5000 * (room + 700) < 20_000_000
    item = Item("x", "x", Encoded(pictures.encoded(noise(), "PNG")))
    name, small = thumbnails._small(item, room)
    assert thumbnails.OURS.fullmatch(name) and len(small) <= room


class Encoded:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self) -> bytes:
        return self.data


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
