"""How soon does `diffalign vote` show the first pair and the next one, and does its memory grow, with 10,000 images?

    python benchmarks/voting.py [--images 10000] [--each 4] [--votes 300]

For a dataset, a folder and two folders of images of 64 x 64 pixels: the command is started, and one client asks for pairs,
loads both images and votes, over loopback, as the page does. `first` is from the start of the process, `ready` from the
line that names the address; both until both images of the first pair are there. `next` is from sending a vote until the
images of the next pair are there, without the preload that the page does meanwhile. Each stands beside the CPU seconds that
the server computed for it: other work on the machine moves them less than the clock. Memory is what the process allocated
(RssAnon); mapped files are not part of it.

Writes results/voting.json with the default arguments.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "voting.json"
SIDE = 64


def picture(n: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def dataset(folder: Path, images: int, each: int) -> list[str]:
    from diffalign.data.prompts import PromptRow
    from diffalign.data.writer import ImageWriter, write_groups

    groups = images // each
    with ImageWriter(folder) as writer:
        for g in range(groups):
            for k in range(each):
                writer.write(f"g{g:06d}", k, picture(each * g + k), f"model {k % 2}", k, {})
    write_groups(folder, (
        {"group_id": f"g{g:06d}", "prompt_id": PromptRow(f"prompt {g}").prompt_id, "prompt": f"prompt {g}",
         "preference": [], "split": "train", "metadata": {}}
        for g in range(groups)
    ))  # fmt: skip
    return [str(folder)]


def one_folder(folder: Path, images: int, each: int) -> list[str]:
    for n in range(images):
        path = folder / f"model-{n % 2}" / f"{n:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(n).save(path)
        path.with_suffix(".txt").write_text(f"prompt {n // each}")
    return [str(folder)]


def two_folders(folder: Path, images: int, each: int) -> list[str]:
    for n in range(images):
        path = folder / "ab"[n % 2] / f"{n // 2:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(n).save(path)
        path.with_suffix(".txt").write_text(f"prompt {n // 2}")
    return [str(folder / "a"), str(folder / "b")]


def allocated(pid: int) -> float:
    """Return the memory that a process has allocated and uses, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) / 1024


def computed(pid: int) -> float:
    """Return the CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(sources: list[str], votes: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "diffalign", "vote", *sources, "--port", str(port), "--no-browser"]
    start = time.perf_counter()
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert any("open in a browser" in said for said in iter(process.stdout.readline, ""))
        ready = time.perf_counter()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            client.get("/").raise_for_status()
            question = client.get("/questions").json()["questions"][0]
            load(client, question)
            found = {"first": time.perf_counter() - start, "ready": time.perf_counter() - ready}
            found["first_cpu"] = computed(process.pid)
            waits, memory = [], {}
            for n in range(votes):
                before = time.perf_counter()
                body = {"question": question["id"], "answer": "left"}
                question = client.post("/vote", json=body).raise_for_status().json()["questions"][0]
                load(client, question)
                waits.append(time.perf_counter() - before)
                if (n + 1) in (votes // 10, votes // 2, votes):
                    memory[str(n + 1)] = round(allocated(process.pid), 1)
            found["next_cpu_ms"] = 1000 * (computed(process.pid) - found["first_cpu"]) / votes
    finally:
        process.terminate()
        process.wait()
    ordered = sorted(waits)
    return {
        **{name: round(value, 2) for name, value in found.items()},
        "next_median_ms": round(1000 * statistics.median(waits), 1),
        "next_99_percent_ms": round(1000 * ordered[int(0.99 * len(ordered))], 1),
        "next_last_tenth_ms": round(1000 * statistics.median(waits[-max(1, votes // 10) :]), 1),
        "memory_mib": memory,
    }


def load(client: httpx.Client, question: dict[str, Any]) -> None:
    for image in question["images"]:
        assert client.get(f"/{image}").raise_for_status().content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--each", type=int, default=4, help="images of a prompt")
    parser.add_argument("--votes", type=int, default=300)
    given = parser.parse_args()
    found: dict[str, Any] = {"images": given.images, "each": given.each, "votes": given.votes}
    for name, make in (("dataset", dataset), ("folder", one_folder), ("two folders", two_folders)):
        with tempfile.TemporaryDirectory() as folder:
            sources = make(Path(folder) / "data", given.images, given.each)
            found[name] = measure(sources, given.votes)
        print(name, json.dumps(found[name]))
    if vars(given) == {action.dest: action.default for action in parser._actions if action.dest != "help"}:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
