"""How fast training is, beside the hardware's limit and beside the common script: the tables of docs/speed.md.

python benchmarks/throughput.py [grid] [--steps 10] [--only TEXT] [--small]
python benchmarks/throughput.py compare [--rounds 8] [--pairs 2]
python benchmarks/throughput.py start

grid     objective x model x LoRA or full x resolution x batch, and the memory ladder: steps, images and model-FLOPs a second,
         the fraction of the matrix product's speed measured on the same device in the same run, peak memory by phase beside
         what `--dry-run` predicts. On CUDA the full-size SDXL, SD3.5-Medium and FLUX.1-dev from their configs, randomly
         initialised; on a CPU, or with --small, reduced ones. The real training loop runs, on random latents.
compare  On a CPU, interleaved: our step, the common script's (common_script.py), and the bare forwards, backward and update.
start    Seconds of `diffalign --help`, and of `diffalign train` until its first step on the embedded world.

Writes results/throughput-DEVICE.json, each part under its own name. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from compare import compare
from start import start
from steps import Cell, matmul_ceiling, measured, model_flops

RESULTS = Path(__file__).parent / "results"
LADDER: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"model.gradient_checkpointing": True},
    "and int8 base": {"model.gradient_checkpointing": True, "model.quantize": "int8"},
    "and nf4 base": {"model.gradient_checkpointing": True, "model.quantize": "nf4"},
    "channels last": {"model.channels_last": True},
    "compiled": {"model.compile": True},
}
FULL_LADDER: dict[str, dict[str, Any]] = {
    "gradient checkpointing": {"model.gradient_checkpointing": True},
    "and 8-bit optimiser": {"model.gradient_checkpointing": True, "optimizer.name": "adamw8bit"},
    "and optimiser offload": {"model.gradient_checkpointing": True, "optimizer.offload": True},
}


def cells(small: bool) -> list[Cell]:
    """The grid."""
    prefix, side = ("small-", 256) if small else ("", 1024)
    saving = {} if small else {"model.gradient_checkpointing": True}
    sdxl, sd35, flux = (prefix + name for name in ("sdxl", "sd35", "flux"))
    found = [
        Cell(model, objective, tune, side, groups, images, saving)
        for model in (sdxl, sd35)
        for tune in ("lora", "full")
        for objective, groups, images in (("dpo", 4, 2), ("rankdpo", 2, 4))
    ]
    found += [Cell(sdxl, "smpo", "lora", side, 2, 2, {**saving, "noise": "inverted"})]
    found += [Cell(flux, "dpo", "lora", side, 1, 2, {**saving, "model.quantize": "int8" if small else "nf4"})]
    found += [Cell(sdxl, "dpo", "lora", side // 2, 4, 2, saving)]
    found += [Cell(sdxl, "dpo", "lora", side, 1, 2, settings) for settings in LADDER.values()]
    found += [Cell(sdxl, "dpo", "full", side, 1, 2, settings) for settings in FULL_LADDER.values()]
    # On CPUs compiling takes minutes, and 8-bit optimisers of bitsandbytes a kernel that not all builds have.
    return [c for c in found if not (small and "model.compile" in c.settings)]


def row(cell: Cell, device: str, steps: int, warm: int, ceiling: float) -> dict[str, Any]:
    """One line of the table. A cell that does not fit says so and costs the run nothing else."""
    line: dict[str, Any] = {
        "model": cell.model, "objective": cell.objective, "tune": cell.tune, "side": cell.side, "groups": cell.groups,
        "images": cell.images, "settings": cell.settings,
    }  # fmt: skip
    try:
        found = measured(cell, device, steps, warm)
    except torch.OutOfMemoryError:
        return {**line, "failed": "out of memory"}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    seconds = statistics.median(found["seconds"])
    needed = model_flops(found["flops"], cell.settings.get("model.gradient_checkpointing", False))
    return {
        **line,
        "seconds": seconds,
        "steps_per_second": 1 / seconds,
        "images_per_second": cell.groups * cell.images / seconds,
        "teraflop": {phase: value / 1e12 for phase, value in found["flops"].items() if value},
        "model_teraflops_per_second": needed / seconds / 1e12,
        "fraction_of_ceiling": needed / seconds / ceiling,
        "peak_gib": {phase: value / 2**30 for phase, value in found["peaks"].items()},
        "predicted_gib": {part: value / 2**30 for part, value in found["predicted"].items()},
    }


def grid(device: str, small: bool, steps: int, only: str) -> dict[str, Any]:
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    ceiling = matmul_ceiling(device, dtype, (4096, 8192, 16384) if cuda else (512, 1024, 2048))
    print(f"matrix product: {ceiling / 1e12:.3f} TFLOP/s in {str(dtype).removeprefix('torch.')}", flush=True)
    rows = []
    for cell in cells(small):
        if only not in str(cell):
            continue
        line = row(cell, device, steps, 3 if cuda else 1, ceiling)
        rows.append(line)
        if "failed" in line:
            print(f"{cell}: {line['failed']}", flush=True)
            continue
        peak = max(line["peak_gib"].values())
        print(
            f"{cell}: {line['seconds']:.3f} s, {line['images_per_second']:.2f} images/s, "
            f"{line['model_teraflops_per_second']:.3f} TFLOP/s, {line['fraction_of_ceiling']:.0%} of the ceiling, "
            f"peak {peak:.2f} GiB (predicted {line['predicted_gib']['peak']:.2f})",
            flush=True,
        )
    return {"ceiling_teraflops": ceiling / 1e12, "dtype": str(dtype), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("grid", "compare", "start"), default="grid")
    parser.add_argument("--steps", type=int, default=None, help="timed steps of a cell: 10 on CUDA, 2 on a CPU")
    parser.add_argument("--only", default="", help="only cells whose name holds this")
    parser.add_argument("--small", action="store_true", help="the reduced models also on CUDA")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=2)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = given.steps or (10 if device == "cuda" else 2)
    if given.part == "grid":
        found = grid(device, given.small or device == "cpu", steps, given.only)
    else:
        found = compare(given.rounds, given.pairs) if given.part == "compare" else start()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    path = RESULTS / f"throughput-{name.lower().replace(' ', '-')}.json"
    RESULTS.mkdir(exist_ok=True)
    document = json.loads(path.read_text()) if path.is_file() else {}
    facts = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    document[given.part] = {**facts, **found}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
