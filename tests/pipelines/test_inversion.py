"""ReNoise and DDIM inversion: published numbers, and the training step on inverted noise."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.pipelines import load_backbone
from diffalign.pipelines.inversion import consistent_route, inverted_noise, official_route, renoise_step
from diffalign.pipelines.process import Diffusion, Flow, NoiseProcess
from helpers import toy

ABAR = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def diffusion(prediction_type: str = "epsilon") -> Diffusion:
    return Diffusion(torch.from_numpy(ABAR).float(), prediction_type, final_alpha_cumprod=float(np.float32(ABAR[0])))


def proportional(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x


def by_time(x: Tensor, t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1) / 1000 * x


ONE = torch.ones(1, 1, 1, 1)


def official(model: Any, tau: float, **options: Any) -> float:
    """The target of the image 1 at time tau, five steps of the authors' code."""
    noise = inverted_noise(
        diffusion(), lambda x, t, rows: model(x, t), ONE, torch.tensor([tau]), steps=5, mode="official", **options
    )
    return noise.item()


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "target"), [(500.0, 0.1286884223), (601.0, 0.2567888252), (602.0, -0.0107920619)])
def test_official_targets(tau: float, target: float) -> None:
    assert official(proportional, tau) == pytest.approx(target, abs=1e-6)


def test_official_predicts_at_the_time_where_a_step_starts() -> None:
    assert official(by_time, 601.0) == pytest.approx(0.1660391119, abs=1e-6)


def walk(model: Any, times: list[float], at_start: bool = False, **options: Any) -> list[float]:
    """Values of the image 1 along a list of levels."""
    x, found = ONE, []
    for start, stop in pairwise(times):
        at = torch.tensor([start]) if at_start else None
        x = renoise_step(diffusion(), model, x, torch.tensor([max(start, 0.0)]), torch.tensor([stop]), predict_at=at,
                         **options)  # fmt: skip
        found.append(x.item())
    return found


GRID = [-199.0, 1.0, 201.0, 401.0, 601.0, 801.0]


def test_levels_of_the_official_walk() -> None:
    renoised = [1.0032194799, 1.0103085324, 0.8668008974, 0.6351470406, 0.3886672377]
    assert walk(proportional, GRID) == pytest.approx(renoised, abs=1e-6)
    plain = [1.0032136294, 1.0098431905, 0.8742597076, 0.6553740250, 0.4202071885]
    assert walk(proportional, GRID, iterations=0) == pytest.approx(plain, abs=1e-6)
    started = [0.9971607491, 0.8659677899, 0.7107753743, 0.5519644672]
    assert walk(by_time, GRID[:5], at_start=True) == pytest.approx(started, abs=1e-6)


def test_renoise_proper_tells_the_model_where_a_step_goes() -> None:
    levels = [0.9995846937, 0.9586528757, 0.8602803952, 0.7479447292]
    assert walk(by_time, GRID[:5]) == pytest.approx(levels, abs=1e-6)
    a, s = ABAR[601] ** 0.5, (1 - ABAR[601]) ** 0.5
    assert (levels[-1] - a) / s == pytest.approx(0.3798477482, abs=1e-6)


def test_official_steps_and_levels() -> None:
    times = torch.tensor([0.0, 1.0, 2.0, 201.0, 202.0, 401.0, 402.0, 601.0, 602.0, 999.0])
    assert official_route(diffusion(), times, 5).counts.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    every = torch.arange(1000.0)
    assert official_route(diffusion(), every, 5).counts.float().mean().item() == pytest.approx(3.792)
    assert official_route(diffusion(), every, 10).counts.float().mean().item() == pytest.approx(6.382)


@pytest.mark.parametrize(
    ("steps", "tau", "gain", "leak"),
    [
        (5, 2, 9.8360, -2.5972), (5, 50, 2.2624, -0.4918), (5, 202, 1.5212, -0.4327), (5, 402, 1.2049, -0.3277),
        (5, 500, 1.0775, -0.1480), (5, 602, 1.0702, -0.2261), (5, 999, 0.9839, 0.1232), (5, 401, 1.0, 0.0),
        (10, 2, 6.4632, -1.0618), (10, 102, 1.5131, -0.2342), (10, 500, 1.0009, -0.0015), (10, 999, 0.9953, 0.0502),
    ],
)  # fmt: skip
def test_official_takes_one_level_for_another(steps: int, tau: int, gain: float, leak: float) -> None:
    """The official target is gain e + leak x0 where x_L = a_L x0 + s_L e; consistent steps end at tau itself."""
    route = official_route(diffusion(), torch.tensor([float(tau)]), steps)
    level = int(route.stop[0, route.counts[0] - 1])
    a, s, a_level, s_level = ABAR[tau] ** 0.5, (1 - ABAR[tau]) ** 0.5, ABAR[level] ** 0.5, (1 - ABAR[level]) ** 0.5
    assert (s_level / s, (a_level - a) / s) == (pytest.approx(gain, abs=1e-4), pytest.approx(leak, abs=1e-4))


