"""Selection: which groups and images, with what weight; and several rewards as one label. Oracles in numpy."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.config import load_config
from diffalign.data.choose_members import choose_members
from diffalign.data.combine import calibrations, combined_labels
from diffalign.data.labels import balanced
from diffalign.errors import DiffalignError
from diffalign.pipelines.process import Flow
from diffalign.rewards.aggregate import dvao
from diffalign.training.order import groups_for_step
from diffalign.training.preference.draws import make_draws
from diffalign.training.preference.selection import (
    Selection,
    easiest,
    loser_by_rank,
    loser_by_score,
    phase_of,
    relaxed,
    weights_by_gap,
    weights_by_mean,
)
from helpers import toy
from helpers.small_datasets import scored

SMALL = "run_dir: runs/x\nmodel: {path: m}\ndata: {path: d}\n"


def test_phases_are_equal_parts_and_never_go_back() -> None:
    for steps, phases in ((10, 3), (7, 7), (5, 8), (100, 1)):
        found = [phase_of(step, steps, phases) for step in range(steps)]
        assert [p for p, _ in found] == sorted(p for p, _ in found)
        assert found[-1][0] == (phases - 1 if phases <= steps else found[-1][0])
        for step, (phase, first) in enumerate(found):
            assert first == min(s for s, (p, _) in enumerate(found) if p == phase) <= step


def test_a_curriculum_starts_with_what_is_far_apart_and_ends_with_all() -> None:
    gaps = np.array([0.1, 0.9, -1.0, 0.5, 0.9, 0.3])
    assert easiest(gaps, 0, 3).tolist() == [1, 4]
    assert easiest(gaps, 1, 3).tolist() == [1, 3, 4, 5]
    assert easiest(gaps, 2, 3).tolist() == [0, 1, 2, 3, 4, 5]


def test_d3s_schedule_and_subsets() -> None:
    assert [relaxed(4, 16, step, 5) for step in range(5)] == [4, 7, 10, 13, 16]
    assert relaxed(4, 8, 0, 1) == 4
    # 16 of 0 and 1, three of them 1: as many of both, with variance 1.641026 of the advantages.
    rewards = np.array([1.0] * 3 + [0.0] * 13)
    advantages = (rewards - rewards.mean()) / rewards.std()
    chosen = choose_members(advantages, "variance", 6, np.random.default_rng(0))
    assert rewards[chosen].sum() == 3 and np.var(advantages[chosen]) == pytest.approx(1.641026, abs=1e-6)
    # Over two prompts at once, one of 1 in 8 and one of 4 in 8: the first's success and the second's failures.
    both = np.concatenate([_advantages(1), _advantages(4)])
    chosen = choose_members(both, "variance", 4, np.random.default_rng(0))
    assert sorted(both[chosen].round(6)) == [-1.0, -1.0, -1.0, 2.645751]
    assert np.var(both[chosen]) == pytest.approx(2.492157, abs=1e-6)
    assert max(np.var(both[list(c)]) for c in combinations(range(16), 4)) == pytest.approx(2.492157, abs=1e-6)


def _advantages(successes: int) -> np.ndarray:
    rewards = np.array([1.0] * successes + [0.0] * (8 - successes))
    return np.asarray((rewards - rewards.mean()) / rewards.std())


def test_pairs_from_the_farthest_to_the_closest() -> None:
    labels = torch.tensor([[0.2, 1.0, 0.9, 0.4, 0.0]])
    ranked = labels.argsort(dim=1, descending=True)
    assert [loser_by_rank(ranked, phase, 4).item() for phase in range(4)] == [4, 0, 3, 2]
    # Shares 1, 2/3, 1/3 and 0 of the gap: 1.0, nearest 0.6, nearest 0.6 again (0.33 lies between 0.1 and 0.6), 0.1.
    assert [loser_by_score(ranked, labels, phase, 4).item() for phase in range(4)] == [4, 3, 2, 2]
    assert loser_by_score(ranked, labels, 0, 1).item() == loser_by_rank(ranked, 0, 1).item() == 4


def test_a_tie_with_the_best_is_no_pair() -> None:
    labels = torch.tensor([[1.0, 1.0, 0.0]])
    assert loser_by_score(torch.tensor([[0, 1, 2]]), labels, 2, 3).item() == 2
    assert loser_by_score(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), 1, 3).item() == 2


def test_weights_of_difficulty() -> None:
    """MathForge's weights for mean accuracies 1/8, 4/8, 7/8 at T = 2; ours by the gap, for a symmetric set."""
    assert weights_by_mean(np.array([0.125, 0.5, 0.875]), 2.0) == pytest.approx(
        [1.192218, 0.988383, 0.819399], abs=1e-6
    )
    gaps = np.array([0.1, 0.3, 0.5])
    z = 0.2 / gaps.std()
    expected = [1 + 0.5 * math.erf(z / math.sqrt(2)), 1.0, 1 - 0.5 * math.erf(z / math.sqrt(2))]
    assert weights_by_gap(gaps, 0.5) == pytest.approx(expected)
    assert weights_by_gap(np.array([0.3, 0.3]), 0.5).tolist() == [1.0, 1.0]


