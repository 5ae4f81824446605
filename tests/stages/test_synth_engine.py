"""`synth` with `engine=ray` on a stand-in for Ray: the folder of one machine, whatever dies and whoever answers first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import pytest

from diffalign.errors import DiffalignError
from diffalign.stages import drawing, synth
from helpers.fake_ray import FakeRay
from helpers.files import tree
from helpers.synth_models import Painter, open_channel, open_painter


@pytest.fixture
def made(world: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, bytes]]:
    monkeypatch.setattr(drawing, "open_generator", open_painter)
    monkeypatch.setattr(synth, "open_reward", open_channel)

    def make(name: str, *overrides: str, ray: FakeRay | None = None) -> dict[str, bytes]:
        monkeypatch.setitem(sys.modules, "ray", ray or FakeRay())
        return tree(world(name, *overrides))

    return make


@pytest.mark.parametrize("dies", [(), (1, 3, 9, 20)])
def test_the_folder_of_one_machine(
    made: Callable[..., dict[str, bytes]], tmp_path: Path, dies: tuple[int, ...]
) -> None:
    (tmp_path / "prompts.txt").write_text("".join("bad\n" if i == 3 else f"prompt {i}\n" for i in range(21)))
    ray = FakeRay(dies=dies)
    assert made("ray", "engine=ray", "reward_batch=7", ray=ray) == made("one", "reward_batch=7")
    # 16 batches are drawn, and 10 scored by each of two rewards, where each of the five files has two.
    assert ray.calls >= 16 + 2 * 10 and (ray.made > 4 * 3) == bool(dies)


def test_a_cluster_that_fails_keeps_what_was_drawn(made: Callable[..., dict[str, bytes]], tmp_path: Path) -> None:
    for first in (4, 12, 20):  # while drawing with one model, with the other, while scoring
        with pytest.raises(DiffalignError, match=r"a batch ended its process|no actor starts"):
            made(f"ray{first}", "engine=ray", ray=FakeRay(dies=tuple(range(first, 300))))
        assert list((tmp_path / f"ray{first}" / "data" / ".work").rglob("*.parquet"))
        rest = FakeRay()
        assert made(f"ray{first}", "engine=ray", ray=rest) == made("one")
        assert rest.calls < 16 + 2 * 5  # all that one machine would do


def test_another_model_on_a_node_is_refused(
    made: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions = chain("a", repeat("b"))  # of the first actor, and of all others
    monkeypatch.setattr(drawing, "open_generator", lambda section, _: Painter(section.name, revision=next(revisions)))
    with pytest.raises(DiffalignError, match="generator one: images were drawn with revision='a', now it is 'b'"):
        made("ray", "engine=ray")


def test_a_dry_run_is_of_this_machine(world: Callable[..., Path]) -> None:
    with pytest.raises(DiffalignError, match="use engine=local"):
        world("dry", "engine=ray", dry_run=True)
