"""Sections for the model: where it comes from, how it is loaded, and which of its weights are trained."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from diffalign.config.section import (
    MOST_RANK,
    NAMED,
    ROUNDING,
    UNAFFECTED,
    FilePath,
    Section,
    refuse,
)

Device = Literal["auto", "cpu", "cuda"]
DEVICE = "auto: CUDA where there is one"

# Keys of one family that stood among all models' keys, with the defaults they had there.
FORMER_KEYS: dict[str, object] = {"use_t5": True, "max_sequence_length": None, "guidance": 3.5}


def with_options(model: dict[str, Any]) -> dict[str, Any]:
    """Return a plain `model` section with its former family keys moved to `options`; a default is left out there."""
    rest = {key: value for key, value in model.items() if key not in FORMER_KEYS}
    if len(rest) == len(model):
        return model
    options = dict(model.get("options") or {})
    for key, default in FORMER_KEYS.items():
        if key in model:
            options.pop(key, None)
            if model[key] != default:
                options[key] = model[key]
    return {**rest, "options": options}


def current_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's plain config, as a checkpoint stores it, with today's keys, so that earlier runs resume."""
    model = config.get("model")
    return {**config, "model": with_options(model)} if isinstance(model, dict) else config


class ModelSection(Section):
    """Which model, and how it is loaded."""

    text_key: ClassVar[str | None] = "path"

    path: Annotated[str, NAMED] = Field(
        min_length=1,
        description="a diffusers folder, a checkpoint in one .safetensors file, a Hugging Face id, or one of the small "
        "models shapes-sd3, shapes-sdxl",
    )
    revision: Annotated[str | None, NAMED] = Field(
        None, description="branch, tag or commit of a hub model; resolved to a commit and recorded"
    )
    variant: Annotated[str | None, NAMED] = Field(
        None, description="which weight files of a hub model, such as fp16; null: the plain ones"
    )
    token: Annotated[str | None, UNAFFECTED] = Field(
        None, repr=False, description="access token for gated models; better: HF_TOKEN. Never written out"
    )
    local_files_only: Annotated[bool, UNAFFECTED] = Field(
        False, description="true: never ask the network, use what is in the cache"
    )
    config: Annotated[str | None, NAMED] = Field(
        None,
        min_length=1,
        description="where configs and tokenizers of a checkpoint in one file come from: a diffusers folder, which needs no "
        "weights, or a Hugging Face id; null: built in for SD1.x and SDXL, SD3's repository for SD3",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="number type of the frozen weights. auto: bfloat16 on a GPU that computes in it, else float32; "
        "float32 where all weights train. A run's own config says which it was",
    )
    attention: Annotated[Literal["sdpa", "xformers", "flash", "cudnn"], ROUNDING] = Field(
        "sdpa",
        description="attention kernel; all but sdpa need a GPU (flash also half precision). cudnn: cuDNN's in bfloat16 where "
        "no fault of its gradients is known, compared with flash in the first step of `train`; sdpa elsewhere",
    )
    gradient_checkpointing: Annotated[bool | Literal["auto", "attention"], UNAFFECTED] = Field(
        False,
        description="true: less memory, more time, same gradients; attention: as true, but attention is not computed again; "
        "auto (train only): false where the predicted memory allows it, else attention, else true",
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none", description="bits of the frozen layers under a LoRA: int8, or nf4 (4 bits; needs bitsandbytes)"
    )
    channels_last: Annotated[bool, ROUNDING] = Field(
        False,
        description="true: memory format that a UNet's convolutions prefer. torch's group norm does not take it, so it was "
        "slower on an H100; only with compile can it win",
    )
    compile: Annotated[bool | Literal["auto"], ROUNDING] = Field(
        False,
        description="true: torch.compile of the repeated blocks, in training only; the first step takes minutes. auto: on a "
        "GPU, for plain weights, and from 2000 steps on",
    )
    lora_text_encoders: Annotated[Literal["refuse", "ignore"], UNAFFECTED] = Field(
        "refuse",
        description="a LoRA that adapts text encoders too: refuse it, or ignore that part and take the UNet's or "
        "transformer's",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the model's family. SD3: use_t5, max_sequence_length; FLUX and FLUX.2-dev: guidance (the "
        "scale to train under, which must be that of the data), max_sequence_length; FLUX.2 klein and PixArt-Sigma: "
        "max_sequence_length; Sana: max_sequence_length, instruction; Z-Image and Qwen-Image: max_sequence_length",
    )

    @model_validator(mode="before")
    @classmethod
    def _family_keys(cls, value: Any) -> Any:
        """Read configs from before `options` existed."""
        return with_options(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_compile(self) -> ModelSection:
        if self.compile is True and self.quantize != "none":
            refuse("quantised layers are not compiled; leave one of them out", "compile", "quantize")
        return self


def check_device(model: ModelSection, device: str, *, autocast: bool = False) -> None:
    """Refuse an attention kernel that the device or the number type lacks; for configs with `model` and `device`.

    `autocast`: whether the model runs in half precision whatever its weights are.
    """
    if device == "cpu" and model.attention != "sdpa":
        refuse(f"{model.attention} needs a GPU; use sdpa with device=cpu", "model.attention", "device")
    if model.attention == "flash" and model.dtype in ("auto", "float32") and not autocast:
        refuse(
            "flash attention has no float32 kernel; use model.dtype=bfloat16, or sdpa", "model.attention", "model.dtype"
        )


class TuneSection(Section):
    """What is trained."""

    kind: Literal["lora", "full"] = Field(
        "lora", description="low-rank adapters, or all weights of the UNet/transformer"
    )
    rank: int = Field(16, gt=0, le=MOST_RANK, description="rank of the adapters (lora only)")
    alpha: float = Field(16.0, gt=0, description="the adapters' output is scaled by alpha / rank (lora only)")
    targets: list[str] | None = Field(
        None, min_length=1, description="module names that get adapters; null: the attention projections of the family"
    )
    init: Annotated[FilePath | None, NAMED] = Field(
        None, description="a LoRA, or a run's weights/ folder or checkpoint, to continue from (lora only)"
    )

    @model_validator(mode="after")
    def _check_kind(self) -> TuneSection:
        if self.kind == "full" and self.init is not None:
            refuse(
                "init loads a LoRA, but tune.kind=full trains no LoRA; set tune.kind=lora or leave init out",
                "init",
                "kind",
            )
        if self.kind == "full" and self.targets is not None:
            refuse(
                "targets choose where a LoRA goes, but tune.kind=full trains all weights; leave targets out", "targets"
            )
        return self


class PolicySection(TuneSection):
    """What is trained."""

    reference: Literal["init", "base", "ema", "old"] = Field(
        "init",
        description="what the policy is compared with. init: what it began with; base: the model without the LoRA of "
        "tune.init; ema: a moving average of itself; old: the policy that draws the images of train.online",
    )
    reference_decay: float = Field(
        0.9999, ge=0, lt=1, description="how much of the average stays in a step (reference ema only)"
    )
    reference_warmup: bool = Field(
        True, description="true: at most (1 + t) / (10 + t) of it stays after step t (reference ema only)"
    )
    reference_slope: float | None = Field(
        None, gt=0, description="at most slope t of it stays after step t; null: no such limit (reference ema only)"
    )

    @property
    def reference_moves(self) -> bool:
        """Whether what the policy is compared with changes during the run."""
        return self.reference in ("ema", "old")

    @property
    def reference_is_base(self) -> bool:
        """Whether the policy is compared with the model as it was loaded."""
        return self.reference == "base" or (self.reference == "init" and self.init is None)

    @model_validator(mode="after")
    def _check_average(self) -> PolicySection:
        plain = {"reference_decay": 0.9999, "reference_warmup": True, "reference_slope": None}
        given = [key for key, value in plain.items() if self.model_dump()[key] != value]
        if self.reference != "ema" and given:
            refuse(
                f"it belongs to an average, and reference={self.reference} is none; set tune.reference=ema, or leave it out",
                *given,
                "reference",
            )
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> PolicySection:
        if self.reference == "base" and self.init is None:
            refuse(
                "without tune.init the reference is the base anyway; give tune.init or leave reference out",
                "reference",
                "init",
            )
        return self
