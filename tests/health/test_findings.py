"""Health: every finding on rows made for it, none on ordinary rows, and the watch over a run of the toy backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.health import FINDINGS, Finding, LabelledGroup, describe, examine, examine_labels
from diffalign.objectives import DiffusionDPO, GroupErrors, SmPO
from diffalign.training.preference.stabilise import is_outlier, remember_margin, with_auto_beta
from helpers import toy

RNG = np.random.default_rng(0)


def rows(count: int = 160, **changes: Any) -> list[dict[str, float]]:
    """Rows of an ordinary DPO run; a change is a number, or a function of the step."""
    plain: dict[str, Any] = {
        "loss": lambda s: 0.69 - 0.0005 * s,
        "margin": lambda s: 0.001 * s,
        "accuracy": lambda s: float(np.clip(RNG.binomial(8, 0.62) / 8, 0, 1)),
        "winner_gap": lambda s: 1e-5 * s,
        "loser_gap": lambda s: 2e-5 * s,
        "gradient_factor": lambda s: 0.5 - 0.0005 * s,
        "grad_norm": lambda s: 0.3 + 0.1 * RNG.random(),
        "drift": lambda s: 2e-5 * s,
        "policy_error": 0.04,
        "reference_error": 0.04,
        "share_without_preference": 0.1,
        "lr": 1e-3,
    }
    made = {name: value for name, value in {**plain, **changes}.items() if value is not None}
    return [{"step": s, **{k: float(v(s) if callable(v) else v) for k, v in made.items()}} for s in range(1, count + 1)]


def names(found: list[Finding]) -> list[str]:
    return [f.name for f in found]


def test_an_ordinary_run_is_healthy() -> None:
    assert examine(rows()) == []
    sft = [{k: r[k] for k in ("step", "loss", "policy_error", "grad_norm", "lr")} for r in rows()]
    assert examine(sft) == []


@pytest.mark.parametrize(
    ("name", "step", "changes"),
    [
        ("labels_without_spread", 20, {"share_without_preference": 0.75}),
        ("accuracy_stuck", 120, {"accuracy": lambda s: (0.375, 0.5, 0.625)[s % 3]}),
        ("beta_too_small", 20, {"gradient_factor": 0.4999, "winner_gap": 0.001, "loser_gap": 0.002}),
        ("beta_too_small", 20, {"gradient_factor": None, "implicit_spread": 0.001, "winner_gap": 0.001}),
        ("winner_rises", 41, {"winner_gap": lambda s: 0.03 if s > 30 else 0.0}),  # the middle of 20 rows: 11 of them
        ("loser_dominates", 20, {"loser_gap": 0.05}),
        ("margin_saturated", 69, {"gradient_factor": lambda s: 0.01 if s > 30 else 0.4}),  # one of 40 at 0.4
        ("gradient_jumps", 45, {"grad_norm": lambda s: 5.0 if s > 40 else 0.5}),
        ("gradient_vanished", 40, {"grad_norm": lambda s: 0.0 if s > 20 else 0.5}),
        # 15 of 20 rows: the lowest quarter, too
        ("loss_diverges", 45, {"loss": lambda s: 2.0 if s > 30 else 0.6, "accuracy": lambda s: 0.25 + 0.5 * (s % 2)}),
        ("loss_diverges", 45, {"loss": lambda s: 2.0 if s > 30 else 0.6, "accuracy": None}),
        ("drift_explodes", 20, {"drift": 0.05, "policy_error": 0.07}),
    ],
)
def test_each_trouble_is_named_once_at_its_first_step(name: str, step: int, changes: dict[str, Any]) -> None:
    found = {f.name: f.step for f in examine(rows(**changes))}
    assert found.get(name) == step


def dpo_rows(seed: int, beta: float, groups: int = 8, count: int = 400, gain: float = 1.0) -> list[dict[str, float]]:
    """Rows as Diffusion-DPO logs them, from made-up errors: both images' errors rise a little, the loser's more, and an
    image's own part is several times the difference. One step in 40 meets a time at which errors are ten times larger.
    """
    rng = np.random.default_rng(seed)
    made = []
    for step in range(1, count + 1):
        moved = 1 - np.exp(-(step - 1) / 100)  # 0 at the reference
        size = 10.0 if rng.random() < 0.025 else 1.0
        noise = 0.004 * moved * rng.standard_normal((groups, 2))
        d = size * (np.array([0.001, 0.001 + 0.003 * gain]) * moved + noise)
        margin = 0.5 * beta * (d[:, 1] - d[:, 0])
        made.append(
            {
                "step": step,
                "loss": float(np.logaddexp(0, -margin).mean()),
                "accuracy": float((0.5 * (np.sign(margin) + 1)).mean()),
                "gradient_factor": float((0.5 * (1 - np.tanh(margin / 2))).mean()),
                "winner_gap": float(d[:, 0].mean()),
                "loser_gap": float(d[:, 1].mean()),
                "reference_error": 0.04 * size,
                "drift": float(0.003 * moved * size),
                "policy_error": 0.041 * size,
                "grad_norm": float(rng.lognormal(0, 0.4)),
                "share_without_preference": 0.0,
                "lr": 1e-3,
            }
        )
    return made


@pytest.mark.parametrize("beta", [50.0, 2000.0, 20000.0])
@pytest.mark.parametrize("groups", [1, 8])
def test_no_false_alarm_whatever_beta_and_batch(beta: float, groups: int) -> None:
    """With beta 20,000 a margin is several tens in both directions, and single losses reach hundreds."""
    for seed in range(6):
        made = dpo_rows(seed, beta, groups)
        assert examine(made) == [], (seed, beta, groups)
    if beta == 20000.0:
        assert max(row["loss"] for row in made) > 10 * np.median([row["loss"] for row in made])


def test_the_same_rows_without_a_gain_are_named() -> None:
    """The other side: rows in which the labels mean nothing, and rows in which beta does nothing."""
    assert "accuracy_stuck" in names(examine(dpo_rows(0, 2000.0, count=1200, gain=0.0)))
    assert names(examine(dpo_rows(0, 0.01))) == ["beta_too_small"]


def test_a_long_warm_up_is_no_stuck_accuracy() -> None:
    made = rows(500, accuracy=lambda s: float(RNG.binomial(8, 0.5)) / 8, lr=lambda s: 1e-6 * min(s, 450))
    assert examine(made) == []
    later = rows(600, accuracy=lambda s: float(RNG.binomial(32, 0.5)) / 32, lr=lambda s: 1e-6 * min(s, 450))
    assert [(f.name, f.step) for f in examine(later)] == [("accuracy_stuck", 569)]  # 450 + 40 + 80 rows, the 450th in


def test_a_policy_that_moves_without_harm_has_not_exploded() -> None:
    """As under inverted noise, where the reference's own error is small."""
    assert examine(rows(drift=0.05, policy_error=0.045)) == []


