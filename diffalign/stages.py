"""The stages as functions of a checked config: names are resolved here, and nowhere else.

`shapes-sd3` becomes a folder, `testbed:test` becomes prompts, `detector: shapes` becomes a detector that is handed to the
reward, since rewards and pipelines know nothing of the embedded world.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from diffalign import testbed
from diffalign.config import load_run_config, resolved_yaml
from diffalign.config_schema import EvalConfig, ModelSection, RewardSection, SampleConfig, TrainConfig
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow, read_prompts
from diffalign.data.sample import sample_groups
from diffalign.data.source import check_guidance, choose_groups, prepare_source
from diffalign.data.suites import read_suite
from diffalign.data.suites_hub import from_hub, read_hub_suite
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import Plan, table
from diffalign.evaluation.evaluate import evaluate as evaluate_models
from diffalign.health import examine_labels
from diffalign.objectives import OBJECTIVES, has_preference
from diffalign.pipelines import load_backbone
from diffalign.pipelines.adapters import POLICY, has_adapter
from diffalign.report.render import write_report
from diffalign.rewards import REWARDS, Reward, accepted, load_reward
from diffalign.testbed.detector import ShapeDetector
from diffalign.testbed.prompts import prompts as testbed_prompts
from diffalign.training.checkpoint import checkpoints
from diffalign.training.footprint import described
from diffalign.training.loop import start_accelerator
from diffalign.training.loop import train as train_backbone
from diffalign.training.optim import check_installed
from diffalign.training.validation import Validation

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
    options = model.model_dump(exclude={"path", "dtype", "compile"})
    return load_backbone(path, dtype=getattr(torch, model.dtype), device=device, **options)


def resolve_prompts(source: str, n: int | None, seed: int = 0) -> list[PromptRow]:
    """A prompt file, `testbed:SPLIT`, `suite:NAME:PATH` or `suite:NAME:hub`."""
    kind, _, split = source.partition(":")
    if kind == "suite":
        name, _, path = split.partition(":")
        return (read_hub_suite(name, path) if from_hub(path) else read_suite(name, Path(path)))[:n]
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


def open_rewards(
    sections: Sequence[RewardSection], rows: list[PromptRow], device: str, key: str, prompts: str
) -> dict[str, Reward]:
    """Rewards by name, refused before any image is drawn where one of them cannot judge a prompt."""
    rewards = {section.name: open_reward(section, device) for section in sections}
    for name, reward in rewards.items():
        for row in rows:
            if reason := reward.unfit(row.prompt, row.metadata):
                raise DiffalignError(
                    f"{key}: {name} cannot judge {row.prompt!r} of {prompts}: {reason}; name another reward, such as "
                    "{name: pickscore}, or give prompts with what it needs"
                )
    return rewards


class Ticker:
    """A plain line every few seconds: sampling has no loss to show. Time counts anew from a call with 0 done."""

    def __init__(self, what: str, every: float = 15.0) -> None:
        self.what, self.every, self.started, self.last = what, every, time.monotonic(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not done:
            self.started = self.last = now
        elif now - self.last >= self.every or done == total:
            self.last = now
            say(f"{self.what}: {done}/{total} images, {(now - self.started) / max(done, 1):.3f} s each")


def train(config: TrainConfig, dry_run: bool = False) -> None:
    """`diffalign train`."""
    device = resolve_device(config.device)
    check_installed(config.optimizer)
    dataset = PreferenceDataset(config.data.path)
    if dry_run:
        _describe(config, dataset, device)
        return
    accelerator = start_accelerator(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    backbone = open_backbone(config.model, str(accelerator.device))
    check_guidance(config.data, dataset, backbone)
    # The first process fills the cache; the others then find it.
    with accelerator.main_process_first():
        source = prepare_source(config.data, config.labels, dataset, backbone, say)
    if OBJECTIVES[config.objective.name].label_kind != "none" and not has_preference(source.rewards, source.mask).any():
        raise DiffalignError(
            f"data.path {config.data.path}: no group states a preference, there is nothing to learn; "
            "its scores may all be equal, or the groups may have one image each"
        )
    if source.label_stats:
        # Into config.yaml: another run can then share the scale, and this one cannot go on with another.
        config = config.model_copy(update={"labels": config.labels.model_copy(update={"stats": source.label_stats})})
        say(f"labels.stats: {', '.join(f'{key} {value:.6g}' for key, value in source.label_stats.items())}")
    # Roles say who made an image: that its maker explains them is no finding.
    roles = OBJECTIVES[config.objective.name].label_kind == "role"
    known = [] if roles else examine_labels(source.labelled(dataset))
    validation = prepare_validation(config, backbone)
    if config.data.cache != "off":
        backbone.drop_encoders(keep_vae=validation is not None, keep_text=config.data.cache == "latents")
    try:
        result = train_backbone(
            config,
            backbone=backbone,
            source=source,
            say=say,
            accelerator=accelerator,
            validation=validation,
            known=known,
        )
    finally:
        # Also of a run that an alarm has stopped: the report is where one sees why.
        metrics = Path(config.run_dir) / "metrics.jsonl"
        if accelerator.is_main_process and metrics.is_file() and metrics.stat().st_size:
            write_report(Path(config.run_dir))
    if accelerator.is_main_process:
        say(f"weights: {result.run_dir / 'weights'}\nreport:  {result.run_dir / 'report.html'}")


def prepare_validation(config: TrainConfig, backbone: Any) -> Validation | None:
    """Prompts encoded and rewards built, while the text encoders are there; None where no validation is wanted."""
    wanted = config.validation
    if wanted.every is None or wanted.prompts is None:
        return None
    rows = resolve_prompts(wanted.prompts, wanted.n)
    device = resolve_device(config.device)
    rewards = open_rewards(wanted.rewards, rows, device, "validation.rewards", wanted.prompts)
    texts = [row.prompt for row in rows]
    chunks = [texts[i : i + wanted.batch_size] for i in range(0, len(texts), wanted.batch_size)]
    parts = [backbone.encode_guided(chunk, wanted.negative_prompt) for chunk in chunks]
    encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    side = config.data.resolution or backbone.default_resolution
    return Validation(wanted, rows, encoded, rewards, side, config.seed)


def _describe(config: TrainConfig, dataset: PreferenceDataset, device: str) -> None:
    """What a run would do, from the files alone: nothing is written, no GPU memory is taken."""
    chosen, members, smaller = choose_groups(config.data, dataset)
    facts = dataset.facts(config.data.split)
    backbone = open_backbone(config.model, "cpu")
    check_guidance(config.data, dataset, backbone)
    epochs = config.train.steps * config.train.groups_per_step / len(chosen)
    print(resolved_yaml(config))
    for title, values in (
        ("model", backbone.facts()),
        ("dataset", facts),
        ("run", {
            "device": device,
            "groups used": f"{len(chosen)} of {members} images" + (f", {smaller} of them smaller" if smaller else ""),
            "images of a group in a step": config.data.group_size or members,
            "steps": f"{config.train.steps} x {config.train.groups_per_step} groups = {epochs:.2f} epochs",
        }),
    ):  # fmt: skip
        print(f"# {title}")
        for key, value in values.items():
            print(f"#   {key}: {value}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    memory = described(config, backbone, members, cuda=device != "cpu", processes=processes)  # uses the backbone up
    print("# memory of a process, predicted")
    for key, value in memory.items():
        print(f"#   {key}: {value}")


def check_guidance_scale(config: SampleConfig | EvalConfig, backbone: Any) -> None:
    """Where the guidance scale is an input of the network, images are drawn at the one that it is trained under."""
    if backbone.guidance is not None and backbone.guidance != config.guidance_scale:
        raise DiffalignError(
            f"guidance_scale={config.guidance_scale:g}: {backbone.path} takes the scale as an input and is trained under "
            f"model.guidance={backbone.guidance:g}; set both to the same value"
        )


def sample(config: SampleConfig) -> None:
    """`diffalign sample`."""
    backbone = open_backbone(config.model, resolve_device(config.device))
    check_guidance_scale(config, backbone)
    # By the name that the user gave: the shipped models lie elsewhere on every machine.
    origin: dict[str, str | None] = {"model": config.model.path}
    if config.weights is not None:
        backbone.load_weights(config.weights)
        origin["weights"] = weights_digest(Path(config.weights))
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
        origin=origin,
        on_progress=Ticker("sampling"),
    )
    say(f"dataset: {config.out}")


def weights_digest(weights: Path) -> str:
    """Hash of a weights folder's tensors. Not of the files: safetensors writes their metadata in any order."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(weights.rglob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(tensors):
            digest.update(f"{path.relative_to(weights)} {name}".encode())
            digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _trains_all(weights: Path, trunk_name: str) -> bool:
    """Whether a folder of weights, or a checkpoint, holds the whole trunk rather than a LoRA."""
    if (weights / "state.json").is_file():
        return bool(json.loads((weights / "state.json").read_text())["config"]["tune"]["kind"] == "full")
    return (weights / trunk_name).is_dir()


