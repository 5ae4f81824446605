"""The distillation loop on a toy: against DMD2 written out, and against ways of cutting up the work."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import DiffalignError
from diffalign.health import examine
from diffalign.pipelines.few_step import FewStep
from diffalign.pipelines.process import Diffusion, Flow
from diffalign.training.distillation.comparison import ratio_weight
from diffalign.training.distillation.draws import make_distill_draws, stop_step
from diffalign.training.distillation.step import fake_step
from helpers import toy_distill as toy
from helpers.distill_step import one_step
from helpers.files import rows
from helpers.processes import finish, torchrun
from helpers.toy_distill import distilled, moved, network


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_loss_and_gradient_are_dmd2_written_out(tmp_path: Path, sampler: str) -> None:
    """Every stop; the student's earlier steps are constants, however the last one reached them."""
    group = {"axis": "none", "size": 1, "scale": "per_sample"}
    config = toy.toy_config(tmp_path, student={"sampler": sampler}, group=group)
    seen = set()
    for iteration in range(12):
        backbone = moved()
        output, draws, conditioning = one_step(config, backbone, iteration)
        output.loss.mean().backward()
        measured = {k: p.grad.clone() for k, p in backbone.trainable().items() if p.grad is not None}
        assert measured.keys() == backbone.trainable().keys()
        assert all(p.grad is None for p in backbone.trainable("fake").values())

        backbone = moved()
        prompt, x = conditioning["prompt"], draws.noise[:, 0]
        with torch.no_grad():
            for k in range(draws.stop):
                s, after = float(toy.TIMES[k]), float(toy.TIMES[k + 1])
                v = network(backbone, "student", x, s, prompt)
                if sampler == "euler":
                    x = x + (after - s) * v
                else:
                    x = (1 - after) * (x - s * v) + after * draws.noise[:, k + 1]
        s = float(toy.TIMES[draws.stop])
        image = x - s * network(backbone, "student", x, s, prompt)
        t = draws.times.view(-1, 1, 1, 1)
        noisy = ((1 - t) * image + t * draws.renoise).detach()
        nothing = torch.zeros_like(prompt)
        v_c = network(backbone, "teacher", noisy, draws.times, prompt)
        v_u = network(backbone, "teacher", noisy, draws.times, nothing)
        v_f = network(backbone, "fake", noisy, draws.times, prompt)
        real, fake = noisy - t * (v_u + 3.0 * (v_c - v_u)), noisy - t * v_f
        grad = (fake - real) / (image - real).abs().mean(dim=[1, 2, 3], keepdim=True)
        loss = 0.5 * torch.nn.functional.mse_loss(image, (image - grad).detach())
        loss.backward()
        assert output.loss.mean().item() == pytest.approx(loss.item(), rel=1e-5)
        for name, gradient in measured.items():
            torch.testing.assert_close(gradient, backbone.trainable()[name].grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(output.x, image.detach())
        seen.add(draws.stop)
    assert seen == {0, 1, 2, 3}


def test_fake_network_learns_to_denoise_the_images(tmp_path: Path) -> None:
    backbone = moved()
    config = toy.toy_config(tmp_path)
    output, draws, conditioning = one_step(config, backbone, 0)
    with backbone.role("fake"):
        error = fake_step(backbone, output.x, conditioning, draws)
        error.sum().backward()
    t = draws.fake_times.view(-1, 1, 1, 1)
    v = network(backbone, "fake", (1 - t) * output.x + t * draws.fake_noise, draws.fake_times, conditioning["prompt"])
    expected = (v - (draws.fake_noise - output.x)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(error, expected)
    assert all(p.grad is None for p in backbone.trainable("student").values())
    assert all(p.grad is not None for p in backbone.trainable("fake").values())


def test_groups_of_one_are_dmd2_bit_for_bit(tmp_path: Path) -> None:
    dmd2 = distilled(tmp_path / "a", group={"axis": "none", "size": 1, "scale": "per_sample"})
    for axis in ("prompt", "renoise"):
        assert distilled(tmp_path / axis, group={"axis": axis, "size": 1, "scale": "group_mean"}) == dmd2
    assert distilled(tmp_path / "d") != dmd2  # groups of two


def test_images_of_a_prompt_share_the_level_and_nothing_else(tmp_path: Path) -> None:
    student = FewStep(toy.ToyBackbone().process, toy.TIMES, "renoise")
    draws = make_distill_draws(toy.toy_config(tmp_path, group={"size": 3}), student, 5, [0, 1], ["a", "b"], toy.SHAPE)
    levels = draws.times.view(2, 3)
    assert bool((levels == levels[:, :1]).all()) and levels[0, 0] != levels[1, 0]
    for noise in (draws.noise, draws.renoise, draws.fake_noise):
        assert len({float(n.flatten()[0]) for n in noise}) == 6
    again = make_distill_draws(toy.toy_config(tmp_path, group={"size": 3}), student, 5, [1], ["b"], toy.SHAPE)
    assert torch.equal(again.noise, draws.noise[3:]) and torch.equal(again.times, draws.times[3:])
    config = toy.toy_config(tmp_path, group={"axis": "renoise", "size": 3})
    draws = make_distill_draws(config, student, 5, [0, 1], ["a", "b"], toy.SHAPE)
    assert draws.noise.shape == (2, 4, *toy.SHAPE) and draws.renoise.shape == (6, *toy.SHAPE)
    assert len(set(draws.times.tolist())) == 6


def test_levels_lie_where_they_should(tmp_path: Path) -> None:
    config = toy.toy_config(tmp_path, match={"low": 0.2, "high": 0.6, "shift": 3.0, "decoupled": True})
    student = FewStep(toy.ToyBackbone().process, toy.TIMES, "renoise")
    stops = Counter(stop_step(config, i) for i in range(400))
    assert set(stops) == {0, 1, 2, 3} and min(stops.values()) > 60
    shifted = [3 * u / (1 + 2 * u) for u in (0.2, 0.6)]
    below: dict[int, list[float]] = {}
    for i in range(300):
        draws = make_distill_draws(config, student, i, [0], ["p"], toy.SHAPE)
        assert shifted[0] <= float(draws.times[0]) <= shifted[1]
        below.setdefault(draws.stop, []).append(float(draws.guidance_times[0]))
    for stop, levels in below.items():  # U(0, student's level), not shifted
        top = float(toy.TIMES[stop])
        assert max(levels) <= top and max(levels) > 0.85 * top and np.mean(levels) == pytest.approx(top / 2, rel=0.25)


def test_guidance_apart_needs_its_own_level(tmp_path: Path) -> None:
    config = toy.toy_config(tmp_path, match={"decoupled": True, "guidance": 3.0})
    backbone = moved()
    output, draws, conditioning = one_step(config, backbone, 1)
    prompt, x = conditioning["prompt"], output.x
    t, t_ca = draws.times.view(-1, 1, 1, 1), draws.guidance_times.view(-1, 1, 1, 1)
    with torch.no_grad():
        noisy = (1 - t) * x + t * draws.renoise
        teacher = noisy - t * network(backbone, "teacher", noisy, draws.times, prompt)
        fake = noisy - t * network(backbone, "fake", noisy, draws.times, prompt)
        low = (1 - t_ca) * x + t_ca * draws.guidance_noise
        c = low - t_ca * network(backbone, "teacher", low, draws.guidance_times, prompt)
        u = low - t_ca * network(backbone, "teacher", low, draws.guidance_times, torch.zeros_like(prompt))
    guided = u + 3.0 * (c - u)
    sizes = [(x - m).abs().mean(dim=(1, 2, 3), keepdim=True) for m in (teacher, guided)]
    direction = (teacher - fake) + 2.0 * (c - u) * sizes[0] / sizes[1]
    mean = sizes[0].view(2, 2).mean(1).repeat_interleave(2).view(-1, 1, 1, 1)
    expected = 0.5 * (direction / mean).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-4, atol=1e-6)


def test_ratio_as_a_metric(tmp_path: Path) -> None:
    """The weight of a draw against closed forms, and mean and error of a step's draws over its prompts."""
    config = toy.toy_config(tmp_path, match={"low": 0.1, "high": 0.9, "shift": 3.0})
    s = torch.tensor([0.1, 0.5, 0.9])
    u = s / (3 - 2 * s)
    expected = 1 / (s * (1 - s)) * 3 / (1 + 2 * u) ** 2 * 0.8
    torch.testing.assert_close(ratio_weight(Flow(3.0), config, s), expected, rtol=1e-3, atol=0)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
    snr = (abar / (1 - abar)).log()
    t = torch.tensor([100.0, 500.0, 900.0])
    flat = toy.toy_config(tmp_path, match={"low": 0.1, "high": 0.9, "shift": 1.0})
    by_step = torch.stack([(snr[int(k) - 1] - snr[int(k) + 1]) / 4 * 1000 * 0.8 for k in t])
    found = ratio_weight(Diffusion(abar.float(), "epsilon"), flat, t)
    torch.testing.assert_close(found, by_step.float(), rtol=1e-2, atol=0)

    config = toy.toy_config(tmp_path, train={"steps": 1})
    row = distilled(tmp_path / "run", train={"steps": 1})[0]
    assert row["r_dm"] == 0.0 == row["r_dm_error"]  # fake and teacher are still one
    output = one_step(config, moved(), 0)[0]
    assert output.metrics["r_dm"].view(2, 2).std(dim=1).tolist() == [0.0, 0.0]
    later = distilled(tmp_path / "later", train={"steps": 4})[-1]
    assert later["r_dm"] != 0.0 and later["r_dm_error"] > 0.0


def test_collapse_is_said_in_words() -> None:
    steady = [{"step": float(n + 1), "grad_norm": 1.0, "diversity": 0.4 - 0.001 * n} for n in range(100)]
    assert examine(steady) == []
    falling = [{**row, "diversity": 0.4 * 0.985 ** row["step"]} for row in steady]
    (found,) = examine(falling)
    assert found.name == "diversity_falls" and found.words.level == "alarm" and "0.1" in found.measured


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    whole = distilled(tmp_path / "a", judge=toy.brightness, reward={"terms": [{"name": "mean"}]})
    cut = distilled(
        tmp_path / "b", judge=toy.brightness, reward={"terms": [{"name": "mean"}]}, train={"micro_batch": 1}
    )
    assert cut[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    for name in ("student_loss", "fake_loss", "grad_norm", "fake_grad_norm", "reward"):
        assert [r[name] for r in cut] == pytest.approx([r[name] for r in whole], rel=1e-3), name


@pytest.mark.parametrize("group", [{"size": 2}, {"axis": "renoise", "size": 2}])
def test_resume_is_exact(tmp_path: Path, group: dict[str, Any]) -> None:
    options: dict[str, Any] = {"group": group, "reward": {}}
    straight = distilled(tmp_path / "a", train={"steps": 6, "ema_decay": 0.9}, **options)
    distilled(tmp_path / "b", train={"steps": 3, "ema_decay": 0.9}, **options)
    assert distilled(tmp_path / "b", train={"steps": 6, "ema_decay": 0.9}, **options) == straight
    for name in ("policy", "optimizer", "ema", "fake", "fake_optimizer"):
        a, b = (load_file(tmp_path / d / f"checkpoints/step-00000006/{name}.safetensors") for d in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    saved = load_file(tmp_path / "a/weights/weights.safetensors")
    average = load_file(tmp_path / "a/checkpoints/step-00000006/ema.safetensors")
    assert all(torch.equal(saved[k], average[k]) for k in saved)


def test_another_config_does_not_go_on(tmp_path: Path) -> None:
    distilled(tmp_path, train={"steps": 3})
    with pytest.raises(DiffalignError, match=r"match\.guidance was 3\.0, is now 5\.0"):
        distilled(tmp_path, train={"steps": 6}, match={"guidance": 5.0})


def test_losses_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    backbone = toy.ToyBackbone()
    with torch.no_grad():
        backbone.trunk.base[0, 0] = float("nan")
    with pytest.raises(DiffalignError, match="student's loss is nan at step 1"):
        toy.run(toy.toy_config(tmp_path), backbone)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    program = [toy.__file__]
    for name, launcher in (("one", [sys.executable]), ("two", torchrun())):
        finish([*launcher, *program, str(tmp_path / name), "6", "4", "2"])
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two) == 6
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for name in ("student_loss", "fake_loss"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4)
