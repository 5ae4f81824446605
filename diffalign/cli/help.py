"""The look of `--help`: the verbs in groups, and examples below each verb."""

from typing import Any

from typer.core import TyperGroup

GROUPS: dict[str, tuple[str, ...]] = {
    "Start": ("init", "doctor", "recipes", "config"),
    "Score images": ("score", "rewards", "measure", "serve"),
    "Make preference data": (
        "pairs",
        "synth",
        "sample",
        "rank",
        "vote",
        "vote-results",
        "vote-export",
        "data",
        "cache",
    ),
    "Train": ("train", "distill", "reward-gradient", "rounds", "judge", "judge-distributions", "judge-eval"),
    "Look and share": ("eval", "bench", "report", "export"),
    "Try without a GPU": ("testbed",),
}
"""The verbs, in the order in which they are needed. A test compares them with those that exist."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": ("init my.yaml", "init my.yaml --data data/mine --model sdxl --memory 24 --yes"),
    "doctor": ("doctor",),
    "recipes": ("recipes", "recipes sdxl", "recipes sdxl_dpo > my.yaml"),
    "config show": ("config show sdxl_dpo", "config show my.yaml train.steps=400", "config show runs/mine"),
    "config validate": ("config validate my.yaml", "config validate sdxl_dpo optimizer.lr=1e-4"),
    "config diff": ("config diff sdxl_dpo sdxl_dpo_small", "config diff runs/a runs/b"),
    "score": (
        'score photos/ -r pickscore --prompt "a red fox" --html scores.html',
        "score new/ --against old/ -r hpsv2 -r imagereward",
        "score data/mine -r pickscore --into-dataset",
    ),
    "rewards": ("rewards", "rewards pickscore"),
    "measure": ("measure drawn/ -m fid,kid --reference photos/",),
    "serve": ("serve -r hpsv2 -r pickscore",),
    "pairs": (
        "pairs winners/ losers/ --out data/mine",
        "pairs pairs.csv --out data/mine --split validation=0.1",
    ),
    "synth": (
        "synth synth_one_gpu prompts=prompts.txt out=data/drawn --dry-run",
        "synth synth_one_gpu prompts=FILE out=data/drawn -r pickscore",
    ),
    "sample": (
        "sample sample_sdxl prompts=prompts.txt --images look/",
        "sample sample_sdxl prompts=prompts.txt weights=runs/mine/weights",
    ),
    "rank": ("rank data/drawn -r pickscore", "rank data/drawn 'splits={validation: 0.1}'"),
    "vote": ("vote data/drawn", "vote folder-a/ folder-b/ --rater ann"),
    "vote-results": ("vote-results data/drawn", "vote-results data/drawn -r pickscore --html votes.html"),
    "vote-export": ("vote-export data/drawn --out choices.csv",),
    "data convert": ("data convert pickapic/ --out data/pickapic --split validation=0.05",),
    "data inspect": ("data inspect data/mine", "data inspect data/mine --html contact.html"),
    "data export": ("data export data/mine --out shared/ --format pickapic",),
    "cache": ("cache sdxl_dpo data.path=data/mine --dry-run", "cache sdxl_dpo data.path=data/mine"),
    "train": (
        "train sdxl_dpo_small data.path=data/mine --dry-run",
        "train sdxl_dpo_small data.path=data/mine run_dir=runs/mine",
    ),
    "distill": (
        "distill sdxl_dmd2_4step prompts=prompts.txt --dry-run",
        "distill sd35_medium_gndm prompts=prompts.txt -r pickscore",
    ),
    "reward-gradient": (
        "reward-gradient sdxl_refl prompts=prompts.txt --dry-run",
        "reward-gradient sd3_draft prompts=prompts.txt -r hpsv2",
    ),
    "rounds": ("rounds rounds_shapes_gdro rounds=2", "rounds rounds_shapes_ddo out=runs/rounds --dry-run"),
    "judge train": ("judge shapes_judge_risd --dry-run", "judge train qwen3vl_judge_risd"),
    "judge personal": ("judge personal data/mine features=pickscore", "judge personal data/mine source=anna out=taste"),
    "judge-distributions": ("judge-distributions runs/teacher/weights ratings.jsonl",),
    "judge-eval": ("judge-eval runs/judge/weights ratings.jsonl --out measures.json",),
    "eval": (
        "eval runs/mine prompts=held-out.txt -r pickscore",
        "eval runs/mine prompts=held-out.txt n=64 -r hpsv2 -r pickscore",
    ),
    "bench run": ("bench runs/mine -t geneval,hpsv2 -n 8", "bench shapes-sd3 -t shapes"),
    "bench compare": ("bench compare runs/a/bench runs/b/bench",),
    "bench suites": ("bench suites",),
    "report": ("report runs/mine", "report runs/a runs/b --out compare.html"),
    "export": ("export runs/mine", "export runs/mine --best --format merged --out merged/"),
    "testbed prompts": ("testbed prompts test --n 32 --out prompts.jsonl",),
    "testbed pretrain": ("testbed pretrain shapes-sd3",),
    "testbed quickstart": ("testbed quickstart", "testbed quickstart --base shapes-sdxl --steps 50"),
    "testbed judge-data": ("testbed judge-data data/judge --groups 64",),
    "testbed judge-base": ("testbed judge-base student models/judge-base",),
}
"""Commands for each verb. A test reads each with the parser, and the recipes in it."""


def examples(verb: str) -> str:
    """Return the text below the help of a verb; the first line keeps the parser from wrapping the others."""
    lines = [f"  diffalign {one}" for one in EXAMPLES[verb]]
    return "\n".join(["\b", "Examples:" if len(lines) > 1 else "Example:", *lines])


class GroupedVerbs(TyperGroup):
    """The verbs below the headings of `GROUPS`.

    The context and the formatter are typed Any: their classes are click's, or those of the copy of click inside typer.
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group, with the first sentence of every verb."""
        widest = max(map(len, self.commands))
        for heading, names in GROUPS.items():
            with formatter.section(heading):
                # Equal columns in all sections: each list is as wide as its longest name.
                rows = [(name.ljust(widest), self.commands[name].get_short_help_str(100)) for name in names]
                formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the verb that the arguments name; the name of a method is answered with the verb that has it."""
        if args[0] not in self.commands:
            from diffalign.config import OBJECTIVE_SECTIONS
            from diffalign.config.synonyms import other_verb

            hint = other_verb(args[0])
            if args[0].lower() in OBJECTIVE_SECTIONS:
                hint = (
                    f"; {args[0].lower()} is an objective of `diffalign train`: `diffalign recipes` lists its recipes"
                )
            if hint:
                ctx.fail(f"no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the verbs in the order of their groups."""
        return [name for names in GROUPS.values() for name in names]