def load_trained(backbone: Any, weights: Path) -> None:
    """Put trained weights into the policy: a folder in diffusers' layout, or a checkpoint of a run (its average, if kept)."""
    if not (weights / "state.json").is_file():
        backbone.load_weights(weights)
        return
    tune = json.loads((weights / "state.json").read_text())["config"]["tune"]
    average = weights / "ema.safetensors"
    values = load_file(average if average.is_file() else weights / "policy.safetensors")
    if tune["kind"] == "lora" and not has_adapter(backbone.trunk, POLICY):
        backbone.add_lora(tune["rank"], tune["alpha"], targets=tune["targets"])
    own = dict(backbone.trunk.named_parameters())
    if values.keys() - own.keys() or any(values[name].shape != own[name].shape for name in values):
        raise DiffalignError(f"{weights}: this checkpoint does not fit the model; was it trained on another one?")
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _refuse_selection_prompts(config: EvalConfig, rows: list[PromptRow]) -> None:
    """What chose the best weights, or where to stop, flatters them: it is not what they are judged by."""
    trained = config.weights.parent / "config.yaml"
    if not trained.is_file():
        return
    validation = load_run_config(trained).validation
    if validation.every is None or validation.prompts is None:
        return
    chosen = {row.prompt for row in resolve_prompts(validation.prompts, validation.n)}
    shared = [row.prompt for row in rows if row.prompt in chosen]
    if shared:
        raise DiffalignError(
            f"prompts={config.prompts}: {len(shared)} of {len(rows)} prompts chose this run's weights by validation, such as "
            f"{shared[0]!r}; evaluate on others"
        )


