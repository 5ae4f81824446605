"""How fast is training beside the hardware's limit, and how much memory does it take?

python benchmarks/training_throughput.py [--steps 10] [--only TEXT] [--small] [--seconds 540] [--resume]

Makes the tables of docs/speed.md: objective x model x LoRA or full x resolution x batch, and the memory ladder: steps, images
and model-FLOPs a second, the fraction of the matrix product's speed measured on the same device in the same run, peak memory
by phase beside what `--dry-run` predicts. On CUDA the full-size SDXL, SD3.5-Medium and FLUX.1-dev from their configs,
randomly initialised; on a CPU, or with --small, reduced ones. The real training loop runs, on random latents. Model-FLOPs are
those of forwards, backward and inversion, without what gradient checkpointing computes twice. Rows come in the order of what
they decide, and each is written when it is done.

Writes the part `grid` of results/speed-DEVICE.json and .md. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import DiffalignError
from shared.speed_results import RESULTS, keep, results_path
from shared.timed_training import Cell, matmul_ceiling, measured, model_flops

SAVING: dict[str, Any] = {"model.gradient_checkpointing": True}
LADDER: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"model.compile": True},
    "gradient checkpointing": SAVING,
    "attention kept": {"model.gradient_checkpointing": "attention"},
    "compiled, channels last": {"model.compile": True, "model.channels_last": True},
    "cuDNN's attention": {"model.attention": "cudnn"},
    "channels last": {"model.channels_last": True},
    "and int8 base": SAVING | {"model.quantize": "int8"},
    "and nf4 base": SAVING | {"model.quantize": "nf4"},
}
FULL_LADDER: dict[str, dict[str, Any]] = {
    "gradient checkpointing": SAVING,
    "and 8-bit optimiser": SAVING | {"optimizer.name": "adamw8bit"},
    "and optimiser offload": SAVING | {"optimizer.offload": True},
}


ONLY_CUDA = {
    "model.compile": True, "model.quantize": "nf4", "optimizer.name": "adamw8bit", "model.attention": "cudnn",
}  # fmt: skip
"""Compiling takes a CPU minutes, and the others have kernels for GPUs alone."""
HIDES_FLOPS = (("model.compile", True), ("model.quantize", "nf4"))


def cells(small: bool, cuda: bool) -> list[Cell]:
    """Return the grid, in the order of what its rows decide: a run that is cut off has settled the most important."""
    prefix, side = ("small-", 256) if small else ("", 1024)
    saving: dict[str, Any] = {} if small else SAVING
    sdxl, sd35, flux = (prefix + name for name in ("sdxl", "sd35", "flux"))
    found = [Cell(model, "dpo", "lora", side, 4, 2, settings) for settings in ({}, saving) for model in (sdxl, sd35)]
    found += [Cell(model, "dpo", "lora", side, 4, 2, {"model.compile": True}) for model in (sdxl, sd35)]
    found += [Cell(sd35, "dpo", "lora", side, 4, 2, {"model.attention": "cudnn"})]
    found += [Cell(sdxl, "dpo", "lora", side, 1, 2, settings) for settings in LADDER.values()]
    # On 80 GB the base fits in bfloat16; 4 bits are for smaller cards.
    found += [Cell(flux, "dpo", "lora", side, 1, 2, saving)]
    found += [Cell(flux, "dpo", "lora", side, 1, 2, saving | {"model.quantize": "nf4" if cuda else "int8"})]
    found += [Cell(model, "rankdpo", "lora", side, 2, 4, saving) for model in (sdxl, sd35)]
    full = (("dpo", 4, 2), ("rankdpo", 2, 4))
    found += [Cell(model, name, "full", side, n, k, saving) for model in (sdxl, sd35) for name, n, k in full]
    inverted = {"noise": "inverted", "inversion.steps": 2, "inversion.by": "policy"}
    found += [Cell(sdxl, "smpo", "lora", side, 2, 2, saving | inverted)]
    found += [Cell(sdxl, "dpo", "lora", side // 2, 4, 2, saving)]
    found += [Cell(sdxl, "dpo", "full", side, 1, 2, settings) for settings in FULL_LADDER.values()]
    unique = {str(c): c for c in found if cuda or not (c.settings.items() & ONLY_CUDA.items())}
    return list(unique.values())


def counted_flops(cell: Cell, device: str, flops: dict[str, int]) -> dict[str, int]:
    """FLOPs of a step by phase: `flops`, or where these are not all, those of a step of one group without what hides them.

    The counter does not see into compiled blocks and 4-bit products, which compute what plain ones do. And it keeps tensors
    alive, for which a GPU that the step itself fits may be too small: the step ends early then, without its update. Empty
    where one group does not fit either.
    """
    hiding = {key for key, value in cell.settings.items() if (key, value) in HIDES_FLOPS}
    if not hiding and "update" in flops:
        return flops
    settings = {key: value for key, value in cell.settings.items() if key not in hiding}
    gc.collect()
    one = measured(replace(cell, settings=settings, groups=1), device, 0, 0)["flops"]
    return {phase: cell.groups * value for phase, value in one.items()} if "update" in one else {}


def row(cell: Cell, device: str, steps: int, warm: int, ceiling: float) -> dict[str, Any]:
    """One line of the table. A cell that does not fit, or lacks a package, says so and costs the run nothing else."""
    line: dict[str, Any] = {
        "model": cell.model, "objective": cell.objective, "tune": cell.tune, "side": cell.side, "groups": cell.groups,
        "images": cell.images, "settings": cell.settings,
    }  # fmt: skip
    try:
        found = measured(cell, device, steps, warm)
        flops = counted_flops(cell, device, found["flops"])
    except torch.OutOfMemoryError:
        return {**line, "failed": "out of memory"}
    except DiffalignError as error:
        return {**line, "failed": str(error)}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    seconds = statistics.median(found["seconds"])
    needed = model_flops(cell, flops) if flops else None
    predicted = {part: value / 2**30 for part, value in found["predicted"].items()}
    whole = predicted["peak"] if device == "cuda" else predicted["gradients"] + predicted["activations"]
    return {
        **line,
        "seconds": seconds,
        "steps_per_second": 1 / seconds,
        "images_per_second": cell.groups * cell.images / seconds,
        "teraflop": {phase: value / 1e12 for phase, value in flops.items() if value},
        "model_teraflops_per_second": needed / seconds / 1e12 if needed else None,
        "fraction_of_ceiling": needed / seconds / ceiling if needed else None,
        "peak_gib": {phase: value / 2**30 for phase, value in found["peaks"].items()},
        "predicted_peak_gib": whole,
        "predicted_gib": predicted,
    }


def measured_before(results: Path, wanted: list[Cell]) -> dict[str, dict[str, Any]]:
    """Return the rows of these cells that the results file has from this version of torch, by the cell's name."""
    path = results_path(results)
    known = json.loads(path.read_text()).get("grid", {}) if path.is_file() else {}
    if known.get("torch") != torch.__version__:
        return {}
    names = ("model", "objective", "tune", "side", "groups", "images", "settings")
    rows = {str(Cell(**{name: row[name] for name in names})): row for row in known["rows"] if "failed" not in row}
    return {str(cell): rows[str(cell)] for cell in wanted if str(cell) in rows}


