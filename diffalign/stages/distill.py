"""`diffalign distill`: prompts and a model to a student with few steps."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.config import DistillConfig, RewardTerm
from diffalign.data.buckets import fit, to_pixels
from diffalign.data.cut_prompts import cut_lines
from diffalign.data.dataset import ImageRow
from diffalign.data.prompts import PromptRow, unique_prompts
from diffalign.errors import DiffalignError
from diffalign.files.lock import writing_folder
from diffalign.files.published import public_name
from diffalign.pipelines import Backbone
from diffalign.pipelines.export import export_merged
from diffalign.pipelines.few_step import FewStep, call_options, few_step, student_scheduler
from diffalign.pipelines.settings import SamplingSettings
from diffalign.progress import say
from diffalign.rewards.base import Reward
from diffalign.stages.checks import check_packages, check_validation, check_weights
from diffalign.stages.dry_run import TIME_UNKNOWN, count_trainable, model_facts, print_config, print_facts, print_where
from diffalign.stages.fingerprints import of_model, of_prompts, of_real_images
from diffalign.stages.real_images import real_images
from diffalign.stages.resolve import (
    note_other_base,
    open_backbone,
    open_plain_backbone,
    open_validation,
    planned_backbone,
    resolve_prompts,
    settled,
    with_judges,
)
from diffalign.stages.resolve_rewards import open_rewards, process_device, resolve_device
from diffalign.stages.trainer import run_and_report
from diffalign.training.checkpoint import check_before_loading
from diffalign.training.device import start_accelerator
from diffalign.training.distillation.method import Distillation
from diffalign.training.distillation.real_images import RealImages
from diffalign.training.optim import check_installed
from diffalign.training.prompt_source import PromptSource
from diffalign.training.protocols import DifferentiableScore, LatentScores

HOW = """# A student with {steps} steps