def evaluate(config: EvalConfig, base_folder: Path | None = None) -> dict[str, Any]:
    """`diffalign eval`: one backbone is both models, since its policy can be switched off."""
    models = {"tuned": config.weights, **config.others}
    if config.checkpoints:
        found = checkpoints(config.weights.parent)
        if not found:
            raise DiffalignError(f"checkpoints=true: {config.weights.parent} holds no checkpoints/ beside its weights")
        models |= {f"step-{int(path.name.removeprefix('step-'))}": path for path in found}
    for path in models.values():
        if not path.exists():
            raise DiffalignError(f"no weights at {path}: the folder does not exist")
    backbone = open_backbone(config.model, resolve_device(config.device))
    check_guidance_scale(config, backbone)
    full = any(_trains_all(path, backbone.trunk_name) for path in models.values())
    base = open_backbone(config.model, resolve_device(config.device)) if full else backbone
    rows = resolve_prompts(config.prompts, config.n)
    _refuse_selection_prompts(config, rows)
    sections = (config.reward, *config.more_rewards)
    rewards = open_rewards(sections, rows, resolve_device(config.device), "reward", config.prompts)
    options = {
        "steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "negative_prompt": config.negative_prompt,
        "height": config.height,
        "width": config.width,
    }

    loaded: list[Path] = []

    def sampler(model: Any, role: str, weights: Path | None = None) -> Callable[[list[str], list[int]], Any]:
        def draw_images(prompts: list[str], seeds: list[int]) -> Any:
            # Models are drawn one after the other: each puts its weights in at its first images.
            if weights is not None and loaded[-1:] != [weights]:
                load_trained(model, weights)
                loaded.append(weights)
            with model.role(role):
                return model.sample(prompts, seeds, **options)

        return draw_images

    drawn_by = f"{backbone.source.fingerprint(str(backbone.dtype))} {json.dumps(options)}"
    ticker = {name: Ticker(name) for name in ("base", *models)}
    result = evaluate_models(
        base=sampler(base, "policy" if full else "reference"),
        tuned=sampler(backbone, "policy", config.weights),
        others={name: sampler(backbone, "policy", path) for name, path in models.items() if name != "tuned"},
        plan=Plan(rows, config.seeds, config.seed, config.batch_size),
        rewards=rewards,
        correction=config.corrected,
        out=config.out,
        identities={"base": drawn_by, **{name: f"{drawn_by} {weights_digest(path)}" for name, path in models.items()}},
        base_folder=base_folder,
        on_progress=lambda name, done, total: ticker[name](done, total),
    )
    # rich takes a pipe for 80 columns, which would break the table's lines
    Console(width=None if sys.stdout.isatty() else 120).print(table(result))
    report = write_report(config.out, result)
    say(f"report: {report}")
    return result
