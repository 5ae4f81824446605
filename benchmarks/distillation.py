"""How good are few-step students beside their teacher: DMD2, GNDM, and GNDMR with the GenEval reward?

python benchmarks/distillation.py [--bases shapes-sd3 shapes-sdxl] [--seeds 0 1 2] [--max-hours 8] [--tiny]
python benchmarks/distillation.py --prompts testbed:validation      to choose settings; writes no table

On the embedded world. A cell is a base, a method and a seed; shapes-sdxl takes the first seed alone. All students draw the
same number of images in training. The CPU-hours are estimated from a few timed passes and said first; more than --max-hours
is refused. A finished cell leaves cell.json and is not run again, and a run within a cell resumes from its checkpoint.

The measures were fixed before any training: GenEval's dense and exact score; Frechet and kernel distance to the teacher's
images and recall of them, on the features that are named, with the number of images; distance to the teacher's image of the
same prompt and first noise; diversity within a prompt; seconds per image, the VAE included.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.config import RewardSection, load_distill_config
from diffalign.draws import draw
from diffalign.evaluation.distance import frechet_distance, kernel_distance, recall, thumbnails
from diffalign.pipelines.few_step import student_scheduler
from diffalign.stages import resolve
from diffalign.stages.distill import distill
from diffalign.stages.resolve_rewards import open_reward

RESULTS = Path(__file__).parent / "results"
GUIDANCE = {"shapes-sd3": 6.0, "shapes-sdxl": 4.0}  # those of docs/embedded-world.md
TEACHER, TEACHER_STEPS, STEPS = "teacher", 28, 4
FEATURES = "thumbnail-8x8"
REWARD = RewardSection()
# Every update of the student sees 16 images: 16 prompts, or 4 with a group of 4.
MORE = {"axis": "prompt", "size": 4, "scale": "group_mean"}
DMD2 = {"axis": "none", "size": 1, "scale": "per_sample"}
GENEVAL = "reward.terms=[{name: geneval, detector: shapes, options: {}, column: dense, weight: 1.0}]"
# SDXL's students noise again, as DMD2's; a flow's are deterministic.
SAMPLERS = {"shapes-sd3": "euler", "shapes-sdxl": "renoise"}


@dataclass(frozen=True)
class Method:
    """`overrides` of the recipe; none: nothing is trained. steps, guided: how it samples."""

    steps: int
    guided: bool
    overrides: tuple[str, ...] | None = None


METHODS: dict[str, Method] = {
    TEACHER: Method(TEACHER_STEPS, True),
    "teacher in 4 steps": Method(STEPS, True),
    "DMD2": Method(STEPS, False, (f"group={json.dumps(DMD2)}", "train.groups_per_step=16", "train.micro_batch=16")),
    "GNDM": Method(STEPS, False, (f"group={json.dumps(MORE)}", "train.groups_per_step=4", "train.micro_batch=4")),
    "GNDMR": Method(
        STEPS, False, (f"group={json.dumps(MORE)}", "train.groups_per_step=4", "train.micro_batch=4", GENEVAL)
    ),
}


@dataclass(frozen=True)
class Size:
    """updates: of the student; n: training prompts; prompts and seeds_per_prompt: of the evaluation."""

    updates: int = 600
    n: int = 1024
    prompts: int = 256
    seeds_per_prompt: int = 4


TINY = Size(updates=2, n=16, prompts=6, seeds_per_prompt=2)


@dataclass(frozen=True)
class Cell:
    base: str
    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in self.method.lower())
        return out / self.base / f"{name}-{self.seed}"


def cells(bases: list[str], methods: list[str], seeds: list[int]) -> list[Cell]:
    """The teacher first, since the others are compared with its images; what is not trained has one seed."""
    return [
        Cell(base, name, seed)
        for base in bases
        for name in methods
        for seed in (seeds if METHODS[name].overrides and base == "shapes-sd3" else seeds[:1])
    ]


def config_of(cell: Cell, folder: Path, size: Size, more: list[str]) -> Any:
    given = [f"run_dir={folder / 'run'}", f"seed={cell.seed}", f"model.path={cell.base}", f"n={size.n}"]
    given += [f"train.steps={size.updates}", f"student.sampler={SAMPLERS[cell.base]}", f"student.steps={STEPS}"]
    given += [
        "save_pipeline=false",
        "tracking.trackers=[]",
        "validation.every=null",
        f"match.guidance={GUIDANCE[cell.base]}",
    ]
    if cell.base == "shapes-sdxl":
        given.append("model.max_sequence_length=null")
    return load_distill_config("shapes_sd3_gndm", [*given, *(METHODS[cell.method].overrides or ()), *more])


def draw_images(cell: Cell, config: Any, rows: list[Any], size: Size, folder: Path) -> tuple[list[Image.Image], float]:
    """Images of every prompt and seed, a prompt's side by side, from the same first noises; CPU-seconds per image."""
    backbone = resolve.open_backbone(config.model, "cpu")
    method = METHODS[cell.method]
    if method.overrides is not None:
        backbone.load_weights(folder / "run" / "weights")
        backbone.pipeline.scheduler = student_scheduler(backbone.pipeline.scheduler, STEPS, SAMPLERS[cell.base])
    pairs = [(p, k) for p in range(len(rows)) for k in range(size.seeds_per_prompt)]
    images: list[Image.Image] = []
    started = time.process_time()
    torch.manual_seed(cell.seed)  # for schedulers that are given no generator
    for start in range(0, len(pairs), 32):
        part = pairs[start : start + 32]
        images += backbone.sample(
            [rows[p].prompt for p, _ in part],
            [int(draw(0, "benchmark", inner=p, member=k).integers(2**32)) for p, k in part],
            steps=method.steps,
            guidance_scale=GUIDANCE[cell.base] if method.guided else 0.0,
        )
    return images, (time.process_time() - started) / len(pairs)


