"""Addresses: what is listed and read below them, what is refused, and that a file appears whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable
from diffalign.files.remote import RemoteFolder, check_writable, is_address, local_copy, read_address, upload


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/bucket", recursive=True) if fs.exists("/bucket") else None


@pytest.mark.parametrize("text", ["s3://b/x", "gs://b", "hf://datasets/a/b", "memory://x", "file:///x"])
def test_addresses(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize("text", ["x/y", "/x", "hub:a/b", "testbed:test", "C://x", "a://", "../s3://b"])
def test_paths(text: str) -> None:
    assert not is_address(text)


def test_what_is_below(memory: Any) -> None:
    for name in ("a/1.png", "a/deep/2.png", "b/3.png", "a/x.txt"):
        memory.pipe(f"/bucket/{name}", name.encode())
    folder = RemoteFolder("memory://bucket/a/")
    assert folder.sizes == {"1.png": 7, "deep/2.png": 12, "x.txt": 7} and folder.path == "memory://bucket/a"
    assert folder.read("deep/2.png") == b"a/deep/2.png" == read_address(folder.address("deep/2.png"))
    assert RemoteFolder("memory://bucket/*/*.png").sizes.keys() == {"a/1.png", "b/3.png"}
    one = RemoteFolder("memory://bucket/a/1.png")
    assert (one.path, list(one.sizes)) == ("memory://bucket/a", ["1.png"]) and one.read("1.png") == b"a/1.png"
    folder.fetch(["1.png", "x.txt"])
    memory.rm("/bucket", recursive=True)
    assert folder.read("x.txt") == b"a/x.txt"  # kept
    with pytest.raises(Unreadable, match="No such file"):
        folder.read("deep/2.png")


def test_names_that_lead_out_are_left_out(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Object stores take any text for a key."""
    memory.pipe("/bucket/a/fine.png", b"1")
    found = {
        f"/bucket/a/{name}": {"type": "file", "size": 1} for name in ("fine.png", "../out.png", "b//c.png", "./d.png")
    }
    monkeypatch.setattr(type(memory), "find", lambda *_, **__: found)
    assert list(RemoteFolder("memory://bucket/a").sizes) == ["fine.png"]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("memory://bucket/nothing", "no file there|no such file"),
        ("nonsense://x/y", "Protocol not known"),
        ("zip://a.png::memory://b.zip", "a chain or a query is not read"),
        ("https://example.org/a.png?sig=secret", "a chain or a query is not read"),
        ("sftp://me:secret@example.org/a", "no password belongs in an address"),
    ],
)
def test_what_is_refused_in_one_line_without_its_secret(address: str, reason: str) -> None:
    with pytest.raises(DiffalignError, match=reason) as raised:
        RemoteFolder(address)
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs"), ("sftp", "paramiko")]
)
def test_a_missing_package_is_named_with_its_command(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = f"{scheme}://: {package} is not installed, which reads such addresses; pip install {package}"
    for read in (RemoteFolder, local_copy, check_writable):
        with pytest.raises(DiffalignError, match=f"^{line}$"):
            read(f"{scheme}://bucket/a")
    with pytest.raises(Unreadable, match=line):
        read_address(f"{scheme}://bucket/a")


def test_a_place_is_tried_and_left_as_it_was(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/bucket/a.jsonl", b"x")
    check_writable("memory://bucket/a.jsonl")
    check_writable("memory://bucket/new/b.jsonl")
    assert memory.find("/bucket") == ["/bucket/a.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffalignError, match="file/b.jsonl: "):
        check_writable(f"file://{tmp_path}/file/b.jsonl")
    with pytest.raises(DiffalignError, match="^https://127.0.0.1:1/b: |aiohttp"):
        check_writable("https://127.0.0.1:1/b")


def test_copies_and_uploads(memory: Any, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "deep" / "b.txt").write_text("b")
    upload(tmp_path / "in", "memory://bucket/out")
    assert local_copy("memory://bucket/out/deep/b.txt").read_text() == "b"
    upload(tmp_path / "in" / "a.txt", f"file://{tmp_path}/new/c.txt")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.txt"]
