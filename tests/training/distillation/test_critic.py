"""The adversarial part of distillation: losses and gradients written out, and that it trains, resumes and splits well."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.objectives.adversarial import critic_loss, generator_loss
from diffalign.pipelines import load_backbone
from diffalign.pipelines.features import feature_width, predict_with_features
from diffalign.training.distillation.critic import Critic, adversarial_step, critic_step, make_critic_draws
from helpers import toy_distill as toy
from helpers.command_line import run
from helpers.distill_config import config
from helpers.files import rows
from helpers.processes import finish, torchrun
from helpers.toy_distill import distilled, moved, network

GAN = {"weight": 0.5, "critic_weight": 0.2, "hidden": 8, "real": "toy"}


def test_losses_are_logarithms_of_the_chances() -> None:
    drawn, real = np.array([-3.0, 0.0, 2.5]), np.array([4.0, 0.0, -1.0])
    chance = 1 / (1 + np.exp(-drawn)), 1 / (1 + np.exp(-real))
    found = generator_loss(torch.from_numpy(drawn)), critic_loss(torch.from_numpy(drawn), torch.from_numpy(real))
    np.testing.assert_allclose(found[0], -np.log(chance[0]), rtol=1e-12)
    np.testing.assert_allclose(found[1], -np.log(1 - chance[0]) - np.log(chance[1]), rtol=1e-12)


def looked(critic: Critic, prediction: Tensor) -> Tensor:
    """The head written out on the toy's middle, which is its prediction: [N, 2, 4, 4] -> [N, 16, 2] -> [N]."""
    features = prediction.flatten(2).transpose(1, 2)
    centred = features - features.mean(2, keepdim=True)
    normal = centred / (centred.square().mean(2, keepdim=True) + critic.norm.eps).sqrt()
    inner = (normal + critic.norm.bias) @ critic.inner.weight.T + critic.inner.bias
    return (inner * torch.sigmoid(inner) @ critic.logit.weight[0] + critic.logit.bias).mean(dim=1)


def test_gradients_written_out(tmp_path: Path) -> None:
    """The student's: through the fake network to x, with no trace in fake network and head. Theirs: to both."""
    settings = toy.toy_config(tmp_path, gan=GAN)
    backbone, critic, images = moved(), Critic(2, 8, 0), toy.ToyImages()
    with torch.no_grad():  # LayerNorm over two channels leaves two values only; the bias breaks that
        critic.norm.bias.copy_(torch.tensor([0.3, -0.2]))
    draws = make_critic_draws(settings, backbone.process, 3, [0, 1], ["p0", "p1"], toy.SHAPE, 2)
    assert len(draws.real) == 4 and len(set(draws.real)) == 4
    assert not torch.equal(draws.times, draws.real_times) and not torch.equal(draws.noise, draws.real_noise)
    x = torch.randn(4, *toy.SHAPE, generator=torch.Generator().manual_seed(0))
    prompt = toy.ToyPrompts().batch([0, 0, 1, 1])["prompt"]

    loss, slope = adversarial_step(backbone, critic, {"prompt": prompt}, draws, x)
    assert all(p.grad is None for p in [*backbone.trunk.parameters(), *critic.parameters()])
    leaf, t = x.clone().requires_grad_(), draws.times.view(-1, 1, 1, 1)
    logits = looked(critic, network(backbone, "fake", (1 - t) * leaf + t * draws.noise, draws.times, prompt))
    expected = -torch.sigmoid(logits).log()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-3, atol=2e-6)
    # float32: normalising two channels is ill-conditioned where they nearly agree
    assert float(slope.abs().max()) > 0

    real, real_seen = images.batch(draws.real)
    level = torch.tensor([0.2, 0.4, 0.6, 0.8])
    with backbone.role("fake"):
        error, judged, told = critic_step(
            backbone, critic, x, {"prompt": prompt}, draws.noise, level, (real, real_seen), draws
        )
    s, r = level.view(-1, 1, 1, 1), draws.real_times.view(-1, 1, 1, 1)
    v = network(backbone, "fake", (1 - s) * x + s * draws.noise, level, prompt)
    torch.testing.assert_close(error, (v - (draws.noise - x)).square().mean(dim=(1, 2, 3)))
    beside = network(backbone, "fake", (1 - r) * real + r * draws.real_noise, draws.real_times, real_seen["prompt"])
    by_hand = -torch.sigmoid(-looked(critic, v)).log() - torch.sigmoid(looked(critic, beside)).log()
    torch.testing.assert_close(judged, by_hand, rtol=1e-5, atol=1e-6)
    share = 0.5 * ((looked(critic, v) < 0).float() + (looked(critic, beside) > 0).float())
    assert torch.equal(told["critic_accuracy"], share)
    (error + judged).sum().backward()
    touched = {n for n, p in backbone.trunk.named_parameters() if p.grad is not None}
    assert touched == set(backbone.trainable("fake")) and all(p.grad is not None for p in critic.parameters())


