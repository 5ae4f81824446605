"""`diffalign eval`: the base model and trained weights on the same prompts and seeds."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.config import BackboneRunConfig, EvalConfig, ValidationSection, load_run_config
from diffalign.data.prompts import PromptRow
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import EvaluationPlan, Sampler, comparison_table
from diffalign.evaluation.evaluate import evaluate as evaluate_models
from diffalign.files.lock import writing_folder
from diffalign.pipelines import Backbone
from diffalign.pipelines.settings import SamplingSettings
from diffalign.pipelines.tuning import trains_all
from diffalign.progress import ImageProgress, say
from diffalign.report.images import Candidate
from diffalign.report.render import verdicts, write_report
from diffalign.stages.checks import check_weights
from diffalign.stages.dry_run import print_config, print_facts, print_where
from diffalign.stages.resolve import (
    check_guidance_scale,
    note_other_base,
    open_backbone,
    resolve_prompts,
    sampling_settings,
    weights_digest,
)
from diffalign.stages.resolve_rewards import open_rewards, resolve_device, settled_rewards
from diffalign.terminal import show_table
from diffalign.training.checkpoint_files import checkpoints, verify


def evaluate(config: EvalConfig, base_folder: Path | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Compare trained weights with the base model: `diffalign eval`. Return what eval.json holds; {} after a dry run.

    base_folder: where the base's images lie or go, so that several evaluations share them. Raises DiffalignError for
    weights that are missing, a reward that cannot score a prompt, and prompts that chose the weights.
    """
    with writing_folder(None if dry_run else config.out, "out"):
        return _evaluate(config, base_folder, dry_run)


def _evaluate(config: EvalConfig, base_folder: Path | None, dry_run: bool) -> dict[str, Any]:
    # Refuse before a model is loaded.
    device = resolve_device(config.device)
    weights = _weights_to_compare(config)
    rows = resolve_prompts(config.prompts, config.n)
    _refuse_selection_prompts(config, rows)
    named = settled_rewards((config.reward, *config.more_rewards), config.model.path, config.prompts, "reward")
    config = config.model_copy(update={"reward": named[0], "more_rewards": named[1:]})
    rewards = open_rewards(named, rows, device, "reward", config.prompts)
    judges = check_weights(rewards, dry_run)
    if dry_run:
        images = len(rows) * config.seeds * (1 + len(weights))
        print_config(config)
        print_facts("run", {
            "device": device,
            "images": f"{images}: {len(rows)} prompts x {config.seeds} seeds x {1 + len(weights)} models",
            "weights": ", ".join(f"{name} {path}" for name, path in weights.items()),
            "time": "unknown; it is shown once the first images are drawn",
        })  # fmt: skip
        print_facts("rewards", judges)
        print_where(config.model, {})
        return {}
    backbone = open_backbone(config.model, device)
    check_guidance_scale(config.guidance_scale, backbone)

    # Under a LoRA, one backbone is both models, since its policy can be switched off; full weights replace the base's.
    full = any(trains_all(path, backbone.trunk_name) for path in weights.values())
    base = open_backbone(config.model, device) if full else backbone

    for path in weights.values():
        note_other_base(path, config.model)

    settings = sampling_settings(config)
    trained = _trained_samplers(backbone, weights, settings)
    drawn_by = f"{backbone.source.fingerprint(str(backbone.dtype))} {json.dumps(asdict(settings))}"
    result = evaluate_models(
        base=_sampler(base, "policy" if full else "reference", settings),
        tuned=trained.pop("tuned"),
        others=trained,
        plan=EvaluationPlan(rows, config.seeds, config.seed, config.batch_size),
        rewards=rewards,
        correction=config.corrected,
        out=config.out,
        identities={"base": drawn_by, **{name: f"{drawn_by} {weights_digest(path)}" for name, path in weights.items()}},
        base_folder=base_folder,
        on_progress=ImageProgress(),
    )
    show_table(comparison_table(result))
    (verdict,) = verdicts([Candidate("tuned", config.out, result["scores"], "tuned")])
    say(f"{verdict['headline']}: {verdict['reason']}")
    drawn = config.out / "eval" / "images"
    say(
        f"images: {drawn} ({', '.join(model for model, folder in result['images'].items() if Path(folder).parent == drawn)})"
    )
    say(f"report: {write_report(config.out, result)}")
    return result


def _weights_to_compare(config: EvalConfig) -> dict[str, Path]:
    """Return all weights that are compared with the base, by name: `tuned`, others, and the run's checkpoints if asked."""
    weights = {"tuned": config.weights, **config.others}
    if config.checkpoints:
        run_dir = config.weights.parent
        found = checkpoints(run_dir)
        if not found:
            raise DiffalignError(f"checkpoints=true: {run_dir} holds no checkpoints/ beside its weights")
        weights |= {f"step-{int(path.name.removeprefix('step-'))}": path for path in found}
    for path in weights.values():
        if not path.exists():
            raise DiffalignError(f"no weights at {path}: the folder does not exist")
        if (path / "state.json").is_file():
            verify(path)
    return weights


def _sampler(backbone: Backbone, role: str, settings: SamplingSettings) -> Sampler:
    """Return a function that draws images of prompts at seeds under a role of the backbone."""

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        with backbone.role(role):
            return backbone.sample(prompts, seeds, settings)

    return draw


def _trained_samplers(backbone: Backbone, weights: dict[str, Path], settings: SamplingSettings) -> dict[str, Sampler]:
    """Return a sampler for each of the weights; they share the backbone, and each loads its weights at its first images."""
    draw = _sampler(backbone, "policy", settings)
    loaded: Path | None = None

    def sampler(path: Path) -> Sampler:
        def draw_trained(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
            nonlocal loaded
            if loaded != path:
                backbone.load_weights(path)
                loaded = path
            return draw(prompts, seeds)

        return draw_trained

    return {name: sampler(path) for name, path in weights.items()}


def _refuse_selection_prompts(config: EvalConfig, rows: list[PromptRow]) -> None:
    """Refuse prompts by which validation chose the weights, or the step to stop at: they flatter the weights."""
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
