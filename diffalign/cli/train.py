"""Verbs about models and runs: train, distill, reward-gradient, sample, eval, rounds, recipes, report, export."""

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.errors import plain_errors
from diffalign.cli.options import Overrides, Source

verbs = typer.Typer()


@verbs.command()
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
    with plain_errors(goes_on=True):
        from diffalign.config import load_config

        checked = load_config(config, overrides or ())  # before torch is imported: a mistyped key is reported at once
        from diffalign.stages import train as train_stage

        train_stage.train(checked, dry_run=dry_run)


@verbs.command()
def distill(
    config: Source,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved config, the student's times and the updates; write nothing."
        ),
    ] = False,
) -> None:
    """Distil a model into a student with few steps (DMD2, GNDM), with rewards if asked. Goes on where it stopped."""
    with plain_errors(goes_on=True):
        from diffalign.config import load_distill_config

        checked = load_distill_config(config, overrides or ())
        from diffalign.stages import distill as distill_stage

        distill_stage.distill(checked, dry_run=dry_run)


@verbs.command("reward-gradient")
def reward_gradient(
    config: Source,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved config and which steps carry a gradient; write nothing."),
    ] = False,
) -> None:
    """Train a model on the gradient of differentiable rewards (ReFL, DRaFT, AlignProp). Goes on where it stopped."""
    with plain_errors(goes_on=True):
        from diffalign.config import load_reward_gradient_config

        checked = load_reward_gradient_config(config, overrides or ())
        from diffalign.stages import reward_gradient as reward_gradient_stage

        reward_gradient_stage.reward_gradient(checked, dry_run=dry_run)


@verbs.command()
def sample(config: Source, overrides: Overrides = None) -> None:
    """Draw groups of images for prompts into a dataset folder. The same command again goes on where it stopped."""
    with plain_errors(goes_on=True):
        from diffalign.config import load_sample_config

        checked = load_sample_config(config, overrides or ())
        from diffalign.stages import sample as sample_stage

        sample_stage.sample(checked)


@verbs.command("eval")
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
    with plain_errors():
        from diffalign.config import eval_config_of_run, load_eval_config

        if Path(source).is_dir():
            checked = eval_config_of_run(Path(source), overrides or ())
        else:
            checked = load_eval_config(source, overrides or ())
        from diffalign.stages import evaluate as evaluate_stage

        evaluate_stage.evaluate(checked)


@verbs.command("rounds")
def run_rounds(config: Source, overrides: Overrides = None) -> None:
    """Sample, score, rank, train, evaluate, again, from the last model. The same command goes on where it stopped."""
    with plain_errors(goes_on=True):
        from diffalign.config import load_rounds_config

        checked = load_rounds_config(config, overrides or ())
        from diffalign.stages import rounds as rounds_stage

        rounds_stage.rounds(checked)


@verbs.command("recipes")
def show_recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A recipe, or a config file: print it with every key.")
    ] = None,
) -> None:
    """List the shipped recipes, or print one with every key, its meaning and its default."""
    with plain_errors():
        if name is not None:
            from diffalign.config.commented import commented_recipe

            print(commented_recipe(name), end="")
            return
        from diffalign.config import list_recipes

        row = "{:27}{:24}{:15}{}"
        print(row.format("name", "task", "model", "memory"))
        for recipe in list_recipes():
            print(row.format(recipe.name, recipe.task, recipe.model, recipe.memory))
        print("\nmemory: of the GPU that the recipe is meant for.")
        print("`diffalign recipes NAME` prints one with every key, its meaning and default.")


@verbs.command("report")
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
    with plain_errors():
        from diffalign.report.render import write_reports

        target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
        print(f"report: {write_reports(runs, target, shown=images)}")


@verbs.command("export")
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
    with plain_errors():
        from diffalign.stages.export import export

        export(run, out or run / "export" / form, form, best=best, licence=licence, push=push, private=private)