def test_weight_adds_the_adversarial_gradient(tmp_path: Path) -> None:
    """The student's first gradient is linear in the weight: a run's norm against those of its two parts."""
    none, one, two = (
        distilled(tmp_path / str(w), gan={**GAN, "weight": w, "real": "toy" if w else None}, train={"steps": 1})[0]
        for w in (0.0, 1.0, 2.0)
    )
    a, b, c = (row["grad_norm"] ** 2 for row in (none, one, two))  # |p + w q|^2 at w = 0, 1, 2
    third = distilled(tmp_path / "3", gan={**GAN, "weight": 3.0}, train={"steps": 1})[0]["grad_norm"] ** 2
    assert third == pytest.approx(3 * c - 3 * b + a, rel=1e-3) and b != pytest.approx(a, rel=1e-3)
    assert "critic_loss" not in none
    assert two["student_loss"] - one["student_loss"] == pytest.approx(one["adversarial_loss"], rel=1e-4)
    assert 0.0 <= one["critic_accuracy"] <= 1.0


def test_resume_and_micro_batches(tmp_path: Path) -> None:
    straight = distilled(tmp_path / "a", gan=GAN)
    distilled(tmp_path / "b", gan=GAN, train={"steps": 3})
    assert distilled(tmp_path / "b", gan=GAN, train={"steps": 6}) == straight
    fake = [load_file(tmp_path / d / "checkpoints/step-00000006/fake.safetensors") for d in "ab"]
    assert fake[0].keys() == fake[1].keys() and all(torch.equal(fake[0][k], fake[1][k]) for k in fake[0])
    start = Critic(2, 8, 2).inner.weight
    assert not torch.equal(fake[0]["critic.inner.weight"], start), "the head was not trained"
    cut = distilled(tmp_path / "c", gan=GAN, train={"micro_batch": 1})
    for name in ("adversarial_loss", "critic_loss", "grad_norm", "fake_grad_norm"):
        assert [r[name] for r in cut] == pytest.approx([r[name] for r in straight], rel=1e-3), name


def test_two_processes_equal_one(tmp_path: Path) -> None:
    program = [toy.__file__]
    for name, launcher in (("one", [sys.executable]), ("two", torchrun())):
        finish([*launcher, *program, str(tmp_path / name), "4", "4", "2", "0.5"])
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for name in ("grad_norm", "fake_grad_norm"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-5)
    for name in ("student_loss", "fake_loss", "critic_loss"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_features_of_genuine_trunks(family: str, request: pytest.FixtureRequest) -> None:
    """The bottleneck of a UNet; the image's tokens of SD3; with gradient checkpointing the same gradient to x."""
    folder = request.getfixturevalue(f"{family}_dir")
    slopes = []
    for checkpointing in (False, True):
        backbone: Any = load_backbone(str(folder), device="cpu", gradient_checkpointing=checkpointing)
        backbone.add_lora(2, 2.0, seed=0)
        backbone.add_fake(seed=1)
        backbone.trunk.train()
        side = backbone.default_resolution // backbone.vae_scale_factor
        shape = (1, backbone.latent_channels, side, side)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        seen = backbone.encode_prompts(["a red cube"])
        time = torch.tensor([0.4 * backbone.process.span])
        with backbone.role("fake"):
            prediction, features = predict_with_features(backbone, x, time, seen)
            assert torch.equal(prediction, backbone.predict(x, time, seen))
            slopes.append(torch.autograd.grad(features.square().sum(), x)[0])
        assert len(backbone.middle_block()._forward_hooks) == 0
        width = feature_width(backbone, x.detach(), seen)
        assert features.shape[0] == 1 and features.shape[2] == width
        if family == "sd3":
            assert features.shape[1] == (side // backbone.trunk.config.patch_size) ** 2
        else:
            assert width == backbone.trunk.config.block_out_channels[-1]
    assert float(slopes[0].abs().max()) > 0
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("family", "kind"), [("sdxl", "lora"), ("sd3", "full")])
def test_from_the_command_line(family: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"{family}_dir")
    path = config(tmp_path, model, "gan: {weight: 0.1, real: testbed}\nsave_pipeline: false\n")
    text = path.read_text().replace(str(tmp_path / "prompts.txt"), "testbed:train").replace("device:", "n: 6\ndevice:")
    path.write_text(text.replace("tune: {rank: 2, alpha: 2.0}", f"tune: {{kind: {kind}}}"))
    assert run("distill", path) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"critic_loss", "critic_accuracy", "adversarial_loss"} <= set(last)


def test_mistakes(tmp_path: Path, sdxl_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(tmp_path, sdxl_dir)
    assert run("distill", path, "gan.weight=0.1") == 2
    assert "gan.real" in capsys.readouterr().err
    assert run("distill", path, "gan.weight=0.1", "gan.real=testbed") == 2
    assert "testbed:train" in capsys.readouterr().err
    assert run("distill", path, "gan.weight=0.1", f"gan.real={tmp_path / 'nowhere'}") == 2
    assert "does not exist" in capsys.readouterr().err
