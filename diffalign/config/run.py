"""What all training verbs share: the run's folder, its steps, optimiser, checkpoints, validation and trackers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from diffalign.config.model import DEVICE, Device, ModelSection, TuneSection, check_device
from diffalign.config.section import (
    MOST_IMAGES,
    MOST_PROMPTS,
    MOST_THREADS,
    NAMED,
    ROUNDING,
    UNAFFECTED,
    Betas,
    FilePath,
    OnResume,
    Section,
    refuse,
    refuse_twice,
)
from diffalign.plugins import load_class
from diffalign.remote_address import TOKEN_KEY, remote_address, remote_label

AUTO = 0
"""How a micro-batch is stored that is found when the run begins: `train.micro_batch: auto`."""
PRECISION = "auto: bf16 on CUDA, no on CPU"
WITHOUT_VALIDATION = OnResume("none", only_where=(("validation.every", None),))
"""Images of a run's validations are compared, so they stay the same once there are some."""
STEPS = OnResume(
    "none",
    only_where=(
        ("optimizer.schedule", "constant"),
        ("fake.optimizer.schedule", "constant"),
        ("selection.groups", "all"),
        ("selection.images", "all"),
        ("objective.beta_end", None),
    ),
)
"""A rate that falls to 0, a beta that falls, and phases of a selection, depend on the number of steps."""
MICRO_BATCH = OnResume("rounding", only_where=(("data.buckets", "none"),), pending="auto")
"""With buckets, the groups of a micro-batch are drawn together."""
WARMUP = OnResume("none", only_where=(("train.ema_decay", None),), formerly=False)
PROMPT_COUNT = "use only the first n prompts; null: all of a file, 256 of the testbed"


def divisors(number: int, most: int) -> list[int]:
    """Return the divisors of `number` that are at most `most`, largest first."""
    return [n for n in range(min(most, number), 0, -1) if number % n == 0]


class StepSection(Section):
    """Length and shape of the training."""

    drawn: ClassVar[str] = "groups_per_step"
    """The key that says how many groups, images or records a step takes."""
    member: ClassVar[str] = "groups"
    """What that key counts, in words."""
    largest_micro_batch: ClassVar[int] = 8
    late: ClassVar[tuple[str, ...]] = (
        "micro_batch", "images_per_pass", "mixed_precision", "max_grad_norm", "ema_decay", "ema_warmup", "ema_slope",
        "threads", "log_every",
        "cache_prompts", "shard",
    )  # fmt: skip

    steps: Annotated[int, STEPS] = Field(400, gt=0, description="optimiser steps")
    micro_batch: Annotated[int, MICRO_BATCH] = Field(
        8,
        gt=0,
        le=MOST_IMAGES,
        description="groups, images or records in one forward pass; must divide what a step draws. Not given: its largest "
        "divisor up to 8 (4 for judges)",
    )
    mixed_precision: Annotated[Literal["auto", "no", "bf16", "fp16"], NAMED] = Field("auto", description=PRECISION)
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is scaled down to this norm")
    threads: Annotated[int | None, ROUNDING] = Field(
        None, gt=0, le=MOST_THREADS, description="CPU threads of torch; fix it where runs must agree bit for bit"
    )
    log_every: Annotated[int, UNAFFECTED] = Field(1, gt=0, description="steps between rows in metrics.jsonl")

    @model_validator(mode="before")
    @classmethod
    def _derive_micro_batch(cls, value: Any) -> Any:
        """Take the largest divisor of what a step draws where no micro-batch is given."""
        if not isinstance(value, dict) or "micro_batch" in value:
            return value
        drawn = value.get(cls.drawn, cls.model_fields[cls.drawn].default)
        # A number of another type, or below 1, is refused by its own field.
        fits = type(drawn) is int and drawn > 0
        return {**value, "micro_batch": divisors(drawn, cls.largest_micro_batch)[0] if fits else 1}

    @model_validator(mode="after")
    def _check_micro_batch(self) -> StepSection:
        drawn, micro = int(getattr(self, self.drawn)), self.micro_batch
        if micro != AUTO and drawn % micro:
            fitting = ", ".join(str(n) for n in divisors(drawn, micro))
            refuse(
                f"{micro} does not divide train.{self.drawn}={drawn}, and every forward pass takes the same number of "
                f"whole {self.member}; use {fitting}",
                "micro_batch",
                self.drawn,
            )
        return self


