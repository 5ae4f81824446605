"""The cache's files: made by any number of processes, kept over kills, checked when read, and those of earlier versions."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.data import shared_tasks
from diffalign.data.cache import CachePlan, plan_cache
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.records import Records, make_records, read_index
from diffalign.errors import DiffalignError
from diffalign.files.checksums import tensor_crc
from helpers.files import tree
from helpers.processes import in_a_child
from helpers.small_datasets import Encoder, group_rows, quiet, settings, write_groups, write_images

PROMPTS = ["prompt a", "prompt b", "prompt c"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three groups of 3, 3 and 2 images with preferences."""
    write_images(tmp_path / "data")
    write_groups(tmp_path / "data", group_rows())
    return tmp_path / "data"


def plan(folder: Path, encoder: Any = None, **changes: Any) -> CachePlan:
    return plan_cache(settings(**changes), PreferenceDataset(folder), [2, 0, 1], 3, encoder or Encoder())


def fill(folder: Path, encoder: Any = None, **changes: Any) -> CachePlan:
    found = plan(folder, encoder, **changes)
    found.latents(quiet), found.embeddings(quiet)
    return found


def values(made: CachePlan) -> list[torch.Tensor]:
    latents, prompts = made.latents(quiet), made.embeddings(quiet)
    mean, spread = latents.batch([0, 1, 2])
    return [mean, *([] if spread is None else [spread]), *prompts.batch(PROMPTS).values()]


