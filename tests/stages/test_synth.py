"""`diffalign synth`: killed, shared, failing and full disks end with the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import yaml

from diffalign.cli import app
from diffalign.config import RewardSection, load_synth_config
from diffalign.data import dataset_card, sample
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.plan import Part, SynthPlan
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.stages import synth
from helpers.files import tree
from helpers.processes import in_a_child
from helpers.synth_models import Painter


def test_what_comes_out(world: Callable[..., Path]) -> None:
    out = world("whole")
    assert sorted(tree(out)) == [
        "README.md", "contact.html", "generators/one.json", "generators/two.json", "groups.parquet",
        *(f"images/part-0000{n}.parquet" for n in range(5)),
        "ranking.json", "sampling.json", "scores/bright.parquet", "scores/red.parquet",
    ]  # fmt: skip
    dataset = PreferenceDataset(out)
    assert len(dataset) == 21 and all(dataset.members(g) == [0, 1, 2] for g in dataset.column("group_id"))
    images = dataset.images(dataset.column("group_id")[4])
    assert [i.generator for i in images] == ["one", "one", "two"] and len({i.seed for i in images}) == 3
    scores = [dataset.scores(name) for name in ("bright", "red")]
    for i in range(21):
        row = dataset.group(i)
        by_hand = [
            sum(s[row["group_id"], a] > s[row["group_id"], b] for s in scores for b in range(3) if b != a) / 4
            for a in range(3)
        ]
        assert row["preference"] == pytest.approx(by_hand)


def test_rewards_score_on_the_device_of_the_run(world: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []
    open_channel = synth.open_reward

    def open_reward(section: RewardSection, device: str) -> Any:
        devices.append(device)
        return open_channel(section, device)

    monkeypatch.setattr(synth, "process_device", lambda device: f"{device} of this process")
    monkeypatch.setattr(synth, "open_reward", open_reward)
    world("whole")
    assert devices == ["cpu of this process"] * 2


def test_the_card_names_licences(world: Callable[..., Path]) -> None:
    out = world(
        "whole", "generators=[{name: one, model: {path: m1}, licence: openrail++}, {name: two, model: {path: m2}}]"
    )
    text = (out / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license_name"] == "openrail++, unknown" and head["configs"][0]["data_files"] == "images/*.parquet"
    assert re.search(r"\| one \| m1 \|.*\| openrail\+\+ \|", text) and re.search(
        r"\| two \| m2 \|.*\| unknown \|", text
    )
    assert "| train | 21 |" in text and "Preferences are vote shares of bright, red. 21 groups" in text


def test_a_detector_stands_for_the_rewards_weights() -> None:
    """Every reward's section has a `detector`; only GenEval takes one."""
    known = {"weights": "w", "settings": {"detector": "shapes"}}
    assert [dataset_card._weights(name, known) for name in ("geneval", "sharpness")] == ["the detector shapes", "w"]
    assert dataset_card._weights("geneval", {"weights": "w", "settings": {"detector": None}}) == "w"


def test_the_same_command_again_changes_nothing(world: Callable[..., Path], tmp_path: Path) -> None:
    before = tree(world("whole"))
    (tmp_path / "log").unlink()
    assert tree(world("whole")) == before and not (tmp_path / "log").exists()


