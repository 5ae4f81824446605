"""Do image-evaluator and evalscope give the same PickScore for the same weights, and how much longer do they compute?

python benchmarks/score_beside_others.py [--pictures 200] [--side 512] [--others FOLDER] [--tiny]

Each package runs in a process of its own, on one thread, on the same pictures, prompts and weights: a random CLIP of 12
layers in PickScore's layout. They take turns, ROUND pictures each, so that what else the machine does meets all of them; the
seconds are those of CPU, without start and loading. Every package is called as its documentation does: image-evaluator's
predictor and evalscope's metric once a picture, `diffalign.score` once a round. evalscope returns the cosine, so that its
scores are multiplied by the model's scale before they are compared. It names its weights on a hub; a stand-in for the
hub's loader gives it the same folder.

The packages are installed with pip in environments of their own below .venv/others, which see ours. evalscope asks for no
version of transformers in particular; it is tried with ours first, then with transformers 4. Writes
results/score-beside-others.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

from diffalign.terminal import plain_table, show_table
from shared.scoring_inputs import jpeg_pictures, random_clip

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "score-beside-others.json"
ROUND, WARM_UP = 50, 4
PROMPTS = ("a red circle on a table", "two dogs that run through deep snow", "a city at night, seen from a hill")
INSTALLED = {
    "image-evaluator": ("--no-deps", "image-evaluator==0.7.0"),
    "evalscope": ("evalscope==1.14.1", "transformers<5"),
}
"""What pip installs for each. image-evaluator's PickScore needs nothing that ours does not have."""

WORKER = """
import json, os, sys, time
from importlib.metadata import version
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the packages print must not mix with the answers
import torch
torch.set_num_threads(1)
weights = sys.argv[1]
PROGRAM
for line in sys.stdin:
    files, prompts = json.loads(line)
    started = time.process_time()
    scores = score(files, prompts)
    seconds = time.process_time() - started
    versions = {name: version(name) for name in (PACKAGE, "transformers")}
    answer = {"scores": [float(one) for one in scores], "seconds": seconds, "versions": versions}
    print(json.dumps(answer), file=answers, flush=True)
"""
OURS = """
PACKAGE = "diffalign"
import diffalign
reward = diffalign.load_reward("pickscore", weights=weights, device="cpu")
def score(files, prompts):
    return diffalign.score(files, prompts, rewards=reward, workers=1, device="cpu")["pickscore"]
"""
IMAGE_EVALUATOR = """
PACKAGE = "image-evaluator"
from image_evaluator import PickScorePredictor
predictor = PickScorePredictor(device="cpu", model_name=weights, processor_name=weights)
def score(files, prompts):
    return [predictor.evaluate(file, prompt) for file, prompt in zip(files, prompts)]
"""
EVALSCOPE = """
PACKAGE = "evalscope"
import modelscope, transformers
class FromOurFolder:
    def __init__(self, kind): self.kind = kind
    def from_pretrained(self, name): return self.kind.from_pretrained(weights)
modelscope.AutoModel = FromOurFolder(transformers.AutoModel)
modelscope.AutoProcessor = FromOurFolder(transformers.AutoProcessor)
from evalscope.metrics.vision.metrics import PickScore
metric = PickScore(device="cpu")
scale = float(transformers.CLIPModel.from_pretrained(weights).logit_scale.detach().exp())
def score(files, prompts):
    return [scale * float(metric(file, prompt)[0]) for file, prompt in zip(files, prompts)]
"""


