"""What does `diffalign score` cost, and what does the hpsv2 package cost for the same?

python benchmarks/scoring_speed.py [--images 10000] [--side 512] [--loop 200] [--network ViT-B-32] [--network-loop 20]

Makes the two tables of docs/score.md.

1. The command on a folder. Decoding (read, decode, prepare) and the model are timed alone first, in CPU-seconds of one thread
   on a part of the pictures; then the real command runs on all of them in a process of its own, whose memory is watched. The
   target is wall <= 1.15 x (decoding + model CPU-seconds) / cores, start-up included. The model is a random CLIP of
   ViT-S/32's sizes, so that decoding is a fifth of the work; beside a larger one it weighs less. The files have just been
   written, so that they come from the page cache.
2. A loop over `hpsv2.score`, called once a picture as its users do, against `diffalign score` with the same random checkpoint.
   hpsv2.score loads the checkpoint at every call, so the ratio is also given with that time taken off theirs. Ours is timed
   with its one load, reading and hashing, over all --loop pictures. How much the load weighs depends on the network, so there
   are two: a small one and ViT-B-32. `--network ViT-H-14` takes HPSv2's own, with 8 GB of memory and 4 GB of disk.

`make oracles` installs the package; tests/helpers/oracles.py makes it import. Writes results/scoring.json.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from diffalign.files.images import decode
from diffalign.rewards import Reward, load_reward
from diffalign.scoring.allocator import keep_freed_memory
from diffalign.scoring.items import Item
from diffalign.scoring.run import score_items
from diffalign.scoring.sources import Prompting, collect
from diffalign.scoring.store import Store
from helpers import oracles
from shared.scoring_inputs import jpeg_pictures, random_clip

RESULTS = Path(__file__).parent / "results"
PROMPT = "a picture"
TARGET, RATIO = 1.15, 5.0
REDUCED = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
}


def parts(items: list[Item], reward: Reward, count: int = 256, batch: int = 32) -> tuple[float, float]:
    """CPU-seconds a picture of (reading, decoding and preparing; the model), one after the other on one thread.

    With the command's own way with memory, which spares page faults: otherwise the target would be easier to reach.
    """
    keep_freed_memory()
    some, threads = items[:count], torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.process_time()
    prepared = [reward.prepare(decode(item.origin.read())) for item in some]
    decoding = (time.process_time() - started) / len(some)
    reward.measure_prepared(prepared[:batch], [PROMPT] * len(prepared[:batch]))  # weights are loaded here
    started = time.process_time()
    for k in range(0, len(some), batch):
        reward.measure_prepared(prepared[k : k + batch], [PROMPT] * len(prepared[k : k + batch]))
    model = (time.process_time() - started) / len(some)
    torch.set_num_threads(threads)
    return decoding, model


def command(folder: Path, clip: Path, output: Path) -> tuple[float, float, list[float]]:
    """(wall seconds from start to end, CPU-seconds, resident MB every quarter of a second) of `diffalign score`."""
    reward = f"clipscore:convention=cosine,weights={clip}"
    call = [
        sys.executable,
        "-m",
        "diffalign",
        "score",
        str(folder),
        "-r",
        reward,
        "--prompt",
        PROMPT,
        "-o",
        str(output),
    ]
    memory = []
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen([*call, "--device", "cpu"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()
            memory.append(int(pages[1]) * resource.getpagesize() / 1e6 if len(pages) > 1 else 0.0)
            time.sleep(0.25)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"diffalign score ended with {process.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, memory


def throughput(work: Path, items: list[Item], side: int, cores: int) -> dict[str, Any]:
    """The first table."""
    clip = random_clip(work / "clip")
    decoding, model = parts(items, load_reward("clipscore", convention="cosine", weights=clip))
    jpeg_pictures(work / "one", 1, side)
    start, start_cpu, _ = command(work / "one", clip, work / "one.jsonl")
    wall, cpu, memory = command(work / "pictures", clip, work / "all.jsonl")
    expected = len(items) * (decoding + model) / cores
    # The first seconds import libraries; from then on a run must not grow with the number of pictures.
    steady = memory[int(len(memory) * min(0.5, start / wall)) :]
    third = max(1, len(steady) // 3)
    return {
        "pictures": len(items), "side": side, "decoding, CPU ms a picture": 1000 * decoding,
        "model, CPU ms a picture": 1000 * model, "(decoding + model) / cores, s": expected,
        "wall, s": wall, "wall / that (target 1.15)": wall / expected,
        "start-up (a run on one picture), s": start, "without start-up": (wall - start) / expected,
        "CPU, s": cpu, "CPU without start-up / (decoding + model)": (cpu - start_cpu) / (expected * cores),
        "resident MB, first third": max(steady[:third]), "resident MB, last third": max(steady[-third:]),
        "meets the target": wall <= TARGET * expected,
    }  # fmt: skip


def timed(spent: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose seconds are appended to `spent`."""

    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        answer = function(*arguments, **options)
        spent.append(time.perf_counter() - started)
        return answer

    return call