def test_one_wild_row_decides_nothing() -> None:
    made = rows()
    made[60] |= {"loss": 500.0, "winner_gap": 5.0, "loser_gap": 9.0, "drift": 7.0, "grad_norm": 900.0}
    assert examine(made) == []


def test_the_loss_is_judged_per_group_that_counts() -> None:
    """First most groups state no preference, then all do: the loss doubles, and nothing has happened."""
    made = rows(loss=lambda s: 0.3 if s <= 30 else 0.66, share_without_preference=lambda s: 0.55 if s <= 15 else 0.0)
    for row in made[15:30]:
        row["share_without_preference"] = 0.45
    assert "loss_diverges" not in names(examine(made))


def test_steps_without_a_preference_are_not_judged() -> None:
    """Their accuracy is 0 and their gaps are 0 because nothing counts, not because anything is wrong."""
    made = rows()
    for row in made[::2]:
        row.update(share_without_preference=1.0, accuracy=0.0, gradient_factor=0.0, winner_gap=0.0)
    assert names(examine(made)) == ["labels_without_spread"]


def test_every_finding_has_words() -> None:
    for name in FINDINGS:
        line = describe(Finding(name, 7, "measured"))
        assert line.count("\n") == 0 and "step 7" in line and "Change: " in line
    assert "before training" in describe(Finding("labels_oppose_scores", 0, "x"))


def validation(step: int, scores: np.ndarray) -> dict[str, Any]:
    return {"step": step, "scores": {"geneval.dense": scores.tolist()}}


