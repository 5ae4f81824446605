"""Verbs about the embedded world."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.errors import plain_errors
from diffalign.cli.help import examples
from diffalign.errors import DiffalignError
from diffalign.files import make_folder

testbed = typer.Typer(
    help="Use the embedded world of coloured shapes.\n\nTwo small models and a detector, on a CPU, offline.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
SHAPES_MODELS = "shapes-sd3 or shapes-sdxl"
SPLITS = ("train", "validation", "test")


@testbed.command("prompts", epilog=examples("testbed prompts"))
def testbed_prompts(
    split: Annotated[str, typer.Argument(help="train, validation or test; they share no combination of objects.")],
    n: Annotated[int, typer.Option("--n", min=1, max=10_000_000, help="Number of prompts.")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A .jsonl file; without it, standard output.")] = None,
) -> None:
    """Write prompts with their GenEval metadata.

    One JSON object per line.
    """
    with plain_errors():
        _check_choice("split", split, SPLITS)
        from diffalign.testbed.shape_prompts import draw_prompts

        lines = "".join(json.dumps(row) + "\n" for row in draw_prompts(split, n, seed))
        if out is None:
            sys.stdout.write(lines)
        else:
            make_folder(out.parent)
            out.write_text(lines, encoding="utf-8")


@testbed.command("pretrain", epilog=examples("testbed pretrain"))
def testbed_pretrain(
    name: Annotated[str, typer.Argument(help=f"Which model: {SHAPES_MODELS}.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and the training's snapshots.")] = Path(
        "runs/pretrain"
    ),
) -> None:
    """Train a base model from random weights.

    Takes hours on a CPU; the shipped models were made this way. The same command resumes where it stopped.
    """
    with plain_errors(resumes=True):
        _check_shapes_model(name)
        from diffalign.files.lock import writing_file
        from diffalign.testbed.pretrain import main

        with writing_file(out / name, "--out"):
            main(name, out)


@testbed.command("quickstart", epilog=examples("testbed quickstart"))
def testbed_quickstart(
    base: Annotated[str, typer.Option(help=f"The base model: {SHAPES_MODELS}.")] = "shapes-sd3",
    out: Annotated[
        Path | None, typer.Option(help="Folder for data, run and report; without it, runs/quickstart-BASE.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the whole round.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; without it, those of the recipe.")] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="As a control, shuffle the labels within every group.")
    ] = False,
) -> None:
    """Sample, score, rank, train and evaluate once.

    One round on the embedded world, with a report. The same command resumes where it stopped.
    """
    with plain_errors(resumes=True):
        _check_shapes_model(base)
        from diffalign.stages.quickstart import quickstart

        folder = out or Path("runs") / f"quickstart-{base}"
        quickstart(base=base, out=folder, seed=seed, steps=steps, shuffle=shuffle)


@testbed.command("judge-data", epilog=examples("testbed judge-data"))
def testbed_judge_data(
    out: Annotated[Path, typer.Argument(help="The folder to write: images/, pairs.jsonl, ratings.jsonl.")],
    split: Annotated[str, typer.Option(help="train, validation or test; they share no prompt.")] = "train",
    groups: Annotated[int, typer.Option(min=1, help="Number of prompts, each in one dimension.")] = 600,
    images: Annotated[int, typer.Option(min=2, max=5, help="Images per prompt, each with another fault.")] = 4,
    raters: Annotated[int, typer.Option(min=1, help="Simulated people who rate each image.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of scenes, faults and raters.")] = 0,
) -> None:
    """Draw rated scenes to train a judge on.

    Scenes with known faults and simulated ratings.
    """
    with plain_errors():
        _check_choice("split", split, SPLITS)
        from diffalign.stages.judge import judge_data

        judge_data(out, split, groups, images, raters, seed)


@testbed.command("judge-base", epilog=examples("testbed judge-base"))
def testbed_judge_base(
    size: Annotated[str, typer.Argument(help="teacher (1.4 M parameters) or student (0.4 M).")],
    out: Annotated[
        Path, typer.Argument(help="The folder to write: a transformers model with processor and judge.json.")
    ],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 32 images.")] = 3000,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of weights and images.")] = 0,
) -> None:
    """Train a small Qwen3-VL from random weights to rate.

    It learns to describe scenes of the embedded world and to rate them, from scores that are mostly noise.
    """
    with plain_errors():
        _check_choice("size", size, ("teacher", "student"))
        from diffalign.stages.judge import judge_base

        judge_base(out, size, steps, seed)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DiffalignError(f"{name} {value}: unknown; one of {', '.join(choices)}")


def _check_shapes_model(name: str) -> None:
    if name not in ("shapes-sd3", "shapes-sdxl"):
        raise DiffalignError(f"{name}: no model of the embedded world; use {SHAPES_MODELS}")