def measure(images: list[Image.Image], teacher: list[Image.Image], rows: list[Any], seeds: int) -> dict[str, Any]:
    reward = open_reward(REWARD, "cpu")
    texts = [row.prompt for row in rows for _ in range(seeds)]
    scores = reward.measure(images, texts, [row.metadata for row in rows for _ in range(seeds)])
    ours, theirs = thumbnails(images), thumbnails(teacher)
    pixels = [np.asarray(i, np.float32) / 255 for i in images]
    original = [np.asarray(i, np.float32) / 255 for i in teacher]
    pairs = [(p * seeds + a, p * seeds + b) for p in range(len(rows)) for a, b in combinations(range(seeds), 2)]

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.mean((a - b) ** 2)))

    by_prompt = scores["dense"].double().view(len(rows), seeds).mean(1)
    return {
        "dense": float(by_prompt.mean()),
        "dense_error": float(by_prompt.std() / len(rows) ** 0.5),
        "exact": float(scores["exact"].double().mean()),
        f"frechet {FEATURES}": frechet_distance(ours, theirs),
        f"kernel {FEATURES}": kernel_distance(ours, theirs),
        f"recall {FEATURES}": recall(ours, theirs),
        "distance": float(np.mean([apart(a, b) for a, b in zip(pixels, original, strict=True)])),
        "diversity": float(np.mean([apart(pixels[a], pixels[b]) for a, b in pairs])),
        "images": len(images),
    }


