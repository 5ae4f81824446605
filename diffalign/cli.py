"""The verbs. Nothing heavy is imported before a verb runs, so `--help` answers at once.

Exit codes: 0 done; 2 a mistake that the user can mend, said in one line on stderr; 3 `score` is done, but some picture has
no score; 130 stopped by Ctrl-C; 1 with a traceback is a bug.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from diffalign import __version__
from diffalign.errors import DiffalignError

app = typer.Typer(
    name="diffalign",
    help="Make text-to-image diffusion and rectified-flow models follow preferences.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
testbed = typer.Typer(
    help="The embedded world: coloured shapes, two small models, a detector. It runs on a CPU, offline.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(testbed, name="testbed")
data = typer.Typer(
    help="Datasets: other people's to ours, what is in one, and ours to other forms.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data, name="data")

Source = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped recipe such as sdxl_dpo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="Values that replace those of CONFIG, such as train.steps=200."),
]
SHAPES_MODELS = "shapes-sd3 or shapes-sdxl"


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(f"diffalign {__version__}")
        raise typer.Exit


@app.command()
def train(
    config: Source,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved config, facts about model and data and the steps; write nothing."
        ),
    ] = False,
) -> None:
    """Train a model on preference data. The same command again goes on where it stopped."""
    with _plain_errors(goes_on=True):
        from diffalign.config import load_config

        checked = load_config(config, overrides or ())  # before torch is imported: a mistyped key is reported at once
        from diffalign import stages

        stages.train(checked, dry_run=dry_run)


@app.command()
def sample(config: Source, overrides: Overrides = None) -> None:
    """Draw groups of images for prompts into a dataset folder. The same command again goes on where it stopped."""
    with _plain_errors(goes_on=True):
        from diffalign.config import load_sample_config

        checked = load_sample_config(config, overrides or ())
        from diffalign import stages

        stages.sample(checked)


@app.command("eval")
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|RUN", help="A YAML file, or the directory of a training run (then give prompts=... too)."
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Compare a model without and with trained weights on the same prompts and seeds, and write report.html."""
    with _plain_errors():
        from diffalign.config import eval_config_of_run, load_eval_config

        if Path(source).is_dir():
            checked = eval_config_of_run(Path(source), overrides or ())
        else:
            checked = load_eval_config(source, overrides or ())
        from diffalign import stages

        stages.evaluate(checked)


@app.command("pairs")
def import_pairs(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CSV | WINNERS LOSERS",
            help="A csv with columns prompt, winner, loser; or two folders of pictures with equal names, "
            "with the caption of a.png in a.txt beside the winner.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
) -> None:
    """Turn your own pairs into a dataset that `diffalign train` reads (data.path)."""
    with _plain_errors():
        from diffalign.data import pairs

        if len(sources) > 2:
            raise DiffalignError(f"pairs: {len(sources)} sources; give one csv, or two folders (winners, then losers)")
        if len(sources) == 1 and sources[0].is_dir():
            raise DiffalignError(f"pairs: {sources[0]} is one folder; give two (winners, then losers) or a csv")
        found = pairs.pairs_from_folders(*sources) if len(sources) == 2 else pairs.pairs_from_csv(sources[0])
        print(f"{pairs.import_pairs(found, out)} pairs in {out}; train on them with data.path={out}")


@app.command("recipes")
def list_recipes() -> None:
    """List the shipped recipes and where their files are."""
    with _plain_errors():
        from diffalign.config import recipes

        for name, path in recipes().items():
            print(f"{name:20} {path}")


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; several stand side by side.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; without it, RUN/report.html, or report.html here for several.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="So many images with the largest gains, and as many with the largest losses.")
    ] = 12,
) -> None:
    """Write one self-contained HTML file about a run, or about several side by side."""
    with _plain_errors():
        from diffalign.report.render import write_reports

        target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        print(f"report: {write_reports(runs, target, shown=images)}")


