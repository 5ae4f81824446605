"""Verbs to begin with: init, doctor, recipes, and the group `config`."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli.complete import config_names
from diffalign.cli.config_verb import Overrides
from diffalign.cli.errors import plain_errors
from diffalign.cli.help import examples
from diffalign.progress import say, say_block

verbs = typer.Typer()
config = typer.Typer(
    help="Show, check and compare configs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
AnyConfig = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, a recipe or a run directory.", autocompletion=config_names),
]


@verbs.command("init", epilog=examples("init"))
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The config to write.")] = Path("train.yaml"),
    data: Annotated[Path | None, typer.Option(help="The dataset folder, which may come later.")] = None,
    model: Annotated[
        str | None, typer.Option(help="sdxl, sd35-medium, sd3-medium, sd15, shapes-sd3 or shapes-sdxl.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=1, help="GB of the GPU; without it, this machine's.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out prompts, which choose the best weights; none: no such.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The folder of the run.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; what is not given has its default.")] = False,
) -> None:
    """Write a short config for training on pairs.

    Asks five questions, for what no option answers. The config extends a recipe and states what is yours.
    """
    ask = not yes and sys.stdin.isatty()
    with plain_errors():
        from diffalign.stages.init import BASES, Answers, check_new, write_config

        check_new(file)

        def answer(given: object, question: str, default: object, check: Callable[[str], str] = str) -> str:
            if given is not None:
                return str(given)
            return str(typer.prompt(question, default=default, value_proc=check)) if ask else str(default)

        def known(name: str) -> str:
            if name not in BASES:
                raise typer.BadParameter(f"{name} is unknown here; one of {', '.join(BASES)}")
            return name

        folder = answer(data, "Dataset folder (of `diffalign pairs` or `synth`)", "data/mine")
        base = answer(model, f"Base model ({', '.join(BASES)})", "sdxl", known)
        size = (
            memory if memory is not None else float(answer(None, "Memory of the GPU in GB", _gpu_memory(), _gigabytes))
        )
        held_out = answer(prompts, "File of held-out prompts, or none", "none")
        runs = answer(run_dir, "Folder of the run", f"runs/{Path(folder).name}")
        write_config(file, Answers(Path(folder), base, size, None if held_out == "none" else held_out, Path(runs)))


def _gigabytes(answer: str) -> str:
    """Return the answer if it is a number of GB; else typer asks again."""
    try:
        size = float(answer)
    except ValueError:
        size = 0.0
    if not 1 <= size < math.inf:
        raise typer.BadParameter(f"{answer} is no number of GB; one from 1 on, such as 24")
    return answer


def _gpu_memory() -> int:
    """Return the GB of this machine's first GPU, or 24 where there is none or torch cannot be imported."""
    from diffalign.stages.doctor import imported_torch

    torch = imported_torch()
    if isinstance(torch, str):
        return 24
    return round(torch.cuda.get_device_properties(0).total_memory / 1e9) if torch.cuda.is_available() else 24


@verbs.command("doctor", epilog=examples("doctor"))
def doctor() -> None:
    """Check this machine.

    Versions, devices, kernels, extras, the hub's cache and free disk space. Exit code 1 if something is wrong.
    """
    with plain_errors():
        from diffalign.stages.doctor import doctor

        fine = doctor()
    if not fine:
        raise typer.Exit(1)


@verbs.command("recipes", epilog=examples("recipes"))
def show_recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A recipe, or a config file: print it with every key. A part of a name or a task: list those.",
            autocompletion=config_names,
        ),
    ] = None,
) -> None:
    """List the shipped recipes, or print one in full.

    In full: with every key, its meaning and its default.
    """
    with plain_errors():
        from diffalign.config import list_recipes, recipes

        listed = [
            recipe
            for recipe in list_recipes()
            if name is None or name.lower() in f"{recipe.name} {recipe.task}".lower()
        ]
        if name is not None and (name in recipes() or Path(name).exists() or not listed):
            from diffalign.config.commented import commented_recipe

            say_block(commented_recipe(name).rstrip("\n"))
            return
        row = "{:29}{:22}{:17}{}"
        print(row.format("name", "task", "model", "memory"))
        for recipe in listed:
            print(row.format(recipe.name, recipe.task, recipe.model, recipe.memory))
        print("\nmemory: of the GPU that the recipe is meant for.")
        print("`diffalign recipes NAME` prints one with every key, its meaning and default.")


@config.command("show", epilog=examples("config show"))
def show(source: AnyConfig, overrides: Overrides = None) -> None:
    """Print a config with every key.

    With the meaning and the default of each, after what it extends and the arguments are applied. The output is a config
    again.
    """
    with plain_errors():
        from diffalign.config.commented import commented_recipe

        say_block(commented_recipe(source, overrides or ()).rstrip("\n"))


@config.command("validate", epilog=examples("config validate"))
def validate(source: AnyConfig, overrides: Overrides = None) -> None:
    """Check a config and start nothing.

    Exit code 2 and one line if something is wrong. Whether data and models are there, `--dry-run` of its verb says.
    """
    with plain_errors():
        from diffalign.config.any_kind import load_any

        kind, _ = load_any(source, overrides or ())
        say(f"{source}: a valid config of `diffalign {kind}`")


@config.command("diff", epilog=examples("config diff"))
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A YAML file, a recipe or a run directory.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another, of the same verb.")],
) -> None:
    """Compare two configs, defaults included.

    One line for each key that differs: the value of A, then that of B.
    """
    with plain_errors():
        from diffalign.config.any_kind import differences

        lines = differences(first, second)
        say_block("\n".join(lines) if lines else "no difference")