def run_cell(cell: Cell, folder: Path, teacher: Path, size: Size, prompts: str, more: list[str]) -> None:
    """`teacher`: the folder of the teacher's cell, whose own images are its measure."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(cell, folder, size, more)
    rows = resolve.resolve_prompts(prompts, size.prompts)
    spent = time.process_time()
    if METHODS[cell.method].overrides is not None:
        distill(config)
    spent = time.process_time() - spent
    images, seconds = draw_images(cell, config, rows, size, folder)
    pictures = folder / "images.npy"
    np.save(pictures, np.stack([np.asarray(i.convert("RGB")) for i in images]))
    stored = np.load(teacher / "images.npy", allow_pickle=False)
    facts = {
        **asdict(cell), "seconds": seconds, "training_cpu_seconds": spent,
        **measure(images, [Image.fromarray(i) for i in stored], rows, size.seeds_per_prompt),
    }  # fmt: skip
    part = folder / "cell.part"
    part.write_text(json.dumps(facts, indent=1))
    part.rename(folder / "cell.json")


def estimate(todo: list[Cell], size: Size) -> float:
    """CPU-hours of the cells that are left, in forward passes of one image: a learning pass counts three."""
    total = 0.0
    for base in dict.fromkeys(cell.base for cell in todo):
        config = config_of(Cell(base, "DMD2", 0), Path("unused"), size, [])
        backbone = resolve.open_backbone(config.model, "cpu")
        conditioning = {k: v.repeat(16, *[1] * (v.dim() - 1)) for k, v in backbone.encode_prompts(["a circle"]).items()}
        side = backbone.default_resolution // backbone.vae_scale_factor
        x, t = torch.randn(16, backbone.latent_channels, side, side), torch.full((16,), 0.5 * backbone.process.span)
        times = []
        for _ in range(4):
            started = time.process_time()
            with torch.no_grad():
                backbone.predict(x, t, conditioning)
            times.append((time.process_time() - started) / 16)
        rolled, learnt, fake = (STEPS - 1) / 2, 3, config.fake.updates
        update = rolled + learnt + 3 + fake * 3 + (fake - 1) * (rolled + 1)
        for cell in (c for c in todo if c.base == base):
            method = METHODS[cell.method]
            # A decoded image costs about as much as six passes.
            passes = method.steps * (2 if method.guided else 1) + 6
            trained = 0.0 if method.overrides is None else 16 * size.updates * update
            total += min(times[1:]) * (trained + size.prompts * size.seeds_per_prompt * passes)
    return total / 3600


def table(done: list[dict[str, Any]]) -> str:
    """Markdown, means over seeds."""
    columns = [
        k for k in done[0] if k not in ("base", "method", "seed", "images", "dense_error", "training_cpu_seconds")
    ]
    lines = [
        f"| base | method | seeds | {' | '.join(columns)} | of the teacher's score |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for key in dict.fromkeys((c["base"], c["method"]) for c in done):
        own = [c for c in done if (c["base"], c["method"]) == key]
        teacher = [c["dense"] for c in done if (c["base"], c["method"]) == (key[0], TEACHER)]
        means = {k: float(np.mean([c[k] for c in own])) for k in columns}
        share = f"{means['dense'] / teacher[0]:.0%}" if teacher and teacher[0] else "unknown"
        values = " | ".join(f"{means[k]:.4f}" for k in columns)
        lines.append(f"| {key[0]} | {key[1]} | {len(own)} | {values} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-distillation"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prompts", default="testbed:test", help="testbed:validation is for choosing settings")
    parser.add_argument("--max-hours", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true", help="a few updates and prompts: does everything run?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of every distillation config")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    size = TINY if given.tiny else Size()
    out = given.out / given.prompts.replace(":", "-")
    methods = [TEACHER, *(m for m in given.methods if m != TEACHER)]
    wanted = cells(given.bases, methods, given.seeds)
    todo = [cell for cell in wanted if not (cell.folder(out) / "cell.json").is_file()]
    if todo:
        hours = estimate(todo, size)
        print(f"{len(todo)} of {len(wanted)} cells to run, about {hours:.2f} CPU-hours", flush=True)
        if hours > given.max_hours:
            sys.exit(f"more than --max-hours={given.max_hours:g}; choose fewer bases, methods or seeds")
    for cell in todo:
        print(f"\n=== {cell.base}: {cell.method}, seed {cell.seed}", flush=True)
        teacher = Cell(cell.base, TEACHER, given.seeds[0]).folder(out)
        run_cell(cell, cell.folder(out), teacher, size, given.prompts, given.overrides)
    done = [json.loads((cell.folder(out) / "cell.json").read_text()) for cell in wanted]
    print(table(done))
    if given.prompts == "testbed:test" and not given.tiny:
        settings = {**asdict(size), "overrides": given.overrides, "features": FEATURES}
        (given.results / "distillation.json").write_text(json.dumps({"size": settings, "cells": done}, indent=1) + "\n")


if __name__ == "__main__":
    main()
