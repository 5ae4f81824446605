"""Does `diffalign serve` lose a request, and how fast is it beside direct calls of the same reward?

python benchmarks/serve.py [--requests 10000] [--clients 16] [--rounds 12] [--seconds 15] [--part all] [--tiny]

1. Nothing is lost. 16 clients in a process of their own send 10,000 requests of one image each, for two rewards, to a server
   that runs as a process. After a third of them the server is killed (SIGKILL), after two thirds it is ended (SIGTERM), and
   each time it is started again on the same port. In between, other clients send hostile bodies. Every request must get one
   answer, and every answer must be the number that the reward itself gives.
2. Throughput. Rounds of two kinds take turns, so that what else the machine does meets both: direct calls (threads decode and
   prepare ahead, one thread runs batches of 32, as the server does), and the 16 clients. The reward is a random CLIP of
   ViT-S/32's sizes on PNG files of 512 px, with one thread for the model. The target is a ratio of 0.9, of the median round.

Writes results/serve.json.
"""

import argparse
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from diffalign.files.images import decode
from diffalign.rewards import Reward, load_reward
from diffalign.terminal import plain_table, show_table
from shared.scoring_inputs import random_clip

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "serve.json"
TARGET = 0.9
BATCH, THREADS = 32, 2
HOSTILE = (
    b"",
    b"{",
    b"[" * 50_000,
    b"\x80\x04pickle",
    b'{"images": ["!!"]}',
    b'{"images": [' + b'"aaaa",' * 5000 + b'"a"]}',
)
PATIENCE = 600.0


def pictures(folder: Path, number: int, side: int) -> list[Path]:
    """Write pictures of smooth noise as PNG files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for n in range(number):
        small = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        paths.append(folder / f"{n}.png")
        small.resize((side, side), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@contextmanager
def server(port: int, *rewards: str) -> Iterator[subprocess.Popen[str]]:
    """Run `diffalign serve` with one thread for the model; kill it at the end if it still runs."""
    named = [part for reward in rewards for part in ("-r", reward)]
    line = [sys.executable, "-m", "diffalign", "serve", *named, "--port", str(port), "--workers", str(THREADS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ready(port: int) -> None:
    """Wait until a server answers."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


@dataclass
class Tally:
    """What clients found. answered: by request number how often; wrong: answers that are not the reward's number."""

    answered: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    hostile: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


# --- 1. Nothing is lost


