"""The stages as functions of a checked config: names are resolved here, and nowhere else.

`shapes-sd3` becomes a folder, `testbed:test` becomes prompts, `detector: shapes` becomes a detector that is handed to the
reward, since rewards and pipelines know nothing of the embedded world.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffalign import testbed
from diffalign.config import resolved_yaml
from diffalign.config_schema import EvalConfig, ModelSection, RewardSection, SampleConfig, TrainConfig
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow, read_prompts
from diffalign.data.sample import sample_groups
from diffalign.data.source import choose_groups, prepare_source
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import Plan, table
from diffalign.evaluation.evaluate import evaluate as evaluate_models
from diffalign.objectives import OBJECTIVES, has_preference
from diffalign.pipelines import load_backbone
from diffalign.report.render import write_report
from diffalign.rewards import REWARDS, Reward, accepted, load_reward
from diffalign.testbed.detector import ShapeDetector
from diffalign.testbed.prompts import prompts as testbed_prompts
from diffalign.training.loop import start_accelerator
from diffalign.training.loop import train as train_backbone

Say = Callable[[str], None]
DETECTORS: dict[str, type] = {"shapes": ShapeDetector}
TESTBED_PROMPTS = 256


def say(message: str) -> None:
    print(message, flush=True)


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one; CUDA asked for and absent is a mistake."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DiffalignError("device=cuda: this machine has no usable CUDA device; use device=cpu or device=auto")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def open_backbone(model: ModelSection, device: str) -> Any:
    """The backbone that a config's `model` section names."""
    path = str(testbed.model_path(model.path)) if model.path in testbed.MODELS else model.path
    options = model.model_dump(exclude={"path", "dtype"})
    return load_backbone(path, dtype=getattr(torch, model.dtype), device=device, **options)


def resolve_prompts(source: str, n: int | None, seed: int = 0) -> list[PromptRow]:
    """A prompt file, or `testbed:SPLIT`."""
    kind, _, split = source.partition(":")
    if kind == "testbed":
        rows = testbed_prompts(split, n or TESTBED_PROMPTS, seed)
        return [PromptRow(row["prompt"], {k: v for k, v in row.items() if k != "prompt"}) for row in rows]
    return read_prompts(source)[:n]


def open_reward(section: RewardSection, device: str = "cpu") -> Reward:
    """The reward, with its detector built and handed over where it takes one."""
    options = dict(section.options)
    known = accepted(section.name) if section.name in REWARDS else set()
    if "device" in known:
        options.setdefault("device", device)
    if section.detector is not None and "detector" in known:
        if section.detector not in DETECTORS:
            raise DiffalignError(f"reward.detector {section.detector!r}: unknown; there are {', '.join(DETECTORS)}")
        options["detector"] = DETECTORS[section.detector]()
    return load_reward(section.name, **options)


class Ticker:
    """A plain line every few seconds: sampling has no loss to show."""

    def __init__(self, what: str, every: float = 15.0) -> None:
        self.what, self.every, self.started, self.last = what, every, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= self.every or done == total:
            self.last = now
            say(f"{self.what}: {done}/{total} images, {(now - self.started) / max(done, 1):.3f} s each")


def train(config: TrainConfig, dry_run: bool = False) -> None:
    """`diffalign train`."""
    device = resolve_device(config.device)
    dataset = PreferenceDataset(config.data.path)
    if dry_run:
        _describe(config, dataset, device)
        return
    accelerator = start_accelerator(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    backbone = open_backbone(config.model, str(accelerator.device))
    # The first process fills the cache; the others then find it.
    with accelerator.main_process_first():
        source = prepare_source(config.data, config.labels, dataset, backbone, say)
    if OBJECTIVES[config.objective.name].label_kind != "none" and not has_preference(source.rewards, source.mask).any():
        raise DiffalignError(
            f"data.path {config.data.path}: no group states a preference, there is nothing to learn; "
            "its scores may all be equal, or the groups may have one image each"
        )
    backbone.drop_encoders()
    result = train_backbone(config, backbone=backbone, source=source, say=say, accelerator=accelerator)
    if accelerator.is_main_process:
        write_report(result.run_dir)
        say(f"weights: {result.run_dir / 'weights'}\nreport:  {result.run_dir / 'report.html'}")


def _describe(config: TrainConfig, dataset: PreferenceDataset, device: str) -> None:
    """What a run would do, from the files alone: nothing is written, no GPU memory is taken."""
    chosen, members, smaller = choose_groups(config.data, dataset)
    facts = dataset.facts(config.data.split)
    backbone = open_backbone(config.model, "cpu")
    epochs = config.train.steps * config.train.groups_per_step / len(chosen)
    print(resolved_yaml(config))
    for title, values in (
        ("model", backbone.facts()),
        ("dataset", facts),
        ("run", {
            "device": device,
            "groups used": f"{len(chosen)} of {members} images" + (f", {smaller} of them smaller" if smaller else ""),
            "steps": f"{config.train.steps} x {config.train.groups_per_step} groups = {epochs:.2f} epochs",
        }),
    ):  # fmt: skip
        print(f"# {title}")
        for key, value in values.items():
            print(f"#   {key}: {value}")


def sample(config: SampleConfig) -> None:
    """`diffalign sample`."""
    backbone = open_backbone(config.model, resolve_device(config.device))
    if config.weights is not None:
        backbone.load_weights(config.weights)
    sample_groups(
        backbone,
        resolve_prompts(config.prompts, config.n, config.seed),
        config.out,
        images_per_prompt=config.images_per_prompt,
        seed=config.seed,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt,
        height=config.height,
        width=config.width,
        batch_size=config.batch_size,
        on_progress=Ticker("sampling"),
    )
    say(f"dataset: {config.out}")


def _digest(weights: Path) -> str:
    """Hash of the files of a weights folder."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(weights.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def evaluate(config: EvalConfig, base_folder: Path | None = None) -> dict[str, Any]:
    """`diffalign eval`: one backbone is both models, since its policy can be switched off."""
    backbone = open_backbone(config.model, resolve_device(config.device))
    backbone.load_weights(config.weights)
    full = (config.weights / backbone.trunk_name).is_dir()
    base = open_backbone(config.model, resolve_device(config.device)) if full else backbone
    rows = resolve_prompts(config.prompts, config.n)
    options = {
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "negative_prompt": config.negative_prompt,
        "height": config.height,
        "width": config.width,
    }

    def sampler(model: Any, role: str) -> Callable[[list[str], list[int]], Any]:
        def draw_images(prompts: list[str], seeds: list[int]) -> Any:
            with model.role(role):
                return model.sample(prompts, seeds, **options)

        return draw_images

    drawn_by = f"{backbone.source.fingerprint(str(backbone.dtype))} {json.dumps(options)}"
    ticker = {name: Ticker(name) for name in ("base", "tuned")}
    result = evaluate_models(
        base=sampler(base, "policy" if full else "reference"),
        tuned=sampler(backbone, "policy"),
        plan=Plan(rows, config.seeds, config.seed, config.batch_size),
        rewards={config.reward.name: open_reward(config.reward, resolve_device(config.device))},
        out=config.out,
        identities={"base": drawn_by, "tuned": f"{drawn_by} {_digest(config.weights)}"},
        base_folder=base_folder,
        on_progress=lambda name, done, total: ticker[name](done, total),
    )
    # rich takes a pipe for 80 columns, which would break the table's lines
    Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    report = write_report(config.out, result)
    say(f"report: {report}")
    return result
