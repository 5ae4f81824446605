"""All classes of hostile input, and the table of what was tried and what held.

`make hostile` runs the long form and prints the table: `python tests/hostile/classes.py [TRIALS [CLASS]]`.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hostile import folders, inputs
from hostile.trial import Trial

CLASSES: dict[str, tuple[Trial, int]] = {
    **{name: (trial, 20) for name, trial in inputs.CLASSES.items()},
    **{name: (trial, 1) for name, trial in folders.CLASSES.items()},
}
"""Class -> its trial, and how many of them stand for one unit of work: functions are quicker than verbs."""
SECONDS_OF_A_CLASS = 600.0


def failures(name: str, seeds: range) -> Iterator[tuple[int, str]]:
    """Yield (seed, what failed) of each trial of a class, "" where all held. A trial depends on its seed alone."""
    trial, _ = CLASSES[name]
    for seed in seeds:
        folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        try:
            yield seed, trial(random.Random(f"{name} {seed}"), folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main(units: int, only: str | None = None) -> int:
    """Run every class, print each failure and the table, and return how many failed."""
    print("| class | tried | held | failed |\n|---|---|---|---|")
    total = failed_of_all = 0
    for name, (_, per_unit) in CLASSES.items():
        if only is not None and only not in name:
            continue
        started, tried, failed = time.monotonic(), 0, 0
        for seed, fault in failures(name, range(units * per_unit)):
            tried += 1
            failed += bool(fault)
            if fault:
                print(f"{name}, seed {seed}: {fault!r}", file=sys.stderr, flush=True)
            if time.monotonic() - started > SECONDS_OF_A_CLASS:
                break
        print(f"| {name} | {tried} | {tried - failed} | {failed} |", flush=True)
        total, failed_of_all = total + tried, failed_of_all + failed
    print(f"| all | {total} | {total - failed_of_all} | {failed_of_all} |")
    return failed_of_all


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(min(1, main(int(sys.argv[1]) if len(sys.argv) > 1 else 50, sys.argv[2] if len(sys.argv) > 2 else None)))
