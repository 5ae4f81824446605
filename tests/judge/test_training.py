"""Teachers and students on a tiny random judge: what is sampled, what is learnt, and that a resumed run is the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.config import load_judge_config
from diffalign.draws import draw
from diffalign.errors import DiffalignError
from diffalign.judge import losses
from diffalign.judge.forward import Sample, read
from diffalign.judge.gdso import GDSO, GRPO, Rolled
from diffalign.judge.loop import JudgeTraining
from diffalign.judge.predict import Thinking, predict
from diffalign.judge.records import read_pairs
from diffalign.judge.rollout import KeyedSampling, sample_traces, trimmed
from diffalign.judge.tune import make_trainable
from diffalign.rewards.judge import Judge, load_judge
from diffalign.stages.judge import judge_data, train_from_config
from diffalign.testbed.judge_base import untrained_judge
from diffalign.training import finite
from diffalign.training.run import run as train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records and an untrained judge, so that traces are noise: what counts here is that they are handled rightly."""
    folder = tmp_path_factory.mktemp("world")
    judge_data(folder / "data", "train", 9, 4, 3, seed=0)
    untrained_judge("student", 0).save(folder / "base")
    return folder


@pytest.fixture
def judge(world: Path) -> Judge:
    return load_judge(world / "base")


def config(world: Path, run: Path, *more: str, method: str = "gdso", role: str = "teacher") -> Any:
    data = "distributions" if method == "risd" else "pairs"
    run.mkdir(parents=True, exist_ok=True)
    (run / "c.yaml").write_text(
        f"""
run_dir: {run}
role: {role}
method: {method}
device: cpu
model: {{path: {world / "base"}}}
tune: {{kind: full}}
data: {{{data}: {world / "data" / (data + ".jsonl")}}}
rollout: {{traces: 2, max_tokens: 4}}
train: {{steps: 2, records_per_step: 2, micro_batch: 1, threads: 1}}
checkpoint: {{every: 1}}
tracking: {{trackers: []}}
"""
    )
    return load_judge_config(run / "c.yaml", more)


def some(world: Path, n: int, trace: tuple[int, ...] | None = None) -> list[Sample]:
    pairs = read_pairs(world / "data/pairs.jsonl")[:n]
    return [Sample(p.prompt, p.dimension, p.images[0], trace) for p in pairs]


def test_token_probabilities_are_those_of_a_plain_forward_pass(world: Path, judge: Judge) -> None:
    short, long = (
        tuple(judge.tokenizer("all right .")["input_ids"]),
        tuple(judge.tokenizer("two red circles . no cuts")["input_ids"]),
    )
    samples = [Sample(s.prompt, s.dimension, s.image, t) for s, t in zip(some(world, 2), (short, long), strict=True)]
    both = read(judge, samples)
    for i, sample in enumerate(samples):
        (alone,) = read(judge, [sample]).rows()
        torch.testing.assert_close(both.rows()[i], alone, atol=1e-5, rtol=0)
        inputs = judge.inputs([Image.open(sample.image)], [sample.prompt], sample.dimension, [list(sample.trace or ())])
        full = judge.model(**inputs).logits[0].log_softmax(-1)
        n, m = len(sample.trace or ()), judge.marker_length(True)
        ids = inputs["input_ids"][0]
        wanted = torch.stack([full[p - 1, ids[p]] for p in range(len(ids) - m - n, len(ids) - m)])
        torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=0)
        assert tuple(ids[len(ids) - m - n : len(ids) - m].tolist()) == sample.trace
        torch.testing.assert_close(both.log_q[i], full[-1, list(judge.token_ids)].log_softmax(-1), atol=1e-5, rtol=0)
    marked = read(judge, samples, marker=True)
    assert marked.mask.sum(1).tolist() == [len(short) + m, len(long) + m]


def test_tokens_are_drawn_from_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generators = [draw(0, "t", member=i) for i in range(2000)]
    drawn = KeyedSampling(generators, 0.7)(torch.zeros(2000, 1), logits.expand(2000, -1)).argmax(dim=-1)
    p = (logits / 0.7).softmax(dim=-1)
    shares = torch.bincount(drawn, minlength=4) / 2000
    assert ((shares - p).abs() < 4 * (p * (1 - p) / 2000).sqrt()).all()
    assert torch.equal(KeyedSampling(generators, 0.0)(torch.zeros(2000, 1), logits.expand(2000, -1))[0], logits)


def test_a_trace_depends_on_its_key_alone(world: Path, judge: Judge) -> None:
    samples = some(world, 3)
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "batch_size": 4}
    together = sample_traces(judge, samples, [draw(0, "t", member=i) for i in range(3)], **options)
    alone = [sample_traces(judge, [s], [draw(0, "t", member=i)], **options)[0] for i, s in enumerate(samples)]
    other = sample_traces(judge, samples, [draw(1, "t", member=i) for i in range(3)], **options)
    assert together == alone != other and all(together)


