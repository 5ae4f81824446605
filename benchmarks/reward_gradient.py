"""Does following a reward's gradient over-optimise it: how do that reward, GenEval and drift move?

python benchmarks/reward_gradient.py [--methods "DRaFT-2" ...] [--seeds 0 1 2] [--max-hours 4] [--tiny] [KEY=VALUE ...]
python benchmarks/reward_gradient.py --prompts testbed:validation      to choose settings; writes no table
python benchmarks/reward_gradient.py --name zreward 'rewards=[{name: zreward, options: {...}}]'      another reward

A cell is a method and a seed on shapes-sd3. Every --every steps the policy draws images of the same held-out prompts, scored
by what is trained on and by GenEval's dense score; nothing is chosen by them. The CPU-hours are estimated from a few timed
passes and said first; more than --max-hours is refused. A finished cell leaves cell.json and is not run again, and a run
within a cell resumes from its checkpoint.

Writes results/reward-gradient-NAME.json and docs/images/reward-gradient-NAME.svg.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from diffalign.config import RewardGradientConfig, RewardSection, load_reward_gradient_config
from diffalign.report.curves import HEIGHT, WIDTH, Series, static_svg
from diffalign.stages import resolve
from diffalign.stages.reward_gradient import reward_gradient
from diffalign.training.reward_gradient.draws import span_of

ROOT = Path(__file__).parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
SAMPLER, GENEVAL = "{steps: 10, guidance_scale: 6.0}", "geneval.dense"
# What differs between the lines; everything else is the recipe.
METHODS: dict[str, tuple[str, ...]] = {
    "DRaFT-2": ("method={name: draft, last: 2}",),
    "DRaFT-2, drift held": ("method={name: draft, last: 2}", "drift.weight=0.3"),
    "ReFL": ("method={name: refl, between: [7, 9]}",),
    "DRaFT-LV": ("method={name: draft_lv, noises: 2}",),
}
STYLE = """
.grid { stroke: #8884; stroke-width: 1 } .raw { fill: none; stroke-width: 1; opacity: .3 }
.line { fill: none; stroke-width: 2 } text { font: 11px system-ui, sans-serif; fill: #808080 }
.y { text-anchor: end } .x { text-anchor: middle } .title { font-size: 15px; font-weight: 600 } .name { font-size: 12px }
.run0 { stroke: #4a86e8 } .run1 { stroke: #e07a2f } .run2 { stroke: #3d9970 }
"""


@dataclass(frozen=True)
class Size:
    """steps: updates; every: between two looks; prompts: held-out, one image each."""

    steps: int = 96
    every: int = 12
    prompts: int = 128


TINY = Size(steps=2, every=1, prompts=4)


@dataclass(frozen=True)
class Cell:
    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / ("".join(c if c.isalnum() else "-" for c in self.method.lower()) + f"-{self.seed}")


def config_of(cell: Cell, folder: Path, size: Size, prompts: str, more: list[str]) -> RewardGradientConfig:
    given = [f"run_dir={folder / 'run'}", f"seed={cell.seed}", f"sampler={SAMPLER}", *METHODS[cell.method]]
    given += [f"train.steps={size.steps}", f"checkpoint.every={size.every}", "tracking.trackers=[]"]
    given += [f"validation.every={size.every}", f"validation.prompts={prompts}", f"validation.n={size.prompts}"]
    config = load_reward_gradient_config("shapes_sd3_reward_gradient", [*given, *more])
    # GenEval looks on, and so does whatever is followed.
    followed = [RewardSection(name=r.name, detector=r.detector, options=r.options) for r in config.rewards]
    seen = config.validation.model_copy(update={"rewards": [RewardSection(), *followed]})
    return config.model_copy(update={"validation": seen})


def paired(now: list[float | None], before: list[float | None]) -> tuple[float, float]:
    """Mean difference over prompts and its standard error."""
    changes = [a - b for a, b in zip(now, before, strict=True) if a is not None and b is not None]
    return fmean(changes), stdev(changes) / len(changes) ** 0.5


def read_cell(cell: Cell, config: RewardGradientConfig, seconds: float) -> dict[str, Any]:
    """The curve of a finished run: at every look the scores, GenEval's change with its error, and the drift up to there."""
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    looks = [json.loads(line) for line in (config.run_dir / "validation.jsonl").read_text().splitlines()]
    columns = [GENEVAL, *(next(c for c in looks[0]["scores"] if c.split(".")[0] == r.name) for r in config.rewards)]
    curve = []
    for look in looks:
        recent = [row["drift"] for row in rows if look["step"] - config.validation.every < row["step"] <= look["step"]]
        change, error = paired(look["scores"][GENEVAL], looks[0]["scores"][GENEVAL])
        known = {c: fmean(v for v in look["scores"][c] if v is not None) for c in columns}
        drift = fmean(recent) if recent else 0.0
        curve.append({"step": look["step"], **known, "change": change, "error": error, "drift": drift})
    return {**asdict(cell), "training_cpu_seconds": seconds, "columns": columns, "curve": curve}


def run_cell(cell: Cell, folder: Path, config: RewardGradientConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    reward_gradient(config)
    facts = read_cell(cell, config, time.process_time() - started)
    part = folder / "cell.part"
    part.write_text(json.dumps(facts, indent=1))
    part.rename(folder / "cell.json")


def estimate(configs: list[RewardGradientConfig]) -> float:
    """CPU-hours, in passes of one image: one that learns counts four (it is made twice), a decoded image six or, with a
    gradient, 24."""
    if not configs:
        return 0.0
    backbone = resolve.open_backbone(configs[0].model, "cpu")
    conditioning = {k: v.repeat(16, *[1] * (v.dim() - 1)) for k, v in backbone.encode_prompts(["a circle"]).items()}
    side = backbone.default_resolution // backbone.vae_scale_factor
    x, t = torch.randn(16, backbone.latent_channels, side, side), torch.full((16,), 0.5 * backbone.process.span)
    times = []
    for _ in range(4):
        started = time.process_time()
        with torch.no_grad():
            backbone.predict(x, t, conditioning)
        times.append((time.process_time() - started) / 16)
    total = 0.0
    for config in configs:
        steps, train, seen = config.sampler.steps, config.train, config.validation
        span = span_of(config, 0)
        learnt = span.length * (config.method.noises if config.method.name == "draft_lv" else 1)
        image = 2 * (span.first + 5 * learnt) + 24
        looks = (train.steps // (seen.every or train.steps) + 1) * (seen.n or 0)
        total += min(times[1:]) * (train.steps * train.images_per_step * image + looks * (2 * steps + 6))
    return total / 3600


def table(done: list[dict[str, Any]]) -> str:
    """Markdown: for each method the means over seeds at the start, where GenEval was highest, and at the end."""
    columns = done[0]["columns"]
    lines = [
        f"| method | seeds | at | {' | '.join(columns)} | GenEval's change | drift |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for method in dict.fromkeys(cell["method"] for cell in done):
        own = [cell["curve"] for cell in done if cell["method"] == method]
        means = [fmean(curve[i][GENEVAL] for curve in own) for i in range(len(own[0]))]
        places = {
            "start": 0,
            "GenEval's best look": max(range(len(means)), key=means.__getitem__),
            "end": len(means) - 1,
        }
        for name, i in places.items():
            look = [curve[i] for curve in own]
            values = " | ".join(f"{fmean(one[c] for one in look):.3f}" for c in columns)
            # Seeds share the prompts, so their errors do not average out: the mean of the errors is the cautious one.
            change, error = fmean(one["change"] for one in look), fmean(one["error"] for one in look)
            drift = fmean(one["drift"] for one in look)
            at = f"{name} (step {look[0]['step']})"
            lines.append(f"| {method} | {len(own)} | {at} | {values} | {change:+.3f} ± {error:.3f} | {drift:.3g} |")
    return "\n".join(lines)


def picture(done: list[dict[str, Any]]) -> str:
    """A row for each method: what is followed, GenEval, drift; a line a seed."""
    columns = [*done[0]["columns"][1:], GENEVAL, "drift"]
    titles = {GENEVAL: "GenEval, dense (not trained on)", "drift": "drift"}
    methods = list(dict.fromkeys(cell["method"] for cell in done))
    row = HEIGHT + 62
    size = f"{WIDTH * len(columns)} {row * len(methods)}"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>']
    for i, method in enumerate(methods):
        parts.append(f'<text class="title" x="52" y="{i * row + 22}">{method}</text>')
        own = [cell["curve"] for cell in done if cell["method"] == method]
        for j, column in enumerate(columns):
            title = titles.get(column, f"{column} (followed)")
            parts.append(f'<text class="name" x="{j * WIDTH + 52}" y="{i * row + 42}">{title}</text>')
            lines = [Series(n, [p["step"] for p in curve], [p[column] for p in curve]) for n, curve in enumerate(own)]
            place = f'<svg x="{j * WIDTH}" y="{i * row + 44}" width="{WIDTH}" height="{HEIGHT}" '
            parts.append(static_svg(column, lines).replace("<svg ", place, 1))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="sharpness", help="of the results: the reward that is followed")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-reward-gradient"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--prompts", default="testbed:test", help="testbed:validation is for choosing settings")
    parser.add_argument("--max-hours", type=float, default=4.0)
    parser.add_argument("--tiny", action="store_true", help="two steps and a few prompts: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of every config")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    size = TINY if given.tiny else Size()
    out = given.out / given.name / given.prompts.replace(":", "-")
    wanted = [Cell(method, seed) for method in given.methods for seed in given.seeds]
    configs = {cell: config_of(cell, cell.folder(out), size, given.prompts, given.overrides) for cell in wanted}
    todo = [cell for cell in wanted if not (cell.folder(out) / "cell.json").is_file()]
    hours = estimate([configs[cell] for cell in todo])
    print(f"{len(todo)} of {len(wanted)} cells to run, about {hours:.2f} CPU-hours", flush=True)
    if hours > given.max_hours:
        sys.exit(f"more than --max-hours={given.max_hours:g}; choose fewer methods or seeds")
    for cell in todo:
        print(f"\n=== {cell.method}, seed {cell.seed}", flush=True)
        run_cell(cell, cell.folder(out), configs[cell])
    done = [json.loads((cell.folder(out) / "cell.json").read_text()) for cell in wanted]
    print(table(done))
    if given.prompts == "testbed:test" and not given.tiny:
        settings = {**asdict(size), "overrides": given.overrides, "methods": {m: METHODS[m] for m in given.methods}}
        text = json.dumps({"settings": settings, "cells": done}, indent=1) + "\n"
        (given.results / f"reward-gradient-{given.name}.json").write_text(text)
        (given.images / f"reward-gradient-{given.name}.svg").write_text(picture(done))
    elif given.tiny:
        (out / "picture.svg").write_text(picture(done))


if __name__ == "__main__":
    main()
