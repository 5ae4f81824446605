"""What does a training step ask of a GPU and of its host, counted on a CPU?

python benchmarks/step_cost.py [--no-host]

Counts a LoRA step of four pairs at 1024 px of the full-size SDXL and SD3.5-Medium on tensors without contents: kernels, what
they move, casts, host reads, and what is kept for backward. Then measures the CPU time of a step of one pair through the same
networks at their full depth and next to no width, as a ratio to a fixed loop, and the time of a role switch.

Writes results/step-cost.json. A test holds the counts to its bounds (tests/benchmarks/test_step_cost.py).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from diffalign.pipelines.lean_lora import use_peft_forward
from shared.host_time import Step, cpu_seconds, fixed_loop, role_switch, tuned
from shared.speed_results import RESULTS
from shared.step_cost import step_cost

PAIRS = 4
WAYS = {"autocast": torch.bfloat16, "bfloat16 throughout": None}
"""Of a LoRA: as with `model.dtype: float32`, and as trained with bfloat16 weights. `peft` beside them, to compare."""


def counts() -> dict[str, dict[str, float]]:
    """Count the step of each model in each way."""
    found = {}
    for model in ("sdxl", "sd35"):
        for way, autocast in WAYS.items():
            cost = step_cost(model, PAIRS, autocast)
            found[f"{model}, {way}"] = {**cost.figures(), **cost.by_phase}
            print(f"{model}, {way}: {found[f'{model}, {way}']}", flush=True)
    return found


def host() -> dict[str, dict[str, float]]:
    """Measure the step of each model in each way, all in this run."""
    loop = fixed_loop()
    found: dict[str, dict[str, float]] = {}
    for model in ("deep-sdxl", "deep-sd35"):
        for way, autocast in {"autocast, peft's layers": torch.bfloat16, **WAYS}.items():
            # A CPU's kernels for bfloat16 take longer than launching them, so without autocast the weights are float32.
            backbone = tuned(model, torch.float32 if autocast is None else torch.bfloat16)
            if "peft" in way:
                use_peft_forward(backbone.trunk)
            if autocast is None:
                backbone.compute_low()
            step = Step(model, backbone, autocast)
            step()
            seconds = cpu_seconds(step)
            row = {
                "step, loops": seconds / loop,
                "step, ms": 1e3 * seconds,
                "role switch, ms": 1e3 * role_switch(backbone),
            }
            found[f"{model}, {way}"] = {name: round(value, 3) for name, value in row.items()}
            print(f"{model}, {way}: {found[f'{model}, {way}']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-host", action="store_true", help="only the counts, which no other process disturbs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "step-cost.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    before = {name: row for name, row in document.get("counts", {}).items() if name.startswith("before")}
    document |= {"torch": torch.__version__, "pairs": PAIRS, "counts": before | counts()}
    if not given.no_host:
        document["host"] = host()
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
