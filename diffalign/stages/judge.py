"""The stages of a judge of images: data of the embedded world, training, a teacher's distributions, evaluation."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffalign.config import JudgeConfig, JudgeModelSection
from diffalign.errors import DiffalignError
from diffalign.files import make_folder, read_json
from diffalign.files.lock import holds_files, writing_file, writing_folder
from diffalign.judge.evaluation import by_dimension, table
from diffalign.judge.forward import Sample
from diffalign.judge.loop import JudgeTraining
from diffalign.judge.predict import Thinking, predict
from diffalign.judge.records import Rated, rated_images, read_pairs, read_ratings, read_taught, write_records
from diffalign.pretrained import quiet_progress
from diffalign.progress import ImageProgress, say, say_block
from diffalign.rewards.judge import Judge
from diffalign.stages.checks import check_packages
from diffalign.stages.dry_run import TIME_UNKNOWN, print_config, print_facts
from diffalign.stages.fingerprints import of_judge
from diffalign.stages.resolve import open_judge
from diffalign.stages.resolve_rewards import resolve_device
from diffalign.stages.trainer import run_and_report
from diffalign.testbed.judge_base import BaseSettings, make_base
from diffalign.testbed.judge_data import faulty_groups, judge_records
from diffalign.training.checkpoint import check_before_loading


def judge_data(out: Path, split: str, groups: int, images: int, raters: int, seed: int) -> None:
    """Write data for judges: images/, pairs.jsonl, ratings.jsonl, and data.json, which says how they were made."""
    with writing_folder(out, "OUT"):
        _judge_data(out, split, groups, images, raters, seed)


def _judge_data(out: Path, split: str, groups: int, images: int, raters: int, seed: int) -> None:
    made = {"split": split, "groups": groups, "images": images, "raters": raters, "seed": seed}
    told = out / "data.json"
    if told.is_file():
        if read_json(told, "delete it, and the same command draws the data again") != made:
            raise DiffalignError(f"{out}: holds other data ({told.read_text().strip()}); choose another folder")
        say(f"{out}: is complete")
        return
    if holds_files(out) and not (out / "images").is_dir():
        raise DiffalignError(f"{out}: is not empty; choose another folder")
    make_folder(out / "images")
    pairs, rated = [], []
    for pictures, own_pairs, own_rated in judge_records(faulty_groups(split, groups, images, seed), raters, seed):
        for picture, row in zip(pictures, own_rated, strict=True):
            picture.save(out / row["image"])
        pairs += own_pairs
        rated += own_rated
    write_records(out / "pairs.jsonl", pairs)
    write_records(out / "ratings.jsonl", rated)
    told.write_text(json.dumps(made) + "\n")  # last: it says that the rest is whole
    say(f"{out}: {len(rated)} images, {len(pairs)} pairs")


def judge_base(out: Path, size: str, steps: int, seed: int) -> None:
    """Train a base for judges: `diffalign testbed judge-base`."""
    with writing_folder(out, "OUT"), quiet_progress():
        if holds_files(out):
            raise DiffalignError(f"{out}: is not empty; choose another folder")
        make_base(out, size, seed, BaseSettings(steps=steps), say)
    say(f"judge: {out}")


def train_from_config(config: JudgeConfig, dry_run: bool = False) -> Path:
    """Train a judge: `diffalign judge`. The same command resumes where it stopped. Returns the folder of the trained judge."""
    with writing_folder(None if dry_run else config.run_dir, "run_dir"):
        return _train_from_config(config, dry_run)


def _train_from_config(config: JudgeConfig, dry_run: bool) -> Path:
    if dry_run:
        print_config(config)
    check_packages(config)
    check_before_loading(config)
    device = resolve_device(config.device)
    for key, folder in (("model.path", config.model.path), ("teacher", config.teacher)):
        if folder is not None and not folder.is_dir():
            role = config.role if key == "model.path" else "teacher"
            raise DiffalignError(
                f"{key} {folder}: no such folder; give an image-text model of transformers with its processor, or make the "
                f"embedded world's with `diffalign testbed judge-base {role} {folder}`"
            )
    source = config.data.distributions if config.method == "risd" else config.data.pairs
    assert source is not None  # the config is checked
    records: list[Any] = [*(read_taught(source) if config.method == "risd" else read_pairs(source))][
        : config.data.limit
    ]
    if config.method == "sft" and config.role == "teacher" and len({one.traces is None for one in records}) == 2:
        raise DiffalignError(
            f"{source}: some pairs have traces and some have none; supervised reasons need them everywhere"
        )
    if dry_run:
        epochs = config.train.steps * config.train.records_per_step / max(1, len(records))
        print_facts("run", {
            "device": device,
            "records": f"{len(records)} of {source}",
            "dimensions": ", ".join(sorted({one.dimension for one in records})),
            "steps": f"{config.train.steps} x {config.train.records_per_step} records = {epochs:.2f} epochs",
            "time": TIME_UNKNOWN,
        })  # fmt: skip
        return config.run_dir / "weights"
    resolved = of_judge(config, records)
    check_before_loading(config, resolved)
    judge = open_judge(config.model, device)
    check_dimensions(judge, {one.dimension for one in records}, source)
    teacher = None
    if config.teacher is not None:
        teacher = open_judge(JudgeModelSection(path=config.teacher), device)
        teacher.model.requires_grad_(False)
        check_dimensions(teacher, {one.dimension for one in records}, source)
    with quiet_progress():
        method = JudgeTraining(config, judge, records, teacher)
        resolved["train.mixed_precision"] = "bf16" if method.bf16 else "no"
        result = run_and_report(config, method, report=False, resolved=resolved)
    return result.run_dir / "weights"


def check_dimensions(judge: Judge, wanted: set[str], source: Path) -> None:
    """Before anything is computed: every dimension of the records has a rubric."""
    unknown = sorted(wanted - set(judge.rubrics))
    if unknown:
        raise DiffalignError(
            f"{source}: dimension {unknown[0]} has no rubric; there are {', '.join(judge.rubrics)}: give NAME=FILE"
        )


def distributions(teacher: Path, source: Path, out: Path, thinking: Thinking, device: str, seed: int) -> None:
    """Write a teacher's score distributions for every image of some records: `diffalign judge-distributions`."""
    with writing_file(out, "--out"):
        _distributions(teacher, source, out, thinking, device, seed)


