"""`train.online`: images drawn by the old policy, scored, labelled and trained on; exact on resume and for any processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from diffalign.config import load_config
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.training.average_decay import AverageDecay
from diffalign.training.preference.drawn_groups import DrawnGroups
from diffalign.training.run import run
from helpers.drawn_run import PROMPTS, Euler, Red, Words, drawn_config, drawn_run, method_for, rows
from helpers.processes import finish, in_a_child, torchrun

STILL = {"lr": 1e-30}
"""A learning rate at which no float32 weight moves."""
NO_REFERENCE: dict[str, Any] = {
    "objective": {"name": "gdro", "beta": 50.0},
    "tune": {"reference": "init"},
    "labels": {"transform": "minmax"},
    "train": {"online": {"old": {"decay": 0.0, "slope": None}}},
}


def files_of(run_dir: Path, step: int) -> dict[str, bytes]:
    """Return the bytes of everything that equal runs have in common."""
    last = f"checkpoints/step-{step:08d}"
    names = ["metrics.jsonl", "online.jsonl", f"{last}/policy.safetensors", f"{last}/optimizer.safetensors"]
    names += [
        f"{last}/{n}.safetensors" for n in ("reference", "drawn") if (run_dir / f"{last}/{n}.safetensors").exists()
    ]
    return {name: (run_dir / name).read_bytes() for name in names}


@pytest.mark.parametrize("sections", [{}, NO_REFERENCE], ids=["nft, old", "gdro, init"])
def test_a_run_resumes_exactly_in_the_middle_of_a_draw_between_draws_and_killed_while_drawing(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    drawn_run(tmp_path / "straight", 5, **sections)
    # 6 images in batches of 2 are 3 calls a draw: the fifth is in the middle of the second draw.
    child = in_a_child(lambda: drawn_run(tmp_path / "resumed", 5, Red(dies=5), **sections))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(rows(tmp_path / "resumed/metrics.jsonl")) == 2
    for goal in (3, 5):
        drawn_run(tmp_path / "resumed", goal, **sections)
    assert (tmp_path / "straight/checkpoints/step-00000005/drawn.safetensors").exists()
    assert not (tmp_path / "straight/checkpoints/step-00000004/drawn.safetensors").exists()
    assert files_of(tmp_path / "straight", 5) == files_of(tmp_path / "resumed", 5)


def test_two_processes_draw_and_learn_what_one_does(tmp_path: Path) -> None:
    program = ["-m", "helpers.drawn_run"]
    finish([sys.executable, *program, str(tmp_path / "one"), "3"])
    finish([*torchrun(), *program, str(tmp_path / "two"), "3"])
    one, two = (load_file(tmp_path / name / "checkpoints/step-00000003/drawn.safetensors") for name in ("one", "two"))
    assert one["epoch"] == two["epoch"] == 1
    np.testing.assert_allclose(one["latents"], two["latents"], rtol=1e-3, atol=1e-4)
    first, second = (rows(tmp_path / name / "online.jsonl") for name in ("one", "two"))
    assert first[0] == second[0]  # drawn before anything was trained: the same batches, bit for bit
    for name in ("policy", "reference"):
        last = f"checkpoints/step-00000003/{name}.safetensors"
        ours, theirs = load_file(tmp_path / "one" / last), load_file(tmp_path / "two" / last)
        for key, value in ours.items():
            np.testing.assert_allclose(theirs[key], value, rtol=1e-3, atol=1e-5)


def test_the_ratio_is_exactly_one_before_the_first_update_and_after_the_old_policy_has_followed(tmp_path: Path) -> None:
    followed = {"online": {"old": {"decay": 0.0, "slope": None}}}
    awm = {"objective": {"name": "awm", "anchor": 0.0}, "labels": {"transform": "advantage"}}
    found = drawn_run(tmp_path, 5, train=followed, **awm)
    assert [row["ratio_change"] == 0.0 for row in found] == [True, False, True, False, True]
    assert [row["drift"] == 0.0 for row in found] == [True, False, True, False, True]
    policy = load_file(tmp_path / "checkpoints/step-00000004/policy.safetensors")
    moved = load_file(tmp_path / "checkpoints/step-00000005/reference.safetensors")
    assert all(np.array_equal(policy[name], value) for name, value in moved.items())


def test_the_old_policy_follows_by_its_schedule(tmp_path: Path) -> None:
    drawn_run(tmp_path, 5)
    at = {
        (name, step): load_file(tmp_path / f"checkpoints/step-{step:08d}/{name}.safetensors")
        for name in ("policy", "reference")
        for step in (2, 3, 4, 5)
    }
    for done, after in ((2, 3), (4, 5)):
        kept = min(0.5, 0.1 * done)
        for name, value in at["reference", after].items():
            wanted = kept * at["reference", done][name] + (1 - kept) * at["policy", done][name]
            np.testing.assert_allclose(value, wanted, atol=1e-7)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (AverageDecay(0.5, warmup=False, slope=0.001), {0: 0, 1: 0.001, 100: 0.1, 500: 0.5, 1000: 0.5}),
        (AverageDecay(0.999, warmup=False, slope=0.0075, after=75), {75: 0, 76: 0.0075, 100: 0.1875, 208: 0.9975, 300: 0.999}),
    ],
)  # fmt: skip
def test_the_schedules_of_diffusion_nft(decay: AverageDecay, expected: dict[int, float]) -> None:
    assert {step: decay.at(step) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_without_learning_the_loss_is_its_closed_form(tmp_path: Path) -> None:
    nft = {"name": "nft", "anchor": 0.0, "beta": 0.5, "scale": 2.0, "normalise": "none"}
    found = drawn_run(tmp_path / "nft", 3, objective=nft, optimizer=STILL)
    for row in found:
        assert row["loss"] == pytest.approx(2.0 * row["reference_error"] / 0.5, rel=1e-6)
    awm = {"objective": {"name": "awm", "anchor": 0.0, "scale": 5.0}, "labels": {"transform": "advantage"}}
    for row in drawn_run(tmp_path / "awm", 3, Red(unscored=5), optimizer=STILL, **awm):
        assert row["loss"] == pytest.approx(0.0, abs=1e-7)  # minus the mean of advantages, which are centred


def test_labels_are_those_of_the_whole_draw_and_a_failure_is_counted_and_never_a_zero(tmp_path: Path) -> None:
    said: list[str] = []
    config = drawn_config(tmp_path, 2, labels={"transform": "advantage"}, objective={"name": "awm"})
    method = method_for(config, Red(unscored=4), said)
    assert method.online is not None
    tmp_path.mkdir(exist_ok=True)
    method.step(0)
    seen: list[float] = []
    groups = method.online.groups
    with torch.no_grad():
        for row in groups.values["latents"]:
            for latent in row:  # an image by itself: another batch than the run's
                (image,) = method.backbone.to_images(method.backbone.decode_latents(latent[None]))
                seen.append(float(Red().measure([image], [""])["redness"]))
    scores = np.array(seen).reshape(2, 3)
    scores[0, 0] = scores[1, 1] = np.nan  # the first and the fifth of six
    centred = scores - np.nanmean(scores, axis=1, keepdims=True)
    wanted = np.clip(centred / (np.nanstd(scores) + 1e-4), -5, 5)
    np.testing.assert_allclose(groups.rewards.numpy(), wanted, rtol=1e-6, atol=1e-6)
    (row,) = rows(tmp_path / "online.jsonl")
    assert row["unscored"] == {"red": 2} and said == ["draw 1: red did not score 2 images: too dark"]
    np.testing.assert_allclose(row["scores"]["red.redness"], np.nanmean(scores, axis=1), atol=1e-6)
    assert method.row()["unscored"] == pytest.approx(1 / 3)
    assert method.row()["reward"] == pytest.approx(np.nanmean(scores), abs=1e-6)


@pytest.mark.parametrize("labels", [{"transform": "none"}, {"transform": "advantage"}])
def test_a_draw_without_any_score_ends_the_run_and_says_why(tmp_path: Path, labels: dict[str, str]) -> None:
    config = drawn_config(tmp_path, 2, labels=labels, objective={"name": "awm"})
    method = method_for(config, Red(unscored=1))
    with pytest.raises(DiffalignError, match=r"draw 1: red scored no image \(too dark\), .* mend the reward"):
        method.step(0)


@pytest.mark.parametrize(
    ("objective", "transform", "reference"),
    [
        ({"name": "nft", "anchor": 0.0}, "optimality", "old"),
        ({"name": "awm", "anchor": 0.0}, "advantage", "old"),
        ({"name": "group_dpo", "omega": 20.0, "reduction": "mean"}, "none", "old"),
        ({"name": "gdro", "beta": 20.0, "gamma": 0.0, "tau": 0.0}, "none", "init"),
        ({"name": "dpo", "beta": 20.0}, "none", "init"),
    ],
    ids=["nft", "awm", "group_dpo", "gdro", "dpo"],
)
def test_thirty_draws_make_images_redder(
    tmp_path: Path, objective: dict[str, Any], transform: str, reference: str
) -> None:
    """Images of the same noise, before and after: the mean difference lies more than 2.6 standard errors above 0."""
    old = {"old": {"decay": 0.5 if reference == "old" else 0.0, "slope": 0.1 if reference == "old" else None}}
    wide = {"every": 1, "groups": 8, "images_per_prompt": 8, "steps": 4, "batch_size": 64, **old}
    config = drawn_config(
        tmp_path, 30, train={"groups_per_step": 8, "micro_batch": 8, "online": wide}, objective=objective,
        labels={"transform": transform}, tune={"reference": reference}, optimizer={"lr": 0.03},
        checkpoint={"every": 30},
    )  # fmt: skip
    method = method_for(config, Red())
    run(config, method, say=lambda _: None)
    seeds, backbone = [17 + n for n in range(32)], method.backbone
    means = {}
    for role in ("base", "policy"):
        with backbone.role(role), torch.no_grad():
            latents = Euler(backbone, 4)(Words().batch([PROMPTS[n % 4] for n in range(32)]), seeds)["latents"]  # type: ignore[arg-type]
        means[role] = Red().measure(backbone.to_images(backbone.decode_latents(latents)), [""] * 32)["redness"].numpy()
    gained = means["policy"] - means["base"]
    assert gained.mean() - 2.6 * gained.std(ddof=1) / np.sqrt(len(gained)) > 0.0


def test_draws_meet_all_prompts_and_no_seed_twice() -> None:
    online = drawn_config(Path("r"), 2).train.online
    assert online is not None
    wide = online.model_copy(update={"groups": 6})  # more than there are prompts: some come up twice
    groups = DrawnGroups([PromptRow(p) for p in PROMPTS], None, wide, 0, {})  # type: ignore[arg-type]
    met, seeds = [], []
    for epoch in range(2):
        groups.begin(epoch)
        met += [row.prompt for row in groups.rows]
        seeds += [groups.image_seed(name, k) for name in groups.group_ids for k in range(3)]
    assert sorted(met) == sorted(3 * PROMPTS) and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=d"], "data.path: train.online draws the images that are trained on"),
        (["data.limit=3"], "data.limit: it concerns stored images"),
        (["selection.groups=curriculum"], "selection.groups: it looks at all groups of a dataset"),
        (["tune.reference=init"], "tune.reference: nft compares the policy with the one that drew the images"),
        (["labels.source=preference", "labels.transform=none"], "labels.source: nobody ranks what is drawn"),
        (["data.group_size=9"], "images_per_prompt: a step looks at 9 images of a group, and 8 are drawn"),
        (["train.online.old.after=3", "train.online.old.slope=null"], "it delays slope, which is null"),
        (["objective=ddo", "labels.transform=none"], "objective.name: ddo needs real images beside the drawn ones"),
        (["train.online=null", "data.path=d"], "tune.reference: the old policy is the one that draws images"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(DiffalignError) as caught:
        load_config("shapes_sd3_online_nft", overrides)
    assert message in str(caught.value)
