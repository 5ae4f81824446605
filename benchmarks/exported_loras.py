"""Do exported LoRAs change weights in other programs by what was trained, for every family, file and program?

python benchmarks/exported_loras.py

Random adapters of rank 4 and alpha 6 on trunks with the blocks of the published models, but narrow. ComfyUI, sd-scripts and
A1111 are the readers of tests/helpers/lora_readers.py, which cites their sources; diffusers is the installed one. A number is
the largest difference of a weight's change from alpha / rank B A, over the largest change. Writes
results/exported_loras.json.
"""

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from diffalign.pipelines.loading import BACKBONES
from helpers.lora_readers import PROGRAMS, Model, largest_difference
from helpers.trunks import PIPELINES, TRUNKS, exported

RESULTS = Path(__file__).parent / "results"


def through_diffusers(name: str, file: Path, model: Model) -> dict[str, Tensor]:
    """Load the file as `load_lora_weights` does and return the change of each weight."""
    from peft.tuners.lora import LoraLayer

    trunk: Any = TRUNKS[name]()  # five classes of diffusers, each with loaders of its own
    pipeline: Any = BACKBONES[PIPELINES[name]].pipeline_class()
    where = {"weight_name": file.name, "return_lora_metadata": True}
    if name in ("sd15", "sdxl"):
        state, alphas, metadata = pipeline.lora_state_dict(str(file.parent), unet_config=trunk.config, **where)
        pipeline.load_lora_into_unet(state, alphas, trunk, metadata=metadata)
    else:
        state, metadata = pipeline.lora_state_dict(str(file.parent), **where)
        alphas = {"network_alphas": None} if name == "flux" else {}
        pipeline.load_lora_into_transformer(state, transformer=trunk, metadata=metadata, **alphas)
    layers = {n: m for n, m in trunk.named_modules() if isinstance(m, LoraLayer)}
    return model.true_changes({
        n: (m.lora_A["default_0"].weight, m.lora_B["default_0"].weight, m.scaling["default_0"]) for n, m in layers.items()
    })  # fmt: skip


def measure(name: str) -> dict[str, dict[str, str]]:
    """Return file -> program -> the difference, or that the file is not read."""
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model, true, files = exported(name, Path(folder), alpha=6.0)
        for form in ("diffusers", "kohya"):
            row = found[f"{name}, {files[form].name}"] = {}
            try:
                changes = through_diffusers(name, files[form], model)
                row["diffusers"] = f"{largest_difference(changes, true):.0e}" if changes else "not read"
            except (ValueError, KeyError, AssertionError, RuntimeError) as error:
                row["diffusers"] = f"not read ({type(error).__name__})"
            for program, read in PROGRAMS.items():
                reading = read(files[form], model)
                whole = f"{largest_difference(reading.changes, true):.0e}" if not reading.unread else "in part"
                row[program] = whole if reading.changes else "not read"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"diffusers": version("diffusers"), "rank": 4, "alpha": 6.0}
    for name in TRUNKS:
        result |= measure(name)
    print("| file | " + " | ".join(["diffusers", *PROGRAMS]) + " |")
    for name, row in result.items():
        if isinstance(row, dict):
            print(f"| {name} | " + " | ".join(row.values()) + " |")
    (RESULTS / "exported_loras.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