def _distributions(teacher: Path, source: Path, out: Path, thinking: Thinking, device: str, seed: int) -> None:
    _beside_images(source, out)
    if out.exists():
        raise DiffalignError(f"{out}: is there already; a teacher is asked once, delete it to ask again")
    rated, judge = _rated(source), open_judge(JudgeModelSection(path=teacher), resolve_device(device))
    check_dimensions(judge, {one.dimension for one in rated}, source)
    found = predict(judge, _samples(rated), thinking, seed, _counter(len(rated)))
    mean = found.probabilities.double() @ torch.linspace(1, 5, 9, dtype=torch.float64)
    rows = (
        {
            "prompt": one.prompt, "dimension": one.dimension,
            "image": Path(os.path.relpath(one.image, out.parent.resolve())).as_posix(),
            "probabilities": q, "mean": mu, "teacher": teacher.as_posix(), "traces": thinking.traces,
        }
        for one, q, mu in zip(rated, found.probabilities.tolist(), mean.tolist(), strict=True)
    )  # fmt: skip
    say(f"{out}: {write_records(out, rows)} distributions, {found.tokens:.1f} tokens an image")


def evaluate_judge(
    folder: Path, source: Path, out: Path | None, thinking: Thinking, device: str, seed: int
) -> dict[str, Any]:
    """Measure a judge, `diffalign judge-eval`: the measures of all images and of each dimension; `out` gets them as JSON."""
    rated, judge = _rated(source), open_judge(JudgeModelSection(path=folder), resolve_device(device))
    check_dimensions(judge, {one.dimension for one in rated}, source)
    found = predict(judge, _samples(rated), thinking, seed, _counter(len(rated)))
    rows = by_dimension(rated, found.probabilities.double().numpy())
    rows["all"] |= {"tokens": found.tokens, "images_per_second": len(rated) / found.seconds}
    say_block(table(rows, "images"))
    if out is not None:
        make_folder(out.parent)
        told = {"judge": folder.as_posix(), "ratings": source.as_posix(), "measures": rows}
        out.write_text(json.dumps(told, indent=1) + "\n")
    return rows


def _rated(source: Path) -> list[Rated]:
    """Read ratings, or the images of pairs with one rating each: whichever the first row is."""
    if not source.is_file():
        raise DiffalignError(f"{source}: no such file; give pairs.jsonl or ratings.jsonl")
    with source.open(encoding="utf-8", errors="replace") as stream:
        first = stream.readline()
    return rated_images(read_pairs(source)) if '"image_w"' in first else read_ratings(source)


def _samples(rated: list[Rated]) -> list[Sample]:
    return [Sample(one.prompt, one.dimension, one.image) for one in rated]


def _beside_images(source: Path, out: Path) -> None:
    """Refuse to write apart from the images, since records name images below their own folder."""
    if out.parent.resolve() != source.parent.resolve():
        raise DiffalignError(
            f"{out}: must be in {source.parent}, where the images are; records may not point elsewhere"
        )


def _counter(total: int) -> Callable[[int], None]:
    """Return a callback that shows how many images are judged."""
    show = ImageProgress().named("judge")
    show(0, total)
    return lambda done: show(done, total)