def against_the_package(work: Path, items: list[Item], count: int, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Seconds a picture of `hpsv2.score` in a loop over `count` items and of ours over all of them; the largest difference."""
    import open_clip

    package = oracles.hpsv2(config)
    checkpoint = work / "HPS_v2.1_compressed.pt"
    network = package.model_dict["model"]
    torch.save({"state_dict": network.state_dict()}, checkpoint)
    paths = [str(getattr(item.origin, "path", "")) for item in items[:count]]
    load: list[float] = []
    started = time.perf_counter()
    with (
        mock.patch.object(torch, "load", timed(load, torch.load)),
        mock.patch.object(network, "load_state_dict", timed(load, network.load_state_dict)),
    ):
        theirs = [float(package.score(path, PROMPT, cp=str(checkpoint))[0]) for path in paths]
    loop, loading = (time.perf_counter() - started) / len(paths), sum(load) / len(paths)
    package.model_dict.clear()
    del network
    (work / "bench-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(work / "bench-hps.json")
    started = time.perf_counter()
    reward = load_reward("hpsv2", weights=checkpoint, architecture="bench-hps")
    with Store(work / f"{name}.jsonl") as store:
        scores = score_items(items, {"hps": reward}, store, workers=os.cpu_count() or 1)
        store.finish(scores.rows, [])
    ours = (time.perf_counter() - started) / len(items)
    checkpoint.unlink()
    return {
        "network": name, "pictures (theirs, ours)": f"{len(paths)}, {len(items)}", "hpsv2.score, ms a picture": 1000 * loop,
        "of which loading the checkpoint, ms": 1000 * loading, "ours, ms a picture": 1000 * ours,
        "ratio (target 5)": loop / ours, "ratio without their loading": (loop - loading) / ours,
        "largest difference of scores": max(abs(row["hps"] - t) for row, t in zip(scores.rows[:count], theirs, strict=True)),
        "meets the target": loop >= RATIO * ours,
    }  # fmt: skip


def show(title: str, results: list[dict[str, Any]]) -> None:
    table = Table("", *("" for _ in results), title=title, title_justify="left", show_header=False)
    for key in results[0]:
        table.add_row(key, *(f"{r[key]:.4g}" if isinstance(r[key], float) else str(r[key]) for r in results))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--loop", type=int, default=200, help="pictures of the comparison")
    parser.add_argument(
        "--network", default="ViT-B-32", help="open_clip's name of the second network of the comparison"
    )
    parser.add_argument("--network-loop", type=int, default=20, help="how many of them hpsv2.score gets on it")
    arguments = parser.parse_args()
    oracles.folder()
    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"machine": platform.machine(), "cores": cores, "load before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        jpeg_pictures(work / "pictures", arguments.images, arguments.side)
        items = collect([str(work / "pictures")], Prompting(one=PROMPT))
        result["command"] = throughput(work, items, arguments.side, cores)
        show(f"diffalign score on {cores} cores", [result["command"]])
        second = oracles.hpsv2_config(arguments.network)
        networks = [(arguments.loop, "reduced", REDUCED), (arguments.network_loop, arguments.network, second)]
        result["against hpsv2.score"] = [
            against_the_package(work, items[: arguments.loop], count, name, config) for count, name, config in networks
        ]
        show("against a loop over hpsv2.score", result["against hpsv2.score"])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scoring.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
