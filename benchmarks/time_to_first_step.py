"""How long does it take until `diffalign --help` prints, and until `diffalign train` makes its first step?

python benchmarks/time_to_first_step.py [--repeat 5]

Aims: 0.5 s and 12 s, imports included. Writes the part `start` of results/speed-cpu.json and .md. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from shared.speed_results import RESULTS, keep

DIFFALIGN = [sys.executable, "-m", "diffalign"]


def help_seconds(repeat: int) -> float:
    found = []
    for _ in range(repeat):
        started = time.perf_counter()
        subprocess.run([*DIFFALIGN, "--help"], check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def pairs(folder: Path, count: int = 8) -> Path:
    """A dataset of random pictures at the embedded world's size."""
    rng = np.random.default_rng(0)
    for side in ("win", "lose"):
        (folder / side).mkdir()
        for n in range(count):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / side / f"{n}.png")
            (folder / side / f"{n}.txt").write_text("a red circle")
    made = [*DIFFALIGN, "pairs", str(folder / "win"), str(folder / "lose"), "--out", str(folder / "data")]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    return folder / "data"


def first_step() -> tuple[float, float]:
    """Seconds from starting the program to its line about step 1, with nothing cached: imports, model, encoding, one step; and
    the processor's seconds within them, of all cores together."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [f"data.path={pairs(folder)}", f"run_dir={folder / 'run'}", "device=cpu", "train.steps=400"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        with subprocess.Popen(
            [*DIFFALIGN, "train", "shapes_sd3_dpo", *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as program:  # fmt: skip
            assert program.stdout is not None and program.stderr is not None
            for line in program.stdout:
                if line.startswith("step 1/"):
                    seconds = time.perf_counter() - started
                    program.kill()
                    program.wait()
                    after = resource.getrusage(resource.RUSAGE_CHILDREN)
                    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            raise SystemExit(f"diffalign train ended before its first step: {program.stderr.read()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into")
    given = parser.parse_args()
    steps = [first_step() for _ in range(given.repeat)]
    found = {
        "diffalign --help": help_seconds(given.repeat),
        "train, first step": statistics.median(seconds for seconds, _ in steps),
        "train, first step, of the processor": statistics.median(processor for _, processor in steps),
    }
    for name, value in found.items():
        print(f"{name:36} {value:.2f} s")
    print(f"written: start of {keep('start', {'repeat': given.repeat, 'seconds': found}, given.results)}")


if __name__ == "__main__":
    main()
