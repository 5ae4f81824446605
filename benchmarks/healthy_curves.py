"""Short runs on the embedded world, good ones and deliberately broken ones, and what the health lines say of each.

python benchmarks/healthy_curves.py [--out runs/healthy] [--only NAME ...] [--draw]

It samples 512 groups of 4 images once (minutes on a CPU), trains each run for 256 steps (about a minute each), writes a table
of findings, and with --draw the picture in docs/healthy-curves.md. Runs that are complete are kept.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from diffalign import rounds, stages
from diffalign.config import load_config
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.rank import rank
from diffalign.data.writer import write_groups
from diffalign.errors import DiffalignError
from diffalign.report.curves import HEIGHT, WIDTH, Series, series, static_svg
from diffalign.report.runs import Run, read_run

GROUPS, IMAGES, STEPS = 512, 4, 256
VALIDATED = ("validation.every=64", "validation.prompts=testbed:validation")
# name -> (labels, what is changed)
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "good-0": ("true", ()),
    "good-1": ("true", ("seed=1",)),
    "good-b500": ("true", ("objective.beta=500.0",)),
    "good-lr3e-4": ("true", ("optimizer.lr=3e-4",)),
    "good-sft": ("true", ("objective={name: sft}",)),
    "good-2": ("true", ("seed=2",)),
    "good-b2000": ("true", ("objective.beta=2000.0",)),
    "good-sft-1": ("true", ("objective={name: sft}", "seed=1")),
    "good-r4": ("true", ("tune.rank=4", "tune.alpha=4.0", "seed=3")),
    "good-b300": ("true", ("objective.beta=300.0", "seed=4")),
    "beta-small": ("true", ("objective.beta=1.0",)),
    "reversed": ("reversed", ()),
    "v-reversed": ("reversed", VALIDATED),
    "shuffled": ("shuffled", ()),
    "lr-high": ("true", ("optimizer.lr=0.03",)),
}
DRAWN = {
    "good-0": "good",
    "beta-small": "beta too small (1 instead of 100)",
    "reversed": "labels reversed",
    "shuffled": "labels shuffled",
    "lr-high": "learning rate too high (0.03 instead of 0.001)",
}
PANELS = {
    "accuracy": "implicit accuracy",
    "gaps": "error against the reference: winner (blue), loser (orange)",
    "gradient_factor": "gradient factor",
    "drift": "drift",
}
STYLE = """
.grid { stroke: #8884; stroke-width: 1 } .raw { fill: none; stroke-width: 1; opacity: .3 }
.line { fill: none; stroke-width: 2 } text { font: 11px system-ui, sans-serif; fill: #808080 }
.y { text-anchor: end } .x { text-anchor: middle } .title { font-size: 15px; font-weight: 600 } .name { font-size: 12px }
.run0 { stroke: #4a86e8 } .run1 { stroke: #e07a2f }
"""


def make_data(out: Path) -> None:
    """The same images three times: with true labels, with the order reversed, and shuffled within each group."""
    if (out / "data-shuffled" / "groups.parquet").is_file():
        return
    rounds.IMAGES_PER_GROUP = IMAGES
    rank(rounds.make_data("shapes-sdxl", out / "data", 0, GROUPS), ["geneval"])
    for kind in ("reversed", "shuffled"):
        shutil.copytree(out / "data", out / f"data-{kind}", dirs_exist_ok=True)
        dataset = PreferenceDataset(out / f"data-{kind}")
        if kind == "shuffled":
            rank(dataset, ["geneval"], shuffle_seed=1)
        else:
            rows = [dataset.group(i) for i in range(len(dataset))]
            write_groups(dataset.folder, [{**r, "preference": [1 - p for p in r["preference"]]} for r in rows])


def train(out: Path, name: str) -> None:
    labels, changes = RUNS[name]
    if (out / "runs" / name / "weights").exists():
        return
    data = out / ("data" if labels == "true" else f"data-{labels}")
    given = (f"data.path={data}", f"run_dir={out / 'runs' / name}", f"train.steps={STEPS}", "train.threads=1")
    fixed = (
        "objective.beta=100",
        "optimizer.lr=1e-3",
        "tracking.trackers=[]",
        "checkpoint.every=64",
        "checkpoint.keep=4",
    )
    stages.train(load_config("shapes_sdxl_dpo", [*given, *fixed, *changes]))


def table(runs: dict[str, Run]) -> str:
    lines = ["| run | findings, each at its first step |", "|---|---|"]
    for name, run in runs.items():
        found = [f"{f['name']} ({f['step']}: {f['measured']})" for f in run.findings]
        lines.append(f"| {name} | {'; '.join(found) or 'none'} |")
    return "\n".join(lines)


def lines_of(run: Run, panel: str) -> list[Series]:
    names = ["winner_gap", "loser_gap"] if panel == "gaps" else [panel]
    return [s for n, name in enumerate(names) for s in [series(n, name, run.rows)] if s is not None]


def picture(runs: dict[str, Run]) -> str:
    """A row of panels for each run in DRAWN; every panel has its own scale."""
    shown = [name for name in DRAWN if name in runs]
    row = HEIGHT + 62
    width, height = WIDTH * len(PANELS), row * len(shown)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"><style>{STYLE}</style>']
    for i, name in enumerate(shown):
        parts.append(f'<text class="title" x="52" y="{i * row + 22}">{DRAWN[name]}</text>')
        for j, (panel, title) in enumerate(PANELS.items()):
            parts.append(f'<text class="name" x="{j * WIDTH + 52}" y="{i * row + 42}">{title}</text>')
            place = f'<svg x="{j * WIDTH}" y="{i * row + 44}" width="{WIDTH}" height="{HEIGHT}" '
            parts.append(static_svg(panel, lines_of(runs[name], panel)).replace("<svg ", place, 1))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/healthy"))
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--draw", action="store_true", help="write docs/images/healthy-curves.svg from what is there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    make_data(given.out)
    for name in given.only:
        try:
            train(given.out, name)
        except DiffalignError as error:  # a broken run may well end early; that is a result
            print(f"{name}: {error}")
    runs = {name: read_run(given.out / "runs" / name) for name in given.only if (given.out / "runs" / name).is_dir()}
    print(table(runs))
    results = {name: [(f["name"], f["step"]) for f in run.findings] for name, run in runs.items()}
    print(json.dumps(results, indent=1))
    if given.draw:
        path = Path(__file__).parent.parent / "docs" / "images" / "healthy-curves.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(picture(runs))
        print(f"written: {path}")


if __name__ == "__main__":
    main()
