"""How many images a second does our generator draw beside a bare diffusers pipeline?

python benchmarks/sampling_speed.py [--images 64] [--batch 16] [--rounds 3]

On the two embedded base models. Both draw the same prompts with the same seeds, steps and guidance in the same batches, to
PIL images, in turn. Ours makes the starting noise itself and decodes in float32; the ratio says what its interface costs.
`synthetic_data.py generate` adds files. Writes the part `sampling` of results/speed-cpu.json and .md. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from diffalign import testbed
from diffalign.pipelines.generator import load_generator
from diffalign.testbed.shape_prompts import draw_prompts
from shared.speed_results import RESULTS, keep
from shared.timing import seconds

STEPS, GUIDANCE = 10, 4.0


def against_bare(model: str, images: int, batch: int, rounds: int) -> dict[str, Any]:
    """Median images a second of both, and the median of their ratio within a round."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = load_generator(testbed.model_path(model), device=device)
    pipeline = generator.pipeline
    own = {"max_sequence_length": 32} if model == "shapes-sd3" else {}
    texts = [row["prompt"] for row in draw_prompts("train", images)]
    batches = [
        (texts[first : first + batch], range(first, min(first + batch, images))) for first in range(0, images, batch)
    ]

    def bare() -> None:
        for some, seeds in batches:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            pipeline(some, generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE, **own)

    def ours() -> None:
        for some, seeds in batches:
            generator.draw(some, list(seeds), steps=STEPS, guidance_scale=GUIDANCE)

    bare()  # the first one is slower
    turns = [(seconds(bare), seconds(ours)) for _ in range(rounds)]
    return {
        "images_per_second": {
            "bare": images / statistics.median(plain for plain, _ in turns),
            "ours": images / statistics.median(own for _, own in turns),
        },
        "ours / bare": statistics.median(plain / own for plain, own in turns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write into")
    given = parser.parse_args()
    found = {}
    for model in testbed.MODELS:
        found[model] = against_bare(model, given.images, given.batch, given.rounds)
        print(model, found[model], flush=True)
    plan = {"images": given.images, "batch": given.batch, "rounds": given.rounds, "steps": STEPS}
    print(f"written: sampling of {keep('sampling', {**plan, 'models': found}, given.results)}")


if __name__ == "__main__":
    main()