class AveragedStepSection(StepSection):
    """Length and shape of the training, with an average of the weights."""

    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="largest decay of a moving average of the weights, as 0.999, which is then validated and saved; null: none",
    )
    ema_warmup: Annotated[bool, WARMUP] = Field(
        True,
        description="true: the decay after t steps is at most (1 + t) / (10 + t), so that the average forgets its start",
    )
    ema_slope: float | None = Field(
        None, gt=0, description="the decay after t steps is at most this times t, as 0.001 (GDRO); null: no such limit"
    )

    @model_validator(mode="after")
    def _check_average(self) -> AveragedStepSection:
        if self.ema_decay is None and self.ema_slope is not None:
            refuse("it limits ema_decay, which is null; set train.ema_decay=0.5 (GDRO), or leave it out", "ema_slope")
        return self


class OptimizerSection(Section):
    """Which optimiser, and its learning rate over time."""

    text_key: ClassVar[str | None] = "name"

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
    offload: Annotated[bool, ROUNDING] = Field(
        False, description="true: Adam's averages in the host's memory, on the GPU only during an update (adamw only)"
    )

    @model_validator(mode="after")
    def _check_optimizer(self) -> OptimizerSection:
        if not all(0 <= beta < 1 for beta in self.betas):
            refuse("both betas must lie in [0, 1)", "betas")
        if self.offload and self.name != "adamw":
            refuse(f"offload serves adamw, whose averages are large, not {self.name}; leave it out", "offload", "name")
        return self


def check_warmup(optimizer: OptimizerSection, steps: int, key: str = "optimizer") -> None:
    """Refuse a warm-up that is longer than the run; `key`: where the optimiser stands in the config that asks."""
    if optimizer.warmup_steps >= steps:
        refuse(
            f"the warm-up of {optimizer.warmup_steps} steps does not end within train.steps={steps}; shorten it",
            f"{key}.warmup_steps",
            "train.steps",
        )


class CheckpointSection(Section):
    """When the state is saved, so that the run can resume."""

    every: int = Field(100, gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="how many of the newest are kept")


Tracker = Literal["tensorboard", "wandb", "trackio"]


class TrackingSection(Section):
    """Where metrics go besides metrics.jsonl, which is always written."""

    trackers: list[Tracker] = Field(["tensorboard"], description="any of tensorboard, wandb, trackio; [] for none")
    project: str = Field("diffalign", min_length=1, description="the project's name at wandb and trackio")

    @model_validator(mode="after")
    def _check_trackers(self) -> TrackingSection:
        refuse_twice(self.trackers, "a tracker", "trackers")
        return self