def test_the_validation_reward() -> None:
    base = RNG.random(40)
    worse, better = base - 0.1 + 0.05 * RNG.standard_normal(40), base + 0.1
    found = examine(rows(), [validation(0, base), validation(40, base + 0.001), validation(80, worse)])
    assert [(f.name, f.step) for f in found] == [("reward_below_base", 80)]
    assert examine(rows(), [validation(0, base), validation(40, better), validation(80, better)]) == []
    flat = [validation(s, better if s == 40 else base + 0.05) for s in (0, 40, 80, 120, 160)]
    assert names(examine(rows(drift=lambda s: 1e-5 * s), flat)) == ["drift_without_reward"]
    assert examine(rows(drift=1e-4), flat) == []


def test_validations_that_only_scatter_are_no_finding() -> None:
    """64 prompts whose true reward rises a little and stays: in most runs one of many noisy means is the best early on."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        base = rng.random(64)
        made = [validation(s, base + (0.02 if s else 0) + 0.15 * rng.standard_normal(64)) for s in range(0, 161, 20)]
        assert examine(rows(drift=lambda s: 1e-5 * s), made) == [], seed


# --- labels ----------------------------------------------------------------------------------------------------------


def labelled(kind: str, groups: int = 40) -> list[LabelledGroup]:
    made = []
    for _ in range(groups):
        scores = RNG.random(4)
        labels = {"true": scores, "reversed": 1 - scores, "shuffled": RNG.permutation(scores)}[kind]
        made.append(LabelledGroup(labels.tolist(), {"geneval": scores.tolist(), "other": RNG.random(4).tolist()}))
    return made


def test_labels_against_scores() -> None:
    assert examine_labels(labelled("true")) == []
    assert names(examine_labels(labelled("shuffled", 1000))) == ["labels_ignore_scores"]
    reversed_ = [LabelledGroup(g.labels, {"geneval": g.scores["geneval"]}) for g in labelled("reversed")]
    assert names(examine_labels(reversed_)) == ["labels_oppose_scores"]
    assert examine_labels(labelled("reversed", 3)) == []  # too few pairs decide nothing
    assert examine_labels([LabelledGroup([1.0, 0.0], {})] * 100) == []


@pytest.mark.parametrize("pairs", [64, 100, 1000])
def test_people_who_agree_with_a_score_in_six_of_ten_pairs(pairs: int) -> None:
    """A weak but real agreement, as of people and PickScore, is no alarm, however few pairs there are."""
    for seed in range(20):
        alike = np.random.default_rng(seed).random(pairs) < 0.62
        groups = [LabelledGroup([1.0, 0.0], {"pickscore": [0.3, 0.2] if a else [0.2, 0.3]}) for a in alike]
        assert examine_labels(groups) == [], seed


def test_generators_that_explain_the_ranking() -> None:
    clear = [LabelledGroup([1.0, 0.5, 0.0], {}, ["a", "b", "b"])] * 50
    mixed = [LabelledGroup([1.0, 0.0], {}, ["a", "b"]), LabelledGroup([0.0, 1.0], {}, ["a", "b"])] * 50
    one = [LabelledGroup([1.0, 0.0], {}, ["a", "a"])] * 100
    assert names(examine_labels(clear)) == ["generators_explain_ranking"]
    assert examine_labels(mixed) == examine_labels(one) == []
    # Twenty generators that seldom meet: in most pairs one has won all, and that says nothing.
    rng = np.random.default_rng(3)
    many = [LabelledGroup([1.0, 0.0], {}, [f"g{i}" for i in rng.choice(20, 2, replace=False)]) for _ in range(100)]
    assert examine_labels(many) == []


# --- in the loop -----------------------------------------------------------------------------------------------------


def run(run_dir: Path, said: list[str] | None = None, **sections: Any) -> list[dict[str, float]]:
    findings = sections.pop("findings", ())
    config = toy.toy_config(run_dir, **sections)
    say = (lambda _: None) if said is None else said.append
    toy.train(config, backbone=toy.ToyBackbone(), source=toy.ToySource(), say=say, findings=findings)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


SMALL_BETA: dict[str, Any] = {"objective": {"name": "dpo", "beta": 1e-3}, "optimizer": {"lr": 0.05}}


def test_said_and_written(tmp_path: Path) -> None:
    said: list[str] = []
    made = run(tmp_path, said, train={"steps": 40}, **SMALL_BETA)
    written = json.loads((tmp_path / "health.json").read_text())
    assert "beta_too_small" in [f["name"] for f in written]
    assert any(line.startswith("alarm, step ") and "beta is too small" in line for line in said)
    assert said[-1].startswith("health: ")
    assert [f["name"] for f in written] == names(examine(made))


def test_a_healthy_run_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    run(tmp_path, said, train={"steps": 24})
    assert said[-1] == "health: nothing found" and json.loads((tmp_path / "health.json").read_text()) == []


def test_stop_keeps_what_was_trained_and_warn_goes_on(tmp_path: Path) -> None:
    warned = run(tmp_path / "warn", train={"steps": 40}, **SMALL_BETA)
    step = json.loads((tmp_path / "warn/health.json").read_text())[0]["step"]
    with pytest.raises(DiffalignError, match=r"on_alarm=stop.*beta is too small.*Set on_alarm=warn to continue"):
        run(tmp_path / "stop", train={"steps": 40}, on_alarm="stop", **SMALL_BETA)
    assert (tmp_path / f"stop/checkpoints/step-{step:08d}/policy.safetensors").is_file()
    assert (tmp_path / "stop/weights/weights.safetensors").is_file()
    with pytest.raises(DiffalignError, match="on_alarm=stop"):  # the same command does not slip past
        run(tmp_path / "stop", train={"steps": 40}, on_alarm="stop", **SMALL_BETA)
    assert run(tmp_path / "stop", train={"steps": 40}, **SMALL_BETA) == warned


def test_what_is_wrong_before_training_stops_it(tmp_path: Path) -> None:
    with pytest.raises(DiffalignError, match="before training: the labels oppose"):
        run(tmp_path, on_alarm="stop", findings=[Finding("labels_oppose_scores", 0, "3% of 400 pairs")])
    assert not (tmp_path / "checkpoints").exists()
    assert json.loads((tmp_path / "health.json").read_text())[0]["name"] == "labels_oppose_scores"


# --- optional stabilisers ---------------------------------------------------------------------------------------------


def test_outlier_gradients_are_skipped_and_not_remembered() -> None:
    state: dict[str, Any] = {}
    assert not any(is_outlier(1.0 + 0.01 * i, 5.0, state) for i in range(20))
    assert is_outlier(50.0, 5.0, state) and is_outlier(float("nan"), 5.0, state) and max(state["usual_norms"]) < 2
    assert not is_outlier(5.0, 5.0, state) and not is_outlier(50.0, None, {})


def test_a_skipped_step_changes_no_weight(tmp_path: Path) -> None:
    made = run(tmp_path / "a", train={"steps": 30, "skip_grad_norm": 1.1})
    assert {r["skipped"] for r in made} == {0.0, 1.0}
    run(tmp_path / "b", train={"steps": 17, "skip_grad_norm": 1.1})
    assert run(tmp_path / "b", train={"steps": 30, "skip_grad_norm": 1.1}) == made  # also when it goes on


def test_auto_beta_reaches_its_target() -> None:
    objective, state = DiffusionDPO(beta=100.0), {}
    assert with_auto_beta(objective, None, state).beta == with_auto_beta(objective, 0.3, state).beta == 100.0
    size = 2e-4  # margin / beta
    beta = 100.0
    for _ in range(5):
        remember_margin({"margin": beta * size, "share_without_preference": 0.2}, beta, state)
        beta = with_auto_beta(objective, 0.3, state).beta
        before = dict(state)
        remember_margin({"margin": 0.0, "share_without_preference": 1.0}, beta, state)  # a step without a preference
        assert state == before
    assert 1 / (1 + np.exp(beta * size)) == pytest.approx(0.3)
    assert with_auto_beta(DiffusionDPO(beta=1.0), 0.3, state).beta == 100.0  # no further than a hundredfold


def test_auto_beta_of_smpo_does_not_count_ties() -> None:
    """Three sure pairs and five ties: the sure ones get the factor. A plain mean would triple their margin."""
    scores = torch.tensor([[1.0, 0.0]] * 3 + [[0.5, 0.5]] * 5, dtype=torch.float64)
    reference = torch.full((8, 2), 0.4, dtype=torch.float64)
    policy = reference + torch.tensor([0.0, 2e-4], dtype=torch.float64)
    state: dict[str, Any] = {}
    objective = SmPO(beta=100.0)
    for _ in range(3):
        found = {k: float(v.mean()) for k, v in objective(GroupErrors(policy, reference, scores)).metrics.items()}
        remember_margin({**found, "share_without_preference": 0.0}, objective.beta, state)
        objective = with_auto_beta(SmPO(beta=100.0), 0.3, state)
    sure = 10 * np.tanh(0.5)  # gamma (2p - 1) with p = sigmoid(1)
    assert 1 / (1 + np.exp(0.5 * objective.beta * sure * 2e-4)) == pytest.approx(0.3)
    factors = objective(GroupErrors(policy, reference, scores)).metrics["gradient_factor"].tolist()
    assert factors == pytest.approx([0.3] * 3 + [0.5] * 5)


OBJECTIVES = {"dpo": {"name": "dpo", "beta": 20.0}, "smpo": {"name": "smpo", "beta": 5.0, "reward_min": -1.0}}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_auto_beta_holds_its_target_while_training(name: str, tmp_path: Path) -> None:
    """The policy moves on and the margins grow; beta falls, and the factor of the mean margin stays where it is wanted."""
    settings = {"steps": 250, "auto_beta": 0.4}
    made = run(tmp_path, train=settings, objective=OBJECTIVES[name], optimizer={"lr": 2e-3})[-100:]
    margins = [r["smoothed_margin"] / r["smoothing"] if name == "smpo" else r["margin"] for r in made]
    assert 1 / (1 + np.exp(np.mean(margins))) == pytest.approx(0.4, abs=0.03)
    assert made[0]["beta"] != OBJECTIVES[name]["beta"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_auto_beta_goes_on_exactly(name: str, tmp_path: Path) -> None:
    made = run(tmp_path / "a", train={"auto_beta": 0.3}, objective=OBJECTIVES[name])
    assert len({r["beta"] for r in made}) > 3
    run(tmp_path / "b", train={"steps": 6, "auto_beta": 0.3}, objective=OBJECTIVES[name])
    assert run(tmp_path / "b", train={"auto_beta": 0.3}, objective=OBJECTIVES[name]) == made
    a, b = ((tmp_path / folder / "weights/weights.safetensors").read_bytes() for folder in "ab")
    assert a == b


@pytest.mark.parametrize("name", ["rankdpo", "gdro", "sft"])
def test_auto_beta_is_refused_by_name_where_there_is_no_such_margin(name: str, tmp_path: Path) -> None:
    plain = toy.toy_config(tmp_path).model_dump(mode="json") | {"objective": {"name": name}}
    plain["train"]["auto_beta"] = 0.3
    with pytest.raises(ValueError, match=f"as dpo and smpo have, not {name}"):
        TrainConfig.model_validate(plain)


def test_remedies_of_dpo() -> None:
    policy = torch.tensor([[0.5, 0.9], [0.2, 0.1]], dtype=torch.float64, requires_grad=True)
    group = GroupErrors(policy, torch.full((2, 2), 0.4, dtype=torch.float64), torch.tensor([[1.0, 0.0]] * 2))
    d_w, d_l = np.array([0.1, -0.2]), np.array([0.5, -0.3])
    plain = np.log1p(np.exp(5.0 * (d_w - d_l)))
    assert DiffusionDPO(10.0)(group).loss.tolist() == pytest.approx(plain)
    assert DiffusionDPO(10.0, anchor=0.5)(group).loss.tolist() == pytest.approx(plain + 0.5 * np.array([0.5, 0.2]))
    weighted = np.log1p(np.exp(5.0 * (d_w - 0.5 * d_l)))
    assert DiffusionDPO(10.0, loser_weight=0.5)(group).loss.tolist() == pytest.approx(weighted)
    clamped = DiffusionDPO(10.0, margin_clamp=1.0)(group)
    assert clamped.loss.tolist() == pytest.approx([np.log1p(np.exp(-1.0)), plain[1]])  # the first margin is 2
    clamped.loss.sum().backward()
    assert policy.grad is not None and not policy.grad[0].any() and policy.grad[1].all()


@pytest.mark.parametrize(
    "weightless", [[0.5, 0.5], [1.0, float("nan")], [float("nan")] * 3, [0.3], [0.2, 0.2, float("nan")]], ids=str
)
def test_most_groups_without_weight_are_named_before_training(weightless: list[float]) -> None:
    fine = LabelledGroup([1.0, float("nan"), 0.0])
    assert examine_labels([fine] * 50 + [LabelledGroup(weightless)] * 50) == []
    (finding,) = examine_labels([fine] * 30 + [LabelledGroup(weightless)] * 70)
    assert (finding.name, finding.measured) == ("labels_without_spread", "70% of 100 groups")
