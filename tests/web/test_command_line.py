"""The servers of the command line on another host: the address that they print opens, and no file learns its token."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from helpers.files import json_lines
from helpers.processes import environment
from helpers.vote_data import colours


@pytest.mark.parametrize("verb", ["vote", "serve"])
def test_the_printed_address_opens(tmp_path: Path, verb: str) -> None:
    data = colours(tmp_path / "data", 2)
    what = [str(data), "--no-browser"] if verb == "vote" else ["-r", "sharpness", "--device", "cpu"]
    line = [sys.executable, "-m", "diffalign", verb, *what, "--host", "0.0.0.0", "--port", "0"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    process = subprocess.Popen(line, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        shown = next(said for said in iter(process.stdout.readline, "") if "?token=" in said)
        found = re.search(r"http://[^:/]+:(\d+)/\?token=(\S+)", shown)
        assert found, shown
        port, token = found.groups()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Accept": "text/html"}) as browser:
            assert browser.get("/").status_code == 401
            page = browser.get("/", params={"token": token}, follow_redirects=True)
            assert page.status_code == 200 and token not in page.text
            if verb == "vote":
                question = browser.get("/questions").raise_for_status().json()["questions"][0]["id"]
                browser.post("/vote", json={"question": question, "answer": "left"}).raise_for_status()
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[0]
    later = [said for said in rest.splitlines() if not said.startswith("or: ")]  # the same by IP address
    assert process.returncode == 0 and not any(token in said for said in later)
    if verb == "vote":
        assert [row["answer"] for row in json_lines(data / "votes.jsonl")] == ["left"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if token.encode() in path.read_bytes()]
    assert {path: path.read_bytes() for path in before} == before
