"""Aspect buckets: sizes, the group's one, what training sees, and the order of steps whose batches never mix shapes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.buckets import bucket_sizes, fit, most, nearest
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.training_source import prepare_source
from diffalign.data.writer import write_groups
from diffalign.errors import DiffalignError
from diffalign.training.order import BucketOrder, check_units, groups_for_step
from diffalign.training.preference.posterior import with_samples
from helpers import toy
from helpers.small_datasets import LABELS, Encoder, group_rows, quiet, settings, write_images


def test_sizes_of_auto() -> None:
    sizes = bucket_sizes("auto", 1024, 8)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768)} <= set(sizes)  # SDXL's own
    assert all(w % 64 == 0 and h % 64 == 0 and w * h <= 1024**2 and 0.5 <= w / h <= 2 for w, h in sizes)
    assert all(w * h > 0.85 * 1024**2 for w, h in sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert (64, 64) in bucket_sizes("auto", 64, 16)
    assert all(w % 16 == 0 for w, _ in bucket_sizes("auto", 64, 16))
    assert bucket_sizes("none", 512, 8) == [(512, 512)]
    assert max(max(size) for size in bucket_sizes("auto", 64, 8, longest=72)) == 72
    with pytest.raises(DiffalignError, match="96x48 is beyond the 64 pixels a side"):
        bucket_sizes([[96, 48]], 64, 8, longest=64)
    with pytest.raises(DiffalignError, match="100x64 are not multiples of 8"):
        bucket_sizes([[100, 64]], 64, 8)


def test_the_nearest_aspect() -> None:
    sizes = [(64, 64), (96, 48), (48, 96)]
    assert nearest((1000, 900), sizes) == (64, 64)
    assert nearest((300, 170), sizes) == (96, 48)
    assert nearest((1, 2), sizes) == (48, 96)
    assert nearest((100, 50), [(64, 32), (128, 64)]) == (128, 64)
    assert most({0: (1, 1), 1: (2, 1), 2: (2, 1)}) == (2, 1)
    assert most({1: (2, 1), 0: (1, 1)}) == (1, 1)


def test_pictures_are_covered_and_cropped() -> None:
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste(Image.new("RGB", (20, 20), "blue"), (10, 0))
    square = fit(wide, (10, 10))
    assert square.shape == (10, 10, 3) and (square[:, 3:7] == [0, 0, 255]).all()  # Lanczos rings at the edges
    assert np.array_equal(fit(wide, (40, 20)), np.asarray(wide))
    assert fit(wide, (16, 24)).shape == (24, 16, 3)


def test_a_group_has_one_shape(tmp_path: Path) -> None:
    """Group a: two wide images of three. Group b: one of three. Group c: square."""
    write_images(tmp_path, a0=(32, 16), a2=(36, 17), b1=(32, 16))
    write_groups(tmp_path, group_rows())
    said: list[str] = []
    data = settings(buckets=[[16, 16], [32, 16]])
    source = prepare_source(data, LABELS, PreferenceDataset(tmp_path), Encoder(), said.append)
    assert source.buckets == [1, 0, 0] and any("2 of 16x16, 1 of 32x16" in line for line in said)
    assert source.batch([0]).latents.shape == (1, 3, 3, 2, 4) and source.batch([1, 2]).latents.shape == (2, 3, 3, 2, 2)
    live = prepare_source(
        settings(buckets=[[16, 16], [32, 16]], cache="off"), LABELS, PreferenceDataset(tmp_path), Encoder(), quiet
    )
    assert torch.equal(live.batch([0]).latents, source.batch([0]).latents)
    with pytest.raises(ValueError, match="different sizes in one batch"):
        source.batch([0, 1])


def test_sdxl_is_told_the_buckets_size(sdxl_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-conditioning of a wide latent is what the pipeline itself passes when it draws that size."""
    from diffalign.pipelines import load_backbone

    backbone = load_backbone(sdxl_dir)
    seen = []
    genuine = backbone.trunk.forward

    def forward(*args: object, added_cond_kwargs: dict[str, torch.Tensor], **rest: object) -> object:
        seen.append(added_cond_kwargs["time_ids"][0].tolist())
        return genuine(*args, added_cond_kwargs=added_cond_kwargs, **rest)

    monkeypatch.setattr(backbone.trunk, "forward", forward)
    backbone.sample(["a"], [0], steps=1, guidance_scale=1.0, height=48, width=96)
    backbone.predict(torch.zeros(1, 4, 6, 12), torch.tensor([500.0]), backbone.encode_prompts(["a"]))
    assert seen[-1] == seen[0] == [48.0, 96.0, 0.0, 0.0, 48.0, 96.0]


# --- the order of steps ----------------------------------------------------------------------------------------------

BUCKETS = [0] * 13 + [1] * 6 + [2] * 3


def test_one_bucket_is_the_plain_order() -> None:
    order = BucketOrder([0] * 13, 2, 4, seed=3)
    assert [order.step(s) for s in range(20)] == [groups_for_step(13, 4, s, 3) for s in range(20)]