def fixed_point(**options: Any) -> float:
    return renoise_step(
        diffusion(), lambda z, t: 0.5 * z, ONE, torch.tensor([401.0]), torch.tensor([601.0]), **options
    ).item()


def test_fixed_point_and_averages() -> None:
    iterates = [0.8395525159, 0.8034841605, 0.7953760479, 0.7935533563, 0.7931436179, 0.7930515093]
    assert [fixed_point(iterations=k, average_from=k) for k in range(6)] == pytest.approx(iterates, abs=1e-6)
    assert fixed_point(iterations=1) == pytest.approx(0.8215183382, abs=1e-6)
    assert fixed_point(iterations=4) == pytest.approx(0.8050219397, abs=1e-6)
    assert fixed_point(iterations=9, average_from=8) == pytest.approx(0.7930249848, abs=1e-6)
    assert fixed_point(iterations=40, average_from=40) == pytest.approx(0.7930247990, abs=1e-6)


# --- consistent paths --------------------------------------------------------------------------------------------

PROCESSES: dict[str, NoiseProcess] = {"epsilon": diffusion(), "v": diffusion("v_prediction"), "flow": Flow()}


@pytest.mark.parametrize("kind", PROCESSES)
def test_consistent_steps_are_equal_and_end_at_the_drawn_time(kind: str) -> None:
    process = PROCESSES[kind]
    t = torch.tensor([0.2, 0.201, 0.5, 1.0, 0.1]) * (process.span if kind == "flow" else 999.0)
    route = consistent_route(process, t, 5)
    assert route.counts.tolist() == [1, 2, 3, 5, 1]
    for i, n in enumerate(route.counts.tolist()):
        stops = route.stop[i, :n]
        assert stops[-1] == t[i] and torch.equal(route.predict_at, route.stop)
        torch.testing.assert_close(stops, t[i] * torch.arange(1, n + 1) / n)
        assert route.start[i, 0] == process.noiseless and torch.equal(route.start[i, 1:n], stops[:-1])


def test_an_image_has_a_step_even_at_time_zero() -> None:
    route = consistent_route(diffusion(), torch.tensor([0.0]), 5)
    assert route.counts.tolist() == [1] and route.stop.tolist() == [[0.0]]


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_model_of_one_noise_is_inverted_exactly(kind: str) -> None:
    """A network that knows the noise e of the image: inversion must give e back at any time, in any number of steps."""
    process = PROCESSES[kind]
    generator = torch.Generator().manual_seed(0)
    x0, e = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(2))
    t = torch.tensor([0.05, 0.3, 0.62, 0.97])
    t = t if kind == "flow" else (t * 1000).floor()

    def predict(x: Tensor, now: Tensor, rows: Tensor) -> Tensor:
        if kind == "v":
            a, s = (c.view(-1, 1, 1, 1) for c in process.coefficients(now))
            return (e[rows] - s * x) / a
        return process.target(x0[rows], e[rows], now)

    for iterations in (0, 2):
        found = inverted_noise(process, predict, x0, t, steps=7, iterations=iterations)
        torch.testing.assert_close(found, e, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", PROCESSES)
def test_iterating_inverts_the_sampler(kind: str) -> None:
    """Many ReNoise iterations, then the sampler's own steps back: the image returns, which it does not after DDIM's."""
    process = PROCESSES[kind]
    x0 = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    start, end = (0.0, 0.6) if kind == "flow" else (1.0, 601.0)
    times = torch.linspace(start, end, 4)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.8 * x + t.view(-1, 1, 1, 1) / process.span)

    def error(iterations: int) -> float:
        x = x0
        for t, t_next in pairwise(times):
            x = renoise_step(process, predict, x, t[None], t_next[None], iterations=iterations, average_from=iterations)
        for t, t_next in pairwise(times.flip(0)):
            x = process.step(x, predict(x, t[None]), t[None], t_next[None])
        return float((x - x0).abs().max())

    assert error(40) < 1e-4 < error(0) / 20


