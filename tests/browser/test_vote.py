"""The voting page in a browser: what is pressed is what the file holds, whatever happens to the page and the server."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from helpers.files import json_lines
from helpers.processes import environment
from helpers.vote_data import colour_of, colours, folder_of, kept

if TYPE_CHECKING:
    from conftest import OpenPage
    from playwright.sync_api import Browser, Page, Route

pytest.importorskip("playwright.sync_api", reason="pip install playwright")

ANSWERS = {"1": "left", "2": "right", "0": "tie", "t": "tie", "b": "both_bad", "s": "skip", "ArrowLeft": "left",
           "ArrowRight": "right", "ArrowUp": "tie", "ArrowDown": "both_bad"}  # fmt: skip
REFUSED = "ERR_CONNECTION_REFUSED"
PIXELS = """() => [...document.querySelectorAll('#stage img')].map(image => {
  const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
  canvas.getContext('2d').drawImage(image, 0, 0);
  return [...canvas.getContext('2d').getImageData(0, 0, 1, 1).data].slice(0, 3);
})"""


class Server:
    """`diffalign vote` as a process, on one port however often it starts."""

    def __init__(self, data: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.data, self.options = data, options
        self.log = data / "votes.jsonl"
        self.start()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        line = [sys.executable, "-m", "diffalign", "vote", str(self.data), "--port", str(self.port), "--no-browser"]
        self.process = subprocess.Popen([*line, *self.options], env=environment(), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert any("open in a browser" in said for said in iter(self.process.stdout.readline, ""))

    def stop(self, how: signal.Signals) -> None:
        self.process.send_signal(how)  # nothing, where it has ended
        self.process.wait()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[list[Server]]:
    """A list into which a test puts its servers; they end with it."""
    servers: list[Server] = []
    yield servers
    for server in servers:
        server.stop(signal.SIGKILL)


def until(page: Page, condition: str, arg: object = None) -> None:
    """Wait for a condition in JavaScript; playwright's own way needs eval, which the page's policy refuses."""
    end = time.monotonic() + 15
    while not page.evaluate(condition, arg):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(10)


def shown(page: Page) -> list[list[int]]:
    """The colours on the screen, left to right, when all images are there."""
    until(page, "document.querySelectorAll('#stage img').length > 1 && ready() && !busy")
    found: list[list[int]] = page.evaluate(PIXELS)
    return found


def press(page: Page, key: str) -> tuple[str, list[list[int]]]:
    """Press a key that answers; return the answer and the colours that were on the screen."""
    colours_shown = shown(page)
    before = page.evaluate("now.id")
    page.keyboard.press(key)
    until(page, "id => ended || now.id !== id", before)
    return ANSWERS[key], colours_shown


def written(log: Path, rater: str) -> list[tuple[str, list[list[int]]]]:
    return [(row["answer"], [colour_of(name) for name in row["images"]]) for row in kept(log, rater)]


def test_what_was_pressed_is_what_the_file_holds(serve: list[Server], open_page: OpenPage, tmp_path: Path) -> None:
    """30 pairs by keyboard with undos, a reload, a killed server and a torn last line."""
    server = Server(colours(tmp_path / "data", 12, 3))
    serve.append(server)
    # 404: an image that was on its way when the server was killed has a new address afterwards.
    page = open_page(server.root, expected=(REFUSED, "404"))
    keys = random.Random(0).choices(list(ANSWERS), k=30)
    pressed = []
    for n, key in enumerate(keys):
        pressed.append(press(page, key))
        assert written(server.log, "me") == pressed  # it was on the disk before the next pair was shown
        if n in (4, 5, 20):
            page.keyboard.press("u")
            taken_back = pressed.pop()
            assert shown(page) == taken_back[1]  # the same pair, on the same sides
            assert written(server.log, "me") == pressed
            pressed.append(press(page, "2"))
        if n == 10:
            before = shown(page)
            page.reload()
            assert shown(page) == before
        if n == 15:
            server.stop(signal.SIGKILL)
            with server.log.open("a") as stream:
                stream.write('{"id": "torn", "ra')
            waiting = shown(page)
            page.keyboard.press("1")
            page.get_by_text("The server does not answer").wait_for()
            server.start()
            page.get_by_text("The server does not answer").wait_for(state="hidden")
            pressed.append(("left", waiting))
            shown(page)
            assert written(server.log, "me") == pressed
    rows = json_lines(server.log)
    assert len(kept(server.log, "me")) == 31 and sum("undo" in row for row in rows) == 3
    assert all(
        row["models"] == [("base", "tuned")[int(i[-1]) % 2] for i in row["images"]] for row in rows if "models" in row
    )
    server.stop(signal.SIGINT)
    assert server.process.stdout is not None and "31 in all" in server.process.stdout.read()
    assert server.process.returncode == 0


def test_two_raters_at_once(serve: list[Server], open_page: OpenPage, tmp_path: Path) -> None:
    server = Server(colours(tmp_path / "data", 6), "-n", "5")
    serve.append(server)
    pages = {name: open_page(f"{server.root}?rater={name}") for name in ("anna", "ben")}
    pressed: dict[str, list[tuple[str, list[list[int]]]]] = {"anna": [], "ben": []}
    for keys in zip("12012", "22b11", strict=True):
        for name, key in zip(pages, keys, strict=True):
            pressed[name].append(press(pages[name], key))
    for name, page in pages.items():
        page.get_by_text(f"5 votes are kept under the name {name}").wait_for()
        assert written(server.log, name) == pressed[name]
        assert page.locator("#end tbody tr").inner_text().split()[::4] == ["base", "tuned"]
    orders = [[row["images"] for row in kept(server.log, name)] for name in pages]
    assert [set(pair) for pair in orders[0]] == [set(pair) for pair in orders[1]]  # the same pairs
    assert orders[0] != orders[1]  # on other sides


def test_nothing_tells_the_model_before_the_end_and_prompts_are_text(
    serve: list[Server], open_page: OpenPage, tmp_path: Path
) -> None:
    server = Server(colours(tmp_path / "data", 1, 2))
    serve.append(server)
    page = open_page(server.root)
    shown(page)
    assert page.locator("#prompt").inner_text().startswith("<script>window.hacked=1</script><img src=x")
    assert page.evaluate("window.hacked === undefined")
    assert "{{ 7 * 7 }}" in page.locator("#prompt").inner_text()
    sources = [image.get_attribute("src") or "" for image in page.locator("#stage img").all()]
    assert not any(word in page.content() + "".join(sources) for word in ("tuned", "base", "g00000"))
    press(page, "1")
    page.get_by_text("There is nothing more to ask").wait_for()
    assert "tuned" in page.locator("#end table").inner_text()
    page.get_by_role("button", name="Undo the last vote").click()
    press(page, "2")
    assert [row["answer"] for row in kept(server.log, "me")] == ["right"]


def test_ranking_by_numbers_and_by_dragging_with_scores_and_a_note(
    serve: list[Server], open_page: OpenPage, tmp_path: Path
) -> None:
    server = Server(colours(tmp_path / "data", 2, 4), "--images", "4", "--rubric", "alignment,aesthetics")
    serve.append(server)
    page = open_page(server.root)
    first = shown(page)
    for key in ("3", "1", "0", "4"):  # 4 shares the rank of 1; 2 is left and comes last
        page.keyboard.press(key)
    page.locator("figure").nth(1).get_by_role("group", name="alignment").get_by_text("4").click()
    page.keyboard.press("n")
    page.keyboard.type("1 is blurred")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('count').textContent === '1 of 2'")
    second = shown(page)
    frames = page.locator("figure .frame")
    start, end = frames.nth(3).bounding_box(), frames.nth(0).bounding_box()
    assert start is not None and end is not None
    page.mouse.move(start["x"] + 50, start["y"] + 50)
    page.mouse.down()
    page.mouse.move(end["x"] + 60, end["y"] + 60, steps=4)
    page.mouse.up()
    page.keyboard.press("Enter")
    page.get_by_text("There is nothing more to ask").wait_for()
    rows = kept(server.log, "me")
    assert [[colour_of(name) for name in row["images"]] for row in rows] == [first, second]
    assert [(row["answer"], row["ranking"]) for row in rows] == [("ranking", [2, 4, 1, 2]), ("ranking", [2, 3, 4, 1])]
    assert rows[0]["scores"] == {"alignment": [None, 4, None, None]} and rows[0]["note"] == "1 is blurred"
    assert rows[1]["scores"] == {} and rows[1]["note"] == ""


def test_zoom_shows_the_same_part_of_both(serve: list[Server], open_page: OpenPage, tmp_path: Path) -> None:
    server = Server(colours(tmp_path / "data", 3, 2, side=2000))
    serve.append(server)
    page = open_page(server.root)
    shown(page)
    page.keyboard.press("z")
    box = page.locator("figure .frame").nth(1).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    style = "image => [image.style.transform, image.style.transformOrigin]"
    both = [page.locator("#stage img").nth(n).evaluate(style) for n in (0, 1)]
    assert both[0] == both[1] and both[0][1].startswith("25")
    scale = float(both[0][0].removeprefix("scale(").removesuffix(")"))
    assert abs(scale * min(box["width"], box["height"]) - 2000) < 20  # a pixel of the image is one of the screen
    assert json_lines(server.log) == []
    page.keyboard.press("1")  # keys still answer
    until(page, "document.getElementById('count').textContent.startsWith('1')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844), (844, 390)])
def test_it_fits_the_screen(
    serve: list[Server], open_page: OpenPage, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    server = Server(colours(tmp_path / "data", 4), "--rubric", "alignment")
    serve.append(server)
    page = open_page(server.root, width, height, "dark" if scheme == "dark" else "light")
    shown(page)
    assert page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight"
    )
    for box in [b.bounding_box() for b in page.locator("#answers button, #tools button:visible, figure").all()]:
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["y"] >= 0 and box["y"] + box["height"] <= height
    assert all(i.evaluate("i => i.clientHeight") > 60 for i in page.locator("#stage img").all())
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")


def test_a_phone_votes_by_touch(serve: list[Server], browser: Browser, tmp_path: Path) -> None:
    server = Server(colours(tmp_path / "data", 5))
    serve.append(server)
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(server.root)
    pressed = []
    for tap, answer in (("figure:nth-child(2)", "right"), ("#answers button:nth-child(2)", "tie"), ("figure", "left")):
        pressed.append((answer, shown(page)))
        before = page.evaluate("now.id")
        page.locator(f"#stage {tap}" if tap.startswith("figure") else tap).first.tap()
        until(page, "id => now.id !== id", before)
    upper, lower = (page.locator("figure").nth(n).bounding_box() for n in (0, 1))
    assert upper is not None and lower is not None and upper["y"] + upper["height"] <= lower["y"]
    context.close()
    assert written(server.log, "me") == pressed


def test_a_pair_waits_until_both_images_are_there(serve: list[Server], open_page: OpenPage, tmp_path: Path) -> None:
    server = Server(colours(tmp_path / "data", 3))
    serve.append(server)
    page = open_page(server.root)
    shown(page)
    held: list[Route] = []
    page.route("**/image/**", lambda route: held.append(route))
    page.reload()
    page.wait_for_selector("#stage figure")
    page.keyboard.press("1")  # nothing is shown yet
    assert not page.evaluate("ready()")
    for route in held:
        route.continue_()
    shown(page)
    assert json_lines(server.log) == []


def test_an_unreadable_image_can_only_be_skipped(serve: list[Server], open_page: OpenPage, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", {"a.png": "fox", "b.png": "fox"})
    (folder / "b.png").write_bytes(b"\x00 no image")
    server = Server(folder)
    serve.append(server)
    page = open_page(server.root, expected=("422",))
    page.get_by_text("cannot be read (not an image of a known format). Skip it.").wait_for()
    until(page, "ready()")
    page.keyboard.press("1")
    page.keyboard.press("s")
    page.get_by_text("There is nothing more to ask").wait_for()
    assert [row["answer"] for row in kept(server.log, "me")] == ["skip"]
