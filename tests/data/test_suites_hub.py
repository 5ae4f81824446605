"""Suites from the hub, against a cache on disk in the hub's own layout: no network is touched, and none is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.suites import STYLES
from diffalign.data.suites_hub import ON_HUB, from_hub, read_hub_suite
from diffalign.errors import DiffalignError
from diffalign.stages.resolve import resolve_prompts

COMMIT, OLDER = "a" * 40, "b" * 40


def prompts_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that must not be asked. The library reads its settings once, so they are set in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def snapshot(cache: Path, name: str, commit: str = COMMIT) -> Path:
    """The folder of one commit in the cache, with `main` pointing to it, as a download would leave it."""
    repository = cache / f"datasets--{ON_HUB[name].repository.replace('/', '--')}"
    prompts_file(repository / "refs" / "main", COMMIT)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_every_suite_is_read_from_the_cache(cache: Path) -> None:
    prompts_file(
        snapshot(cache, "partiprompts") / "PartiPrompts.tsv", "Prompt\tCategory\tChallenge\na cat\tAnimals\tBasic\n"
    )
    for style in STYLES:
        prompts_file(snapshot(cache, "hpsv2") / "benchmark" / f"{style}.json", json.dumps([f"a {style}"]))
    prompts_file(snapshot(cache, "hpsv2") / "benchmark" / "drawbench.json", json.dumps(["another suite"]))
    prompts_file(snapshot(cache, "drawbench") / ON_HUB["drawbench"].files[0], "Prompts,Category\na dog,Colors\n")
    parquet = snapshot(cache, "pickapic") / ON_HUB["pickapic"].files[0]
    parquet.parent.mkdir()
    pq.write_table(pa.table({"caption": ["a house", "a tree"]}), parquet)
    found = {name: [(r.prompt, r.metadata.get("tag")) for r in read_hub_suite(name, "hub")] for name in ON_HUB}
    assert found == {
        "partiprompts": [("a cat", "Animals")],
        "hpsv2": [(f"a {style}", style) for style in STYLES],
        "pickapic": [("a house", None), ("a tree", None)],
        "drawbench": [("a dog", "Colors")],
    }
    row = resolve_prompts("suite:drawbench:hub", 1)[0]
    assert row.metadata == {"tag": "Colors", "suite": f"sayakpaul/drawbench@{COMMIT}"}


def test_a_revision_is_kept_to(cache: Path) -> None:
    for commit, text in ((COMMIT, "new"), (OLDER, "old")):
        prompts_file(
            snapshot(cache, "drawbench", commit) / ON_HUB["drawbench"].files[0], f"Prompts,Category\n{text},x\n"
        )
    assert [r.prompt for r in read_hub_suite("drawbench", "hub")] == ["new"]
    old = read_hub_suite("drawbench", f"hub@{OLDER}")
    assert (old[0].prompt, old[0].metadata["suite"]) == ("old", f"sayakpaul/drawbench@{OLDER}")
    # Files of a suite are one commit's, even where the cache holds the rest of another.
    prompts_file(snapshot(cache, "hpsv2") / "benchmark/anime.json", '["a"]')
    for style in STYLES[1:]:
        prompts_file(snapshot(cache, "hpsv2", OLDER) / f"benchmark/{style}.json", '["b"]')
    with pytest.raises(DiffalignError, match=f"benchmark/concept-art.json .* at revision {COMMIT}"):
        read_hub_suite("hpsv2", "hub")


@pytest.mark.parametrize("name", sorted(ON_HUB))
def test_what_is_missing_is_named_in_one_line(name: str, cache: Path) -> None:
    suite = ON_HUB[name]
    with pytest.raises(DiffalignError) as told:
        resolve_prompts(f"suite:{name}:hub", None)
    line = str(told.value)
    assert "\n" not in line
    assert suite.files[0] in line
    assert f"datasets/{suite.repository}" in line
    assert f"prompts=suite:{name}:PATH" in line


def test_mistakes(cache: Path) -> None:
    for name in ("geneval", "dpgbench", "t2i-compbench"):
        with pytest.raises(DiffalignError, match=f"no repository of the hub is known.*give suite:{name}:PATH"):
            resolve_prompts(f"suite:{name}:hub", None)
    with pytest.raises(DiffalignError, match="did you mean drawbench"):
        read_hub_suite("drawbenhc", "hub")
    with pytest.raises(DiffalignError, match="a revision belongs after @"):
        read_hub_suite("drawbench", "hub@")
    assert not from_hub("hub.csv")
    assert not from_hub("./hub")
    assert from_hub("hub@1234")
