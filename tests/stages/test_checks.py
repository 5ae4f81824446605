"""What is wrong is said before a model is loaded, the same way in a dry run and in the run; what is left open is settled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign.config import RewardSection, load_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.writer import write_groups
from diffalign.errors import DiffalignError
from diffalign.stages import (
    distill,
    evaluate,
    judge,
    micro_batch,
    resolve,
    resolve_rewards,
    reward_gradient,
    rounds,
    sample,
    train,
)
from diffalign.stages.resolve_rewards import settled_rewards
from helpers.command_line import run
from helpers.small_datasets import group_rows, scored, write_images

FACTS = '{"prompt": "a red circle", "tag": "single_object", "include": [{"class": "circle", "count": 1}]}\n'


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, prompts and a run's weights, in which no model may be loaded and no reward asked for weights."""
    write_images(tmp_path / "pairs")
    write_groups(tmp_path / "pairs", group_rows())
    scored(tmp_path / "scored", {"sharpness": [[0.1, 0.2], [0.4, 0.3]]})
    (tmp_path / "p.txt").write_text("a cat\nsnow\n")
    (tmp_path / "facts.jsonl").write_text(FACTS)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "weights").mkdir()

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    for module in (micro_batch, distill, evaluate, reward_gradient, sample):
        monkeypatch.setattr(module, "open_backbone", loaded)
    for module in (train, distill, reward_gradient):
        monkeypatch.setattr(module, "planned_backbone", loaded)
    monkeypatch.setattr(judge, "open_judge", loaded)
    monkeypatch.setattr(rounds, "sample", loaded)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = ["train", "sdxl_dpo", "data.path=pairs", "optimizer.name=adamw", "tracking.trackers=[]"]