class RewardSection(Section):
    """What scores the images."""

    text_key: ClassVar[str | None] = "name"

    name: str = Field(
        "geneval",
        min_length=1,
        description="the reward's name, or module:Class from another package. Not given, and "
        "outside the embedded world: the first of hpsv2 and pickscore that can be had",
    )
    detector: str | None = Field(
        "shapes",
        description="the object detector that a GenEval reward looks through; null: its own, also where this is not given "
        "outside the embedded world",
    )
    url: str | None = Field(
        None, description="where `diffalign serve` runs the reward, as http://host:8000/hpsv2 (name: remote only)"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the reward")

    @model_validator(mode="after")
    def _check_url(self) -> RewardSection:
        if self.url is not None and self.name != "remote":
            refuse("an address is for the reward remote; set name=remote", "url", "name")
        if self.name == "remote" and self.address is None:
            refuse("it needs the server's address, as http://host:8000/hpsv2", "url")
        if self.address is not None and remote_address(self.address).token is not None:
            refuse(f"config.yaml would hold the token; put it into {TOKEN_KEY} and leave it out of the address", "url")
        return self

    @property
    def address(self) -> str | None:
        """The address of the reward remote, also where it stands among the options."""
        given = self.url or self.options.get("url")
        return given if self.name == "remote" and isinstance(given, str) else None

    @property
    def written_name(self) -> str:
        """The name as the config has it, of which two in a list must differ; of a remote reward, the label in its address."""
        return remote_label(self.address) if self.name == "remote" else self.name

    @property
    def label(self) -> str:
        """The name of the reward's columns and files: `written_name`, or for `module:Class` the class's own `name`."""
        return str(load_class(self.name).name) if ":" in self.name else self.written_name


class ValidationSection(Section):
    """Images of prompts that are not trained on, drawn and scored during training; the best weights go to best/."""

    every: Annotated[int | None, UNAFFECTED] = Field(None, gt=0, description="steps between validations; null: none")
    prompts: str | None = Field(
        None, description="a .txt or .jsonl file, or testbed:validation; never those of the final evaluation"
    )
    n: int | None = Field(None, gt=0, le=MOST_PROMPTS, description=PROMPT_COUNT)
    rewards: list[RewardSection] = Field(
        [RewardSection()],
        min_length=1,
        description="what scores, better none that is trained on; the first column of the first decides what is best",
    )
    seeds: int = Field(1, gt=0, le=MOST_IMAGES, description="images per prompt")
    batch_size: Annotated[int, ROUNDING] = Field(8, gt=0, le=MOST_IMAGES, description="images drawn at once")
    patience: Annotated[int | None, UNAFFECTED] = Field(
        None, gt=0, description="stop after this many validations in a row without a better one; null: never"
    )

    @model_validator(mode="after")
    def _check_prompts(self) -> ValidationSection:
        if self.every is not None and self.prompts is None:
            refuse(
                "validation draws images of prompts, and none are given; set validation.prompts to a file, or "
                "validation.every=null",
                "prompts",
                "every",
            )
        return self


class RunConfig(Section):
    """A run: what every trainer has, whatever it trains."""

    late: ClassVar[tuple[str, ...]] = ("train", "optimizer", "checkpoint", "validation", "on_alarm", "tracking")

    run_dir: Annotated[FilePath, UNAFFECTED] = Field(
        description="everything the run writes; the same command resumes where it stopped"
    )
    seed: int = Field(0, ge=0, description="seed of every draw")
    device: Annotated[Device, ROUNDING] = Field("auto", description=DEVICE)
    train: StepSection
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: Annotated[CheckpointSection, UNAFFECTED] = CheckpointSection()
    tracking: Annotated[TrackingSection, UNAFFECTED] = TrackingSection()

    @model_validator(mode="after")
    def _check_run(self) -> RunConfig:
        check_warmup(self.optimizer, self.train.steps)
        return self


class BackboneRunConfig(RunConfig):
    """A run that trains an image model: loading, tuning, validation and health."""

    model: ModelSection
    tune: TuneSection = TuneSection()
    train: AveragedStepSection
    validation: Annotated[ValidationSection, WITHOUT_VALIDATION] = ValidationSection()
    on_alarm: Annotated[Literal["warn", "stop"], UNAFFECTED] = Field(
        "warn", description="what a health alarm does: print it and continue, or save and stop"
    )

    compiles: ClassVar[bool] = False
    """Whether this trainer can run compiled blocks."""

    @model_validator(mode="after")
    def _check_model(self) -> BackboneRunConfig:
        check_device(self.model, self.device, autocast=self.train.mixed_precision != "no")
        if self.tune.kind == "full" and self.model.dtype == "float16":
            refuse(
                "full fine-tuning updates the weights themselves, and float16 loses the updates; use float32, with "
                "train.mixed_precision for speed",
                "model.dtype",
                "tune.kind",
            )
        if self.tune.kind == "full" and self.model.quantize != "none":
            refuse(
                "quantised weights cannot train; set model.quantize=none, or tune.kind=lora",
                "model.quantize",
                "tune.kind",
            )
        if self.model.compile and not self.compiles:
            refuse("compile serves `diffalign train`; leave it out here", "model.compile")
        if self.model.gradient_checkpointing == "auto" and not self.compiles:
            refuse(
                "auto predicts the memory of `diffalign train`; use true or false here", "model.gradient_checkpointing"
            )
        return self