@pytest.mark.soak
def test_killed_at_any_moment(world: Callable[..., Path], tmp_path: Path, soak: bool) -> None:
    """Killed by SIGKILL and run again until it ends: the same bytes as undisturbed, whatever it was doing."""
    whole = tree(world("whole"))
    chance, kills, wanted = random.Random(0), 0, 20 if soak else 3
    while kills < wanted:
        # A fresh folder each time the run got through, so that every kill hits another stage of the work.
        child = in_a_child(lambda: world("cut", pause=0.01))
        time.sleep(chance.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            assert tree(tmp_path / "cut" / "data") == whole
            (tmp_path / "cut").rename(tmp_path / f"done-{time.monotonic_ns()}")
    assert tree(world("cut")) == whole


def test_two_processes_share_the_work(world: Callable[..., Path], tmp_path: Path) -> None:
    whole = tree(world("whole"))
    drawn = sorted((tmp_path / "log").read_text().split("\n"))
    (tmp_path / "log").unlink()
    children = [in_a_child(lambda: world("shared", pause=0.01)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert tree(tmp_path / "shared" / "data") == whole
    assert sorted((tmp_path / "log").read_text().split("\n")) == drawn  # each cell once, by one of the two


def test_a_dead_process_leaves_its_share_to_the_other(world: Callable[..., Path], tmp_path: Path) -> None:
    whole = tree(world("whole"))
    children = [in_a_child(lambda: world("shared", pause=0.02)) for _ in range(2)]
    time.sleep(0.1)
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    assert os.waitpid(children[1], 0)[1] == 0 and tree(tmp_path / "shared" / "data") == whole


def test_a_full_disk(
    world: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, and the same command goes on when there is space."""
    whole = tree(world("whole"))
    genuine, left = sample.image_row, iter(range(30))

    def image_row(*given: Any) -> Any:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cut"))
        return genuine(*given)

    monkeypatch.setattr(sample, "image_row", image_row)
    with pytest.raises(SystemExit) as stopped:
        app(["synth", str(tmp_path / "config.yaml"), f"out={tmp_path / 'cut' / 'data'}"], prog_name="diffalign")
    assert stopped.value.code == 2 and "no disk space left" in capsys.readouterr().err
    assert not list((tmp_path / "cut").rglob("*.part"))
    monkeypatch.setattr(sample, "image_row", genuine)
    assert tree(world("cut")) == whole


def test_a_prompt_that_fails_is_set_aside(world: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join("bad\n" if i == 3 else f"prompt {i}\n" for i in range(21)))
    out = world("some")
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [(f["prompt"], f["index"], f["generator"]) for f in failed] == [
        ("bad", 0, "one"), ("bad", 1, "one"), ("bad", 2, "two"),
    ]  # fmt: skip
    assert "ValueError: this prompt cannot be drawn" in failed[0]["reason"]
    dataset = PreferenceDataset(out)
    assert len(dataset) == 20 and "bad" not in dataset.column("prompt")
    drawn = (tmp_path / "log").read_text().split("\n")
    # a batch of five: three times whole, then its three good cells once and its two bad ones three times
    assert max(drawn.count(line) for line in drawn) == 6
    before = tree(out)
    assert tree(world("some")) == before


def test_a_model_that_fails_stops_the_run(tmp_path: Path) -> None:
    def broken(prompts: list[str], seeds: list[int]) -> Any:
        raise RuntimeError("no kernel image")

    rows = tuple(PromptRow(f"prompt {i}") for i in range(8))
    with pytest.raises(
        DiffalignError, match="generator g could draw no image of a whole batch: RuntimeError: no kernel"
    ):
        sample.draw_part(SynthPlan(rows, (Part("g", 1, 4),), 0), 0, tmp_path, broken, {})
    with pytest.raises(DiffalignError, match="drew nothing 5 times"):
        sample.draw_part(SynthPlan(rows, (Part("g", 4, 4),), 0), 0, tmp_path / "b", broken, {})


def test_a_passing_failure_leaves_no_trace(tmp_path: Path) -> None:
    rows = (PromptRow("a"), PromptRow("b"))
    plan = SynthPlan(rows, (Part("g", 2, 4),), 0)
    for name, failures in (("smooth", 0), ("rough", 2)):
        left = iter(range(failures))
        painter = Painter("g")

        def draw(prompts: list[str], seeds: list[int], left: Any = left, painter: Painter = painter) -> Any:
            if next(left, None) is not None:
                raise RuntimeError("a hiccup")
            return [sample.Drawn(*drawn) for drawn in painter.draw(prompts, seeds, latents=False)]

        sample.draw_part(plan, 0, tmp_path / name, draw, {})
    assert tree(tmp_path / "smooth" / "images") == tree(tmp_path / "rough" / "images")


def test_out_of_memory_is_not_the_prompts_fault(tmp_path: Path) -> None:
    def greedy(prompts: list[str], seeds: list[int]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DiffalignError, match="does not hold a batch of 2; set its batch_size lower"):
        sample.draw_part(SynthPlan((PromptRow("a"),), (Part("g", 2, 2),), 0), 0, tmp_path, greedy, {})


def test_another_plan_or_model_does_not_mix_in(
    world: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world("whole")
    with pytest.raises(DiffalignError, match="sampled with seed=0, not 1"):
        world("whole", "seed=1")
    with pytest.raises(DiffalignError, match="sampled with prompts="):
        world("whole", "prompts.n=3")
    (tmp_path / "whole" / "data" / "images" / "part-00000.parquet").unlink()
    config = load_synth_config(tmp_path / "config.yaml", [f"out={tmp_path / 'whole' / 'data'}"])
    monkeypatch.setattr(synth, "open_generator", lambda *_: Painter("one", revision="new"))
    with pytest.raises(DiffalignError, match="drawn with revision=None, now it is 'new'; pin model.revision"):
        synth.synth(config)


def test_other_ranking_of_the_same_images(world: Callable[..., Path], tmp_path: Path) -> None:
    before = tree(world("whole"))
    after = tree(world("whole", "rank.sources=[red]"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"groups.parquet", "ranking.json", "contact.html", "README.md"}
    red = PreferenceDataset(tmp_path / "whole" / "data").scores("red")
    row = PreferenceDataset(tmp_path / "whole" / "data").group(0)
    assert np.argmax(row["preference"]) == np.argmax([red[row["group_id"], k] for k in range(3)])


def test_latents_are_kept(world: Callable[..., Path]) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(world("whole", "latents=true") / "images" / "part-00000.parquet").to_pylist()
    assert rows[0]["latent_shape"] == [1, 2, 2]
    assert np.frombuffer(rows[0]["latent"], np.float16).tolist() == [rows[0]["seed"] % 7] * 4


def test_prompts_from_and_a_dataset_to_an_address(world: Callable[..., Path], tmp_path: Path) -> None:
    expected = tree(world("whole"))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "prompts.txt"), "/synth/prompts.txt")
    given = ("prompts.source=memory://synth/prompts.txt", "upload=memory://synth/data")
    assert tree(world("some", *given)) == expected
    memory.get("/synth/data", str(tmp_path / "back"), recursive=True)
    assert tree(tmp_path / "back") == expected
    memory.rm("/synth", recursive=True)
    with pytest.raises(DiffalignError, match="upload=data: no address"):
        world("other", "upload=data")


def test_dry_run_writes_nothing(world: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world("dry", "price_per_hour=3600", pause=0.05, dry_run=True)
    said = capsys.readouterr().out
    assert "21 prompts, 63 images" in said and "one: 42 images" in said and "disk: " in said and "cost: " in said
    # 9 batches of one and 6 of two, 0.05 s each, and little else: at 1 a second, 0.75
    cost = float(said.split("cost: ")[1].split()[0])
    assert 0.4 < cost < 1.6
    assert not (tmp_path / "dry").exists()