VALIDATED = [*TRAIN, "validation.every=1", "validation.prompts=p.txt"]
JUDGED = [*TRAIN, "validation.every=1", "validation.rewards=[sharpness]"]
FOLLOW = ["reward-gradient", "sdxl_refl", "optimizer=adamw", "tracking.trackers=[]", "prompts=p.txt"]
DISTILL = ["distill", "shapes_sd3_gndm", "validation.every=null", "tracking.trackers=[]", "prompts=p.txt"]
ROUNDS = ["rounds", "rounds_shapes_gdro", "out=rounds"]
EVAL = ["eval", "e.yaml"]
CASES: list[tuple[list[str], str]] = [
    # rewards
    ([*VALIDATED, "validation.rewards=[pickscor]"], "pickscor"),
    ([*VALIDATED, "validation.rewards=[{name: pickscore, options: {fast: true}}]"], "unknown option 'fast'"),
    ([*VALIDATED, "validation.rewards=[ocr]"], "ocr cannot judge 'a cat'"),
    ([*VALIDATED, "validation.rewards=[{name: geneval, detector: shapes}]"], "geneval cannot judge 'a cat'"),
    ([*VALIDATED, "validation.rewards=[{name: hpsv2, options: {weights: nowhere}}]"], "nowhere does not exist"),
    ([*FOLLOW, "rewards=[{name: pickscore, options: {weights: nowhere}}]"], "nowhere does not exist"),
    ([*FOLLOW, "rewards=[geneval]"], "geneval is not differentiable"),
    ([*DISTILL, "reward.terms=[{name: sharpness, column: blur}]"], "sharpness has no column blur"),
    ([*DISTILL, "reward.terms=[ocr]"], "ocr cannot judge"),
    ([*DISTILL, "reward.terms=[jpeg_compressibility]", "reward.gradient_weight=0.5"], "none of reward.terms"),
    ([*EVAL, "reward=nothing"], "nothing"),
    ([*EVAL, "reward={name: geneval, detector: shapes}"], "cannot judge 'a cat'"),
    (
        [*EVAL, "more_rewards=[{name: hpsv2, options: {weights: nowhere}}]", "reward=sharpness"],
        "nowhere does not exist",
    ),
    # prompts
    ([*JUDGED, "validation.prompts=none.txt"], "none.txt"),
    ([*JUDGED, "validation.prompts=empty.txt"], "empty.txt"),
    ([*FOLLOW, "rewards=[sharpness]", "prompts=none.txt"], "none.txt"),
    ([*DISTILL, "prompts=none.txt"], "none.txt"),
    ([*EVAL, "reward=sharpness", "prompts=none.txt"], "none.txt"),
    (["sample", "s.yaml", "prompts=none.txt"], "none.txt"),
    # labels and groups
    ([*TRAIN, "labels.source=scores.hpsv2"], "hpsv2"),
    ([*TRAIN, "data.path=scored", "labels.source=scores.sharpness.blur"], "blur"),
    ([*TRAIN, "data.path=scored"], "0 preferences"),
    ([*TRAIN, "data.group_size=9"], "data.group_size=9"),
    ([*TRAIN, "data.split=test"], "test"),
    # packages
    ([*TRAIN, "tracking.trackers=[wandb]"], "wandb is not installed"),
    ([*TRAIN, "tracking.trackers=[trackio]"], "trackio is not installed"),
    ([*FOLLOW, "rewards=[sharpness]", "tracking.trackers=[wandb]"], "wandb is not installed"),
    ([*DISTILL, "tracking.trackers=[wandb]"], "wandb is not installed"),
    # weights, rounds and judges
    ([*EVAL, "weights=gone"], "no weights at gone"),
    (["sample", "s.yaml", "weights=gone"], "weights gone: no such folder"),
    ([*ROUNDS, "data.images_per_prompt=2", "overrides=[data.group_size=6]"], "training takes data.group_size=6"),
    ([*ROUNDS, "data.images_per_prompt=1"], "a preference needs at least two"),
    ([*ROUNDS, "overrides=[labels.source=scores.hpsv2]"], "labels.source=scores.hpsv2"),
    ([*ROUNDS, "overrides=['tracking.trackers=[wandb]']"], "wandb is not installed"),
    ([*ROUNDS, "evaluate.prompts=p.txt", "evaluate.reward=ocr"], "ocr cannot judge"),
    (["judge", "shapes_judge_gdso", "data.pairs=none.jsonl"], "testbed judge-base teacher"),
]


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("arguments", "said"), CASES, ids=[" ".join(c[0][-2:])[:60] for c in CASES])
def test_mistakes_are_said_before_anything_is_loaded(
    arguments: list[str], said: str, dry: bool, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    if "planned" not in said and "is not installed" in said and dry:  # packages are checked after the facts are printed
        for module in (train, distill, reward_gradient):
            monkeypatch.setattr(module, "planned_backbone", lambda *_: None)
    (world / "e.yaml").write_text("model: somebody/model\nweights: weights\nout: o\nprompts: p.txt\n")
    (world / "s.yaml").write_text("model: somebody/model\nout: o\nprompts: p.txt\n")
    assert run(*arguments, *(["--dry-run"] if dry else [])) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(err) == 1 and said in err[0], err
    assert not (world / "o").exists() or not any((world / "o").glob("*.json"))


def test_a_dry_run_of_every_long_verb(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "e.yaml").write_text("model: shapes-sd3\nweights: weights\nout: o\nprompts: testbed:test\nn: 3\n")
    (world / "s.yaml").write_text("model: shapes-sd3\nout: o\nprompts: p.txt\nimages_per_prompt: 4\n")
    before = sorted(world.rglob("*"))
    for arguments, said in (
        (
            ["eval", "e.yaml"],
            ["24: 3 prompts x 4 seeds x 2 models", "shapes-sd3 is here", "the detector ShapeDetector"],
        ),
        (["sample", "s.yaml"], ["images: 8: 2 prompts x 4", "shapes-sd3 is here"]),
        (ROUNDS, ["rounds: at most", "images of a round", "shapes-sd3 is here"]),
    ):
        assert run(*arguments, "--dry-run") == 0
        out = capsys.readouterr().out
        assert all(words in out for words in [*said, "# run", "time: unknown"]), out
    assert sorted(world.rglob("*")) == before


def test_no_toy_judges_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """GenEval through the world's detector where nothing is said, in the embedded world alone."""
    default = [RewardSection()]
    assert settled_rewards(default, "shapes-sd3", "p.txt", "reward") == default
    assert settled_rewards(default, "runs/x/student", "testbed:test", "reward") == default
    with pytest.raises(DiffalignError, match="validation.rewards: none is named, the weights of hpsv2 and pickscore"):
        settled_rewards(default, "acme/model", "p.txt", "validation.rewards")
    monkeypatch.setattr(resolve_rewards, "hub_answers", lambda: True)
    assert settled_rewards(default, "acme/model", "p.txt", "reward")[0].name == "hpsv2"
    assert settled_rewards(default, "acme/model", "p.txt", "reward", ("hpsv2",))[0].name == "pickscore"
    assert settled_rewards([RewardSection(name="geneval")], "acme/model", "p.txt", "r")[0].detector is None
    stated = [RewardSection(name="geneval", detector="shapes")]
    assert settled_rewards(stated, "acme/model", "p.txt", "r") == stated


def test_the_judge_of_a_run_stays(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was settled is in the run's config.yaml, and the run goes on with it whatever can be had later."""
    from diffalign.config import resolved_yaml

    monkeypatch.setattr(resolve_rewards, "hub_answers", lambda: True)
    config = load_config("sdxl_dpo", ["data.path=pairs", "validation.every=1", "validation.prompts=p.txt", "run_dir=r"])
    settled = resolve.with_judges(config)
    assert settled.validation.rewards[0].name == "hpsv2"
    (world / "r").mkdir()
    (world / "r" / "config.yaml").write_text(resolved_yaml(settled))
    monkeypatch.setattr(resolve_rewards, "FIRST_JUDGES", ("pickscore",))
    assert resolve.with_judges(config).validation.rewards == settled.validation.rewards
    unvalidated = load_config("sdxl_dpo", ["data.path=pairs"])
    assert resolve.with_judges(unvalidated) == unvalidated
    assert len(PreferenceDataset(world / "pairs")) == 3