class Slow(Encoder):
    """Takes its time, so that processes share the work and a kill finds them at it."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return super().encode_images(pixels)

    longest = 77

    def count_cut(self, prompts: list[str]) -> int:
        return 0

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        time.sleep(0.03)
        return super().encode_prompts(prompts)


# --- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_makes_the_same_bytes(folder: Path, tmp_path: Path, processes: int) -> None:
    fill(folder, cache_dir=tmp_path / "one")
    children = [in_a_child(lambda: fill(folder, Slow(), cache_dir=tmp_path / "many")) for _ in range(processes)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_waiting_for_a_stopped_process_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_tasks, "SILENT", 0.4)
    child = in_a_child(lambda: fill(folder, Slow(), cache_dir=tmp_path / "cache"))
    while not list(tmp_path.glob("cache/latents-*/.locks/*")):
        time.sleep(0.01)
    os.kill(child, signal.SIGSTOP)
    threading.Timer(3.0, lambda: os.kill(child, signal.SIGCONT)).start()
    fill(folder, cache_dir=tmp_path / "cache")
    assert "waiting for other processes that hold 1 tasks of" in capsys.readouterr().err
    assert os.waitpid(child, 0)[1] == 0


def test_kills_change_no_byte(folder: Path, tmp_path: Path) -> None:
    fill(folder, cache_dir=tmp_path / "one")
    for seconds in (0.15, 0.25, 0.2, 0.1):
        child = in_a_child(lambda: fill(folder, Slow(), cache_dir=tmp_path / "killed"))
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    fill(folder, cache_dir=tmp_path / "killed")
    assert tree(tmp_path / "killed") == tree(tmp_path / "one")


def test_what_is_left_to_make_needs_less_space(folder: Path) -> None:
    made = fill(folder)
    assert not made.missing()
    next(made.latent_folder.glob("00001.*")).unlink()
    assert 0 <= made.missing()[made.latent_folder] < made.latent_folder.joinpath("00000.safetensors").stat().st_size


# --- damage --------------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # a low bit of the last value
    path.write_bytes(data)


def _zeros(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-12] + bytes(12))


def _header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[12] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_cut, _half, _empty, Path.unlink])
@pytest.mark.parametrize(
    "name", ["latents-*/index.json", "latents-*/00001.*", "prompts-*/index.json", "prompts-*/00002.*"]
)
def test_the_same_command_makes_what_is_cut_or_gone_again(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    made = fill(folder)
    before = tree(made.folder)
    (path,) = made.folder.glob(name)
    damage(path)
    encoder = Encoder()
    fill(folder, encoder)
    assert tree(made.folder) == before
    assert encoder.encoded <= 3 and encoder.texts <= 2  # one group, or one prompt and another to learn the shapes


@pytest.mark.parametrize("place", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("kind", ["latents", "prompts"])
def test_a_changed_index_is_made_again(folder: Path, kind: str, place: float) -> None:
    made = fill(folder)
    before = tree(made.folder)
    (path,) = made.folder.glob(f"{kind}-*/index.json")
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    encoder = Encoder()
    fill(folder, encoder)
    assert tree(made.folder) == before and encoder.encoded == 0 and encoder.texts <= 1


def _renamed(path: Path) -> None:
    """Flip a bit in the name of a tensor: mean becomes lean, length mength."""
    data = path.read_bytes()
    at = data.index(b"mean" if b"mean" in data else b"length")
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def _unchecked(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"crc32", b"crc33"))


@pytest.mark.parametrize("damage", [_flip, _zeros, _header, _renamed, _unchecked])
@pytest.mark.parametrize("name", ["latents-*/00000.*", "latents-*/00002.*", "prompts-*/00001.*"])
def test_changed_bytes_are_found_and_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    made = fill(folder, latent_sampling="posterior")
    before = tree(made.folder)
    (path,) = made.folder.glob(name)
    damage(path)
    with pytest.raises(DiffalignError, match=rf"{path} cannot be read \(.*; delete this file, and the same command"):
        values(made)
    path.unlink()
    fill(folder, latent_sampling="posterior")
    assert tree(made.folder) == before and values(made)


def test_unfinished_files_are_checked_before_they_are_kept(tmp_path: Path) -> None:
    def make(number: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((3,), float(number))}

    make_records(tmp_path, 5, make, {})
    before = tree(tmp_path)
    (tmp_path / "index.json").unlink()
    _flip(tmp_path / "00003.safetensors")
    assert make_records(tmp_path, 5, make, {}) == 1
    assert tree(tmp_path) == before


def test_large_numbers_of_records(tmp_path: Path) -> None:
    """Files hold up to 128 records, and no more than 64 files are open at once."""
    count = 128 * 70 + 5
    make_records(
        tmp_path, count, lambda n: {"x": torch.tensor([n]), "y": torch.tensor([[n]], dtype=torch.bfloat16)}, {}
    )
    index = read_index(tmp_path)
    assert index is not None and len(index["files"]) == 71
    records = Records(tmp_path, index)
    for n in [0, count - 1, *np.random.default_rng(0).integers(0, count, 300).tolist()]:
        assert int(records.read(n)["x"]) == n


def test_the_checksum_is_that_of_zlib() -> None:
    import zlib

    tensors = [torch.ones(2, 2, dtype=torch.bfloat16), torch.arange(3, dtype=torch.float16)]
    want = zlib.crc32(b"\x80\x3f" * 4 + np.arange(3, dtype=np.float16).tobytes())
    assert tensor_crc(tensors) == want


# --- caches of earlier versions --------------------------------------------------------------------------------------


def earlier(made: CachePlan) -> None:
    """Write the same latents as versions before 0.2 did: an array of all groups of a size."""
    folder = made.latent_folder
    index = json.loads((folder / "index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    records = [load_file(path) for path in files]
    for path in files:
        path.unlink()
    for name, end in (("mean", ""), ("spread", "-spread")):
        found = [record[f"{n}/{name}"].numpy() for n, record in enumerate(records)]
        array = np.zeros((3, 3, *found[0].shape[1:]), np.float16)
        for n, value in enumerate(found):
            array[n, : len(value)] = value
        np.save(folder / f"16x16{end}.npy", array)
    (folder / "index.json").write_text(json.dumps({"sizes": index["sizes"], "spread": True}))


def test_earlier_latents_are_read(folder: Path) -> None:
    made = fill(folder, latent_sampling="posterior")
    want = values(made)
    earlier(made)
    before = tree(made.folder)
    encoder = Encoder()
    again = fill(folder, encoder, latent_sampling="posterior")
    assert all(torch.equal(a, b) for a, b in zip(values(again), want, strict=True))
    assert encoder.encoded == encoder.texts == 0 and tree(made.folder) == before


@pytest.mark.parametrize("damage", [_half, _empty, Path.unlink])
@pytest.mark.parametrize("name", ["latents-*/*x16.npy", "latents-*/*-spread.npy"])
def test_damaged_earlier_latents_are_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    made = fill(folder, latent_sampling="posterior")
    earlier(made)
    (path,) = made.folder.glob(name)
    damage(path)
    with pytest.raises(DiffalignError, match=rf"{path} cannot be read \(.*; delete its folder, and the same command"):
        values(made)


def test_an_earlier_index_that_is_damaged_is_made_again(folder: Path) -> None:
    made = fill(folder, latent_sampling="posterior")
    before = tree(made.folder)
    earlier(made)
    _half(made.latent_folder / "index.json")
    fill(folder, latent_sampling="posterior")
    assert tree(made.folder) == before  # and nothing of the earlier layout is left
