"""How fast are drawing and opening synthetic data, and what does training on them gain?

    python benchmarks/synthetic_data.py generate [--model shapes-sdxl] [--images 256] [--batch 32]
    python benchmarks/synthetic_data.py open [--rows 1000000]
    python benchmarks/synthetic_data.py world [--out runs/bench-synth]

`generate` draws the same images at the same batch in a bare loop and through `draw_part`, several times in turn, with one
thread, and compares the medians of CPU seconds (other work on the machine moves them less than the clock). `open` writes a
dataset of that many tiny images, then opens it in a fresh process and reads groups at random and in order. `world` goes
from prompts to a judged model (`shared/synthetic_world.py`; half an hour of CPU) and keeps what is done.

Each at its full size writes its part of results/synth.json.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "synth.json"


def keep(part: str, found: dict[str, Any]) -> None:
    """Put a part into the results file, beside the others."""
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps({**known, part: found}, indent=1) + "\n")
    print(f"written: {part} of {RESULTS}")


def cpu_and_clock(action: Callable[[], Any]) -> tuple[float, float]:
    cpu, clock = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - cpu, time.perf_counter() - clock


def generate(model: str, images: int, batch: int, rounds: int) -> dict[str, Any]:
    import torch

    from diffalign import testbed
    from diffalign.data.plan import Part, SynthPlan
    from diffalign.data.prompts import PromptRow
    from diffalign.data.sample import Drawn, draw_part
    from diffalign.pipelines.generator import load_generator
    from diffalign.testbed.shape_prompts import draw_prompts

    torch.set_num_threads(1)
    path = str(testbed.model_path(model)) if model in testbed.MODELS else model
    generator = load_generator(path)
    pipeline = generator.pipeline
    texts = [row["prompt"] for row in draw_prompts("train", images)]
    plan = SynthPlan(tuple(PromptRow(t) for t in texts), (Part(model, 1, batch),), 0)
    batches = [b for shard in plan.shards(0) for b in shard.batches]
    given = {"steps": 10, "guidance_scale": 4.0}
    own = {"max_sequence_length": 32} if "SD3" in type(pipeline).__name__ else {}

    facts = generator.facts()  # hashes the weights, once for a model

    def bare() -> None:
        for some in batches:
            pipeline(
                [c.prompt for c in some], generator=[torch.Generator().manual_seed(c.seed) for c in some],
                num_inference_steps=10, guidance_scale=4.0, **own,
            )  # fmt: skip

    def ours(folder: Path) -> None:
        draw_part(
            plan, 0, folder,
            lambda p, s: [Drawn(i) for i, _ in generator.draw(p, s, **given)], facts,
        )  # fmt: skip

    bare()
    found: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
    size = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            found["bare"].append(cpu_and_clock(bare))
            found["ours"].append(cpu_and_clock(lambda folder=folder: ours(Path(folder))))
            size = sum(p.stat().st_size for p in Path(folder).glob("images/*"))
    cpu = {name: statistics.median(c for c, _ in runs) for name, runs in found.items()}
    clock = {name: statistics.median(t for _, t in runs) for name, runs in found.items()}
    print(f"{model}, {images} images, batch {batch}, 10 steps, one thread, median of {rounds}")
    for name in found:
        print(f"  {name}: {cpu[name]:.2f} CPU s, {clock[name]:.2f} s, {images / clock[name]:.2f} images/s")
    print(f"  ours / bare: {cpu['ours'] / cpu['bare']:.3f} in CPU seconds, PNG and parquet included")
    print(f"  disk: {size / images / 1000:.2f} kB an image")
    return {
        "model": model, "images": images, "batch": batch, "rounds": rounds, "cpu_s": cpu, "wall_s": clock,
        "ours_over_bare_cpu": cpu["ours"] / cpu["bare"], "ours_over_bare_wall": clock["ours"] / clock["bare"],
    }  # fmt: skip


def write_large(folder: Path, rows: int) -> None:
    """`rows` tiny images in groups of four, with preferences, as an import leaves them."""
    from diffalign.data.writer import ImageWriter, write_groups

    per_file = 4096
    for first in range(0, rows, per_file):
        with ImageWriter(folder, f"part-{first // per_file:05d}") as writer:
            for i in range(first, min(first + per_file, rows)):
                writer.write(f"{i // 4:07d}-0123456789abcdef", i % 4, b"x" * 64, "m", i, {})
    write_groups(
        folder,
        (
            {
                "group_id": f"{g:07d}-0123456789abcdef", "prompt_id": f"{g:016x}", "prompt": f"a prompt of a usual length, {g}",
                "preference": [1.0, 0.5, 0.25, 0.0], "split": "train", "metadata": {},
            }
            for g in range(rows // 4)
        ),
    )  # fmt: skip


READ = """
import json, random, resource, sys, time
from pathlib import Path
from diffalign.data.dataset import PreferenceDataset

def memory():
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 2**20

before, start, cpu = memory(), time.perf_counter(), time.process_time()
dataset = PreferenceDataset(sys.argv[1])
places = len(dataset.image_index)
chosen = dataset.split('train')
opened, opened_cpu, after = time.perf_counter() - start, time.process_time() - cpu, memory()
start = time.perf_counter()
chance = random.Random(0)
ids = dataset.column('group_id')
for i in chance.sample(chosen, 1000):
    assert len(dataset.images(ids[i])) == 4
drawn = time.perf_counter() - start
marks, count, start, cpu = [], 0, time.perf_counter(), time.process_time()
for rows in dataset.iter_images():
    count += len(rows)
    if count % 65536 == 0:
        marks.append(memory())
print(json.dumps({
    'images': places, 'open_s': opened, 'open_cpu_s': opened_cpu, 'MiB_opened': after - before, 'random_group_ms': drawn,
    'iterate_s': time.perf_counter() - start, 'iterate_cpu_s': time.process_time() - cpu,
    'MiB_while_iterating': [min(marks), max(marks)] if marks else [],
}))
"""


def open_large(rows: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    try:
        _, clock = cpu_and_clock(lambda: write_large(folder, rows))
        size = sum(p.stat().st_size for p in folder.rglob("*.parquet"))
        print(f"{rows} images of 64 bytes in {rows // 4} groups: written in {clock:.1f} s, {size / 1e6:.0f} MB")
        found = subprocess.run([sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=True)
    finally:
        shutil.rmtree(folder)
    facts = json.loads(found.stdout.splitlines()[-1])
    facts |= {
        "file_MB": size / 1e6,
        "write_s": clock,
        "MiB_writer": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    for key, value in facts.items():
        print(f"  {key}: {value}")
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in facts.items()}


def through_the_world(given: argparse.Namespace) -> None:
    import torch

    from shared.synthetic_world import show, world

    torch.set_num_threads(1)
    found = world(given.out, given.prompts, given.steps, given.test_prompts, given.test_seeds)
    show(found)
    if (given.prompts, given.steps, given.test_prompts, given.test_seeds) == (500, None, 256, 4):
        keep("world", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["generate", "open", "world"])
    parser.add_argument("--model", default="shapes-sdxl")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-synth"))
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, help="of training; left out: the recipe's")
    parser.add_argument("--test-prompts", type=int, default=256)
    parser.add_argument("--test-seeds", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.what == "generate":
        found = generate(arguments.model, arguments.images, arguments.batch, arguments.rounds)
        if arguments.images >= 256:
            keep(f"generate {arguments.model}", found)
    elif arguments.what == "open":
        found = open_large(arguments.rows)
        if arguments.rows >= 1_000_000:
            keep("open", found)
    else:
        through_the_world(arguments)