def send_all(port: int, requests: int, clients: int, paths: list[Path]) -> Tally:
    """Send the requests from threads of this process; each is one image for one of two rewards."""
    tally, numbers = Tally(), count()
    images = [decode(path.read_bytes()) for path in paths]
    labels = ("sharpness", "jpeg_compressibility")
    expected = {label: load_reward(label).score(images, ["a"] * len(images)).tolist() for label in labels}
    stop = threading.Event()

    def client() -> None:
        remotes = {
            label: load_reward("remote", url=f"http://127.0.0.1:{port}/{label}", patience=PATIENCE) for label in labels
        }
        while (number := next(numbers)) < requests:
            label, n = labels[number % 2], number % len(images)
            score = remotes[label].score([images[n]], ["a"]).tolist()
            with tally.lock:
                tally.answered[number] += 1
                tally.wrong += score != [expected[label][n]]
                if tally.answered.total() % max(1, requests // 20) == 0:
                    print(f"answered {tally.answered.total()}", flush=True)

    def stranger() -> None:
        with httpx.Client(timeout=30) as strange:
            for body in cycle(HOSTILE):
                if stop.wait(0.05):
                    return
                try:
                    answer = strange.post(f"http://127.0.0.1:{port}/v1/score", content=body)
                except httpx.TransportError:
                    continue
                tally.hostile += 1
                if answer.status_code == 200 and "score" in answer.json()["results"][0]["sharpness"]:
                    tally.wrong += 1

    odd = threading.Thread(target=stranger)
    odd.start()
    with ThreadPoolExecutor(clients) as pool:
        for one in [pool.submit(client) for _ in range(clients)]:
            one.result()
    stop.set()
    odd.join()
    return tally


def nothing_lost(folder: Path, requests: int, clients: int) -> dict[str, Any]:
    """Kill and end the server while a process of clients sends its requests; return what became of them."""
    port, paths = free_port(), pictures(folder / "small", 64, 64)
    line = [sys.executable, __file__, "--as-clients", json.dumps([port, requests, clients, [str(p) for p in paths]])]
    started = time.monotonic()
    served = ("sharpness", "jpeg_compressibility")
    sender = None
    try:
        for number, how in ((0, signal.SIGKILL), (1, signal.SIGTERM), (2, None)):
            with server(port, *served) as process:
                if sender is None:
                    ready(port)
                    sender = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
                assert sender.stdout
                for shown in sender.stdout:
                    found = re.fullmatch(r"answered (\d+)\n", shown)
                    if found and how is not None and int(found[1]) >= (number + 1) * requests // 3:
                        process.send_signal(how)
                        process.wait()
                        print(f"{how.name} after {found[1]} answers; exit code {process.returncode}", flush=True)
                        break
                    if shown.startswith("{"):
                        return {**json.loads(shown), "seconds": round(time.monotonic() - started, 1)}
    finally:
        if sender is not None and sender.poll() is None:
            sender.kill()
    raise SystemExit("the clients ended without a result")


# --- 2. Throughput


def direct(reward: Reward, paths: list[Path], seconds: float) -> float:
    """Return images a second of direct calls: threads decode and prepare ahead, this thread runs full batches."""

    def ahead(path: Path) -> Any:
        return reward.prepare(decode(path.read_bytes()))

    done, endless, prompts = 0, cycle(paths), ["a picture"] * BATCH
    started = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: list[Future[Any]] = [pool.submit(ahead, next(endless)) for _ in range(2 * BATCH)]
        while time.monotonic() - started < seconds:
            batch = [one.result() for one in waiting[:BATCH]]
            waiting = waiting[BATCH:] + [pool.submit(ahead, next(endless)) for _ in range(BATCH)]
            reward.measure_prepared(batch, prompts)
            done += BATCH
        elapsed = time.monotonic() - started
        pool.shutdown(cancel_futures=True)
    return done / elapsed


def through_server(port: int, paths: list[Path], seconds: float, clients: int) -> float:
    """Return images a second that clients get, each with one request of one image at a time; the files are sent as they are."""
    files, done, lock = [path.read_bytes() for path in paths], 0, threading.Lock()
    connections = [httpx.Client(timeout=600, verify=False) for _ in range(clients)]
    started = time.monotonic()

    def client(number: int) -> None:
        nonlocal done
        with connections[number] as connection:
            for file in cycle(files[number:] + files[:number]):
                if time.monotonic() - started > seconds:
                    return
                answer = connection.post(
                    f"http://127.0.0.1:{port}/v1/score",
                    files=[("image", ("a.png", file, "image/png"))],
                    data={"prompt": "a picture"},
                )
                assert "score" in answer.json()["results"][0]["clip"], answer.text
                with lock:
                    done += 1

    with ThreadPoolExecutor(clients) as pool:
        for one in [pool.submit(client, n) for n in range(clients)]:
            one.result()
    return done / (time.monotonic() - started)


def as_a_process(kind: str, *values: Any) -> float:
    """Return what a round gives in a process of its own."""
    line = [sys.executable, __file__, f"--as-{kind}", json.dumps(values)]
    done = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return float(done.stdout.splitlines()[-1])


def throughput(folder: Path, rounds: int, seconds: float, clients: int, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Return images a second of both kinds, round by round, and the ratio of each pair of rounds."""
    layers, width, side = sizes
    clip, paths = random_clip(folder / "clip", layers, width), [str(p) for p in pictures(folder / "large", 128, side)]
    port = free_port()
    found: dict[str, list[float]] = {"direct": [], "served": []}
    load = os.getloadavg()[0]
    with server(port, f"clip=clipscore:convention=cosine,weights={clip}"):
        ready(port)
        for n in range(rounds + 1):
            one = {
                "direct": as_a_process("direct", str(clip), paths, seconds),
                "served": as_a_process("requests", port, paths, seconds, clients),
            }
            if n:  # the first round warms up
                for kind, value in one.items():
                    found[kind].append(value)
                print(f"round {n}: direct {one['direct']:.1f}, served {one['served']:.1f} images/s", flush=True)
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    total = {name: float(value) for name, value in re.findall(r'(diffalign_batch\w*)\{reward="clip"\} (\S+)', metrics)}
    ratios = [b / a for a, b in zip(found["direct"], found["served"], strict=True)]
    return {
        "network": f"CLIP, {layers} layers of {width}, {side} px",
        "images per second": {kind: round(statistics.median(values), 2) for kind, values in found.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "target": TARGET,
        "load of the machine before": round(load, 1),
        "images per batch": round(total["diffalign_batch_images_total"] / total["diffalign_batches_total"], 1),
    }


def worker(arguments: argparse.Namespace) -> bool:
    """Do the part of a process of its own, if this is one."""
    if arguments.as_clients:
        port, requests, clients, paths = json.loads(arguments.as_clients)
        tally = send_all(port, requests, clients, [Path(path) for path in paths])
        once = sum(times == 1 for times in tally.answered.values())
        print(json.dumps({"requests": requests, "answered once": once, "wrong": tally.wrong, "hostile": tally.hostile}))
    elif arguments.as_direct:
        clip, paths, seconds = json.loads(arguments.as_direct)
        torch.set_num_threads(1)
        reward = load_reward("clipscore", convention="cosine", weights=clip)
        direct(reward, [Path(path) for path in paths], 1.0)
        print(direct(reward, [Path(path) for path in paths], seconds))
    elif arguments.as_requests:
        port, paths, seconds, clients = json.loads(arguments.as_requests)
        print(through_server(port, [Path(path) for path in paths], seconds, clients))
    else:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=15.0, help="of one round")
    parser.add_argument(
        "--part", choices=("all", "lost", "speed"), default="all", help="do one of both; keep the other's result"
    )
    parser.add_argument("--tiny", action="store_true", help="see that everything runs; write nothing")
    for kind in ("clients", "direct", "requests"):
        parser.add_argument(f"--as-{kind}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if worker(arguments):
        return
    if arguments.tiny:
        arguments.requests, arguments.rounds, arguments.seconds = 300, 1, 2.0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.part != "speed":
            found["nothing lost"] = nothing_lost(Path(folder), arguments.requests, arguments.clients)
        if arguments.part != "lost":
            sizes = (2, 64, 128) if arguments.tiny else (12, 384, 512)
            found["throughput"] = throughput(
                Path(folder), arguments.rounds, arguments.seconds, arguments.clients, sizes
            )
    for name, values in found.items():
        table = plain_table(name, "")
        for key, value in values.items():
            table.add_row(key, str(value))
        show_table(table)
    if not arguments.tiny:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**before, "machine": machine, **found}, indent=2) + "\n")
    lost = found.get("nothing lost", {})
    if lost and (lost["answered once"] != arguments.requests or lost["wrong"]):
        sys.exit("requests were lost, answered twice or answered with a wrong number")


if __name__ == "__main__":
    main()