def grid(
    device: str, small: bool, steps: int, only: str, results: Path, seconds: float = math.inf, resume: bool = False
) -> None:
    began = time.monotonic()
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    ceiling = matmul_ceiling(device, dtype, (4096, 8192, 16384) if cuda else (512, 1024, 2048))
    print(f"matrix product: {ceiling / 1e12:.3f} TFLOP/s in {str(dtype).removeprefix('torch.')}", flush=True)
    rows: list[dict[str, Any]] = []
    found = {"ceiling_teraflops": ceiling / 1e12, "dtype": str(dtype), "whole_memory": cuda, "rows": rows}
    wanted = [cell for cell in cells(small, cuda) if only in str(cell)]
    if not wanted:
        sys.exit(f"no cell's name holds {only!r}; one is called {cells(small, cuda)[0]}")
    before = measured_before(results, wanted) if resume else {}
    rows += before.values()  # first, so that a run that is cut off keeps them
    path = results_path(results)
    for cell in wanted:
        if str(cell) in before:
            continue
        if time.monotonic() - began > seconds:
            print(f"{cell}: no time left; the same command with --resume continues here", flush=True)
            continue
        line = row(cell, device, steps, 3 if cuda else 1, ceiling)
        rows.append(line)
        path = keep("grid", found, results)  # row by row: a grid that is cut off keeps what it has
        if "failed" in line:
            print(f"{cell}: {line['failed']}", flush=True)
            continue
        rate = line["model_teraflops_per_second"]
        arithmetic = (
            f"{rate:.3f} TFLOP/s, {line['fraction_of_ceiling']:.0%} of the ceiling" if rate else "FLOPs not counted"
        )
        print(
            f"{cell}: {line['seconds']:.3f} s, {line['images_per_second']:.2f} images/s, {arithmetic}, "
            f"peak {max(line['peak_gib'].values()):.2f} GiB (predicted {line['predicted_peak_gib']:.2f})",
            flush=True,
        )
    print(f"written: grid of {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="timed steps of a cell: 10 on CUDA, 2 on a CPU")
    parser.add_argument("--only", default="", help="only cells whose name holds this")
    parser.add_argument("--small", action="store_true", help="the reduced models also on CUDA")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after this time")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that the results file has, and measure the others"
    )
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = given.steps or (10 if device == "cuda" else 2)
    grid(device, given.small or device == "cpu", steps, given.only, given.results, given.seconds, given.resume)


if __name__ == "__main__":
    main()