@app.command("export")
def export_weights(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A training run's directory.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="diffusers: what load_lora_weights reads; kohya: for ComfyUI, A1111 and others (UNets); "
            "merged: the whole pipeline with the LoRA in it.",
        ),
    ] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="The folder to write; without it, RUN/export/FORMAT.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The weights of the best validation, not the last.")] = False,
    licence: Annotated[
        str | None, typer.Option(help="The licence in the model card, as the hub names it; without it, the base's.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload to this hub repository, with HF_TOKEN or your login."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private if it is new.")] = False,
) -> None:
    """Write a run's weights for other programs, with a model card."""
    with _plain_errors():
        from diffalign.export import export

        export(run, out or run / "export" / form, form, best=best, licence=licence, push=push, private=private)


@app.command("score")
def score_images(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Folders, files, quoted globs, parquet files, datasets of ours."),
    ],
    reward: Annotated[
        list[str],
        typer.Option("--reward", "-r", help="NAME, NAME:key=value,... or LABEL=NAME:...; repeat for several rewards."),
    ],
    prompt: Annotated[str | None, typer.Option(help="One prompt for all pictures.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .jsonl, .csv or .parquet with a column that names the picture and a prompt.")
    ] = None,
    prompt_from: Annotated[
        str,
        typer.Option(
            help="auto (metadata.jsonl, else a .txt beside the picture), metadata, txt, name (the file's own), or none."
        ),
    ] = "auto",
    prompt_column: Annotated[
        str | None, typer.Option(help="Column of the prompt; without it prompt, text or caption.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .jsonl, .csv or .parquet; only what is new is scored again."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A gallery: one HTML file, sorted by any reward.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Other pictures of the same prompts: paired win rates with intervals.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Human choices (image_a, image_b, choice) or ratings (image, rating): agreement with them."),
    ] = None,
    into_dataset: Annotated[
        bool,
        typer.Option("--into-dataset", help="Also write the dataset's scores/LABEL.parquet, which training reads."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in one batch.")] = 32,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read and decode.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Score pictures with one or more rewards. The same command again scores only what is new or changed."""
    with _plain_errors(goes_on=output is not None):
        from diffalign import score_stage

        given = score_stage.ScoreRequest(
            images, reward, prompt, prompts, prompt_from, prompt_column, output, html, against, labels, into_dataset,
            batch_size, workers, device,
        )  # fmt: skip
        code = score_stage.score(given)
    if code:
        raise typer.Exit(code)


@app.command("rewards")
def list_rewards() -> None:
    """List the rewards: range, licence, weights and their size, what must be installed."""
    with _plain_errors():
        from diffalign import score_stage

        score_stage.show_rewards()


@app.command()
def synth(
    config: Source,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Time a batch of every generator and reward, print time, disk and cost, stop."),
    ] = False,
) -> None:
    """Make a ranked dataset from prompts. The same command goes on where it stopped; several share the work."""
    with _plain_errors(goes_on=True):
        from diffalign.config import load_synth_config

        checked = load_synth_config(config, overrides or ())
        from diffalign import stages_synth

        stages_synth.synth(checked, dry_run=dry_run)


@app.command("rank")
def rank_scores(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|CONFIG", help="A scored dataset folder, or a YAML file with data and the rest."
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Turn stored scores into preferences anew: other rewards, near-ties dropped, k of K images, filters, splits."""
    with _plain_errors(goes_on=True):
        from diffalign.config import load_rank_config

        checked = load_rank_config(source, overrides or ())
        from diffalign import stages_synth

        stages_synth.rank_again(checked)


@app.command("cache")
def encode_cache(
    config: Source,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how many gigabytes it takes and whether they are free; stop.")
    ] = False,
) -> None:
    """Encode the images and prompts of a training config now, so that `diffalign train` starts at once."""
    with _plain_errors(goes_on=True):
        from diffalign.config import load_config

        checked = load_config(config, overrides or ())
        from diffalign import stages_data

        stages_data.cache(checked, dry_run=dry_run)


@data.command("convert")
def data_convert(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="A file or folder; or two folders: winners, then losers.")
    ],
    out: Annotated[Path, typer.Option(help="The dataset folder to write.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="pickapic, hpdv2, hpdv3, imagefolder, w_l, csv or two_folders; found out if not given."
        ),
    ] = None,
) -> None:
    """Turn a dataset that exists already into one that every command here reads. Broken rows are named and left out."""
    with _plain_errors():
        from diffalign import stages_data

        stages_data.convert(sources, out, form)


@data.command("inspect")
def data_inspect(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    html: Annotated[Path | None, typer.Option(help="Write a contact sheet: images from best to worst.")] = None,
    groups: Annotated[int, typer.Option(min=1, help="How many prompts the contact sheet shows.")] = 100,
) -> None:
    """What a dataset holds: sizes, ties, generators, scores, and how far its rewards agree."""
    with _plain_errors():
        from diffalign import stages_data

        stages_data.inspect(dataset, html, groups)


@data.command("export")
def data_export(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    form: Annotated[
        str, typer.Option("--format", help="rows (one a prompt), pickapic (pairs) or webdataset.")
    ] = "rows",
    pairs: Annotated[str, typer.Option(help="pickapic: best_worst (one pair a prompt) or all.")] = "best_worst",
) -> None:
    """Write a dataset in a form that other code reads, with a card."""
    with _plain_errors():
        from diffalign import stages_data

        stages_data.export_data(dataset, out, form, pairs)


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
    with _plain_errors():
        if split not in ("train", "validation", "test"):
            raise DiffalignError(f"split {split}: unknown; one of train, validation, test")
        from diffalign.testbed.prompts import prompts

        lines = "".join(json.dumps(row) + "\n" for row in prompts(split, n, seed))
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
    with _plain_errors(goes_on=True):
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
    with _plain_errors(goes_on=True):
        _check_shapes_model(base)
        from diffalign.rounds import quickstart

        given: dict[str, Any] = {} if steps is None else {"steps": steps}
        quickstart(base=base, out=out or Path("runs") / f"quickstart-{base}", seed=seed, shuffle=shuffle, **given)


def _check_shapes_model(name: str) -> None:
    if name not in ("shapes-sd3", "shapes-sdxl"):
        raise DiffalignError(f"{name}: no model of the embedded world; use {SHAPES_MODELS}")


@contextmanager
def _plain_errors(goes_on: bool = False) -> Iterator[None]:
    """What a user can mend becomes one line and exit code 2, Ctrl-C one line and 130. Bugs keep their traceback."""
    try:
        yield
    except DiffalignError as error:
        raise _leave(f"error: {error}", 2) from None
    except KeyboardInterrupt:
        raise _leave(
            "stopped by Ctrl-C" + ("; the same command goes on where it stopped" if goes_on else ""), 130
        ) from None
    except Exception as error:
        complaint = _system_complaint(error)
        if complaint is None:
            raise
        raise _leave(f"error: {complaint}", 2) from None


def _leave(message: str, code: int) -> typer.Exit:
    print(message.replace("\n", " "), file=sys.stderr, flush=True)
    return typer.Exit(code)


def _system_complaint(error: BaseException | None) -> str | None:
    """What to say when the disk is full or a folder may not be written; None for every other error."""
    while error is not None:
        path = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and pyarrow report a full disk with errors of their own that carry only the system's words
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return f"no disk space left{path}; free some or write elsewhere, then run the same command again"
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission{path.replace('writing', 'opening')}; change the folder or its rights"
        error = error.__cause__ or error.__context__
    return None