@pytest.mark.parametrize("unit", [1, 2, 4])
def test_units_never_mix_and_every_group_comes_as_often(unit: int) -> None:
    order = BucketOrder(BUCKETS, unit, 4, seed=0)
    groups = [g for step in range(11 * 20 // 2) for g in order.step(step)]  # 20 epochs of 22 groups
    units = [groups[i : i + unit] for i in range(0, len(groups), unit)]
    assert all(len({BUCKETS[g] for g in one}) == 1 for one in units)
    times = Counter(groups)
    assert set(times) == set(range(22))
    for group, bucket in enumerate(BUCKETS):
        # what a bucket still owes is less than a unit
        assert abs(times[group] - 20) <= 1 + unit // BUCKETS.count(bucket)
    assert groups[:22] != groups[22:44]


def test_an_epoch_has_every_group_once_where_units_divide_buckets() -> None:
    buckets = [0] * 8 + [1] * 4
    order = BucketOrder(buckets, 2, 4, seed=1)
    epochs = [[g for step in range(3 * e, 3 * e + 3) for g in order.step(step)] for e in range(4)]
    assert all(sorted(groups) == list(range(12)) for groups in epochs) and epochs[0] != epochs[1]


def test_a_later_step_needs_no_earlier_one() -> None:
    order = BucketOrder(BUCKETS, 2, 4, seed=0)
    whole = [order.step(s) for s in range(60)]
    assert [BucketOrder(BUCKETS, 2, 4, seed=0).step(s) for s in (59, 3, 31)] == [whole[59], whole[3], whole[31]]


def test_a_cut_through_units_is_refused() -> None:
    check_units(BUCKETS, 4, 2)
    check_units([0, 0], 6, 4)
    with pytest.raises(DiffalignError, match=r"into 4 groups, which do not divide train.micro_batch=6; set .*=4"):
        check_units(BUCKETS, 6, 4)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_micro_batches_never_mix_on_any_number_of_processes(processes: int) -> None:
    """Cut as the loop cuts: each process takes its share of a step, micro-batch by micro-batch."""
    per_process = 8 // processes
    micro = min(4, per_process)
    check_units(BUCKETS, 4, micro)
    order = BucketOrder(BUCKETS, 4, 8, seed=2)
    for step in range(30):
        groups = order.step(step)
        assert all(len({BUCKETS[g] for g in groups[start : start + micro]}) == 1 for start in range(0, 8, micro))


class Shaped(toy.ToySource):
    """A source that refuses to mix its buckets, as latents of different shapes would."""

    def __init__(self) -> None:
        super().__init__(groups=13)
        self.buckets = [int(g % 3 == 0) for g in range(13)]

    def batch(self, indices: list[int]) -> toy.Batch:
        assert len({self.buckets[i] for i in indices}) == 1
        return super().batch(indices)


def test_training_over_buckets_resumes_bit_for_bit(tmp_path: Path) -> None:
    shape = {"groups_per_step": 4, "micro_batch": 2, "threads": 1}
    for steps in (5, 12):
        toy.train(
            toy.toy_config(tmp_path / "cut", train={**shape, "steps": steps}, checkpoint={"every": 5}),
            backbone=toy.ToyBackbone(), source=Shaped(), say=quiet,
        )  # fmt: skip
    toy.train(
        toy.toy_config(tmp_path / "whole", train={**shape, "steps": 12}),
        backbone=toy.ToyBackbone(), source=Shaped(), say=quiet,
    )  # fmt: skip
    one, two = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("cut", "whole"))
    assert one == two


# --- samples of the posterior ----------------------------------------------------------------------------------------


def test_posterior_samples_are_the_draws_own(tmp_path: Path) -> None:
    config = toy.toy_config(tmp_path, seed=5)
    zeros, ones = torch.zeros(2, 4, 2, 32, 32), torch.ones(2, 4, 2, 32, 32)
    batch = toy.Batch(zeros + 3, {}, zeros, zeros, ["g0", "g1"], ["", ""], ones / 2)
    both = with_samples(config, batch, 7, [0, 1])
    assert (
        both.spread is None
        and abs(float(both.latents.mean()) - 3) < 0.01
        and abs(float(both.latents.std()) - 0.5) < 0.01
    )
    alone = with_samples(config, toy.Batch(zeros[1:] + 3, {}, zeros, zeros, ["g1"], [""], ones[1:] / 2), 7, [1])
    assert torch.equal(alone.latents[0], both.latents[1])  # whatever it is drawn beside
    assert not torch.equal(both.latents[0, 0], both.latents[0, 1])  # each image its own
    again = with_samples(config, batch, 8, [0, 1])
    assert not torch.equal(again.latents, both.latents)  # a new one each time
    plain = toy.Batch(zeros, {}, zeros, zeros, ["g0", "g1"], ["", ""])
    assert with_samples(config, plain, 7, [0, 1]) is plain