Distilled from `{base}` with diffalign. The scheduler's config holds its times; the number of steps and guidance 0 are
arguments of the call, whose defaults belong to the pipeline's class:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".")  # the folder of this file
image = pipeline("...", {call}).images[0]
```
{note}"""

GLOBAL_NOISE = """
The pipeline gives its scheduler no generator, so `generator=` fixes the first noise alone; call `torch.manual_seed` too.
"""

CPS = """
It was trained with CPS, eta {eta:g}, which no scheduler of diffusers has: Euler stands in its place.
"""


def open_student(config: DistillConfig, backbone: Backbone) -> tuple[FewStep, Any]:
    """Return the student's sampler, and the diffusers scheduler that it is saved with."""
    if backbone.guided:
        raise DiffalignError(
            f"model.path {config.model.path}: its guidance is an input of the network, so there is no prediction without; "
            "distil a model that is guided at sampling, such as SDXL or SD3"
        )
    wanted = config.student
    side = config.resolution or backbone.default_resolution
    grid = backbone.schedule_arguments(wanted.steps, side, side).get("sigmas")
    scheduler = student_scheduler(
        backbone.pipeline.scheduler,
        wanted.steps,
        wanted.sampler,
        wanted.times,
        shift=backbone.shift_at(wanted.steps, side, side),
        even=grid is not None,
    )
    student = few_step(backbone.process, scheduler, wanted.steps, wanted.sampler, wanted.eta, wanted.times, grid)
    top = backbone.process.span if backbone.process.span == 1.0 else backbone.process.span - 1
    if wanted.times is not None and not (wanted.times[-1] > 0 and wanted.times[0] <= top):
        raise DiffalignError(f"student.times: times of this model lie in (0, {top:g}], not {wanted.times}")
    return student, scheduler


def open_terms(config: DistillConfig, rows: list[PromptRow], device: str) -> dict[str, Reward]:
    """Build the rewards of the mix, by label.

    Raises DiffalignError for a reward that cannot judge a prompt, a column that a reward lacks, and where
    reward.gradient_weight finds no differentiable reward.
    """
    terms: list[RewardTerm] = list(config.reward.terms)
    rewards = open_rewards(terms, rows, device, "reward.terms", config.prompts)
    for term in terms:
        if term.column is not None and term.column not in rewards[term.label].columns:
            known = ", ".join(rewards[term.label].columns)
            raise DiffalignError(f"reward.terms: {term.name} has no column {term.column}; it has {known}")
    if terms and config.reward.gradient_weight and not any(reward.differentiable for reward in rewards.values()):
        raise DiffalignError(
            "reward.gradient_weight: none of reward.terms is differentiable; `diffalign rewards` lists those"
        )
    return rewards


def latent_scores(
    config: DistillConfig, backbone: Backbone, rows: list[PromptRow], rewards: dict[str, Reward]
) -> tuple[LatentScores | None, DifferentiableScore | None]:
    """Return what decodes finished latents and scores them with every reward of the mix, and what does so with a gradient."""
    terms: list[RewardTerm] = list(config.reward.terms)
    if not terms:
        return None, None

    def decoded(latents: Tensor) -> Tensor:
        backbone.pipeline.vae.to(backbone.device)  # a validation puts it back into the CPU's memory
        pixels: Tensor = backbone.decode_latents(latents)
        return pixels

    def scores(latents: Tensor, indices: list[int]) -> dict[str, Tensor]:
        with torch.no_grad():
            pixels = decoded(latents)
        pictures = backbone.pipeline.image_processor.postprocess(
            pixels, output_type="pil", do_denormalize=[False] * len(pixels)
        )
        texts, facts = [rows[i].prompt for i in indices], [rows[i].metadata for i in indices]
        found = {}
        for term in terms:
            reward = rewards[term.label]
            found[term.label] = reward.measure(pictures, texts, facts)[term.column or reward.columns[0]]
        return found

    smooth = [term for term in terms if rewards[term.label].differentiable]
    if not config.reward.gradient_weight:
        return scores, None

    def differentiable_score(latents: Tensor, indices: list[int]) -> Tensor:
        pixels, texts = decoded(latents), [rows[i].prompt for i in indices]
        parts = [term.weight * rewards[term.label].score_tensors(pixels, texts) for term in smooth]
        return torch.stack(parts).sum(dim=0)

    return scores, differentiable_score


def open_real(config: DistillConfig, backbone: Backbone, side: int) -> RealImages | None:
    """Return the real images for the critic, resized and cropped to squares of `side` pixels; None where none are wanted."""
    if config.gan.real is None:
        return None
    found = real_images(config.gan.real, config.prompts, config.gan.n or config.n, config.seed)
    if not found:
        raise DiffalignError(f"gan.real={config.gan.real}: there is no image of the training split in it")
    images = RealImages(
        backbone,
        (
            (row.prompt, to_pixels([fit(ImageRow(row.prompt, 0, data(), "real", 0).decode(), (side, side))])[0])
            for row, data in found
        ),
    )
    say(f"{len(found)} real images for the critic")
    return images


def distill(config: DistillConfig, dry_run: bool = False) -> None:
    """Distil a model: `diffalign distill`. The same command resumes where it stopped."""
    with writing_folder(None if dry_run else config.run_dir, "run_dir"):
        _distill(config, dry_run)


def _distill(config: DistillConfig, dry_run: bool) -> None:
    config = with_judges(settled(config), tuple(term.name for term in config.reward.terms))
    device = resolve_device(config.device)
    check_before_loading(config)
    if dry_run:
        print_config(config)
    else:
        _check_packages(config)
    rows = unique_prompts(resolve_prompts(config.prompts, config.n))
    rewards = open_terms(config, rows, process_device(config.device))
    steered = check_weights(rewards, dry_run)
    judged, judges = check_validation(config.validation, device, dry_run)
    if dry_run:
        _describe(config, rows, device, steered | judges)
        return
    accelerator = start_accelerator(config)
    resolved = {
        "train.mixed_precision": accelerator.mixed_precision,
        **of_prompts(rows),
        **of_real_images(config.gan.real),
    }
    check_before_loading(config, resolved)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    note_other_base(config.tune.init, config.model)
    backbone = open_backbone(config.model, str(accelerator.device))
    student, scheduler = open_student(config, backbone)
    backbone.pipeline.scheduler = scheduler  # for validation; the noise process is the base model's and stays
    scores, differentiable_score = latent_scores(config, backbone, rows, rewards)
    side = config.resolution or backbone.default_resolution
    drawn = SamplingSettings(config.student.steps, 0.0, height=side, width=side)
    validation = (
        None
        if judged is None
        else open_validation(config.validation, backbone, judged.rows, judged.rewards, config.seed, drawn)
    )
    for line in cut_lines({"the model": backbone}, [row.prompt for row in rows]):
        say(line)
    source = PromptSource(backbone, rows, cache=config.train.cache_prompts)
    if side % backbone.pixel_multiple:
        raise DiffalignError(f"resolution={side}: this model needs a multiple of {backbone.pixel_multiple}")
    real = open_real(config, backbone, side)
    if config.train.cache_prompts:
        backbone.drop_encoders(keep_vae=scores is not None or validation is not None)
    places = side // backbone.vae_scale_factor
    shape = (backbone.latent_channels, places, places)
    method = Distillation(config, backbone, student, source, shape, accelerator, scores, differentiable_score, real)
    resolved |= of_model(backbone, config.tune)
    result = run_and_report(config, method, validation=validation, resolved=resolved)
    if accelerator.is_main_process and config.save_pipeline:
        say(f"student: {save_student(config, result.run_dir / 'weights', result.run_dir / 'student')}")


def save_student(config: DistillConfig, weights: Path, out: Path) -> Path:
    """Write the whole pipeline with the student's weights and scheduler, for `from_pretrained`; README.md says how to call it.

    A CPS student between Euler and re-noising has no scheduler in diffusers: it is saved with its times and Euler, and the
    README says so.
    """
    backbone = open_plain_backbone(config.model)
    _, scheduler = open_student(config, backbone)
    backbone.load_weights(weights)
    backbone.pipeline.scheduler = scheduler
    export_merged(backbone, out)
    wanted = config.student
    chosen = call_options(scheduler, wanted.times) or {"num_inference_steps": wanted.steps}
    options: dict[str, Any] = {**chosen, **backbone.guidance_arguments(0.0), **backbone.call_options()}
    note = GLOBAL_NOISE if wanted.sampler == "renoise" and not backbone.scheduler_seeded else ""
    if wanted.sampler == "cps":
        note = CPS.format(eta=wanted.eta)
    call = ", ".join(f"{name}={value}" for name, value in options.items())
    text = HOW.format(steps=wanted.steps, base=public_name(config.model.path), call=call, note=note)
    (out / "README.md").write_text(text)
    (out / "student.json").write_text(json.dumps({"call": options, "sampler": wanted.sampler}, indent=1) + "\n")
    return out


def _check_packages(config: DistillConfig) -> None:
    """Refuse an optimiser or a tracker whose package is not installed."""
    check_packages(config)
    check_installed(config.fake.optimizer)


def _describe(config: DistillConfig, rows: list[PromptRow], device: str, judges: dict[str, str]) -> None:
    """Print what a run would do, from the files alone: nothing is written or downloaded, no GPU memory is taken."""
    steps, updates = config.train.steps, config.train.steps * config.fake.updates
    print_facts("run", {
        "device": device,
        "prompts": len(rows),
        "updates": f"{steps} of the student, {updates} of the fake network",
        "images": f"{config.train.groups_per_step * config.group.size} an update",
        "time": TIME_UNKNOWN,
    })  # fmt: skip
    backbone = planned_backbone(config.model)
    model = model_facts(backbone, config.model)
    if backbone is not None:
        student, _ = open_student(config, backbone)
        print_facts("student", {
            "times": ", ".join(f"{t:.4g}" for t in student.times.tolist()),
            "sampler": student.sampler,
        })  # fmt: skip
        print_facts("model", model | {"trainable": f"{count_trainable(backbone, config.tune):,}"})
    else:
        print_facts("model", model)
    print_facts("rewards", judges)
    print_where(config.model, model)
    _check_packages(config)
