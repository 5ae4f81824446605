"""`diffalign eval`: a model without and with trained weights, on the same prompts and seeds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from diffalign.config import BackboneRunConfig, EvalConfig, ValidationSection, load_run_config
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import EvaluationPlan, comparison_table
from diffalign.evaluation.evaluate import evaluate as evaluate_models
from diffalign.pipelines.adapters import POLICY, has_adapter
from diffalign.progress import ImageProgress
from diffalign.report.render import write_report
from diffalign.stages.resolve import (
    check_guidance_scale,
    open_backbone,
    open_rewards,
    resolve_device,
    resolve_prompts,
    say,
    weights_digest,
)
from diffalign.training.checkpoint import checkpoints


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
    run = load_run_config(trained)
    validation = run.validation if isinstance(run, BackboneRunConfig) else ValidationSection()
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
    result = evaluate_models(
        base=sampler(base, "policy" if full else "reference"),
        tuned=sampler(backbone, "policy", config.weights),
        others={name: sampler(backbone, "policy", path) for name, path in models.items() if name != "tuned"},
        plan=EvaluationPlan(rows, config.seeds, config.seed, config.batch_size),
        rewards=rewards,
        correction=config.corrected,
        out=config.out,
        identities={"base": drawn_by, **{name: f"{drawn_by} {weights_digest(path)}" for name, path in models.items()}},
        base_folder=base_folder,
        on_progress=ImageProgress(),
    )
    # rich takes a pipe for 80 columns, which would break the table's lines
    Console(width=None if sys.stdout.isatty() else 120).print(comparison_table(result))
    report = write_report(config.out, result)
    say(f"report: {report}")
    return result
