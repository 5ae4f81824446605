"""The sections of a config, typed. Every field says what it means, its unit and its default; unknown keys are refused.

Checks of one value stand on its field; checks of values against each other stand in `config_checks.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from diffalign.config.checks import check_evaluation, check_sampling, check_training
from diffalign.config.data import DataSection, LabelSection, SelectionSection
from diffalign.config.memory import check_memory
from diffalign.config.objective import DEFAULT_OBJECTIVE, AnyObjective
from diffalign.config.section import Betas, FilePath, Section
from diffalign.plugins import load_class


class ModelSection(Section):
    """Which model, and how it is loaded."""

    path: str = Field(
        min_length=1,
        description="a diffusers folder, a Hugging Face id, or one of the small models shapes-sd3, shapes-sdxl",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub model; resolved to a commit and recorded"
    )
    variant: str | None = Field(
        None, description="which weight files of a hub model, such as fp16; null: the plain ones"
    )
    token: str | None = Field(
        None, repr=False, description="access token for gated models; better: HF_TOKEN. Never written out"
    )
    local_files_only: bool = Field(False, description="true: never ask the network, use what is in the cache")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="number type of the frozen weights")
    attention: Literal["sdpa", "xformers", "flash"] = Field(
        "sdpa", description="attention kernel; xformers and flash need a GPU (flash also half precision)"
    )
    gradient_checkpointing: bool = Field(False, description="true: less memory, more time, same gradients")
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="bits of the frozen layers under a LoRA: int8, or nf4 (4 bits; needs bitsandbytes)"
    )
    channels_last: bool = Field(False, description="true: memory format of a UNet's convolutions that GPUs prefer")
    compile: bool = Field(
        False, description="true: torch.compile of the repeated blocks, in training only; the first step takes minutes"
    )
    max_sequence_length: int | None = Field(
        None, gt=0, description="tokens for SD3's T5; null: the pipeline's own (256)"
    )
    use_t5: bool = Field(True, description="false: SD3 without its T5 encoder (zeros in its place)")
    guidance: float = Field(
        3.5,
        ge=0,
        description="FLUX takes the guidance scale as an input: the one to train under, which must be that of the data. "
        "Other families ignore it",
    )


class TuneSection(Section):
    """What is trained."""

    kind: Literal["lora", "full"] = Field(
        "lora", description="low-rank adapters, or all weights of the UNet/transformer"
    )
    rank: int = Field(16, gt=0, description="rank of the adapters (lora only)")
    alpha: float = Field(16.0, gt=0, description="the adapters' output is scaled by alpha / rank (lora only)")
    targets: list[str] | None = Field(
        None, min_length=1, description="module names that get adapters; null: the attention projections of the family"
    )
    init: FilePath | None = Field(None, description="folder of a LoRA to train on from (lora only)")


class PolicySection(TuneSection):
    """What is trained."""

    reference: Literal["init", "base"] = Field(
        "init", description="what the policy is compared with where init is given: that LoRA, or the model without one"
    )


class TimeSection(Section):
    """How the noise level of a group is drawn."""

    sampler: Literal["uniform", "logit_normal"] = Field("uniform", description="density of the times")
    mean: float = Field(0.0, description="mean of the logit (logit_normal only)")
    std: float = Field(1.0, gt=0, description="standard deviation of the logit (logit_normal only)")
    shift: float = Field(
        1.0, gt=0, description="moves times towards noise: t -> shift t / (1 + (shift - 1) t); 1: not at all"
    )


class InversionSection(Section):
    """How `noise: inverted` finds an image's noise: by running the sampler backwards (ReNoise)."""

    steps: int = Field(10, gt=0, description="inversion steps from the image to pure noise; fewer to an earlier time")
    iterations: int = Field(
        1, ge=0, description="ReNoise iterations a step, each one more forward pass; 0: DDIM inversion"
    )
    average_from: int = Field(
        0,
        ge=0,
        description="the predictions of a step from this one on are averaged; 0: all, iterations: only the last",
    )
    mode: Literal["consistent", "official"] = Field(
        "consistent",
        description="consistent: the steps end at the drawn time and see where they go; official: as the code of SmPO "
        "(epsilon models only), which does neither",
    )
    by: Literal["policy", "reference"] = Field("policy", description="which model is run backwards")


