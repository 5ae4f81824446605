"""The path through the command line on genuine (tiny, random) checkpoints, and what a user reads after a mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from diffalign.data.convert import import_pairs
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.score import score_images
from diffalign.data.writer import write_groups
from diffalign.rewards import Reward
from diffalign.stages.resolve import weights_digest
from helpers.command_line import refused, run


@pytest.fixture(scope="module")
def own_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four pairs at 32 px. Shared: copy it before writing into it."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for side in ("win", "lose"):
        (folder / side).mkdir()
        for n in range(4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / side / f"{n}.png")
            (folder / side / f"{n}.txt").write_text(f"picture number {n}")
    import_pairs([folder / "win", folder / "lose"], folder / "data")
    return folder / "data"


@pytest.fixture
def config(tmp_path: Path, own_pairs: Path, sd3_dir: Path) -> Path:
    """A config of two training steps on a tiny SD3."""
    shutil.copytree(own_pairs, tmp_path / "data")
    path = tmp_path / "c.yaml"
    path.write_text(
        f"run_dir: {tmp_path / 'run'}\ndevice: cpu\nmodel: {{path: {sd3_dir}, max_sequence_length: 12}}\n"
        f"data: {{path: {tmp_path / 'data'}, resolution: 32}}\nobjective: {{name: dpo, beta: 100.0}}\n"
        "train: {steps: 2, groups_per_step: 2}\ncheckpoint: {every: 1}\ntracking: {trackers: []}\n"
    )
    return path


def test_train_then_eval(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", config) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2] and rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert f"weights: {tmp_path / 'run' / 'weights'}" in said and "report.html" in said
    assert run("train", config) == 0  # the run is complete; the same command changes nothing
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a red circle", "tag": "single_object", "include": [{"class": "circle", "count": 1}]}\n'
    )
    given = [f"prompts={tmp_path / 'p.jsonl'}", "seeds=2", "steps=2", "height=32", "width=32", "reward.name=geneval"]
    given += ["reward.detector=shapes", "checkpoints=true", f"others={{again: {tmp_path / 'run' / 'weights'}}}"]
    assert run("eval", tmp_path / "run", *given) == 0
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert set(result["scores"]) == {"geneval.dense", "geneval.official", "geneval.exact", "geneval.server"}
    assert set(result["others"]) == {"again", "step-1", "step-2"} and "all" in result["diversity"]["step-1"]
    images = {m: (Path(f) / "00000-1.png").read_bytes() for m, f in result["images"].items()}
    assert (
        images["again"] == images["tuned"] == images["step-2"] != images["step-1"]
    )  # the last checkpoint is the weights
    assert "geneval.dense over checkpoints" in (tmp_path / "run" / "report.html").read_text()
    said = capsys.readouterr().out
    assert "geneval.dense" in said and (tmp_path / "run" / "report.html").is_file()
    assert "images (base, tuned, " in said  # where the PNGs are


def test_the_reference_of_one_run_serves_another(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full fine-tuning takes what a LoRA run has kept, without a reference in its steps, and gets its own losses."""
    kept = f"reference.store={tmp_path / 'kept'}"
    assert run("train", config, kept) == 0
    for name, more in (("reading", [kept]), ("alone", [])):
        given = [f"run_dir={tmp_path / name}", "tune.kind=full", "optimizer.lr=1e-3", *more]
        assert run("train", config, *given) == 0
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("reading", "alone")
    }
    assert rows["reading"] == [{k: v for k, v in row.items() if k != "drift"} for row in rows["alone"]]
    said = refused(capsys, "train", config, kept, f"run_dir={tmp_path / 'x'}", "seed=4")
    assert "kept belongs to other draws: seed was 0, is now 4" in said
    # The same images and captions, not cached: the same data.
    assert run("train", config, kept, f"run_dir={tmp_path / 'y'}", "data.cache=off") == 0
    dataset = PreferenceDataset(tmp_path / "data")
    rows = [{**dataset.group(n), "prompt": f"another {n}"} for n in range(len(dataset))]
    write_groups(tmp_path / "data", rows)
    assert "draws: data was" in refused(capsys, "train", config, kept, f"run_dir={tmp_path / 'z'}")