def test_a_trace_ends_before_the_marker(judge: Judge) -> None:
    ids = judge.tokenizer("two cuts .\nScore:\n4")["input_ids"]
    assert judge.tokenizer.decode(trimmed(judge, ids)) == "two cuts ."
    assert trimmed(judge, judge.tokenizer("Score:\n4")["input_ids"]) == ()


def test_an_empty_trace_can_be_read(world: Path, judge: Judge) -> None:
    reading = read(judge, [*some(world, 1, ()), *some(world, 1, tuple(judge.tokenizer("no cuts")["input_ids"]))])
    assert reading.mask.sum(1).tolist() == [0, 2] and torch.isfinite(reading.log_q).all()


@pytest.mark.parametrize(
    ("method", "role", "more"),
    [
        ("gdso", "teacher", ("loss.inner_updates=2", "loss.outer_steps=2", "loss.kl=0.1", "train.records_per_step=1")),
        ("gdso", "teacher", ("tune={kind: lora, rank: 4, targets: [q_proj, v_proj]}",)),
        ("grpo", "teacher", ()),
        ("sft", "teacher", ()),
        ("bt", "teacher", ()),
        ("sft", "student", ()),
        ("risd", "student", ()),
        ("opd", "student", ("teacher=BASE",)),
    ],
)
def test_every_method_resumes_exactly(
    world: Path, tmp_path: Path, method: str, role: str, more: tuple[str, ...]
) -> None:
    if method == "risd":
        rows = [json.loads(line) for line in (world / "data/ratings.jsonl").read_text().splitlines()]
        taught = [row | {"probabilities": row["true_probabilities"], "teacher": "truth"} for row in rows]
        (world / "data/distributions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taught))
    more = tuple(one.replace("BASE", str(world / "base")) for one in more)
    # Of gdso's first case the cut is within the second outer iteration: the policy that it is compared with is neither the
    # one that the run began with nor the one that it goes on with.
    cut, whole = (3, 4) if "loss.outer_steps=2" in more else (1, 2)
    for run, steps in (("whole", whole), ("cut", cut), ("cut", whole)):
        train_from_config(config(world, tmp_path / run, *more, f"train.steps={steps}", method=method, role=role))
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()
    one, two = (load_file(tmp_path / run / "weights/model.safetensors") for run in ("whole", "cut"))
    base = load_file(world / "base/model.safetensors")
    assert one.keys() == base.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], base[name]) for name in one)
    load_judge(tmp_path / "whole/weights")