def test_samples_of_a_batch_do_not_mix() -> None:
    x0 = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([5.0, 900.0, 333.0, 120.0, 999.0])
    seen: list[int] = []

    def predict(x: Tensor, now: Tensor, rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return torch.tanh(x) + rows.view(-1, 1, 1, 1) * 0.1

    whole = inverted_noise(diffusion(), predict, x0, t, steps=6)
    assert seen == [5, 5, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2]  # those that have arrived cost nothing more
    for i in range(5):
        alone = inverted_noise(
            diffusion(), lambda x, now, rows, i=i: torch.tanh(x) + i * 0.1, x0[i : i + 1], t[i : i + 1], steps=6
        )
        torch.testing.assert_close(alone, whole[i : i + 1])


def test_the_noise_puts_the_image_where_the_path_ended() -> None:
    """add_noise gives the latent, and target is (x_t - a x0) / s or (x_t - x0) / t."""
    x0 = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    for process, t in ((diffusion(), torch.tensor([301.0, 77.0])), (Flow(), torch.tensor([0.35, 0.9]))):
        noise = inverted_noise(process, lambda x, now, rows: torch.cos(x), x0, t, steps=4)
        x_t = process.add_noise(x0, noise, t)
        a, s = (c.view(-1, 1, 1, 1) for c in process.coefficients(t))
        wanted = (x_t - x0) / s if isinstance(process, Flow) else (x_t - a * x0) / s
        torch.testing.assert_close(process.target(x0, noise, t), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("process", [Flow(), diffusion("v_prediction")])
def test_official_is_for_epsilon_models(process: NoiseProcess) -> None:
    with pytest.raises(DiffalignError, match=r"inversion\.mode=official: it repeats code for epsilon models"):
        inverted_noise(process, lambda x, t, rows: x, ONE, torch.tensor([0.5]), steps=5, mode="official")


def test_unknown_mode() -> None:
    with pytest.raises(DiffalignError, match=r"inversion\.mode: unknown mode 'ddim'"):
        inverted_noise(Flow(), lambda x, t, rows: x, ONE, torch.tensor([0.5]), steps=5, mode="ddim")


# --- in training -------------------------------------------------------------------------------------------------


def rows_of(run_dir: Path, source: Any = None, **sections: Any) -> list[dict[str, float]]:
    config = toy.toy_config(run_dir, noise="inverted", **sections)
    toy.train(config, backbone=toy.ToyBackbone(), source=source or toy.ToySource(), say=lambda _: None)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_training_on_inverted_noise(tmp_path: Path) -> None:
    smpo = {"name": "smpo", "beta": 20.0, "reward_min": -0.5, "reward_max": 0.5}
    # A large learning rate blows up: the inversion runs through the policy itself.
    slow = {"lr": 1e-3}
    rows = rows_of(tmp_path / "a", objective=smpo, train={"steps": 60}, optimizer=slow)
    assert rows[0]["margin"] == 0.0 and rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert np.mean([r["accuracy"] for r in rows[-30:]]) > 0.7 and rows[-1]["loss"] < np.log(2)
    cut = rows_of(tmp_path / "b", objective=smpo, train={"steps": 10, "micro_batch": 1}, optimizer=slow)
    assert [r["loss"] for r in cut] == pytest.approx([r["loss"] for r in rows[:10]], rel=1e-4)
    other = rows_of(tmp_path / "c", objective=smpo, train={"steps": 3}, optimizer=slow, inversion={"by": "reference"})
    # The two models are equal until the first update, and after it no longer.
    assert other[0] == rows[0] and other[2]["policy_error"] != rows[2]["policy_error"]


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_gradients_survive_an_inversion_under_autocast(family: str, request: pytest.FixtureRequest) -> None:
    """Autocast may hand the inversion's casts of weights, which have no gradient, to the policy's forward."""
    from diffalign.objectives import RankDPO
    from diffalign.training.preference.draws import make_draws
    from diffalign.training.preference.step import preference_step
    from helpers.tiny_training import Source, config_for

    folder: Path = request.getfixturevalue(f"{family}_dir")
    backbone = load_backbone(folder)
    backbone.add_lora(4, 4)
    for parameter in backbone.trainable().values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    source = Source(backbone)
    config = config_for(folder, Path("unused"), 1, noise="inverted", inversion={"steps": 3})
    batch = source.batch([0, 1])
    gradients = []
    for autocast in (False, True):
        draws = make_draws(config, backbone.process, 0, [0, 1], batch.group_ids, batch.latents.shape)
        assert draws.noise is None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            result = preference_step(
                config, RankDPO(200.0), backbone, batch, draws, source.unconditional, backbone.trunk
            )
        result.output.loss.sum().backward()
        assert all(p.grad is not None for p in backbone.trainable().values())
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.trainable().values() if p.grad is not None]))
        backbone.trunk.zero_grad()
    plain, cast = gradients
    assert float(torch.nn.functional.cosine_similarity(plain, cast, dim=0)) > 0.9
