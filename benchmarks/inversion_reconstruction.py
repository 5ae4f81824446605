"""How well does inversion reconstruct an image, at an equal number of model calls?

python benchmarks/inversion_reconstruction.py [--base shapes-sdxl] [--images 32] [--calls 60]

Real scenes of the embedded world are inverted along the sampler's own times under their caption, without guidance, and
sampled back from the latent that was found. PSNR is that of the decoded pixels against the decoded latent, so the VAE's
own loss is left out. N steps with k ReNoise iterations each way cost N (k + 1) + N calls.
"""

import argparse
import json
import platform
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffalign.data.buckets import to_pixels
from diffalign.intervals import bootstrap
from diffalign.pipelines import Backbone, load_backbone
from diffalign.pipelines.inversion import renoise_step
from diffalign.testbed import model_path
from diffalign.testbed.scenes import render
from diffalign.testbed.shape_prompts import draw_prompts, scene_for

RESULTS = Path(__file__).parent / "results"


class Counted:
    """The backbone's prediction under fixed captions, with the number of calls."""

    def __init__(self, backbone: Backbone, captions: list[str]) -> None:
        self.backbone, self.conditioning, self.calls = backbone, backbone.encode_prompts(captions), 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.backbone.predict(x, t, self.conditioning)


@torch.no_grad()
def reconstruct(model: Counted, x0: Tensor, steps: int, iterations: int, average_from: int) -> Tensor:
    """Up along the sampler's times, and down again."""
    process, x = model.backbone.process, x0
    times = process.schedule(steps)
    up = times.flip(0)
    up[0] = process.noiseless
    for t, t_next in pairwise(up):
        now, then = t.repeat(len(x)), t_next.repeat(len(x))
        x = renoise_step(process, model, x, now, then, iterations=iterations, average_from=average_from)
    for t, t_next in pairwise(times):
        now, then = t.repeat(len(x)), t_next.repeat(len(x))
        x = process.step(x, model(x, now), now, then)
    return x


def psnr(found: Tensor, wanted: Tensor) -> np.ndarray:
    """[B] decibels, for pixels in [0, 1]."""
    error = (found - wanted).square().mean(dim=(1, 2, 3)).clamp_min(1e-12)
    return (-10 * error.log10()).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="shapes-sdxl")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--calls", type=int, default=60)
    given = parser.parse_args()
    options = {"max_sequence_length": 12} if given.base == "shapes-sd3" else {}
    backbone = load_backbone(model_path(given.base), **options)
    rows = draw_prompts("test", given.images)
    rng = np.random.default_rng(0)
    pixels = to_pixels([np.asarray(render(scene_for(row, rng))) for row in rows])
    x0 = backbone.encode_images(pixels)
    with torch.no_grad():
        wanted = backbone.decode_latents(x0)
    plain = None
    found = []
    print(f"{given.base}: {given.images} scenes, {given.calls} calls each, PSNR in dB\n")
    print("| steps | iterations | averaged | calls | PSNR | gain over DDIM inversion, 95 % | seconds |")
    print("|---|---|---|---|---|---|---|")
    for iterations in (0, 1, 2, 3, 4):
        for average_from in sorted({0, iterations}):
            steps = given.calls // (iterations + 2)
            model, started = Counted(backbone, [row["prompt"] for row in rows]), time.perf_counter()
            latents = reconstruct(model, x0, steps, iterations, average_from)
            seconds = time.perf_counter() - started
            with torch.no_grad():
                values = psnr(backbone.decode_latents(latents), wanted)
            plain = values if plain is None else plain
            gain = values - plain
            (interval,) = bootstrap(gain[:, None], seed=1, unit="images")
            kind = "one" if iterations == 0 else "all" if average_from == 0 else "last only"
            print(
                f"| {steps} | {iterations} | {kind} | {model.calls} | {values.mean():.2f} | {gain.mean():+.2f} "
                f"({interval.words('+.2f')}) | {seconds:.1f} |",
                flush=True,
            )
            found.append({
                "steps": steps, "iterations": iterations, "average_from": average_from, "calls": model.calls,
                "psnr": float(values.mean()), "gain": float(gain.mean()), "low": interval.low, "high": interval.high,
            })  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    document = {"base": given.base, "images": given.images, "machine": platform.machine(), "rows": found}
    (RESULTS / f"inversion-{given.base}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
