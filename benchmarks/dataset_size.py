"""Does a training step take longer, or a run more memory, with more groups or after many steps?

python benchmarks/dataset_size.py [--small 1000] [--large 20000] [--steps 500] [--whole 8]
python benchmarks/dataset_size.py --large 1000000 --steps 10000 --whole 20      # as it is published

Two datasets of pairs lie in files as the cache has them (sparse: what is read is zeros, the indices are whole). For each,
--steps steps choose their groups, read them and draw their noise, in turn for both; then --whole steps are trained, in turn.
Reported: medians and their ratios, the last tenth of the steps against the first, and the process's memory at both ends.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.config import load_config
from diffalign.data.embeddings import PromptStore, encoded, prompt_digest
from diffalign.data.latents import LatentStore
from diffalign.data.training_source import TrainingSource
from diffalign.objectives import DiffusionDPO
from diffalign.pipelines import load_backbone
from diffalign.testbed.models import BUILDERS, LATENTS, autoencoder
from diffalign.training.preference.draws import Draws, make_draws
from diffalign.training.preference.selection import Selection
from diffalign.training.preference.step import preference_step
from shared.timing import seconds

RESULTS = Path(__file__).parent / "results"
NAME, K, GROUPS = "shapes-sd3", 2, 4


def sparse_source(folder: Path, groups: int, backbone: Any) -> TrainingSource:
    """`groups` pairs whose latents and embeddings are holes in files, each with a prompt of its own."""
    side = LATENTS[NAME].side
    size = (side * backbone.vae_scale_factor,) * 2
    (folder / "latents").mkdir(parents=True)
    shape = (groups, K, backbone.latent_channels, side, side)
    np.lib.format.open_memmap(folder / "latents" / f"{size[0]}x{size[1]}.npy", mode="w+", dtype=np.float16, shape=shape)
    (folder / "latents/index.json").write_text(json.dumps({"sizes": [size] * groups, "spread": False}))
    prompts = [f"{n} red circles" for n in range(groups)]
    PromptStore.write(_made(folder / "few"), [], backbone, lambda _: None)
    told = json.loads((folder / "few/index.json").read_text())
    (folder / "prompts").mkdir()
    for name, values in encoded(backbone, "").items():
        told["arrays"][name]["shapes"] = [list(values.shape)] * (groups + 1)
        with (folder / "prompts" / f"{name}.bf16").open("wb") as file:
            file.truncate(2 * values.numel() * (groups + 1))
    told["prompts"] = [prompt_digest(prompt) for prompt in [*prompts, ""]]
    (folder / "prompts/index.json").write_text(json.dumps(told))
    return TrainingSource(
        LatentStore(folder / "latents"),
        PromptStore(folder / "prompts"),
        torch.tensor([[1.0, 0.0]]).repeat(groups, 1),
        torch.ones(groups, dtype=torch.bool),
        [f"{n:08d}" for n in range(groups)],
        prompts,
        buckets=[0] * groups,
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def own_memory() -> float:
    """GiB that this process holds of its own: without the pages of mapped files, which the system takes back when it needs
    them."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0]) / 2**20


class Run:
    """Steps on one of the datasets."""

    def __init__(self, folder: Path, groups: int, backbone: Any) -> None:
        self.backbone, self.source = backbone, sparse_source(folder, groups, backbone)
        given = (f"train.groups_per_step={GROUPS}", f"train.micro_batch={GROUPS}", "train.steps=100000")
        self.config = load_config("shapes_sd3_dpo", given)
        self.selection = Selection.of(self.config, self.source)
        self.optimizer = torch.optim.AdamW(backbone.trainable().values(), lr=1e-4)

    def read(self, step: int) -> tuple[Any, Draws]:
        indices, slots = self.selection.groups(step), list(range(GROUPS))
        batch = self.source.batch(indices)
        return batch, make_draws(self.config, self.backbone.process, step, slots, batch.group_ids, batch.latents.shape)

    def train(self, step: int) -> None:
        batch, draws = self.read(step)
        result = preference_step(
            self.config, DiffusionDPO(100.0), self.backbone, batch, draws, self.source.unconditional, None
        )
        result.output.loss.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--whole", type=int, default=8)
    given = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        BUILDERS[NAME](autoencoder(NAME)).save_pretrained(folder / NAME)
        backbone = load_backbone(folder / NAME, max_sequence_length=12)
        backbone.add_lora(rank=16, alpha=16.0)
        runs = [Run(folder / str(n), n, backbone) for n in (given.small, given.large)]
        for run in runs:
            run.train(0)
        tenth = max(1, given.steps // 10)
        reading, memory = [], []
        for step in range(given.steps):
            reading.append([seconds(lambda run=run, step=step: run.read(step)) for run in runs])
            if step + 1 in (tenth, given.steps):
                memory.append(own_memory())
        whole = [[seconds(lambda run=run, step=step: run.train(step)) for run in runs] for step in range(given.whole)]
    (few, many), (few_whole, many_whole) = (list(zip(*table, strict=True)) for table in (reading, whole))
    ends = [statistics.median(many[-tenth:]), statistics.median(many[:tenth])]
    found = {
        "groups": [given.small, given.large],
        "steps": given.steps,
        "reading seconds": [statistics.median(few), statistics.median(many)],
        "reading large / small": statistics.median(b / a for a, b in reading),
        "reading last tenth / first": ends[0] / ends[1],
        "step seconds": [statistics.median(few_whole), statistics.median(many_whole)],
        "step large / small": statistics.median(b / a for a, b in whole),
        "reading / step": statistics.median(many) / statistics.median(many_whole),
        "own GiB after a tenth and at the end": memory,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    for key, value in found.items():
        print(f"{key}: {value}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "dataset_size.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
