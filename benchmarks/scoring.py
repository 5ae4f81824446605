"""What `diffalign score` costs: wall time against the CPU-seconds of decoding and of the model, and memory.

python benchmarks/scoring.py [--images 10000] [--side 512] [--reward sharpness] [--hpsv2 FOLDER]

Pictures are made once into a temporary folder. Decoding and model are timed alone first, on a part of them and on one thread
each; then the whole command runs. The target is wall <= 1.15 x (decoding + model CPU-seconds) / cores.

--hpsv2 FOLDER compares with a loop over `hpsv2.score` on the same random weights, where FOLDER is a
`pip install --no-deps --target FOLDER hpsv2==1.2.0`. That package cannot be imported as it is; the missing vocabulary is
taken from open_clip, and two unused imports are stood in for.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffalign.rewards import Reward, load_reward
from diffalign.scoring.decode import decode
from diffalign.scoring.items import Item
from diffalign.scoring.run import score_items
from diffalign.scoring.sources import Prompting, collect
from diffalign.scoring.store import Store

RESULTS = Path(__file__).parent / "results"


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Smooth pictures with a little noise, JPEG at quality 90: what a diffusion model's samples weigh."""
    y, x = np.mgrid[0:side, 0:side] / side
    for i in range(count):
        rng = np.random.default_rng(i)
        waves = np.stack(
            [np.sin(rng.uniform(2, 20) * x + rng.uniform(2, 20) * y + rng.uniform(0, 6)) for _ in range(3)], -1
        )
        pixels = np.clip(128 + 90 * waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=90)


def memory_mb() -> float:
    """Resident now, not at the peak."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def parts(items: list[Item], reward: Reward, count: int = 256, batch: int = 32) -> tuple[float, float]:
    """CPU-seconds a picture of (reading, decoding and preparing; the model), one after the other."""
    some = items[:count]
    started = time.process_time()
    prepared = [reward.prepare(decode(item.origin.read())) for item in some]
    decoding = (time.process_time() - started) / len(some)
    reward.measure_prepared(prepared[:batch], ["a picture"] * len(prepared[:batch]))  # weights are loaded here
    started = time.process_time()
    for k in range(0, len(some), batch):
        reward.measure_prepared(prepared[k : k + batch], ["a picture"] * len(prepared[k : k + batch]))
    return decoding, (time.process_time() - started) / len(some)


def whole(items: list[Item], reward: Reward, output: Path) -> tuple[float, float, list[float]]:
    """(wall seconds, CPU-seconds, resident MB in the course of the run)."""
    memory, done = [memory_mb()], threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            memory.append(memory_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    with Store(output) as store:
        scores = score_items(items, {"r": reward}, store, workers=os.cpu_count() or 1)
        store.finish(scores.rows, [])
    spent = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    return *spent, memory


def published_package(folder: Path) -> types.ModuleType:
    """hpsv2 1.2.0, made to import."""
    import open_clip

    vocabulary = folder / "hpsv2" / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not vocabulary.exists():
        shutil.copy(Path(open_clip.__file__).parent / vocabulary.name, vocabulary)
    sys.path.insert(0, str(folder))
    for name, attribute in (("turtle", "forward"), ("clint", "textui"), ("clint.textui", "progress")):
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        sys.modules[name] = module
    import hpsv2.img_score as package

    return package


def against_the_package(folder: Path, items: list[Item], work: Path) -> dict[str, float]:
    """Seconds a picture of `hpsv2.score`, called once a picture as its users do, and of ours; and the largest difference."""
    package = published_package(folder)
    from hpsv2.src.open_clip import factory, model

    config = {"embed_dim": 64, "vision_cfg": {"image_size": 224, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}}  # fmt: skip
    torch.manual_seed(0)
    vision, text = model.CLIPVisionCfg(**config["vision_cfg"]), model.CLIPTextCfg(**config["text_cfg"])
    network = model.CLIP(config["embed_dim"], vision, text, output_dict=True)
    checkpoint = work / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": network.state_dict()}, checkpoint)
    (work / "tiny-bench.json").write_text(json.dumps(config))
    import open_clip

    open_clip.add_model_config(work / "tiny-bench.json")
    package.model_dict.update(
        model=network,
        preprocess_val=factory.image_transform(224, is_train=False, resize_longest_max=True),
    )
    paths = [str(getattr(item.origin, "path", "")) for item in items]
    started = time.perf_counter()
    theirs = [float(package.score(path, "a picture", cp=str(checkpoint))[0]) for path in paths]
    loop = (time.perf_counter() - started) / len(paths)
    reward = load_reward("hpsv2", weights=checkpoint, architecture="tiny-bench")
    reward.measure([Image.open(paths[0])], ["a picture"])
    started = time.perf_counter()
    with Store(None) as store:
        scores = score_items(items, {"r": reward}, store, workers=os.cpu_count() or 1)
    ours = (time.perf_counter() - started) / len(paths)
    gap = max(abs(row["r"] - t) for row, t in zip(scores.rows, theirs, strict=True))
    return {"hpsv2.score, seconds a picture": loop, "ours": ours, "ratio": loop / ours, "largest difference": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--reward", default="sharpness")
    parser.add_argument("--hpsv2", type=Path)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    result: dict[str, object] = {"machine": platform.machine(), "cores": cores, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "pictures").mkdir()
        make_pictures(work / "pictures", arguments.images, arguments.side)
        items = collect([str(work / "pictures")], Prompting(one="a picture"))
        if arguments.hpsv2:
            result |= against_the_package(arguments.hpsv2, items, work)
        else:
            reward = load_reward(arguments.reward)
            decoding, model = parts(items, reward)
            wall, cpu, memory = whole(items, reward, work / "o.jsonl")
            expected = len(items) * (decoding + model) / cores
            tenth = max(1, len(memory) // 10)
            result |= {
                "reward": arguments.reward, "pictures": len(items), "side": arguments.side,
                "decoding, CPU ms a picture": 1000 * decoding, "model, CPU ms a picture": 1000 * model,
                "wall seconds": wall, "CPU-seconds": cpu, "wall / ((decoding + model) / cores)": wall / expected,
                "resident MB after a tenth": max(memory[: tenth + 1]), "resident MB at the end": max(memory[-tenth:]),
            }  # fmt: skip
    for name, value in result.items():
        print(f"{name:40} {value if isinstance(value, str) else f'{value:.4g}'}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scoring.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
