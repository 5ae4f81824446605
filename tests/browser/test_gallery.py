"""The gallery in a browser: look, filter, search, choose and export, by mouse and keyboard, on a desk and on a phone."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from diffalign.stages.score import ScoreRequest, score

if TYPE_CHECKING:
    from conftest import OpenPage
    from playwright.sync_api import Page

expect = pytest.importorskip("playwright.sync_api", reason="pip install playwright").expect

EVIL = '<script>document.title="x"</script> "a\' onerror=alert(1), {{7*7}}'
COUNT = 500
"""More than lie inside a page, so that the thumbnails lie beside it."""


def images(path: Path, count: int) -> Path:
    """Images of rising sharpness in two folders, with three prompts, and one that cannot be read."""
    rows = []
    for i in range(count):
        side = path / ("cats" if i % 2 else "dogs")
        side.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).normal(0, 1 + i / 8, (40, 60, 3))
        Image.fromarray(np.clip(128 + noise, 0, 255).astype(np.uint8)).save(side / f"{i:04d}.png")
        prompt = ("a red cat", "a small dog, running", EVIL)[i % 3]
        rows.append({"file_name": f"{side.name}/{i:04d}.png", "prompt": prompt})
    (path / "cats" / "broken.png").write_bytes(b"no image")
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 25 images, one of them unreadable."""
    folder = tmp_path_factory.mktemp("small")
    page = folder / "scores.html"
    rewards = ["sharpness", "jpeg_compressibility"]
    score(ScoreRequest([str(images(folder / "in", 24))], rewards, html=page))
    return page


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of `COUNT` images and one, with the thumbnails beside it."""
    folder = tmp_path_factory.mktemp("large")
    page = folder / "scores.html"
    score(ScoreRequest([str(images(folder / "in", COUNT))], ["sharpness"], html=page))
    return page


def names(page: Page) -> list[str]:
    """The files of the cards in their order."""
    return [name.rsplit("/", 1)[-1] for name in page.locator("figure .name").all_inner_texts()]


def test_sorts_searches_and_filters(small: Path, open_page: OpenPage) -> None:
    page = open_page(small)
    assert names(page)[:2] == ["0023.png", "0022.png"] and names(page)[-1] == "broken.png"
    page.click("#turn")
    assert names(page)[0] == "0000.png" and names(page)[-1] == "broken.png"
    page.select_option("#by", "name")
    assert names(page)[0] == "0022.png" and page.inner_text("#turn") == "Z to A"
    page.click("#turn")
    assert names(page)[0] == "0001.png" and names(page)[-1] == "0022.png"  # cats before dogs
    page.click(".chart >> nth=1")
    assert page.eval_on_selector("#by", "s => s.value") == "1"
    page.fill("#text", "DOG running")
    assert set(page.locator("figcaption p[title]").all_inner_texts()) == {"a small dog, running"}
    assert page.inner_text("#count") == "8 of 25 images"
    page.select_option("#folder", label="in/cats (13)")
    assert page.inner_text("#count") == "4 of 25 images"
    page.click("#clear")
    page.select_option("#prompt", label="a red cat (8)")
    assert page.inner_text("#count") == "8 of 25 images"
    page.click("#clear")
    page.select_option("#by", "0")
    values = [float(v) for v in page.locator("dd.on").all_inner_texts() if v != "–"]
    page.fill("#from", str(sorted(values)[4]))
    page.fill("#to", str(sorted(values)[20]))
    assert 15 <= page.locator("figure").count() <= 17
    page.click("#clear")
    page.select_option("#reason", "no")
    assert names(page) == ["broken.png"] and "not an image" in page.inner_text("figure .bad")
    page.fill("#text", "no such words")
    assert "No image fits" in page.inner_text("#more")


def test_text_of_others_does_nothing(small: Path, open_page: OpenPage) -> None:
    page = open_page(small, expected=("Content Security Policy",))
    page.fill("#text", "<script>")
    assert page.locator("figure").count() == 8 and page.title() == "scores · diffalign"
    page.click("figure .open >> nth=0")
    assert EVIL in page.inner_text("#about")
    # Not even a script that a fault in our escaping let through would run.
    ran = page.evaluate(
        """() => { const s = document.createElement("script"); s.textContent = "window.ran = 1"; document.body.append(s);
        return window.ran === undefined }"""
    )
    assert ran
    assert page.evaluate("fetch('data:,x').then(() => false, () => true)")


def test_enlarges_and_steps_by_keyboard(small: Path, open_page: OpenPage) -> None:
    page = open_page(small)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.inner_text("#place") == "2 of 25"
    width = page.eval_on_selector("#large", "i => i.decode().then(() => [i.naturalWidth, i.clientWidth])")
    assert width[0] == 60 and width[1] > 600  # the file itself, over the window
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#place") == "3 of 25"
    page.keyboard.press("f")
    assert page.get_attribute("#star", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert not page.is_visible("#view")
    focused = page.evaluate("document.activeElement.closest('figure').querySelector('.name').textContent")
    assert focused.endswith("0021.png")
    page.keyboard.press("/")
    page.keyboard.type("cat/")  # letters in the field are letters
    assert page.input_value("#text") == "cat/" and page.inner_text("#count").endswith("1 favourite")
    page.keyboard.press("Escape")
    assert page.input_value("#text") == "" and page.locator("figure").count() == 25


def test_the_file_of_an_image_is_linked(small: Path, open_page: OpenPage) -> None:
    page = open_page(small)
    page.click("figure .open >> nth=0")
    link = page.locator("#about a")
    assert link.get_attribute("href") == "in/cats/0023.png" and link.inner_text() == "in/cats/0023.png"


def test_a_moved_file_shows_its_thumbnail(small: Path, tmp_path: Path, open_page: OpenPage) -> None:
    (tmp_path / "scores.html").write_text(small.read_text())
    page = open_page(tmp_path / "scores.html", expected=("ERR_FILE_NOT_FOUND",))
    page.click("figure .open >> nth=0")
    expect(page.locator("#large")).to_have_attribute("src", re.compile("data:image/"))
    assert page.eval_on_selector("#large", "i => i.decode().then(() => i.naturalWidth)") == 60


def test_favourites_stay_and_are_exported(small: Path, tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page(small)
    page.click("figure .star >> nth=1")
    page.click("figure .star >> nth=3")
    page.reload()
    assert page.inner_text("#count") == "25 images · 2 favourites"
    page.check("#favourites")
    assert names(page) == ["0022.png", "0020.png"]
    for kind in ("csv", "txt"):
        with page.expect_download() as waiting:
            page.click(f"#{kind}")
        assert waiting.value.suggested_filename == f"selection.{kind}"
        waiting.value.save_as(tmp_path / f"s.{kind}")
    assert (tmp_path / "s.txt").read_text() == "in/dogs/0022.png\nin/dogs/0020.png\n"
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["prompt"] for row in rows] == ["a small dog, running", EVIL]
    data = json.loads(page.inner_text("#data") or page.eval_on_selector("#data", "d => d.textContent"))
    wanted = {image["name"]: image["values"] for image in data["images"]}
    assert [[float(r["sharpness"]), float(r["jpeg_compressibility"])] for r in rows] == [
        wanted[r["image"]] for r in rows
    ]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("f")  # no favourite any more: it leaves the page at once, and the next one has the focus
    assert names(page) == ["0020.png"] and page.evaluate("document.activeElement.className") == "open"


def test_a_name_with_a_line_break_is_one_line_of_the_export(tmp_path: Path, open_page: OpenPage) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a\nb.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    score(ScoreRequest([str(tmp_path / "in")], ["sharpness"], html=tmp_path / "scores.html"))
    page = open_page(tmp_path / "scores.html")
    with page.expect_download() as waiting:
        page.click("#txt")
    waiting.value.save_as(tmp_path / "s.txt")
    lines = (tmp_path / "s.txt").read_text().splitlines()
    assert sorted(json.loads(line) if line.startswith('"') else line for line in lines) == ["in/a\nb.png", "in/c.png"]


def test_of_many_images_few_are_drawn(large: Path, open_page: OpenPage) -> None:
    thumbnails = list((large.parent / "scores_thumbnails").iterdir())
    assert len(thumbnails) == COUNT
    assert large.stat().st_size < 400 * COUNT
    page = open_page(large)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith(".webp") else None)
    page.reload()
    assert page.locator("figure").count() < COUNT / 2 and len(asked) < COUNT / 2
    loaded = page.eval_on_selector("figure img", "i => i.decode().then(() => i.naturalWidth)")
    assert loaded == 60
    for _ in range(20):
        page.locator("#more").scroll_into_view_if_needed()
        page.mouse.wheel(0, 20_000)
        page.wait_for_timeout(50)
    expect(page.locator("figure")).to_have_count(COUNT + 1)
    assert page.inner_text("#more") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(large: Path, open_page: OpenPage, scheme: str) -> None:
    page = open_page(large, width=390, height=844, scheme=scheme)  # type: ignore[arg-type]
    over = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(over) <= 0 and page.eval_on_selector("#filters", "d => d.open") is False
    page.click("#filters summary")
    assert page.evaluate(over) <= 0 and page.is_visible("#folder")
    page.click("figure .open >> nth=0")
    seen = page.eval_on_selector("#large", "i => i.decode().then(() => i.getBoundingClientRect().toJSON())")
    assert seen["width"] == 390 and seen["height"] > 300
    ground = page.eval_on_selector("body", "b => getComputedStyle(b).backgroundColor")
    assert (ground == "rgb(20, 22, 25)") == (scheme == "dark")
