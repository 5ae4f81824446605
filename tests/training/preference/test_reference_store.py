"""What a run keeps of the reference, and what later runs make of it: the same numbers, without its forward passes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.objectives import DiffusionDPO
from diffalign.training.preference import reference_store as reference_store
from diffalign.training.preference.reference_key import reference_key
from helpers import toy

PAIRS = ("dpo", "smpo", "ipo", "madpo", "constrained")
GROUPS = ("rankdpo", "gdro")
BETA = {"beta": 20.0}


class Counting(toy.ToyBackbone):
    """Counts the reference's forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.now = 0, "policy"

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        before, self.now = self.now, name
        with super().role(name):
            yield
        self.now = before

    def predict(
        self, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor], module: nn.Module | None = None
    ) -> Tensor:
        self.passes += self.now == "reference"
        return super().predict(noisy, t, conditioning, module)


def shares(source: toy.ToySource) -> toy.ToySource:
    """Labels in [0, 1], which every objective takes."""
    places = source.rewards.argsort(dim=1).argsort(dim=1)
    source.rewards = places / (source.rewards.shape[1] - 1)
    return source


def run(
    run_dir: Path, store: Path | None = None, source: Any = None, objective: str = "dpo", **sections: Any
) -> tuple[list[dict[str, float]], int]:
    """The metrics, and how often the reference was run."""
    reference = {"store": str(store) if store else None, **sections.pop("reference", {})}
    named = {"name": objective, **BETA, **({"trust": 1.0} if objective == "disco" else {})}
    plain = toy.toy_config(run_dir, reference=reference, **sections).model_dump(mode="json")
    config = TrainConfig.model_validate({**plain, "objective": named})
    backbone = Counting()
    toy.train(config, backbone=backbone, source=source or shares(toy.ToySource()), say=lambda _: None)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows, backbone.passes


def without_drift(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "drift"} for row in rows]


def weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "weights/weights.safetensors")


@pytest.mark.parametrize("keep", ["errors", "predictions"])
@pytest.mark.parametrize("first", ["dpo", "rankdpo"])
def test_later_runs_are_the_same_to_the_bit(first: str, keep: str, tmp_path: Path) -> None:
    """A run is read by its like, and by all objectives that look at the same images."""
    cut: dict[str, Any] = {"train": {"micro_batch": 2}, "reference": {"keep": keep}}
    alone, passes = run(tmp_path / "alone", objective=first, train={"micro_batch": 2})
    filling, filled = run(tmp_path / "filling", tmp_path / "kept", objective=first, **cut)
    assert passes == filled == 24
    expected = alone if keep == "predictions" else without_drift(alone)
    assert filling == expected
    same = PAIRS if first == "dpo" else (*GROUPS, *(["disco"] if keep == "predictions" else []))
    for other in same:
        rows, none = run(tmp_path / other, tmp_path / "kept", objective=other, **cut)
        own, _ = run(tmp_path / f"{other}-alone", objective=other, train={"micro_batch": 2})
        assert none == 0 and rows == (own if keep == "predictions" else without_drift(own)), other
        a, b = weights(tmp_path / other), weights(tmp_path / f"{other}-alone")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_longer_run_goes_on_where_the_store_ends(tmp_path: Path) -> None:
    run(tmp_path / "a", tmp_path / "kept", train={"steps": 6})
    rows, passes = run(tmp_path / "b", tmp_path / "kept", train={"steps": 10}, optimizer={"lr": 3e-2})
    assert passes == 4
    assert rows == without_drift(run(tmp_path / "c", train={"steps": 10}, optimizer={"lr": 3e-2})[0])
    assert run(tmp_path / "d", tmp_path / "kept", train={"steps": 10})[1] == 0