class Worker:
    """A process that scores with one package. Its last line of errors is `failed` once it has ended."""

    def __init__(self, python: Path, program: str, weights: Path, log: Path, *, ours_first: bool) -> None:
        ours = sysconfig.get_path("purelib")
        path = os.pathsep.join([str(ROOT), *([ours] if ours_first else [])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.failed, self._log = "", log
        self._process = subprocess.Popen(
            [str(python), "-c", WORKER.replace("PROGRAM", program), str(weights)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment,
        )  # fmt: skip

    def score(self, files: list[str], prompts: list[str]) -> dict[str, Any] | None:
        """Return scores, CPU seconds and versions; None if the process has failed."""
        assert self._process.stdin and self._process.stdout
        if self.failed:
            return None
        try:
            print(json.dumps([files, prompts]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self.failed = self._log.read_text().strip().splitlines()[-1]
            return None
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        self._process.communicate()


def environment(name: str, others: Path) -> Path:
    """Return the Python of a package's environment, which is made at the first call and sees what ours has installed."""
    folder = others / name
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "zz-ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *INSTALLED[name]], check=True)
        (folder / "installed").touch()
    return python


def compare(folder: Path, others: Path, count: int, side: int, **sizes: int) -> dict[str, Any]:
    """Return a row for each package: versions, CPU seconds a picture, and how its scores and seconds compare with ours."""
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    jpeg_pictures(folder / "pictures", count, side)
    weights = random_clip(folder / "clip", **sizes)
    CLIPProcessor(CLIPImageProcessor(), CLIPTokenizer.from_pretrained(weights)).save_pretrained(weights)
    files = [str(path) for path in sorted((folder / "pictures").iterdir())]
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(count)]
    image_evaluator, evalscope = environment("image-evaluator", others), environment("evalscope", others)
    programs = {
        "diffalign": (Path(sys.executable), OURS, False),
        "image-evaluator": (image_evaluator, IMAGE_EVALUATOR, False),
        "evalscope, transformers 5": (evalscope, EVALSCOPE, True),
        "evalscope, transformers 4": (evalscope, EVALSCOPE, False),
    }
    workers = {
        name: Worker(python, program, weights, folder / f"{name}.log", ours_first=ours_first)
        for name, (python, program, ours_first) in programs.items()
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    try:
        for worker in workers.values():
            worker.score(files[:WARM_UP], prompts[:WARM_UP])
        for start in range(0, count, ROUND):
            for name, worker in workers.items():
                found = worker.score(files[start : start + ROUND], prompts[start : start + ROUND])
                rounds[name] += [] if found is None else [found]
    finally:
        for worker in workers.values():
            worker.end()
    return {name: row(found, rounds["diffalign"], workers[name].failed) for name, found in rounds.items()}


def row(found: list[dict[str, Any]], ours: list[dict[str, Any]], failed: str) -> dict[str, Any]:
    if failed:
        return {"failed": failed}
    theirs, mine = ([score for one in rounds for score in one["scores"]] for rounds in (found, ours))
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, found, strict=True)]
    return {
        "versions": found[0]["versions"],
        "cpu ms a picture": round(1000 * sum(one["seconds"] for one in found) / len(theirs), 2),
        "times our seconds": round(statistics.median(ratios), 3),
        "times our seconds, each round": [round(ratio, 3) for ratio in ratios],
        "largest difference": max(abs(a - b) for a, b in zip(mine, theirs, strict=True)),
        "range of our scores": [min(mine), max(mine)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--others", type=Path, default=Path(sys.prefix) / "others", help="folder of the environments")
    parser.add_argument("--tiny", action="store_true", help="see that everything runs; write nothing")
    given = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        if given.tiny:
            rows = compare(Path(folder), given.others, 8, 64, layers=2, width=64)
        else:
            rows = compare(Path(folder), given.others, given.pictures, given.side)
    table = plain_table("", "CPU ms a picture", "times ours", "largest difference")
    for name, one in rows.items():
        values = ("cpu ms a picture", "times our seconds", "largest difference")
        if "failed" not in one:
            table.add_row(name, *(f"{one[key]:.3g}" for key in values))
    show_table(table)
    print("\n".join(f"{name} fails: {one['failed']}" for name, one in rows.items() if "failed" in one))
    if not given.tiny:
        run = {"pictures": given.pictures, "side": given.side, "machine": platform.machine(), "load before": load}
        RESULT.write_text(json.dumps({**run, "packages": rows}, indent=1) + "\n")
        print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
