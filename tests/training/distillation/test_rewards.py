"""Rewards in distillation: advantages, policy gradients and followed gradients, written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.objectives.advantages import standardised
from diffalign.pipelines.few_step import FewStep
from diffalign.pipelines.process import Flow
from diffalign.training.distillation.draws import make_distill_draws, stop_step
from diffalign.training.distillation.policy_gradient import policy_step
from diffalign.training.distillation.step import student_step
from helpers import toy_distill as toy
from helpers.distill_step import one_step
from helpers.toy_distill import distilled, moved, network


def test_advantages_multiply_the_guidance(tmp_path: Path) -> None:
    """Of the finished images: after the step that learns the student goes on to the end."""
    config = toy.toy_config(tmp_path, group={"size": 4}, reward={"terms": [{"name": "mean"}], "strength": 0.7})
    finals: list[Tensor] = []

    def judge(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        finals.append(latents)
        return toy.brightness(latents, indices)

    backbone = moved()
    early = next(i for i in range(20) if stop_step(config, i) == 1)
    output, draws, conditioning = one_step(config, backbone, early, judge)
    plain, _, _ = one_step(toy.toy_config(tmp_path, group={"size": 4}), backbone, early)
    assert draws.stop == 1 and not torch.equal(finals[0], output.x) and torch.equal(plain.x, output.x)
    a = standardised(finals[0].flatten(1).mean(1).view(2, 4)).flatten()
    t, x, prompt = draws.times.view(-1, 1, 1, 1), output.x, conditioning["prompt"]
    with torch.no_grad():
        noisy = (1 - t) * x + t * draws.renoise
        mu = {r: noisy - t * network(backbone, r, noisy, draws.times, prompt) for r in ("teacher", "fake")}
        u = noisy - t * network(backbone, "teacher", noisy, draws.times, torch.zeros_like(prompt))
    factor = (1 + 0.7 * a).clamp_min(0).view(-1, 1, 1, 1)
    direction = mu["teacher"] - mu["fake"] + factor * 2.0 * (mu["teacher"] - u)
    size = (x - (u + 3.0 * (mu["teacher"] - u))).abs().mean(dim=(1, 2, 3)).view(2, 4).mean(1)
    expected = 0.5 * (direction / size.repeat_interleave(4).view(-1, 1, 1, 1)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-4, atol=1e-6)


def test_rewards_that_say_nothing_leave_the_distillation(tmp_path: Path) -> None:
    terms = {"terms": [{"name": "mean"}]}
    backbone = moved()
    plain, _, _ = one_step(toy.toy_config(tmp_path), backbone, 2)
    for value in (0.3, float("nan")):
        config = toy.toy_config(tmp_path, reward=terms)
        found, _, _ = one_step(config, backbone, 2, lambda x, i, v=value: {"mean": torch.full((len(x),), v)})
        torch.testing.assert_close(found.loss, plain.loss, rtol=1e-5, atol=0)
    later = distilled(tmp_path / "late", judge=toy.brightness, reward={**terms, "start_step": 3})
    assert ["reward" in row for row in later] == [False] * 3 + [True] * 3
    config = toy.toy_config(
        tmp_path, group={"size": 2, "advantage": "scalar_rdm"}, reward={**terms, "use": "raw", "start_step": 9}
    )
    student, prompts = FewStep(Flow(), toy.TIMES, "renoise"), toy.ToyPrompts()
    draws = make_distill_draws(config, student, 2, [0, 1], ["p0", "p1"], toy.SHAPE)
    conditioning = {k: v.repeat_interleave(2, dim=0) for k, v in prompts.batch([0, 1]).items()}
    common = (config, backbone, student, conditioning, prompts.unconditional, draws, [0, 0, 1, 1], toy.brightness)
    assert torch.equal(student_step(*common, rewarded=False).loss, plain.loss)
    assert not torch.allclose(student_step(*common).loss, plain.loss)


def test_exponential_weights_multiply_the_whole_direction(tmp_path: Path) -> None:
    backbone = moved()
    sections = {"terms": [{"name": "mean"}], "use": "exponential"}
    finals: list[Tensor] = []

    def judge(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        finals.append(latents.flatten(1).mean(1))
        return toy.brightness(latents, indices)

    plain = one_step(toy.toy_config(tmp_path), backbone, 1)[0]
    found = one_step(toy.toy_config(tmp_path, reward=sections), backbone, 1, judge)[0]
    r = finals[0].view(2, 2)
    factor = (r / r.norm(dim=1, keepdim=True)).exp().flatten()
    torch.testing.assert_close(found.loss, factor**2 * plain.loss, rtol=1e-4, atol=0)


def test_scalar_ratio_is_an_advantage(tmp_path: Path) -> None:
    backbone = moved()
    config = toy.toy_config(tmp_path, group={"size": 3, "advantage": "scalar_rdm"})
    output, draws, conditioning = one_step(config, backbone, 0)
    t = draws.times.view(-1, 1, 1, 1)
    with torch.no_grad():
        noisy = (1 - t) * output.x + t * draws.renoise
        errors = [
            (noisy + (1 - t) * network(backbone, r, noisy, draws.times, conditioning["prompt"]) - draws.renoise)
            .square()
            .mean(dim=(1, 2, 3))
            for r in ("fake", "teacher")
        ]
    expected = standardised((errors[0] - errors[1]).view(2, 3)).abs().flatten()
    torch.testing.assert_close(output.metrics["advantage_size"], expected, rtol=1e-3, atol=1e-4)


def test_policy_gradient_of_the_step_that_learns(tmp_path: Path) -> None:
    """-A d log N(a; mean, rho^2) on top of the distillation, where the step draws; nothing in the last one."""

    def gradient(weight: float, stop: int) -> tuple[dict[str, Tensor], Any, Any, toy.ToyBackbone]:
        sections = {"terms": [{"name": "mean"}], "strength": 0.0, "policy_weight": weight}
        config = toy.toy_config(tmp_path, group={"size": 4}, reward=sections)
        iteration = next(i for i in range(40) if stop_step(config, i) == stop)
        backbone = moved()
        output, draws, conditioning = one_step(config, backbone, iteration, toy.brightness)
        output.loss.sum().backward()
        return {k: p.grad for k, p in backbone.trainable().items() if p.grad is not None}, draws, conditioning, backbone

    plain, draws, conditioning, backbone = gradient(0.0, 0)
    with_policy, *_ = gradient(2.0, 0)
    prompt, x, after = conditioning["prompt"], draws.noise[:, 0], 0.75
    backbone.trunk.zero_grad()
    mean = (1 - after) * (x - network(backbone, "student", x, 1.0, prompt))
    action = (mean + after * draws.noise[:, 1]).detach()
    final = action
    with torch.no_grad():
        for k in (1, 2, 3):
            s, then = float(toy.TIMES[k]), float(toy.TIMES[k + 1])
            x0 = final - s * network(backbone, "student", final, s, prompt)
            final = x0 if k == 3 else (1 - then) * x0 + then * draws.noise[:, k + 1]
    a = standardised(final.flatten(1).mean(1).view(2, 4)).flatten()
    log = -(action - mean).square().flatten(1).mean(1) / (2 * after**2)
    (-2.0 * a * log).sum().backward()
    for name, parameter in backbone.trainable().items():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0
        torch.testing.assert_close(with_policy[name] - plain[name], parameter.grad, rtol=1e-3, atol=1e-5)
    for name, value in gradient(0.0, 3)[0].items():
        assert torch.equal(value, gradient(2.0, 3)[0][name])


def test_roll_outs_are_used_again_by_importance_ratios(tmp_path: Path) -> None:
    """The ratio is 1 in the update that rolled out; later it is that of the present density to the one it was drawn with."""
    sections = {"terms": [{"name": "mean"}], "policy_weight": 2.0, "policy_clip": 1e-3}
    config = toy.toy_config(tmp_path, group={"size": 4}, reward=sections)
    student, backbone = FewStep(Flow(), toy.TIMES, "renoise"), moved()
    iteration = next(i for i in range(40) if stop_step(config, i) == 1)
    output, _, conditioning = one_step(config, backbone, iteration, toy.brightness)
    kept = output.transition
    assert kept is not None and not kept.log.requires_grad
    loss, ratios = policy_step(config, backbone, student, conditioning, kept)
    torch.testing.assert_close(loss, -2.0 * kept.advantage, rtol=1e-5, atol=1e-6)
    assert float(ratios["ratio_change"].max()) == 0.0
    with torch.no_grad():
        for parameter in backbone.trainable().values():
            parameter.add_(0.03)
    loss, ratios = policy_step(config, backbone, student, conditioning, kept)
    x, prompt = kept.before, conditioning["prompt"]
    with torch.no_grad():
        mean = 0.5 * (x - 0.75 * network(backbone, "student", x, 0.75, prompt))
    log = -((kept.action - mean) ** 2).mean(dim=(1, 2, 3)) / (2 * 0.5**2)
    ratio = (log - kept.log).exp()
    expected = -2.0 * torch.minimum(ratio * kept.advantage, ratio.clamp(0.999, 1.001) * kept.advantage)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    assert float(ratios["ratio_clipped"].mean()) > 0 and float(ratios["ratio_change"].max()) > 1e-3

    again = {"terms": [{"name": "mean"}], "policy_weight": 2.0, "policy_clip": 0.1}
    once = distilled(tmp_path / "once", judge=toy.brightness, reward=again)
    more = distilled(tmp_path / "more", judge=toy.brightness, reward={**again, "policy_reuse": 2})
    assert more != once and any(row.get("ratio_change", 0.0) > 0 for row in more)
    assert "ratio_change" not in once[0]
    cut = distilled(
        tmp_path / "cut", judge=toy.brightness, reward={**again, "policy_reuse": 2}, train={"micro_batch": 1}
    )
    assert [r["grad_norm"] for r in cut] == pytest.approx([r["grad_norm"] for r in more], rel=1e-3)


@pytest.mark.parametrize("balance", [False, True])
def test_gradient_of_a_reward_through_the_last_step(tmp_path: Path, balance: bool) -> None:
    sections = {"terms": [{"name": "mean"}], "strength": 0.0, "gradient_weight": 0.3, "gradient_balance": balance}
    config = toy.toy_config(tmp_path, reward=sections)
    student, prompts = FewStep(Flow(), toy.TIMES, "renoise"), toy.ToyPrompts()

    def slope(stop: int, lean: Any) -> tuple[Tensor, Any]:
        """Gradient to a bias-like parameter, and the output."""
        iteration = next(i for i in range(40) if stop_step(config, i) == stop)
        draws = make_distill_draws(config, student, iteration, [0, 1], ["p0", "p1"], toy.SHAPE)
        conditioning = {k: v.repeat_interleave(2, dim=0) for k, v in prompts.batch([0, 1]).items()}
        backbone = moved()
        output = student_step(
            config, backbone, student, conditioning, prompts.unconditional, draws, [0, 0, 1, 1], toy.brightness, lean
        )
        output.loss.sum().backward()
        return torch.cat([p.grad.flatten() for p in backbone.trainable().values() if p.grad is not None]), output

    def lean(latents: Tensor, indices: list[int]) -> Tensor:
        return 5.0 * latents.flatten(1).mean(dim=1)

    assert torch.equal(slope(1, lean)[0], slope(1, None)[0])
    (with_reward, output), (plain, before) = slope(3, lean), slope(3, None)
    elements = output.x[0].numel()
    size = torch.full((4,), 5.0 / elements)
    if balance:  # |onward| / elements over |slope|, each element of the slope being 5 / elements
        onward = (2 * before.loss.detach() * elements).sqrt() / elements
        size = onward / (5.0 / elements * elements**0.5) * 5.0 / elements
    torch.testing.assert_close(
        output.loss - before.loss, -0.3 * size * output.x.flatten(1).sum(1), rtol=1e-3, atol=1e-5
    )
    assert not torch.allclose(with_reward, plain)
