"""How fast is our training step beside a common script's and beside the bare arithmetic?

python benchmarks/step_against_common_script.py [--rounds 8] [--pairs 2]

On a reduced SDXL with SDXL's shares of FLOPs. In each round, one after the other:
common   Diffusion-DPO as scripts commonly write it (shared/common_dpo_script.py): VAE and text encoders in every step
bare     the reference's forward, the policy's, mean squared error, backward, update; everything else is at hand
step     a step of ours as a call (shared/step_call.py)
stored   the same with `reference.store`, filled by an earlier run: no forward of the reference
ours     a step of `diffalign.training.run.run` itself, from the beginning of one to the beginning of the next

All train a LoRA of rank 16 at the same places with the same optimiser on the same shapes, in float32. Aims: common / ours at
least 1.2, ours / bare at most 1.10, stored / step at most 0.80. FLOPs are counted as well: where a CPU runs the narrow
convolutions of the reduced VAE at another speed than the UNet, the two kinds of ratio differ. Writes the part `step` of
results/speed-cpu.json and .md. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffalign.training.optim import build_optimizer
from diffalign.training.preference.method import Preference
from diffalign.training.run import run
from shared import random_models
from shared.common_dpo_script import TEXT_SHARE, VAE_SHARE, CommonScript
from shared.speed_results import RESULTS, keep
from shared.step_call import stepping
from shared.step_phases import counted
from shared.timed_training import Cell, Enough, RandomGroups
from shared.timing import seconds

MODEL, SIDE = "small-sdxl", 256


class Turns:
    """Between two of our steps the others have theirs. Ours runs from the end of one call to the beginning of the next."""

    def __init__(self, others: dict[str, Callable[[int], object]], rounds: int) -> None:
        self.others, self.wanted = others, rounds
        self.rounds: list[dict[str, float]] = []
        self.left = 0.0

    def __call__(self) -> None:
        now = time.perf_counter()
        if self.left:
            self.rounds[-1]["ours"] = now - self.left
        number = len(self.rounds)
        if number == self.wanted:
            raise Enough
        self.rounds.append({name: seconds(lambda one=step: one(number)) for name, step in self.others.items()})
        self.left = time.perf_counter()


def bare_step(backbone: Any, optimizer: torch.optim.Optimizer, cell: Cell) -> Callable[[], None]:
    """Reference forward, policy forward, mean squared error, backward, update; everything else is at hand."""
    source = RandomGroups(cell)
    flat = source.latents[: cell.groups].flatten(0, 1)
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    times = backbone.process.draw_times(torch.full((len(flat),), 0.5, dtype=torch.float64))
    noisy, target = backbone.process.add_noise(flat, noise, times), backbone.process.target(flat, noise, times)
    repeated = {k: v[: cell.groups].repeat_interleave(cell.images, dim=0) for k, v in source.conditioning.items()}

    def step() -> None:
        with torch.no_grad(), backbone.role("reference"):
            backbone.predict(noisy, times, repeated)
        with backbone.role("policy"):
            (backbone.predict(noisy, times, repeated) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def shares(script: CommonScript, bare: Callable[[], None]) -> dict[str, float]:
    """FLOPs: what the encoders take, in forwards of the UNet for one image, and how much more the common script's step has."""
    unet, images = script.unet, script.pixels.shape[0] * script.pixels.shape[1]
    latents, embeds, pooled = script.encode()
    added = {"text_embeds": pooled[:1], "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        one = counted(lambda: unet(latents[:1], torch.zeros(1), embeds[:1], added_cond_kwargs=added))
        vae = counted(lambda: script.vae.encode(script.pixels.flatten(0, 1))) / images
    text = counted(script.encode) - vae * images
    return {
        f"VAE encoder, an image (SDXL: {VAE_SHARE:.3f})": vae / one,
        f"text encoders, a caption (SDXL: {TEXT_SHARE:.3f})": text / len(script.captions) / one,
        "common / bare": counted(script) / counted(bare),
    }


def compare(rounds: int, pairs: int) -> dict[str, Any]:
    """Median seconds, and medians of the ratios within a round, the first of which is not counted."""
    cell = Cell(MODEL, "dpo", "lora", SIDE, pairs, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = cell.config(folder / "run", 10**6, "cpu")
        ours = random_models.backbone(MODEL)
        theirs, plain, called = (copy.deepcopy(ours) for _ in range(3))
        optimizers = []
        for backbone in (theirs, plain, called):
            backbone.add_lora(config.tune.rank, config.tune.alpha, seed=config.seed)
            optimizers.append(build_optimizer(config.optimizer, backbone.trainable().values()))
        script = CommonScript(theirs.trunk, optimizers[0], config.objective.beta, SIDE, pairs)
        bare = bare_step(plain, optimizers[1], cell)
        flops = shares(script, bare)
        kept = config.model_copy(update={"reference": config.reference.model_copy(update={"store": folder / "kept"})})
        accelerator, source = Accelerator(cpu=True), RandomGroups(cell)

        def step_of(given: Any) -> Callable[[int], None]:
            return stepping(given, called, source, optimizers[2], accelerator, folder)

        filling = step_of(kept)
        for number in range(rounds + 1):
            filling(number)
        turns = Turns(
            {
                "common": lambda _: script(),
                "bare": lambda _: bare(),
                "step": step_of(config),
                "stored": step_of(kept),
                "encoding": lambda _: script.encode(),
            },
            rounds + 1,
        )
        with suppress(Enough):
            run(config, Preference(config, ours, RandomGroups(cell, turns), accelerator, print), say=lambda _: None)
    found = turns.rounds[1:]

    def ratio(above: str, below: str) -> float:
        return statistics.median(turn[above] / turn[below] for turn in found)

    return {
        "model": "SDXL, reduced", "side": SIDE, "pairs": pairs, "rounds": len(found),
        "seconds": {name: statistics.median(turn[name] for turn in found) for name in found[0]},
        "ratios": {
            "common / ours": ratio("common", "ours"), "ours / bare": ratio("ours", "bare"),
            "stored / step": ratio("stored", "step"), "step / bare": ratio("step", "bare"),
            "encoding / common": ratio("encoding", "common"),
        },
        "flops": flops,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into")
    given = parser.parse_args()
    found = compare(given.rounds, given.pairs)
    for name, value in (*found["seconds"].items(), *found["ratios"].items(), *found["flops"].items()):
        print(f"{name:48} {value:.3f}")
    print(f"written: step of {keep('step', found, given.results)}")


if __name__ == "__main__":
    main()
