"""Verbs about the embedded world."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffalign.cli.errors import plain_errors
from diffalign.errors import DiffalignError

testbed = typer.Typer(
    help="The embedded world: coloured shapes, two small models, a detector. It runs on a CPU, offline.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SHAPES_MODELS = "shapes-sd3 or shapes-sdxl"


@testbed.command("prompts")
def testbed_prompts(
    split: Annotated[
        str, typer.Argument(help="train, validation or test: no combination of objects is in two of them.")
    ],
    n: Annotated[int, typer.Option("--n", min=1, help="How many prompts.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A .jsonl file; without it, standard output.")] = None,
) -> None:
    """Write prompts with their GenEval metadata, one JSON object a line."""
    with plain_errors():
        if split not in ("train", "validation", "test"):
            raise DiffalignError(f"split {split}: unknown; one of train, validation, test")
        from diffalign.testbed.shape_prompts import draw_prompts

        lines = "".join(json.dumps(row) + "\n" for row in draw_prompts(split, n, seed))
        if out is None:
            sys.stdout.write(lines)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(lines, encoding="utf-8")


@testbed.command("pretrain")
def testbed_pretrain(
    name: Annotated[str, typer.Argument(help=f"Which model: {SHAPES_MODELS}.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and the states on the way to it.")] = Path(
        "runs/pretrain"
    ),
) -> None:
    """Train a base model of the embedded world from nothing (hours on a CPU; the shipped ones were made so)."""
    with plain_errors(goes_on=True):
        _check_shapes_model(name)
        from diffalign.testbed.pretrain import main

        main(name, out)


@testbed.command("quickstart")
def testbed_quickstart(
    base: Annotated[str, typer.Option(help=f"The base model: {SHAPES_MODELS}.")] = "shapes-sd3",
    out: Annotated[
        Path | None, typer.Option(help="Folder for data, run and report; without it, runs/quickstart-BASE.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the whole round.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; without it, as many as the recipe says.")
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Control: shuffle the labels within every group first.")
    ] = False,
) -> None:
    """One round on the embedded world: sample, score, rank, train, evaluate, report."""
    with plain_errors(goes_on=True):
        _check_shapes_model(base)
        from diffalign.stages.quickstart import quickstart

        given: dict[str, Any] = {} if steps is None else {"steps": steps}
        quickstart(base=base, out=out or Path("runs") / f"quickstart-{base}", seed=seed, shuffle=shuffle, **given)


@testbed.command("judge-data")
def testbed_judge_data(
    out: Annotated[Path, typer.Argument(help="The folder to write: images/, pairs.jsonl, ratings.jsonl.")],
    split: Annotated[str, typer.Option(help="train, validation or test: prompts of none are in another.")] = "train",
    groups: Annotated[int, typer.Option(min=1, help="How many prompts, each in one dimension.")] = 600,
    images: Annotated[int, typer.Option(min=2, max=5, help="Images of a prompt, each with a fault of its own.")] = 4,
    raters: Annotated[int, typer.Option(min=1, help="Simulated people who rate each image.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of scenes, faults and raters.")] = 0,
) -> None:
    """Draw scenes with known faults and simulated ratings: what a judge is trained on and measured with."""
    with plain_errors():
        if split not in ("train", "validation", "test"):
            raise DiffalignError(f"split {split}: unknown; one of train, validation, test")
        from diffalign.stages.judge import judge_data

        judge_data(out, split, groups, images, raters, seed)


@testbed.command("judge-base")
def testbed_judge_base(
    size: Annotated[str, typer.Argument(help="teacher (1.4 M parameters) or student (0.4 M).")],
    out: Annotated[
        Path, typer.Argument(help="The folder to write: a transformers model with processor and judge.json.")
    ],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 32 images.")] = 3000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and images.")] = 0,
) -> None:
    """Teach a small Qwen3-VL from nothing to describe and rate the embedded world, from scores that are mostly noise."""
    with plain_errors():
        if size not in ("teacher", "student"):
            raise DiffalignError(f"size {size}: unknown; one of teacher, student")
        from diffalign.stages.judge import judge_base

        judge_base(out, size, steps, seed)


def _check_shapes_model(name: str) -> None:
    if name not in ("shapes-sd3", "shapes-sdxl"):
        raise DiffalignError(f"{name}: no model of the embedded world; use {SHAPES_MODELS}")
