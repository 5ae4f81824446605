"""The reward-gradient step and loop on a toy: against finite differences of the sampler written out, and against ways of
cutting up the work."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.objectives.reward_gradient import RewardTerm, drift, mean_score, reward_loss
from diffalign.training.order import groups_for_step
from diffalign.training.reward_gradient.draws import Span, make_gradient_draws, span_of
from helpers import toy_reward_gradient as toy
from helpers.files import rows
from helpers.processes import finish, torchrun
from helpers.toy import SHAPE
from helpers.toy_distill import ToyPrompts

METHODS: dict[str, dict[str, Any]] = {
    "refl": {"name": "refl", "between": [2, 4]},
    "refl, three deep": {"name": "refl", "between": [3, 3], "depth": 3},
    "draft-1": {"name": "draft"},
    "draft-3": {"name": "draft", "last": 3},
    "draft": {"name": "draft", "last": None},
    "drtune": {"name": "draft", "last": 3, "detach_input": True},
    "alignprop": {"name": "alignprop", "last": [2, 5]},
    "draft-lv": {"name": "draft_lv", "noises": 3},
}


def trained(run_dir: Path, scores: Any = toy.bright, **sections: Any) -> list[dict[str, float]]:
    toy.run(toy.toy_config(run_dir, **sections), scores=scores)
    return rows(run_dir)


# --- the loss, by hand -----------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    scores = {"a": torch.tensor([0.5, 3.0]), "b": torch.tensor([20.0, 21.0])}
    terms = {"a": RewardTerm(weight=2.0, form="relu", threshold=2.0), "b": RewardTerm(weight=0.1)}
    torch.testing.assert_close(reward_loss(scores, terms), torch.tensor([2 * 1.5 - 2.0, 0.0 - 2.1]))
    torch.testing.assert_close(mean_score(scores, terms), torch.tensor([(1.0 + 2.0) / 2.1, (6.0 + 2.1) / 2.1]))
    torch.testing.assert_close(mean_score({"b": scores["b"]}, {"b": terms["b"]}), scores["b"])
    gap = drift(torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, 4.0]]]]))
    torch.testing.assert_close(gap, torch.tensor([2.5]))
    leaf = torch.tensor([1.9, 2.1], requires_grad=True)
    RewardTerm(3.0, "relu", 2.0).loss(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [-3.0, 0.0]
    with pytest.raises(ValueError, match="threshold"):
        RewardTerm(form="relu")
    with pytest.raises(ValueError, match="threshold"):
        RewardTerm(threshold=1.0)


# --- the gradient, against finite differences in float64 ---------------------------------------------------------


class Oracle:
    """The sampler, the reward and the drift in numpy, float64, from the papers' formulas; no code of the package.

    Steps before `span.first` run on the weights as they are, since a method gives them no gradient.
    """

    def __init__(self, kind: str, config: Any, backbone: toy.ToyBackbone, step: int) -> None:
        self.config, self.kind = config, kind
        trunk = backbone.trunk
        self.base, self.down, self.up = (w.detach().double().numpy() for w in (trunk.base, trunk.down, trunk.up))
        draws = make_gradient_draws(config, step, [0, 1], ["p0", "p1"], SHAPE)
        self.noise = draws.noise.double().numpy().reshape(2, -1)
        self.renoise = None if draws.renoise is None else draws.renoise.double().numpy().reshape(2, -1, 32)
        self.prompts = ToyPrompts().batch([0, 1])["prompt"].double().numpy()
        self.span = span_of(config, step)
        self.times = backbone.sampling_times(config.sampler.steps, 4, 4).double().numpy()
        self.alphas = toy.ALPHAS.float().double().numpy()

    def network(self, x: np.ndarray, t: float, weights: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
        """Guided; weights: of the low-rank policy, None for the reference."""
        scale = self.config.sampler.guidance_scale
        time = np.full((len(x), 1), t)
        outputs = []
        for prompt in (self.prompts, np.zeros_like(self.prompts)):
            features = np.concatenate([x, prompt, time], axis=1)
            out = features @ self.base
            outputs.append(out if weights is None else out + features @ weights[0] @ weights[1])
        return outputs[1] + scale * (outputs[0] - outputs[1])

    def signal(self, t: float) -> tuple[float, float]:
        if self.kind == "flow":
            return 1 - t, t
        abar = 1.0 if t < 0 else self.alphas[int(t)]
        return abar**0.5, (1 - abar) ** 0.5

    def clean(self, x: np.ndarray, prediction: np.ndarray, t: float) -> np.ndarray:
        a, s = self.signal(t)
        return x - t * prediction if self.kind == "flow" else (x - s * prediction) / a

    def onward(self, x: np.ndarray, prediction: np.ndarray, t: float, after: float) -> np.ndarray:
        if self.kind == "flow":
            return x + (after - t) * prediction
        a, s = self.signal(after)
        return a * self.clean(x, prediction, t) + s * prediction

    def loss(self, down: np.ndarray, up: np.ndarray) -> float:
        times, span, method = self.times, self.span, self.config.method
        frozen, moved = (self.down, self.up), (down, up)
        x, start = self.noise, self.noise
        ends = len(times) - 1 if self.renoise is not None else span.first
        for k in range(ends):
            x = self.onward(x, self.network(x, times[k], frozen), times[k], times[k + 1])
        starts = [x]
        if self.renoise is not None:
            a, s = self.signal(times[-2])
            starts = [a * x + s * self.renoise[:, r] for r in range(self.renoise.shape[1])]
        total = 0.0
        for start in starts:
            x, seen, gaps = start, start, []
            for k in range(span.first, span.stop + 1):
                # With a detached input the network looks at the path that the frozen weights take.
                looked = seen if getattr(method, "detach_input", False) else x
                prediction = self.network(looked, times[k], moved)
                gaps.append(((prediction - self.network(looked, times[k], None)) ** 2).mean(axis=1))
                here = self.network(seen, times[k], frozen)
                seen = self.onward(seen, here, times[k], times[k + 1])
                if k == span.stop:
                    x = self.clean(x, prediction, times[k])
                else:
                    x = self.onward(x, prediction, times[k], times[k + 1])
            each = (x.mean(axis=1) - 1.5) ** 2 + self.config.drift.weight * np.mean(gaps, axis=0)
            total += each.mean() / len(starts)
        return float(total)

    def gradients(self, h: float = 1e-6) -> dict[str, np.ndarray]:
        """Central differences, weight by weight."""
        found = {}
        for place, name in enumerate(("down", "up")):
            weights = [self.down.copy(), self.up.copy()]
            gradient = np.zeros_like(weights[place])
            for index in np.ndindex(gradient.shape):
                at = weights[place][index]
                values = []
                for shift in (h, -h):
                    weights[place][index] = at + shift
                    values.append(self.loss(*weights))
                weights[place][index] = at
                gradient[index] = (values[0] - values[1]) / (2 * h)
            found[name] = gradient
        return found


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("name", list(METHODS))
def test_gradient_is_that_of_finite_differences(tmp_path: Path, kind: str, name: str) -> None:
    config = toy.toy_config(tmp_path, method=METHODS[name], drift={"weight": 0.3})
    backbone = toy.ToyBackbone(kind, moved=True)
    step = 1
    output, measured = toy.one_step(config, backbone, step)
    oracle = Oracle(kind, config, backbone, step)
    assert output.loss.mean().item() == pytest.approx(oracle.loss(oracle.down, oracle.up), rel=1e-4)
    for weight, expected in oracle.gradients().items():
        scale = np.abs(expected).max()
        assert scale > 1e-3
        np.testing.assert_allclose(measured[weight].numpy(), expected, rtol=0, atol=3e-4 * scale, err_msg=weight)


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_refl_at_the_last_step_is_draft_1(tmp_path: Path, kind: str) -> None:
    found = []
    for method in ({"name": "refl", "between": [5, 5]}, {"name": "draft", "last": 1}):
        backbone = toy.ToyBackbone(kind, moved=True)
        found.append(toy.one_step(toy.toy_config(tmp_path, method=method), backbone))
    (refl, refl_gradient), (draft, draft_gradient) = found
    assert torch.equal(refl.loss, draft.loss) and torch.equal(refl.image, draft.image)
    assert all(torch.equal(refl_gradient[name], draft_gradient[name]) for name in draft_gradient)


@pytest.mark.parametrize("name", list(METHODS))
def test_checkpointing_changes_no_bit(tmp_path: Path, name: str) -> None:
    found = []
    for checkpointing in (True, False):
        config = toy.toy_config(
            tmp_path,
            method=METHODS[name],
            drift={"weight": 0.3},
            sampler={"checkpointing": checkpointing},
        )
        found.append(toy.one_step(config, toy.ToyBackbone(moved=True), step=2))
    (with_it, its), (without, others) = found
    assert torch.equal(with_it.loss, without.loss) and set(its) == {"down", "up"}
    assert all(torch.equal(its[weight], others[weight]) for weight in its)


def test_checkpointing_keeps_the_input_of_a_step_alone(tmp_path: Path) -> None:
    """What the graph holds between forward and backward."""

    def held(checkpointing: bool) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        config = toy.toy_config(
            tmp_path, method=METHODS["draft"], sampler={"checkpointing": checkpointing}, drift={"measure": False}
        )
        backbone = toy.ToyBackbone(moved=True)
        prompts = ToyPrompts()
        draws = make_gradient_draws(config, 0, [0, 1], ["p0", "p1"], SHAPE)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            toy.reward_gradient_step(
                config, backbone, backbone.sampling_times(6, 4, 4), prompts.batch([0, 1]), prompts.unconditional,
                draws, span_of(config, 0), [0, 1], toy.bright,
            )  # fmt: skip
        return sum(kept.values())

    assert held(True) < held(False) / 4


def test_several_rewards_are_summed_by_weight(tmp_path: Path) -> None:
    def both(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        return {**toy.bright(latents, indices), "flat": -latents.flatten(1).var(dim=1)}

    def gradient(*terms: dict[str, Any]) -> tuple[Any, Tensor]:
        config = toy.toy_config(tmp_path, rewards=list(terms), method=METHODS["draft-3"])
        names = {term["name"] for term in terms}
        output, found = toy.one_step(
            config, toy.ToyBackbone(moved=True), 0, lambda x, i: {k: v for k, v in both(x, i).items() if k in names}
        )
        return output, torch.cat([g.flatten() for g in found.values()])

    bright, flat = {"name": "bright", "weight": 2.0}, {"name": "flat", "weight": 0.5}
    (mixed, together), (_, one), (_, other) = gradient(bright, flat), gradient(bright), gradient(flat)
    torch.testing.assert_close(together, one + other, rtol=1e-4, atol=1e-6)
    scores = both(mixed.image.detach(), [])
    torch.testing.assert_close(mixed.metrics["reward/flat"], scores["flat"])
    torch.testing.assert_close(mixed.metrics["reward"], 0.8 * scores["bright"] + 0.2 * scores["flat"])
    # Above its threshold a reward lets go; the other one stays.
    satisfied = {**bright, "form": "relu", "threshold": -100.0}
    output, alone = gradient(satisfied, flat)
    torch.testing.assert_close(alone, other)
    assert output.metrics["above_threshold"].tolist() == [1.0, 1.0] and "above_threshold" not in mixed.metrics


def test_spans(tmp_path: Path) -> None:
    def spans(method: dict[str, Any], steps: int = 40) -> Counter[tuple[int, int]]:
        config = toy.toy_config(tmp_path, method=method, sampler={"steps": steps})
        found = (span_of(config, step) for step in range(400))
        return Counter((span.first, span.stop) for span in found)

    refl = spans({"name": "refl"})
    assert set(refl) == {(k, k) for k in range(30, 40)} and min(refl.values()) > 15  # ReFL's code: 30 to 39 of 40
    assert set(spans({"name": "refl", "between": [0, 1], "depth": 2}, 4)) == {(0, 0), (0, 1)}
    assert set(spans({"name": "refl", "between": [2, 3], "depth": 2}, 4)) == {(1, 2), (2, 3)}
    assert set(spans({"name": "draft", "last": 7})) == {(33, 39)}
    assert set(spans({"name": "draft", "last": None})) == {(0, 39)}
    assert set(spans({"name": "alignprop"}, 5)) == {(k, 4) for k in range(5)}
    assert set(spans({"name": "alignprop", "last": [2, 3]}, 5)) == {(2, 4), (3, 4)}
    assert set(spans({"name": "draft_lv"})) == {(39, 39)} and Span(2, 4).length == 3


def test_draws_are_named_by_what_they_are_for(tmp_path: Path) -> None:
    config = toy.toy_config(tmp_path, method=METHODS["draft-lv"])
    draws = make_gradient_draws(config, 5, [0, 1], ["a", "b"], SHAPE)
    assert draws.renoise is not None and draws.renoise.shape == (6, *SHAPE)
    again = make_gradient_draws(config, 5, [1], ["b"], SHAPE)
    assert torch.equal(again.noise, draws.noise[1:]) and torch.equal(again.renoise, draws.renoise[3:])
    values = [float(n.flatten()[0]) for n in (*draws.noise, *draws.renoise)]
    other = make_gradient_draws(config, 6, [0], ["a"], SHAPE).noise
    assert len({*values, float(other.flatten()[0])}) == 9
    assert make_gradient_draws(toy.toy_config(tmp_path), 0, [0], ["a"], SHAPE).renoise is None


# --- the loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["refl", "draft", "draft-lv"])
def test_the_reward_rises_and_where_its_gradient_is_cut_it_does_not(tmp_path: Path, name: str) -> None:
    def end(folder: str, scores: Any) -> tuple[float, float, float]:
        found = trained(
            tmp_path / folder, scores, method=METHODS[name], train={"steps": 40, "images_per_step": 8, "micro_batch": 8}
        )
        assert found[0]["drift"] == 0.0
        rewards = [row["reward"] for row in found]
        return float(np.mean(rewards[:5])), float(np.mean(rewards[-5:])), found[-1]["drift"]

    def cut(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        return {"bright": toy.bright(latents.detach(), indices)["bright"] + 0.0 * latents.sum()}

    def shuffled(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        """Half of the images follow the reward, the other half flee from it."""
        value = toy.bright(latents, indices)["bright"]
        sign = torch.tensor([1.0, -1.0]).repeat(len(value) // 2)
        return {"bright": sign * value + ((1 - sign) * value).detach()}

    # All see the same prompts and noises, so that the cut one shows what an untrained policy scores at the end.
    before, after, moved = end("followed", toy.bright)
    _, untrained, unmoved = end("cut", cut)
    assert unmoved == 0.0 and after > untrained + 0.5 and after > before and moved > 0
    _, by_chance, _ = end("shuffled", shuffled)
    assert by_chance < untrained + 0.2 * (after - untrained)


def test_a_learning_rate_of_nothing_leaves_the_reward(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": {"lr": 1e-30}, "method": METHODS["draft-3"]}
    found = trained(tmp_path / "a", **options)
    fresh = toy.ToyBackbone()
    config = toy.toy_config(tmp_path, **options)
    assert all(row["drift"] < 1e-30 and row["grad_norm"] > 0 for row in found)
    prompts = ToyPrompts()
    for step, row in enumerate(found):
        indices = groups_for_step(len(prompts), 4, step, 0)
        draws = make_gradient_draws(config, step, [0, 1, 2, 3], [prompts.ids[i] for i in indices], SHAPE)
        output = toy.reward_gradient_step(
            config, fresh, fresh.sampling_times(6, 4, 4), prompts.batch(indices), prompts.unconditional, draws,
            span_of(config, step), indices, toy.bright,
        )  # fmt: skip
        assert row["reward"] == pytest.approx(float(output.metrics["reward"].mean()), rel=1e-6)


def test_the_penalty_holds_the_policy(tmp_path: Path) -> None:
    free, held = (
        trained(tmp_path / str(weight), method=METHODS["draft-3"], drift={"weight": weight}, train={"steps": 40})
        for weight in (0.0, 30.0)
    )
    assert held[-1]["drift"] < 0.2 * free[-1]["drift"] and held[-1]["reward"] < free[-1]["reward"]
    unseen = trained(tmp_path / "unseen", method=METHODS["draft-3"], drift={"measure": False}, train={"steps": 40})
    assert "drift" not in unseen[0] and unseen[-1]["reward"] == free[-1]["reward"]  # measuring changes nothing


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": METHODS["draft-3"], "drift": {"weight": 0.1}}
    whole = trained(tmp_path / "a", **options)
    cut = trained(tmp_path / "b", **options, train={"micro_batch": 1})
    assert cut[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    for name in ("loss", "reward", "drift", "grad_norm"):
        assert [r[name] for r in cut] == pytest.approx([r[name] for r in whole], rel=1e-3), name


@pytest.mark.parametrize("name", ["refl", "alignprop", "draft-lv"])
def test_resume_is_exact(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"method": METHODS[name], "drift": {"weight": 0.1}}
    straight = trained(tmp_path / "a", train={"steps": 6, "ema_decay": 0.9}, **options)
    trained(tmp_path / "b", train={"steps": 3, "ema_decay": 0.9}, **options)
    assert trained(tmp_path / "b", train={"steps": 6, "ema_decay": 0.9}, **options) == straight
    for part in ("policy", "optimizer", "ema"):
        a, b = (load_file(tmp_path / d / f"checkpoints/step-00000006/{part}.safetensors") for d in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
    saved = load_file(tmp_path / "a/weights/weights.safetensors")
    average = load_file(tmp_path / "a/checkpoints/step-00000006/ema.safetensors")
    assert all(torch.equal(saved[k], average[k]) for k in saved)


def test_another_config_does_not_go_on(tmp_path: Path) -> None:
    trained(tmp_path, train={"steps": 3})
    with pytest.raises(DiffalignError, match=r"belongs to another config: method\."):
        trained(tmp_path, train={"steps": 6}, method={"name": "draft"})


def test_scores_without_a_gradient_are_refused(tmp_path: Path) -> None:
    def rounded(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        return toy.bright(latents.detach(), indices)

    with pytest.raises(DiffalignError, match="the score of bright carries no gradient to the image"):
        trained(tmp_path, rounded)


def test_losses_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match=r"the loss is nan at step 1, prompts p.*lower optimizer\.lr"):
        trained(tmp_path, lambda x, i: {"bright": (x.mean(dim=(1, 2, 3)) - 100.0).sqrt()})


def test_two_processes_equal_one(tmp_path: Path) -> None:
    program = [toy.__file__]
    for name, launcher in (("one", [sys.executable]), ("two", torchrun())):
        finish([*launcher, *program, str(tmp_path / name), "10", "4", "2"])
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two) == 10
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    for name in ("loss", "reward", "drift"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4, abs=1e-9), name
    assert [r["judged_step"] for r in two] == [r["judged_step"] for r in one]