class Deadly(toy.ToySource):
    """Kills its own process as it is asked for the given batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.left = batch

    def batch(self, indices: list[int]) -> toy.Batch:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(indices)


@pytest.mark.parametrize("small_files", [False, True])
def test_killed_and_resumed_runs_end_alike(small_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL between checkpoints, while filling and while reading. With small files steps after the last checkpoint are in
    the store already, and the resumed run reads what it once computed."""
    if small_files:
        monkeypatch.setattr(reference_store, "FILE_BYTES", 1)
    straight, _ = run(tmp_path / "straight", source=toy.ToySource())
    for name in ("filling", "reading"):
        child = os.fork()
        if child == 0:
            try:
                run(tmp_path / name, tmp_path / "kept", Deadly(7))
            finally:
                os._exit(1)  # never back into pytest
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        rows, passes = run(tmp_path / name, tmp_path / "kept", toy.ToySource())
        assert rows == without_drift(straight)
        assert passes == (0 if name == "reading" else 5 if small_files else 8)
        a, b = (load_file(tmp_path / d / "checkpoints/step-00000012/optimizer.safetensors") for d in (name, "straight"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list((tmp_path / "kept").glob("*.part"))


def flipped() -> toy.ToySource:
    source = shares(toy.ToySource())
    source.rewards = 1 - source.rewards
    return source


def other_data() -> toy.ToySource:
    source = shares(toy.ToySource())
    source.latents = source.latents * 2
    return source


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", {"seed": 3}),
        ("data", {"source": other_data()}),
        ("groups", {"source": shares(toy.ToySource(groups=12))}),
        ("labels", {"source": flipped()}),
        ("objective.members", {"objective": "gdro"}),
        ("data.group_size", {"data": {"group_size": 3}}),
        ("data.latent_sampling", {"data": {"latent_sampling": "posterior"}}),
        ("data.cache_dtype", {"data": {"cache_dtype": "float32"}}),
        ("data.resolution", {"data": {"resolution": 64}}),
        ("model.dtype", {"model": {"dtype": "bfloat16"}}),
        ("train.micro_batch", {"train": {"micro_batch": 2}}),
        ("train.groups_per_step", {"train": {"groups_per_step": 8}}),
        ("train.images_per_pass", {"train": {"images_per_pass": 1}}),
        ("train.prompt_dropout", {"train": {"prompt_dropout": 0.1}}),
        ("times.sampler", {"times": {"sampler": "logit_normal"}}),
        ("times.shift", {"times": {"shift": 3.0}}),
        ("noise", {"noise": "independent"}),
        ("selection.groups", {"selection": {"groups": "curriculum"}}),
        ("reference.keep", {"reference": {"keep": "predictions"}}),
    ],
)
def test_another_key_is_refused_by_name(field: str, change: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path / "a", tmp_path / "kept", train={"steps": 1})
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    with pytest.raises(DiffalignError, match=f"reference.store .*kept belongs to other draws: {field} was .* is now"):
        run(tmp_path / "b", tmp_path / "kept", **{"train": {"steps": 1}, **change})
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


def test_other_weights_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "a", tmp_path / "kept", train={"steps": 1})
    monkeypatch.setattr(toy.ToyBackbone, "fingerprint", lambda self: "retrained")
    with pytest.raises(DiffalignError, match="belongs to other draws: model was 'toy', is now 'retrained'"):
        run(tmp_path / "b", tmp_path / "kept", train={"steps": 1})


def test_precision_is_the_one_in_use(tmp_path: Path) -> None:
    """`auto` is bf16 on a GPU and no on a CPU."""
    backbone, source, config = toy.ToyBackbone(), toy.ToySource(), toy.toy_config(tmp_path)
    keys = [
        reference_key(config, source, backbone, DiffusionDPO(), micro=4, precision=precision)
        for precision in ("no", "bf16")
    ]
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["train.mixed_precision"]


def test_labels_count_as_far_as_they_choose_images(tmp_path: Path) -> None:
    """A rescaled reward picks the same pair; an objective that looks at all images does not ask for labels."""
    squared, odd = shares(toy.ToySource()), flipped()
    squared.rewards = squared.rewards.square()
    run(tmp_path / "a", tmp_path / "pairs")
    assert run(tmp_path / "b", tmp_path / "pairs", squared)[1] == 0
    run(tmp_path / "c", tmp_path / "groups", objective="rankdpo")
    assert run(tmp_path / "d", tmp_path / "groups", odd, objective="gdro")[1] == 0


def test_noise_of_images_inverted_by_the_reference_is_kept(tmp_path: Path) -> None:
    inverted: dict[str, Any] = {"noise": "inverted", "inversion": {"steps": 3, "by": "reference"}}
    alone, passes = run(tmp_path / "alone", **inverted)
    filling, filled = run(tmp_path / "a", tmp_path / "kept", **inverted)
    reading, none = run(tmp_path / "b", tmp_path / "kept", **inverted)
    assert passes == filled > 12 and none == 0
    assert filling == reading == without_drift(alone)


def test_a_store_from_before_the_models_options_had_a_section_serves(tmp_path: Path) -> None:
    """Its key has them as keys of the model; a value that is not the default is still another model."""
    run(tmp_path / "a", tmp_path / "kept")
    path = tmp_path / "kept/key.json"
    key = json.loads(path.read_text())
    assert key.pop("model.options") == {}
    former = {"model.use_t5": True, "model.max_sequence_length": None, "model.guidance": 3.5}
    path.write_text(json.dumps({**key, **former}))
    assert run(tmp_path / "b", tmp_path / "kept")[1] == 0
    path.write_text(json.dumps({**key, **former, "model.guidance": 5.0}))
    with pytest.raises(DiffalignError, match=r"belongs to other draws: model\.options was \{'guidance': 5\.0\}"):
        run(tmp_path / "c", tmp_path / "kept")