def _micro_batch(data: dict[str, Any]) -> int:
    """The largest divisor of groups_per_step that is at most 8. `data` lacks it where it is refused."""
    groups = data.get("groups_per_step", 8)
    return next(n for n in range(min(8, groups), 0, -1) if groups % n == 0)


class ReferenceSection(Section):
    """Whether what the frozen reference says of each step is kept for later runs on the same draws."""

    store: FilePath | None = Field(
        None,
        description="folder that the first run fills and later runs read instead of running the reference; null: none",
    )
    keep: Literal["errors", "predictions"] = Field(
        "errors",
        description="errors: 4 bytes an image, without the drift metric; predictions: a latent an image, with everything",
    )

    @property
    def errors_only(self) -> bool:
        """Whether the reference's predictions are not to be had."""
        return self.store is not None and self.keep == "errors"


class TrainSection(Section):
    """Length and shape of the training."""

    steps: int = Field(400, gt=0, description="optimiser steps")
    groups_per_step: int = Field(
        8, gt=0, description="groups in one optimiser step, over all processes and micro-batches"
    )
    micro_batch: int = Field(
        default_factory=_micro_batch, gt=0, description="groups in one forward pass; must divide groups_per_step"
    )
    images_per_pass: int | None = Field(
        None,
        gt=0,
        description="images of a micro-batch in the model at a time, for one more forward pass and the same gradient; null: "
        "all, or one where all do not fit the GPU's memory",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field("auto", description="auto: bf16 on CUDA, no on CPU")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is scaled down to this norm")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="moving average of the weights, as 0.999; null: none")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of torch; fix it where runs must agree bit for bit"
    )
    log_every: int = Field(1, gt=0, description="a row in metrics.jsonl every so many steps")
    prompt_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of groups whose prompt is replaced by the empty one"
    )
    skip_grad_norm: float | None = Field(
        None, gt=1, description="skip steps whose gradient norm is so many times that of recent ones; null: none"
    )
    auto_beta: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="find beta so that the gradient factor becomes this, as 0.3 (dpo and smpo); null: off",
    )
    shard: Literal["none", "fsdp2"] = Field(
        "none", description="fsdp2: weights, gradients and averages cut over the processes (tune.kind full, adamw)"
    )


