"""How long does `diffalign --help` take, and how many forward passes does a Diffusion-DPO step cost?

python benchmarks/help_and_dpo_step.py [--repeat 20]

Times of one machine mean little elsewhere; the ratios do. Writes results/help-and-dpo-step.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffalign.config import load_config
from diffalign.data.training_source import Batch
from diffalign.draws import draw, normal
from diffalign.objectives import OBJECTIVES
from diffalign.pipelines import load_backbone
from diffalign.testbed.models import BUILDERS, LATENTS, autoencoder
from diffalign.training.preference.draws import make_draws
from diffalign.training.preference.step import preference_step

RESULTS = Path(__file__).parent / "results"


def median(what: Callable[[], object], repeat: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    what()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        what()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def command_line(repeat: int) -> dict[str, float]:
    """`--help` against starting Python at all, and against importing torch, which it must not do."""

    def python(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    def diffalign_help() -> object:
        return subprocess.run([sys.executable, "-m", "diffalign", "--help"], check=True, stdout=subprocess.DEVNULL)

    return {
        "python": median(python("pass"), repeat),
        "diffalign --help": median(diffalign_help, repeat),
        "import torch": median(python("import torch"), repeat),
    }


def preference_steps(name: str, repeat: int, folder: Path) -> dict[str, float]:
    """A whole Diffusion-DPO step of 8 pairs (draws, reference, policy, backward) in forward passes of the same 16 images."""
    torch.manual_seed(0)
    BUILDERS[name](autoencoder(name)).save_pretrained(folder / name)
    options = {"max_sequence_length": 12} if name == "shapes-sd3" else {}
    backbone = load_backbone(folder / name, **options)
    backbone.add_lora(rank=16, alpha=16.0)
    prompts = [f"{n} red circles" for n in range(8)]
    conditioning = backbone.encode_prompts(prompts)
    side = LATENTS[name].side
    latents = torch.from_numpy(normal(draw(0, "latents"), (8, 2, backbone.latent_channels, side, side)))
    batch = Batch(latents, conditioning, torch.tensor([[1.0, 0.0]] * 8), torch.ones(8, dtype=bool), prompts, prompts)
    config = load_config("shapes_sd3_dpo", ())
    objective = OBJECTIVES["dpo"](beta=100.0)
    times = backbone.process.draw_times(torch.full((16,), 0.5, dtype=torch.float64))
    twice = {key: value.repeat_interleave(2, dim=0) for key, value in conditioning.items()}

    def forward() -> None:
        with torch.no_grad():
            backbone.predict(latents.flatten(0, 1), times, twice)

    def step() -> None:
        draws = make_draws(config, backbone.process, 0, list(range(8)), prompts, latents.shape)
        arguments = (batch, draws, conditioning, backbone.trunk)
        preference_step(config, objective, backbone, *arguments).output.loss.mean().backward()

    one, whole = median(forward, repeat), median(step, repeat)
    return {f"{name}: forward": one, f"{name}: step": whole, f"{name}: step / forward": whole / one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as folder:
        times = command_line(repeat)
        for name in BUILDERS:
            times |= preference_steps(name, repeat, Path(folder))
    for name, value in times.items():
        print(f"{name:32} {value:.3f}")
    RESULTS.mkdir(exist_ok=True)
    facts = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    (RESULTS / "help-and-dpo-step.json").write_text(json.dumps({**facts, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