def test_a_judge_is_asked_for_numbers_when_a_row_is_due(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. A row has no `waiting`, which is not measured, and there are no health checks of a judge."""
    more = ("train.steps=3", "loss.inner_updates=2")
    train_from_config(config(world, tmp_path / "every", *more))
    monkeypatch.setattr(finite, "runs_ahead", lambda device: True)
    train_from_config(config(world, tmp_path / "seldom", *more, "train.log_every=2"))
    every, seldom = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("every", "seldom")
    )
    assert seldom == [row for row in every if row["step"] in (2, 3)]
    one, two = (load_file(tmp_path / run / "weights/model.safetensors") for run in ("every", "seldom"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert set(json.loads((tmp_path / "every/timing.jsonl").read_text().splitlines()[0])) == {
        "step",
        "seconds",
        "peak_gib",
    }
    assert not (tmp_path / "every/health.json").exists()


def test_a_judges_loss_that_is_not_finite_is_named(world: Path, tmp_path: Path, judge: Judge) -> None:
    with torch.no_grad():
        judge.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DiffalignError, match=r"the loss is nan at step 1, records \d+; .* none: lower optimizer\.lr"):
        settings = config(world, tmp_path, method="sft")
        train(settings, JudgeTraining(settings, judge, read_pairs(world / "data/pairs.jsonl"), None), say=str)


def test_before_the_first_update_the_ratio_is_one_and_the_reference_is_the_policy(
    world: Path, tmp_path: Path, judge: Judge
) -> None:
    settings = config(world, tmp_path, "loss.kl=1")
    policy = make_trainable(judge, settings.tune, 0)
    gdso = GDSO(judge, settings, policy, None)
    pairs = read_pairs(world / "data/pairs.jsonl")[:2]
    work = gdso.prepare(0, [0, 1], pairs, {k: p.detach().clone() for k, p in policy.items()})
    for w in work:
        assert w.reference is not None
        assert all(torch.equal(a, b) for a, b in zip(w.old, w.reference, strict=True))
        assert w.advantages.view(2, -1).sum(1).abs().max() < 1e-4
    gradients = []
    for first in (True, False):
        loss, metrics = gdso.loss(work, first)
        assert metrics["kl"].abs().max() < 1e-6
        gradients.append(torch.autograd.grad(loss.sum(), list(policy.values()), allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_grpo_leaves_the_score_position_alone_and_gdso_does_not(world: Path, tmp_path: Path, judge: Judge) -> None:
    settings = config(world, tmp_path, "loss.kl=0")
    policy = make_trainable(judge, settings.tune, 0)
    pairs = read_pairs(world / "data/pairs.jsonl")[:1]
    trace = tuple(judge.tokenizer("no cuts .")["input_ids"])
    flat = torch.zeros(4)
    old = [torch.zeros(3)] * 4
    work = [Rolled(pairs[0], (trace,) * 4, flat, flat, old, None)]  # no advantages: the policy's term has no gradient
    for kind, moved in ((GRPO, False), (GDSO, True)):
        loss, _ = kind(judge, settings, policy, None).loss(work, True)
        grads = torch.autograd.grad(loss.sum(), list(policy.values()), allow_unused=True)
        assert any(g is not None and bool(g.abs().max() > 0) for g in grads) == moved


def test_risd_learns_a_teachers_distributions(world: Path, judge: Judge) -> None:
    policy = make_trainable(judge, load_section(), 0)
    optimizer = torch.optim.AdamW(policy.values(), lr=3e-3)
    sample = some(world, 1)
    wanted = torch.tensor([[0.0, 0, 0, 0.1, 0.2, 0.4, 0.2, 0.1, 0]])
    before = losses.forward_kl(read(judge, sample).log_q, wanted).item()
    for _ in range(12):
        loss = losses.forward_kl(read(judge, sample).log_q, wanted).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.3 * before


def load_section() -> Any:
    from diffalign.config import JudgeTuneSection

    return JudgeTuneSection(kind="full")


def test_predictions_do_not_depend_on_the_batch(world: Path, judge: Judge) -> None:
    samples = some(world, 3)
    one = predict(judge, samples, Thinking(traces=2, max_tokens=3, batch_size=2), 0)
    all_ = predict(judge, samples, Thinking(traces=2, max_tokens=3, batch_size=6), 0)
    torch.testing.assert_close(one.probabilities, all_.probabilities, atol=1e-5, rtol=0)
    assert one.tokens == all_.tokens <= 8 and predict(judge, samples, Thinking(traces=0), 0).tokens == 1.0
    assert torch.allclose(one.probabilities.sum(1), torch.ones(3))


def test_gradient_checkpointing_computes_layers_again_and_gives_the_same_run(world: Path, tmp_path: Path) -> None:
    counts = {}
    for name in ("true", "false"):
        settings = config(
            world, tmp_path / name, f"model.gradient_checkpointing={name}", "train.steps=1", "rollout.max_tokens=2"
        )
        judge = load_judge(world / "base")
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += torch.is_grad_enabled()

        judge.model.model.language_model.layers[0].self_attn.register_forward_pre_hook(count)
        train(settings, JudgeTraining(settings, judge, read_pairs(world / "data/pairs.jsonl"), None), say=str)
        counts[name] = calls
    assert counts == {"true": 4, "false": 2}  # two micro-batches
    one, two = (load_file(tmp_path / name / "weights/model.safetensors") for name in ("true", "false"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("role=student",), "method: a student is trained by risd, sft, opd, not by gdso"),
        (("method=risd", "role=student"), "risd learns from distributions"),
        (("method=opd", "role=student"), "opd asks a teacher"),
        (("train.micro_batch=3",), "3 does not divide train.records_per_step=2"),
        (("model.dtype=bfloat16",), "all weights train in float32"),
        (("method=sft", "loss.inner_updates=2"), "sft learns from each batch once"),
        (("rollout.trace=2",), "unknown key rollout.trace; did you mean traces"),
    ],
)
def test_configs_that_cannot_be_meant_are_refused(
    world: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DiffalignError, match=message):
        config(world, tmp_path, *more)


def test_runs_that_cannot_start_are_refused(world: Path, tmp_path: Path) -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: config(world, tmp_path / "a", "tune={kind: lora, targets: [nothing]}"),
            "no linear layer nothing; it has",
        ),
        (lambda: config(world, tmp_path / "b", "model.rubrics=[alignment]"), "dimension '?(realism|plausibility)"),
        (lambda: config(world, tmp_path / "c", f"model.path={tmp_path}"), "holds no processor"),
    ]
    for make, message in cases:
        with pytest.raises(DiffalignError, match=message):
            train_from_config(make())
