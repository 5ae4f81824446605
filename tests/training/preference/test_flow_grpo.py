"""`noise: path`: the steps of the sampler are learnt from, which with the objective `awm` is Flow-GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.config import load_config
from diffalign.errors import DiffalignError
from diffalign.training.preference.draws import make_draws
from diffalign.training.preference.step import preference_step
from diffalign.training.run import run
from helpers import toy
from helpers.drawn_run import Red, drawn_config, drawn_run, method_for

GRPO: dict[str, Any] = {
    "noise": "path",
    "objective": {"name": "awm", "clip": 1e-4, "scale": 1.0, "anchor": 0.004},
    "labels": {"transform": "advantage"},
}
FOLLOWED = {"old": {"decay": 0.0, "slope": None}, "steps": 4}


def test_resume_is_exact_and_the_ratio_is_one_before_the_first_update(tmp_path: Path) -> None:
    train = {"online": FOLLOWED}
    found = drawn_run(tmp_path / "straight", 4, train=train, **GRPO)
    for goal in (1, 3, 4):
        drawn_run(tmp_path / "resumed", goal, train=train, **GRPO)
    for part in (
        "metrics.jsonl",
        "checkpoints/step-00000004/policy.safetensors",
        "checkpoints/step-00000003/drawn.safetensors",
    ):
        assert (tmp_path / "straight" / part).read_bytes() == (tmp_path / "resumed" / part).read_bytes()
    assert [row["ratio_change"] == 0.0 for row in found] == [True, False, True, False]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_errors_are_log_probabilities_of_what_was_drawn(tmp_path: Path, guidance: float) -> None:
    """Old and new probability of every transition, and their divergence, in numpy's float64 from the stored paths."""
    config = drawn_config(tmp_path, 2, train={"online": {**FOLLOWED, "guidance_scale": guidance}}, **GRPO)
    method = method_for(config, Red())
    tmp_path.mkdir(exist_ok=True)
    method.step(0)
    backbone, groups = method.backbone, method.source
    batch = groups.batch([0, 1])
    assert batch.paths is not None
    steps = batch.paths.steps
    draws = make_draws(
        config, backbone.process, 1, [0, 1], batch.group_ids, batch.latents.shape, path_times=steps.times
    )
    errors = preference_step(config, method.objective, backbone, batch, draws, groups.unconditional, None).errors
    for row in range(2):
        index = int(draws.path_step[row])  # type: ignore[index]
        t, stop = float(steps.times[index]), float(steps.stops[index])
        means = {}
        x, drawn = batch.paths.states[row, :, index], batch.paths.states[row, :, index + 1].double().numpy()
        for role in ("policy", "reference", "base"):
            with torch.no_grad(), backbone.role(role):
                words = batch.conditioning["prompt"][row].expand(3, -1)
                c, u = (
                    backbone.predict(x, torch.full((3,), t), {"prompt": w}) for w in (words, torch.zeros_like(words))
                )
            v = (u + guidance * (c - u)).double().numpy()
            share = t / (1 - (stop if t == 1 else t))
            sigma2, dt = 0.49 * share, stop - t
            means[role] = x.double().numpy() * (1 + sigma2 / (2 * t) * dt) + v * (1 + sigma2 * (1 - t) / (2 * t)) * dt
        variance = sigma2 * -dt

        def size(difference: np.ndarray, variance: float = variance) -> np.ndarray:
            return (difference**2).mean(axis=(1, 2, 3)) / (2 * variance)

        np.testing.assert_allclose(errors.policy_error[row].detach(), size(drawn - means["policy"]), rtol=2e-4)
        ratio = size(drawn - means["policy"]) - size(drawn - means["reference"])
        np.testing.assert_allclose(errors.error_difference[row].detach(), ratio, atol=2e-6)
        assert np.abs(ratio).max() > 1e-5
        np.testing.assert_allclose(errors.anchor_gap[row].detach(), size(means["policy"] - means["base"]), rtol=1e-3)  # type: ignore[index]


def test_thirty_draws_make_images_redder(tmp_path: Path) -> None:
    wide = {"every": 2, "groups": 8, "images_per_prompt": 8, "batch_size": 64, **FOLLOWED}
    grpo = {**GRPO, "objective": {"name": "awm", "clip": 0.2, "scale": 1.0, "anchor": 0.0}}
    config = drawn_config(
        tmp_path, 60, train={"groups_per_step": 8, "micro_batch": 8, "online": wide}, optimizer={"lr": 0.03},
        checkpoint={"every": 60}, **grpo,
    )  # fmt: skip
    method = method_for(config, Red())
    run(config, method, say=lambda _: None)
    means = {}
    for role in ("base", "policy"):
        with method.backbone.role(role):
            found = method.online.sampler(  # type: ignore[union-attr]
                {"prompt": torch.randn(32, 3, generator=torch.Generator().manual_seed(1))}, list(range(32))
            )
        backbone: Any = method.backbone
        images = backbone.to_images(backbone.decode_latents(found["latents"]))
        means[role] = Red().measure(images, [""] * 32)["redness"].numpy()
    gained = means["policy"] - means["base"]
    assert gained.mean() - 2.6 * gained.std(ddof=1) / np.sqrt(len(gained)) > 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["noise=shared"], "train.online.path: it shapes the sampler's own steps"),
        (["train.online.path.window=[3, 10]"], "two rising numbers of 0 to 9 are needed, not [3, 10]"),
        (["error_space=x0"], "error_space: a path's errors are log-probabilities"),
        (["times={sampler: schedule, steps: 10}"], "times.sampler: the times of a path are the sampler's"),
        (["train.online.negative_prompt=x"], "guidance within the policy steers away from no prompt"),
        (["train.online=null", "data.path=d", "tune.reference=init"], "noise: only images that a run draws have paths"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(DiffalignError) as caught:
        load_config("shapes_sd3_flow_grpo", ["train.online.path.window=[0, 8]", *overrides])
    assert message in str(caught.value)


def test_a_batch_of_a_dataset_has_no_paths(tmp_path: Path) -> None:
    assert toy.ToySource().batch([0]).paths is None
