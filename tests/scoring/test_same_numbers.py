"""The same images get the same numbers, whichever way they are scored.

A new way of scoring is a function from `World` to scores by label, and a line in `WAYS` with the bound that it keeps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import diffalign
from diffalign.rewards import load_reward
from diffalign.scoring.spec import parse
from helpers import pictures, tiny_rewards
from helpers.command_line import run
from helpers.fake_ray import FakeRay
from helpers.processes import finish, torchrun
from helpers.ray_cluster import NODE, small_cluster
from helpers.served import serving

Numbers = dict[str, list[float]]
"""Scores by label, in the order of the images' names."""
PROMPTS = ["a red circle", "a blue square", "a star", "two stars", "a green ring", "a cat", "a dog on a hill"]
BATCH = 2
"""Images in a batch: small, so that every way makes several."""
LABELS = ("clip", "sharpness")


@dataclass(frozen=True)
class World:
    """Images with prompts beside them, in a folder; the rewards as `-r` takes them; a place to write to."""

    folder: Path
    rewards: list[str]
    out: Path

    @property
    def files(self) -> list[Path]:
        """The images, in the order in which the command scores them."""
        return sorted(self.folder.glob("*.png"))

    @property
    def pixels(self) -> np.ndarray:
        """Their pixels, uint8 [N, H, W, 3]."""
        return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in self.files])

    @property
    def command(self) -> list[str]:
        """The arguments of `diffalign score`, without the output."""
        return [
            "score",
            str(self.folder),
            "--batch-size",
            str(BATCH),
            *(word for reward in self.rewards for word in ("-r", reward)),
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("world")
    folder = pictures.folder(place / "in", len(PROMPTS), PROMPTS)
    clip = tiny_rewards.clip_folder(place / "clip")
    rewards = [f"clip=clipscore:convention=cosine,weights={clip}", "sharpness"]
    return World(folder, rewards, place)


def of_file(path: Path) -> Numbers:
    rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["image"])
    return {label: [row[label] for row in rows] for label in LABELS}


def of_table(table: diffalign.ScoreTable) -> Numbers:
    return {label: table[label] for label in LABELS}


def command_line(world: World) -> Numbers:
    assert run(*world.command, "-o", world.out / "one.jsonl") == 0
    return of_file(world.out / "one.jsonl")


def two_processes(world: World) -> Numbers:
    finish([*torchrun(), "-m", "diffalign", *world.command, "-o", str(world.out / "two.jsonl")])
    return of_file(world.out / "two.jsonl")


def address(world: World) -> Numbers:
    words = [f"file://{word}" if word == str(world.folder) else word for word in world.command]
    assert run(*words, "-o", f"file://{world.out}/address.jsonl") == 0
    return of_file(world.out / "address.jsonl")


def served(world: World) -> Numbers:
    specs = {spec.label: spec for spec in map(parse, world.rewards)}
    rewards = {label: load_reward(spec.name, **spec.options) for label, spec in specs.items()}
    with serving(dict(rewards)) as server:
        asked = (word for label in rewards for word in ("-r", f"{label}=remote:url={server.root}/{label}"))
        command = [*world.command[: world.command.index("-r")], *asked]
        assert run(*command, "-o", world.out / "served.jsonl") == 0
    return of_file(world.out / "served.jsonl")


def stand_in_for_ray(world: World) -> Numbers:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", FakeRay())
        assert run(*world.command, "-o", world.out / "fake.jsonl", "--engine", "ray", "--device", "cpu") == 0
    return of_file(world.out / "fake.jsonl")


def ray_cluster(world: World) -> Numbers:
    pytest.importorskip("ray", reason="Ray is not installed (make test-ray)")
    with small_cluster(world.out / "log") as cluster, pytest.MonkeyPatch.context() as patch:
        cluster.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", cluster.address)
        assert run(*world.command, "-o", world.out / "ray.jsonl", "--engine", "ray", "--device", "cpu") == 0
    return of_file(world.out / "ray.jsonl")


def python(images: Callable[[World], Any]) -> Callable[[World], Numbers]:
    """Return the way from images in Python to numbers."""
    return lambda world: of_table(diffalign.score(images(world), PROMPTS, rewards=world.rewards, batch_size=BATCH))


class Way(NamedTuple):
    """A way of scoring. bound: how far a number may be from the command's, relative; 0: equal to the bit."""

    scores: Callable[[World], Numbers]
    bound: float = 0.0


WAYS = {
    "Python: the folder": Way(
        lambda world: of_table(diffalign.score(world.folder, rewards=world.rewards, batch_size=BATCH))
    ),
    "Python: paths": Way(python(lambda world: world.files)),
    "Python: images of Pillow": Way(python(lambda world: [Image.open(path) for path in world.files])),
    "Python: a batch of 8 bits": Way(python(lambda world: world.pixels)),
    "Python: arrays, channels first": Way(python(lambda world: list(world.pixels.transpose(0, 3, 1, 2)))),
    "Python: a tensor of floats": Way(
        python(lambda world: torch.from_numpy(world.pixels).permute(0, 3, 1, 2).float() / 255)
    ),
    # They share the batches of one process.
    "two processes": Way(two_processes),
    "images and output at an address": Way(address),
    # The server makes batches of its own, of the images that arrive together.
    "HTTP": Way(served, bound=1e-6),
    "a stand-in for Ray": Way(stand_in_for_ray),
    "a Ray cluster": Way(ray_cluster),
}


@pytest.fixture(scope="module")
def numbers(world: World) -> Numbers:
    found = command_line(world)
    assert all(len(set(values)) == len(world.files) for values in found.values())  # images that no mix-up hides
    return found


@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_the_numbers_of_the_command(name: str, world: World, numbers: Numbers) -> None:
    way = WAYS[name]
    found = way.scores(world)
    for label, values in numbers.items():
        if way.bound:
            assert found[label] == pytest.approx(values, rel=way.bound)
        else:
            assert found[label] == values