def test_balanced_labels() -> None:
    assert balanced(np.array([1.0] + [0.0] * 7)) == pytest.approx([4.0] + [-0.571429] * 7, abs=1e-6)
    assert balanced(np.array([0.9, 0.5, 0.1, 0.1])) == pytest.approx([1.666667, 0.333333, -1, -1], abs=1e-6)
    assert balanced(np.array([0.3, 0.3])).tolist() == [0.0, 0.0]
    assert np.isnan(balanced(np.array([1.0, np.nan, 0.0]))).tolist() == [False, True, False]


# --- in a run ----------------------------------------------------------------------------------------------------


def run(folder: Path, source: Any = None, steps: int = 12, **sections: Any) -> list[dict[str, float]]:
    sections.setdefault("train", {})
    config = toy.toy_config(folder, **{**sections, "train": {"steps": steps, **sections["train"]}})
    toy.train(config, backbone=toy.ToyBackbone(), source=source or toy.ToySource(), say=lambda _: None)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Stopping(toy.ToySource):
    """As Ctrl-C after so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def batch(self, indices: list[int]) -> toy.Batch:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().batch(indices)


def seen(folder: Path, steps: int = 12, **selection: Any) -> tuple[list[list[int]], list[Any]]:
    """Groups and members of every step."""
    source, config = toy.ToySource(), toy.toy_config(folder, selection=selection, train={"steps": steps})
    chosen = Selection.of(config, source)
    groups, members = [], []
    for step in range(steps):
        groups.append(chosen.groups(step))
        ids = [source.group_ids[i] for i in groups[-1]]
        draws = make_draws(config, Flow(), step, list(range(4)), ids, torch.Size((4, 4, *toy.SHAPE)))
        members.append(chosen.narrow(draws, source.rewards[groups[-1]], step, list(range(4)), ids).members)
    return groups, members


def test_by_default_nothing_is_chosen(tmp_path: Path) -> None:
    groups, members = seen(tmp_path)
    assert groups == [groups_for_step(13, 4, step, 0) for step in range(12)]
    assert all(torch.equal(m, torch.arange(4).expand(4, 4)) for m in members)


def test_a_curriculum_in_a_run(tmp_path: Path) -> None:
    source = toy.ToySource()
    gaps = (source.rewards.amax(1) - source.rewards.amin(1)).numpy()
    groups, _ = seen(tmp_path, groups="curriculum", phases=3)
    first = set(np.argsort(-gaps)[:5].tolist())
    assert {i for step in groups[:4] for i in step} <= first
    assert {i for step in groups[8:] for i in step} - first
    # Every phase begins its own epochs, so each of its groups comes up before one comes up twice.
    for start, phase in ((0, 0), (4, 1), (8, 2)):
        pool = easiest(gaps, phase, 3)
        assert groups[start] == [pool[i] for i in groups_for_step(len(pool), 4, 0, 0)]
    assert len({i for step in groups[:2] for i in step}) == 5


@pytest.mark.parametrize(
    "selection",
    [
        {"images": "variance", "sizes": [2, 4]},
        {"images": "rank_gap", "groups": "curriculum", "phases": 2},
        {"images": "score_gap", "weight": "gap"},
        {"weight": "mean", "temperature": 0.2},
    ],
    ids=str,
)
def test_killed_or_cut_over_micro_batches_the_choice_is_the_same(selection: dict[str, Any], tmp_path: Path) -> None:
    """Stopped after a checkpoint and begun again, and in other micro-batches: the same images, so the same losses."""
    options: dict[str, Any] = {
        "selection": selection,
        "labels": {"source": "scores.x"},
        "objective": {"name": "gdro", "beta": 2.0},
    }
    whole = run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", source=Stopping(6), **options)
    assert run(tmp_path / "stopped", **options) == whole
    cut = run(tmp_path / "cut", train={"micro_batch": 2}, **options)
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in cut] == pytest.approx([r[name] for r in whole], rel=1e-4)


def test_weights_count_in_the_loss_and_leave_the_shares_alone(tmp_path: Path) -> None:
    labels = {"source": "scores.x"}
    plain = run(tmp_path / "a", labels=labels, steps=1)[0]
    selection = {"weight": "mean", "temperature": 0.2}
    weighted = run(tmp_path / "b", labels=labels, selection=selection, steps=1)[0]
    source = toy.ToySource()
    weights = weights_by_mean(source.rewards.mean(1).double().numpy(), 0.2)
    indices = groups_for_step(13, 4, 0, 0)
    # At the reference every group's loss is log 2.
    assert plain["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert weighted["loss"] == pytest.approx(math.log(2) * weights[indices].mean(), rel=1e-6)
    assert weighted["share_without_preference"] == plain["share_without_preference"] == 0.0


def test_groups_without_preference_come_last_and_nan_labels_harm_nothing(tmp_path: Path) -> None:
    source = toy.ToySource()
    source.rewards[0], source.rewards[1, 1:], source.rewards[2, 0] = 0.5, float("nan"), float("nan")
    for number, selection in enumerate(
        ({"groups": "curriculum"}, {"images": "variance", "sizes": [2, 3]}, {"images": "score_gap"})
    ):
        rows = run(tmp_path / str(number), source=source, selection=selection)
        assert all(np.isfinite(r["loss"]) for r in rows)
    pools = [
        set(pool.tolist())
        for pool, _ in Selection.of(toy.toy_config(tmp_path, selection={"groups": "curriculum"}), source).pools
    ]
    assert all(not pool & {0, 1} for pool in pools[:-1]) and pools[-1] >= {0, 1}
    # A group that lacks a label has its place by those it has.
    gap = (source.rewards[2, 1:].max() - source.rewards[2, 1:].min()).item()
    wider = [i for i in range(3, 13) if source.rewards[i].max() - source.rewards[i].min() > gap]
    assert (2 in pools[0]) == (len(wider) < len(pools[0]))


def test_a_schedule_cannot_go_on_with_another_length(tmp_path: Path) -> None:
    options: dict[str, Any] = {"selection": {"groups": "curriculum"}}
    run(tmp_path, steps=4, **options)
    with pytest.raises(DiffalignError, match="train.steps was 4, is now 8"):
        run(tmp_path, steps=8, **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selection.phases=4"], "nothing goes by phases"),
        (["selection.images=variance"], "go together: selection.sizes"),
        (["selection.images=variance", "selection.sizes=[1, 4]"], "at least two images"),
        (["selection.images=rank_gap", "data.group_size=4"], "leave one out"),
        (["selection.weight=mean"], "same mean in every group"),
        (["selection.grups=all"], "did you mean groups"),
        (["tune.reference=base"], "without tune.init the reference is the base anyway"),
        (["labels.source=combined"], "go together"),
        (["labels.source=combined", "labels.combine={weights: {a: -1.0}}"], "vote against"),
        (["labels.source=combined", "labels.combine={how: gated, weights: {a: 1.0}}"], "gates go together"),
        (["labels.source=combined", "labels.combine={weights: {a: 1.0}}", "labels.transform=minmax"], "scaled already"),
        (
            ["labels.source=combined", "labels.combine={weights: {a: 1.0}}", "labels.stats={mean: 1.0}"],
            "a.mean and a.std",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SMALL)
    with pytest.raises(DiffalignError, match=message):
        load_config(path, overrides)


def test_too_large_subsets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="the groups have 4 images; use at most that many"):
        seen(tmp_path, images="variance", sizes=[4, 8])


# --- several rewards as one label ----------------------------------------------------------------------------------

FIRST = [[1.0, 1.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]]
SECOND = [[0.80, 0.78, 0.82, 0.79, 0.81, 0.80], [0.70, 0.90, 0.80, 0.80, 0.75, 0.85]]


def combine(how: str, weights: dict[str, float], gates: dict[str, float] | None = None) -> Any:
    return SimpleNamespace(how=how, weights=weights, gates=gates or {})


def test_combined_labels(tmp_path: Path) -> None:
    dataset = scored(tmp_path, {"a": FIRST, "b": SECOND})
    a, b = np.array(FIRST), np.array(SECOND)
    given = combine("sum", {"a": 1.0, "b": 3.0})
    stats = calibrations(dataset, [0, 1], given)
    assert stats == pytest.approx({"a.mean": a.mean(), "a.std": a.std(), "b.mean": b.mean(), "b.std": b.std()})
    z = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    total = z[0] + 3 * z[1]
    found = combined_labels(dataset, [0, 1], given, stats)
    assert np.stack(found) == pytest.approx(total, abs=1e-5)  # scores are stored in float32

    advantages = combined_labels(dataset, [0, 1], combine("dvao", {"a": 1.0, "b": 3.0}), stats)
    for group in range(2):
        spread = z[0][group].std() + 3 * z[1][group].std()
        assert advantages[group] == pytest.approx((total[group] - total[group].mean()) / spread, abs=1e-5)
        # Where only the order counts it changes nothing.
        assert np.array_equal(np.argsort(advantages[group]), np.argsort(found[group]))

    alone = combine("gated", {"b": 1.0}, {"a": 1.0})
    gated = combined_labels(dataset, [0, 1], alone, calibrations(dataset, [0, 1], alone))
    for group in range(2):
        passed = a[group] >= 1
        assert gated[group][passed].min() > gated[group][~passed].max()
        assert np.argmax(gated[group]) == max(np.flatnonzero(passed), key=lambda i: (b[group, i], -i))


def test_dvao_vector_on_raw_scales(tmp_path: Path) -> None:
    """With the scales left as they are, the first reward drowns the second, and the numbers are the published ones."""
    dataset = scored(tmp_path, {"a": FIRST, "b": SECOND})
    raw = {"a.mean": 0.0, "a.std": 1.0, "b.mean": 0.0, "b.std": 1.0}
    found = combined_labels(dataset, [0], combine("dvao", {"a": 0.5, "b": 0.5}), raw)[0]
    assert found == pytest.approx([0.97483, 0.935837, -0.935837, -0.994327, -0.955333, 0.97483], abs=2e-6)


def test_a_reward_without_spread_cannot_be_combined(tmp_path: Path) -> None:
    dataset = scored(tmp_path, {"a": [[1.0, 1.0], [1.0, 1.0]]})
    with pytest.raises(DiffalignError, match="labels.combine.weights: a: 4 scores without any spread"):
        calibrations(dataset, [0, 1], combine("sum", {"a": 1.0}))


@pytest.mark.parametrize("place", range(3))
def test_an_image_without_a_gates_score_has_no_label(place: int, tmp_path: Path) -> None:
    """Whether it passes is unknown; the others are ranked as if it were not there."""
    gate, values = [1.0, 0.0, 1.0], [0.1, 0.9, 0.5]
    gate[place] = float("nan")
    dataset = scored(tmp_path, {"a": [gate], "b": [values]})
    alone = combine("gated", {"b": 1.0}, {"a": 1.0})
    (found,) = combined_labels(dataset, [0], alone, calibrations(dataset, [0], alone))
    others = [k for k in range(3) if k != place]
    assert np.isnan(found[place]) and np.isfinite(found[others]).all()
    assert max(others, key=lambda k: found[k]) == max(others, key=lambda k: (gate[k], values[k]))


def test_a_reward_of_weight_0_may_lack_scores() -> None:
    scores = np.array([[np.nan, 1.0], [0.5, 0.5]])
    advantages, _ = dvao(scores, [0.0, 1.0])
    assert advantages.tolist() == [0.0, 0.0]
