"""A real browser for pages: `open_page` fails a test on an error in the console and on a request to the network.

Tests here run under `make browser-test`. They are skipped where there is no playwright or no chromium; CHROMIUM names one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"


class OpenPage(Protocol):
    """Opens a file, or an address on this machine, and returns its page when it has loaded.

    expected: texts that errors in the console may contain.
    """

    def __call__(
        self,
        where: Path | str,
        width: int = 1400,
        height: int = 900,
        scheme: Literal["light", "dark"] = "light",
        expected: tuple[str, ...] = (),
    ) -> Page: ...


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window; one for all tests."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not Path(CHROMIUM).is_file():
        pytest.skip(f"no chromium at {CHROMIUM}; set CHROMIUM to one")
    with sync_api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages, each test with storage of its own; afterwards no page may have had an error or left this machine."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []
    away: list[str] = []

    def opened(
        where: Path | str,
        width: int = 1400,
        height: int = 900,
        scheme: Literal["light", "dark"] = "light",
        expected: tuple[str, ...] = (),
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()

        def note(said: ConsoleMessage) -> None:
            if said.type == "error" and not any(text in said.text for text in expected):
                errors.append(said.text)

        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
        near = ("file:", "data:", "blob:", "http://127.0.0.1", "http://localhost")
        page.on("request", lambda request: None if request.url.startswith(near) else away.append(request.url))
        page.goto(where.absolute().as_uri() if isinstance(where, Path) else where)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors and not away