class OptimizerSection(Section):
    """Which optimiser, and its learning rate over time."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = Field(
        "adamw", description="the optimiser; adamw8bit needs bitsandbytes"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate at its peak")
    betas: Betas = Field((0.9, 0.999), description="decay of Adam's two averages")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    eps: float = Field(1e-8, gt=0, description="Adam's division guard")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="after the warm-up; linear, cosine end at 0"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises linearly from 0")
    offload: bool = Field(
        False, description="true: Adam's averages in the host's memory, on the GPU only during an update (adamw only)"
    )


class CheckpointSection(Section):
    """When the state is saved for going on."""

    every: int = Field(100, gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="how many of the newest are kept")


Tracker = Literal["tensorboard", "wandb", "trackio"]


class TrackingSection(Section):
    """Where metrics go besides metrics.jsonl, which is always written."""

    trackers: list[Tracker] = Field(["tensorboard"], description="any of tensorboard, wandb, trackio; [] for none")
    project: str = Field("diffalign", min_length=1, description="the project's name at wandb and trackio")


class RewardSection(Section):
    """What judges the images."""

    name: str = Field("geneval", min_length=1, description="the reward's name, or module:Class of a package of yours")
    detector: str | None = Field(
        "shapes", description="the object detector that a GenEval reward looks through; null: its own"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the reward")

    @property
    def label(self) -> str:
        """The name of the reward's columns and files: `name`, or for `module:Class` the class's own `name`."""
        return str(load_class(self.name).name) if ":" in self.name else self.name


class ValidationSection(Section):
    """Images of prompts that are not trained on, drawn and judged during training; the best weights go to best/."""

    every: int | None = Field(None, gt=0, description="steps between validations; null: none")
    prompts: str | None = Field(
        None, description="a .txt or .jsonl file, or testbed:validation; never those of the final evaluation"
    )
    n: int | None = Field(None, gt=0, description="only so many prompts; null: all of a file, 256 of the testbed")
    rewards: list[RewardSection] = Field(
        [RewardSection()], min_length=1, description="what judges; the first column of the first decides what is best"
    )
    seeds: int = Field(1, gt=0, description="images per prompt")
    steps: int = Field(30, gt=0, description="denoising steps")
    guidance_scale: float = Field(5.0, ge=0, description="classifier-free guidance; 1: none")
    negative_prompt: str | None = Field(None, description="what to steer away from")
    batch_size: int = Field(8, gt=0, description="images drawn at once")
    patience: int | None = Field(
        None, gt=0, description="stop after so many validations in a row without a better one; null: never"
    )


Device = Literal["auto", "cpu", "cuda"]
DEVICE = "auto: CUDA where there is one"


class TrainConfig(Section):
    """`diffalign train`."""

    run_dir: FilePath = Field(description="everything the run writes; the same command goes on where it stopped")
    seed: int = Field(0, ge=0, description="seed of every draw")
    device: Device = Field("auto", description=DEVICE)
    model: ModelSection
    tune: PolicySection = PolicySection()
    data: DataSection
    labels: LabelSection = LabelSection()
    selection: SelectionSection = SelectionSection()
    objective: AnyObjective = DEFAULT_OBJECTIVE
    noise: Literal["shared", "independent", "inverted"] = Field(
        "shared", description="one noise for all images of a group, one each, or each image's own by inversion"
    )
    inversion: InversionSection = InversionSection()
    error_space: Literal["native", "epsilon", "x0"] = Field(
        "native", description="what the squared errors are errors of"
    )
    times: TimeSection = TimeSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    on_alarm: Literal["warn", "stop"] = Field(
        "warn", description="what a health alarm does: say it and go on, or save and stop"
    )
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        check_training(self)
        check_memory(self)
        return self


class _Images(Section):
    """What sampling and evaluation share: a model, prompts, and how the images are drawn."""

    seed: int = Field(0, ge=0, description="seed of every draw")
    device: Device = Field("auto", description=DEVICE)
    model: ModelSection
    prompts: str = Field(
        min_length=1,
        description="a .txt or .jsonl file; testbed:train, testbed:validation or testbed:test; suite:NAME:PATH, or "
        "suite:NAME:hub",
    )
    n: int | None = Field(None, gt=0, description="only so many prompts; null: all of a file, 256 of the testbed")
    steps: int = Field(30, gt=0, description="denoising steps")
    guidance_scale: float = Field(5.0, ge=0, description="classifier-free guidance; 1: none")
    negative_prompt: str | None = Field(None, description="what to steer away from")
    height: int | None = Field(None, gt=0, multiple_of=8, description="pixels; null: the model's own")
    width: int | None = Field(None, gt=0, multiple_of=8, description="pixels; null: the model's own")
    batch_size: int = Field(8, gt=0, description="images drawn at once")


class SampleConfig(_Images):
    """`diffalign sample`: prompts to a folder of image groups."""

    weights: FilePath | None = Field(None, description="a run's weights/ folder; null: the model as it is")
    out: FilePath = Field(description="the dataset folder to write; the same command goes on where it stopped")
    images_per_prompt: int = Field(8, gt=0, description="images per prompt, one group")

    @model_validator(mode="after")
    def _consistent(self) -> SampleConfig:
        check_sampling(self)
        return self


class CorrectionSection(Section):
    """A score that falls where a reward is gained at the cost of quality: r (u - u0) + c, as GDRO reports."""

    reward: str = Field(min_length=1, description="r: a score, such as geneval.dense")
    quality: list[str] = Field(min_length=1, description="u is the mean of these scores")
    u0: float = Field(3.0, description="quality that counts as none (GDRO: 3 of UnifiedReward's 5)")
    c: float = Field(0.2, description="shift, only for plotting (GDRO: 0.2)")


class EvalConfig(_Images):
    """`diffalign eval`: the model without and with trained weights, at the same prompts and seeds."""

    weights: FilePath = Field(description="a run's weights/ folder")
    seeds: int = Field(4, gt=0, description="images per prompt and model")
    reward: RewardSection = RewardSection()
    more_rewards: list[RewardSection] = Field(
        default_factory=list, description="further rewards: what is not trained on shows over-optimisation"
    )
    others: dict[str, FilePath] = Field(
        default_factory=dict, description="further weights against the same base, by name: folders or checkpoints"
    )
    checkpoints: bool = Field(False, description="true: also every checkpoint that the run has kept, as step-N")
    corrected: CorrectionSection | None = Field(None, description="the score corrected for lost quality; null: none")
    out: FilePath = Field(description="the folder that gets eval.json, eval/images and report.html")

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        check_evaluation(self)
        return self