def test_nothing_but_whole_safetensors_lies_in_a_store(tmp_path: Path) -> None:
    run(tmp_path / "a", tmp_path / "kept", reference={"keep": "predictions"})
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    ends = [(1, 4), (5, 8), (9, 12)]
    assert names == ["key.json", *(f"step-{a:08d}-{b:08d}-0.safetensors" for a, b in ends)]
    first = load_file(tmp_path / "kept" / names[1])
    assert first["0/0/prediction"].shape == (4, 2, *toy.SHAPE) and first["0/0/members"].shape == (4, 2)


def test_predictions_are_narrowed_only_where_nothing_is_lost() -> None:
    exact = torch.randn(2, 3, 4).bfloat16().float()
    assert reference_store._narrow(exact).dtype == torch.bfloat16
    fine = exact + 2**-20
    assert torch.equal(reference_store._narrow(fine), fine) and reference_store._narrow(fine).dtype == torch.float32
    half = torch.full((2, 3, 4), 1 + 2**-10)
    assert reference_store._narrow(half).dtype == torch.float16


def tampered(store: Path, change: float) -> None:
    path = next(store.glob("step-00000001-*"))
    values = load_file(path)
    values["0/0/error"] += change
    save_file(values, path)


def test_a_stored_reference_may_round_differently_but_no_more(tmp_path: Path) -> None:
    """beta |d| may reach 0.05 before the first update; beta is 20 here."""
    run(tmp_path / "a", tmp_path / "kept")
    tampered(tmp_path / "kept", 0.05 / 20 * 0.9)
    run(tmp_path / "b", tmp_path / "kept")
    tampered(tmp_path / "kept", 0.05 / 20 * 0.2)
    with pytest.raises(DiffalignError, match="reference.store: before the first update beta times .* is 0.05"):
        run(tmp_path / "c", tmp_path / "kept")


@pytest.mark.parametrize("keep", ["errors", "predictions"])
@pytest.mark.parametrize("at", [-6, -1, 0.5, 0.9])
def test_changed_bytes_are_found(at: float, keep: str, tmp_path: Path) -> None:
    """A low bit of a stored number: the numbers stay plausible, and only the checksum tells."""
    first, _ = run(tmp_path / "a", tmp_path / "kept", reference={"keep": keep})
    path = sorted((tmp_path / "kept").glob("step-*"))[-1]
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")  # of the numbers, after the header
    data[at if at < 0 else start + int(at * (len(data) - start))] ^= 1  # type: ignore[index]
    path.write_bytes(data)
    with pytest.raises(DiffalignError, match=rf"{path} cannot be read \(the checksum of .* differs\); delete it, and"):
        run(tmp_path / "b", tmp_path / "kept", reference={"keep": keep})
    path.unlink()
    assert run(tmp_path / "c", tmp_path / "kept", reference={"keep": keep})[0] == first


def test_a_store_without_checksums_is_read(tmp_path: Path) -> None:
    """As versions before 0.2 wrote it."""
    first, _ = run(tmp_path / "a", tmp_path / "kept")
    for path in (tmp_path / "kept").glob("step-*"):
        save_file(load_file(path), path)
    assert run(tmp_path / "b", tmp_path / "kept") == (first, 0)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a"'])
def test_a_damaged_key_is_named(text: str, tmp_path: Path) -> None:
    run(tmp_path / "a", tmp_path / "kept")
    (tmp_path / "kept/key.json").write_text(text)
    with pytest.raises(DiffalignError, match=r"^reference.store .*key.json cannot be read .*; choose another folder$"):
        run(tmp_path / "b", tmp_path / "kept")


def test_damage_and_a_full_disk_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "a", tmp_path / "kept")
    path = next((tmp_path / "kept").glob("step-*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(DiffalignError, match=r"reference.store .*safetensors cannot be read .*delete it"):
        run(tmp_path / "b", tmp_path / "kept")
    path.unlink()
    assert run(tmp_path / "b", tmp_path / "kept")[1] == 4

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_store, "save_file", full)
    with pytest.raises(DiffalignError, match="cannot be written .*No space left.*reference.store=null"):
        run(tmp_path / "c", tmp_path / "other")
    monkeypatch.undo()
    # What the message offers: the same run goes on without.
    assert len(run(tmp_path / "c")[0]) == 12