def test_sample_again_with_trained_weights(
    config: Path, tmp_path: Path, sd3_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", config) == 0
    (tmp_path / "p.txt").write_text("a dog\na cat\n")
    images = tmp_path / "s.yaml"
    images.write_text(
        f"device: cpu\nmodel: {{path: {sd3_dir}, max_sequence_length: 12}}\nprompts: {tmp_path / 'p.txt'}\n"
        f"out: {tmp_path / 'samples'}\nweights: {tmp_path / 'run' / 'weights'}\nsteps: 2\nheight: 32\nwidth: 32\n"
        "images_per_prompt: 2\nbatch_size: 2\n"
    )
    assert run("sample", images) == 0
    dataset = PreferenceDataset(tmp_path / "samples")
    assert len(dataset) == 2 and dataset.images(dataset.column("group_id")[0])[1].decode().size == (32, 32)
    origins = [origin for _, origin in dataset.provenance()]
    assert all(o["weights"] == weights_digest(tmp_path / "run" / "weights") for o in origins)
    images.write_text(images.read_text().replace(f"weights: {tmp_path / 'run' / 'weights'}\n", ""))
    assert run("sample", images) == 2  # the images of two models would stand in one folder
    assert "weights" in capsys.readouterr().err


def test_a_config_of_init_passes_the_dry_run(
    own_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--data", own_pairs, "--model", "shapes-sd3", "--memory", 8, "--prompts", "testbed:validation"]
    assert run("init", "mine.yaml", *given) == 0
    assert "data/mine" not in capsys.readouterr().out
    assert run("train", "mine.yaml", "--dry-run") == 0
    assert "# warning" not in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_dry_run_writes_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert run("train", config, "--dry-run") == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    said = capsys.readouterr().out
    for fact in (
        "family: sd3",
        "groups: 4",
        "label_spread: 0.5",
        "without_preference: 0",
        "2 x 2 groups = 1.00 epochs",
        "memory of a process, predicted",
        "in a step of 4 images at a time",
    ):
        assert fact in said, fact


class Red(Reward):
    """A reward that tells the images of a pair apart: the first pixel's red."""

    name, columns, reasons, range = "red", ("red",), [""] * 8, (0.0, 255.0)
    version, weights, licence = "1", "none", "none"

    def measure(self, images: list[Image.Image], prompts: list[str], facts: object = None) -> dict[str, torch.Tensor]:
        return {"red": torch.tensor([float(np.asarray(image)[0, 0, 0]) for image in images])}


def test_scale_of_the_labels_is_written_down(config: Path, tmp_path: Path) -> None:
    """The bounds that minmax found are in config.yaml; a dataset with other bounds is then another run."""
    dataset = PreferenceDataset(tmp_path / "data")
    score_images(dataset, Red())
    given = ["objective={name: smpo, beta: 100.0}", "labels.source=scores.red", "labels.transform=minmax"]
    assert run("train", config, *given) == 0
    values = dataset.scores("red").values()
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["labels"]
    assert stored["stats"] == {"min": min(values), "max": max(values)}
    assert run("train", config, *given) == 0
    assert run("train", tmp_path / "run" / "config.yaml") == 0
    assert run("train", config, *given, "labels.stats={min: 0.0, max: 300.0}") == 2


# --- mistakes ----------------------------------------------------------------------------------------------------------


def test_models_that_are_none(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capsys, "train", config, f"model.path={tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in refused(capsys, "train", config, f"model.path={tmp_path / 'empty'}")
    assert not (tmp_path / "run").exists()


def test_unknown_objective(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dpo" in refused(capsys, "train", config, "objective.name=dpp")


def test_absent_score_column(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no scores of 'hpsv2'" in refused(capsys, "train", config, "labels.source=scores.hpsv2")


def test_absent_data(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(capsys, "train", config, f"data.path={tmp_path / 'nothing'}")


def test_groups_of_one_image(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PreferenceDataset(tmp_path / "data").group(i) for i in range(4)]
    write_groups(tmp_path / "data", [{**r, "group_id": f"other{i}"} for i, r in enumerate(rows)])
    assert "a preference needs at least two" in refused(capsys, "train", config)


def test_more_images_a_step_than_a_group_has(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", config, "data.group_size=3")
    assert (
        "data.group_size=3: the largest group of split 'train'" in said and "has 2 images; use at most as many" in said
    )


def test_labels_without_any_preference(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [PreferenceDataset(tmp_path / "data").group(i) for i in range(4)]
    write_groups(tmp_path / "data", [{**r, "preference": [0.5, 0.5]} for r in rows])
    assert "no group states a preference" in refused(capsys, "train", config)


def test_checkpoint_of_another_config(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", config) == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "objective.beta" in refused(capsys, "train", config, "objective.beta=7.0", "train.steps=4")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_cuda_asked_for_and_absent(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable CUDA device" in refused(capsys, "train", config, "device=cuda")


def test_empty_prompt_file(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", config) == 0
    (tmp_path / "p.txt").write_text("\n")
    assert "holds no prompt" in refused(capsys, "eval", tmp_path / "run", f"prompts={tmp_path / 'p.txt'}")


def test_prompts_that_the_reward_cannot_judge(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is drawn or encoded, in training's validation and in an evaluation."""
    (tmp_path / "plain.txt").write_text("a dog\n")
    given = ["validation.every=1", f"validation.prompts={tmp_path / 'plain.txt'}", "validation.rewards=[geneval]"]
    assert "validation.rewards: geneval cannot judge 'a dog'" in refused(capsys, "train", config, *given)
    assert run("train", config) == 0
    capsys.readouterr()
    message = refused(capsys, "eval", tmp_path / "run", f"prompts={tmp_path / 'plain.txt'}", "-r", "geneval")
    assert "reward: geneval cannot judge 'a dog'" in message and not (tmp_path / "run" / "eval").exists()


def test_weights_are_known_by_their_tensors(tmp_path: Path) -> None:
    """Saved anew with other metadata they are the same weights, whose images need not be drawn again."""
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    for name, metadata in (("one", {"x": "1", "y": "2"}), ("two", {"y": "2"})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "w.safetensors", metadata=metadata)
    assert weights_digest(tmp_path / "one") == weights_digest(tmp_path / "two")
    save_file(tensors | {"a": torch.arange(1.0, 5.0)}, tmp_path / "two" / "w.safetensors")
    assert weights_digest(tmp_path / "one") != weights_digest(tmp_path / "two")


def test_a_run_on_shuffled_labels_says_so_in_its_report(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control must not be taken for the run that it controls."""
    assert run("rank", tmp_path / "data", "shuffle=true", "seed=1") == 0
    assert run("train", config) == 0
    words = "Preferences were shuffled within each group (seed 1), as a control"
    assert words in " ".join(capsys.readouterr().out.split())
    assert words in (tmp_path / "run" / "report.html").read_text()
    shutil.rmtree(tmp_path / "run")
    assert run("rank", tmp_path / "data") == 0
    assert run("train", config) == 0
    assert words not in (tmp_path / "run" / "report.html").read_text()
