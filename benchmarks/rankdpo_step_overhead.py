"""What does a RankDPO step cost beyond its forwards, backward and update, and what does a stored reference save?

python benchmarks/rankdpo_step_overhead.py [--repeat 20] [--groups 4]

All run on the same groups of four images, in turn, so that a busy machine slows all. The step is the whole of what the
training loop does for one: choosing groups, draws, both forwards, loss, backward, clipping, update, and the row of metrics
(not writing it). The bare one has the noisy latents at hand and does: reference forward without gradient, policy forward,
mean squared error, backward, update. The stored one is the step whose reference errors lie in files (`reference.store`);
the one in passes takes a quarter of the images through the model at a time (`train.images_per_pass`). Aims: step / bare at
most 1.10, stored / step at most 0.80.
"""

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from diffalign.config import load_config
from diffalign.data.training_source import Batch
from diffalign.draws import draw, normal
from diffalign.pipelines import load_backbone
from diffalign.testbed.models import BUILDERS, LATENTS, autoencoder
from shared.step_call import stepping
from shared.timing import seconds

RESULTS = Path(__file__).parent / "results"
K = 4


class InMemory:
    """The groups of a batch, again and again."""

    def __init__(self, batch: Batch, unconditional: dict[str, torch.Tensor]) -> None:
        self.all, self.unconditional = batch, unconditional
        self.rewards, self.mask, self.group_ids = batch.rewards, batch.mask, batch.group_ids
        self.buckets = [0] * len(self.group_ids)

    def __len__(self) -> int:
        return len(self.group_ids)

    def content(self) -> str:
        return "random"

    def batch(self, indices: list[int]) -> Batch:
        conditioning = {name: values[indices] for name, values in self.all.conditioning.items()}
        names = [self.group_ids[i] for i in indices]
        return Batch(self.all.latents[indices], conditioning, self.rewards[indices], self.mask[indices], names, names)


def compare(name: str, groups: int, repeat: int, folder: Path) -> dict[str, float]:
    """Median seconds of all, and medians of their ratios in each turn."""
    torch.manual_seed(0)
    BUILDERS[name](autoencoder(name)).save_pretrained(folder / name)
    options = {"max_sequence_length": 12} if name == "shapes-sd3" else {}
    backbone = load_backbone(folder / name, **options)
    backbone.add_lora(rank=16, alpha=16.0)
    optimizer = torch.optim.AdamW(backbone.trainable().values(), lr=1e-4)
    prompts = [f"{n} red circles" for n in range(groups)]
    conditioning = backbone.encode_prompts(prompts)
    side = LATENTS[name].side
    latents = torch.from_numpy(normal(draw(0, "latents"), (groups, K, backbone.latent_channels, side, side)))
    labels = torch.tensor([[1.0, 2 / 3, 1 / 3, 0.0]] * groups)
    source = InMemory(
        Batch(latents, conditioning, labels, torch.ones(groups, dtype=torch.bool), prompts, prompts),
        backbone.encode_prompts([""]),
    )
    flat = latents.flatten(0, 1)
    times = backbone.process.draw_times(torch.full((groups * K,), 0.5, dtype=torch.float64))
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    noisy, target = backbone.process.add_noise(flat, noise, times), backbone.process.target(flat, noise, times)
    repeated = {key: value.repeat_interleave(K, dim=0) for key, value in conditioning.items()}

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def bare() -> None:
        with torch.no_grad(), backbone.role("reference"):
            backbone.predict(noisy, times, repeated)
        with backbone.role("policy"):
            update((backbone.predict(noisy, times, repeated) - target).square().mean())

    accelerator = Accelerator(cpu=True)

    def step_of(*more: str) -> Callable[[int], None]:
        """A step of the training loop, under a config with these overrides."""
        sizes = ("data.group_size=", f"train.groups_per_step={groups}", f"train.micro_batch={groups}", "device=cpu")
        config = load_config("shapes_sdxl_rankdpo", (*sizes, "objective.beta=50.0", *more))
        return stepping(config, backbone, source, optimizer, accelerator, folder)

    kept = f"reference.store={folder / name}-kept"
    filling, plain, passes = step_of(kept), step_of(), step_of(f"train.images_per_pass={max(1, groups * K // 4)}")
    bare(), plain(0), passes(0)
    for number in range(repeat):
        filling(number)
    stored = step_of(kept)
    turns = [
        (seconds(bare), *(seconds(lambda one=one, n=n: one(n)) for one in (plain, stored, passes)))
        for n in range(repeat)
    ]
    names = ("bare", "step", "stored", "passes")
    found = {name: statistics.median(turn[i] for turn in turns) for i, name in enumerate(names)}
    return found | {
        "step / bare": statistics.median(step / bare for bare, step, _, _ in turns),
        "stored / step": statistics.median(stored / step for _, step, stored, _ in turns),
        "passes / step": statistics.median(passes / step for _, step, _, passes in turns),
        "kept bytes a step": sum(path.stat().st_size for path in (folder / f"{name}-kept").glob("step-*")) / repeat,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--groups", type=int, default=4)
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in BUILDERS:
            found[name] = compare(name, given.groups, given.repeat, Path(folder))
            print(name, " ".join(f"{key} {value:.4f}" for key, value in found[name].items()), flush=True)
    RESULTS.mkdir(exist_ok=True)
    document = {
        "repeat": given.repeat, "groups": given.groups, "images": K, "machine": platform.machine(),
        "threads": torch.get_num_threads(), "seconds": found,
    }  # fmt: skip
    (RESULTS / "rankdpo-step-overhead.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
