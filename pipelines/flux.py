"""FLUX.1-dev: rectified flow in a transformer over 2 x 2 patches, with the guidance scale as an input of the network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.base import JOINT_ATTENTION, TransformerBackbone
from diffalign.pipelines.kohya import KohyaLayout
from diffalign.pipelines.options import FluxOptions
from diffalign.pipelines.original_names import flux_place
from diffalign.pipelines.process import Flow
from diffalign.pipelines.save_single_file import SingleFile
from diffalign.pipelines.settings import ScheduleArguments

if TYPE_CHECKING:
    from diffusers import FluxPipeline, SchedulerMixin
    from transformers import PreTrainedTokenizerBase

DEFAULT_T5_TOKENS = 512
PATCH = 2
NO_NEGATIVE = "negative_prompt: FLUX.1-dev has its guidance built in and takes no negative prompt; leave it out"
SIZE = 1024
"""Side in pixels that FLUX was made for; its config does not say."""


def pack(latents: Tensor) -> Tensor:
    """Turn latents [B, C, h, w] into tokens [B, h/2 w/2, 4 C]: a token holds a 2 x 2 patch, channel by channel."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // PATCH**2, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack`, for latents of height x width."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // PATCH**2, height, width)


class FluxFlow(Flow):
    """Rectified flow whose sampling times are shifted towards noise the more, the more tokens the image has.

    shift = exp(mu), with mu linear in the number of tokens through (base_tokens, base_shift) and (max_tokens,
    max_shift). `tokens` are those of an image of the model's own size.
    """

    def __init__(
        self,
        tokens: int,
        *,
        base_tokens: int,
        max_tokens: int,
        base_shift: float,
        max_shift: float,
        timesteps: int = 1000,
        shift_terminal: float | None = None,
    ) -> None:
        self.slope = (max_shift - base_shift) / (max_tokens - base_tokens)
        self.base_tokens, self.base_shift = base_tokens, base_shift
        super().__init__(self.shift_of(tokens), timesteps=timesteps, shift_terminal=shift_terminal)

    @classmethod
    def of(cls, scheduler: SchedulerMixin, tokens: int) -> FluxFlow:
        """Read the flow from a scheduler that is given an even grid. Without dynamic shifting all sizes have the same shift.

        Raises DiffalignError for a scheduler that is no FlowMatch scheduler, or shifts in another way.
        """
        config, name = scheduler.config, type(scheduler).__name__
        if "FlowMatch" not in name:
            raise DiffalignError(
                f"scheduler: this model needs a FlowMatch scheduler, not {name}; see scheduler_config.json"
            )
        dynamic = bool(config.get("use_dynamic_shifting"))
        if dynamic and config.get("time_shift_type", "exponential") != "exponential":
            raise DiffalignError(f"scheduler: time_shift_type {config.time_shift_type!r} is not supported")
        fixed = math.log(float(config.get("shift", 1.0)))
        return cls(
            tokens,
            base_tokens=int(config.get("base_image_seq_len", 256)),
            max_tokens=int(config.get("max_image_seq_len", 4096)),
            base_shift=float(config.get("base_shift", 0.5)) if dynamic else fixed,
            max_shift=float(config.get("max_shift", 1.15)) if dynamic else fixed,
            timesteps=int(config.num_train_timesteps),
            shift_terminal=config.get("shift_terminal"),
        )

    def shift_of(self, tokens: int) -> float:
        """Return the shift for an image of so many tokens."""
        return math.exp(self.base_shift + self.slope * (tokens - self.base_tokens))

    def scheduler_arguments(self, steps: int, tokens: int) -> ScheduleArguments:
        """Return what a pipeline passes to `set_timesteps` of its scheduler for an image of so many tokens."""
        even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64).tolist()
        return {"sigmas": even, "mu": math.log(self.shift_of(tokens))}

    def schedule(self, steps: int, tokens: int | None = None) -> Tensor:
        """Return the times as `NoiseProcess.schedule` does; `tokens`: those of the image, if not of the model's own size."""
        if steps < 1:
            raise DiffalignError(f"steps: {steps} sampling steps asked for; at least 1 is needed")
        shift = self.shift if tokens is None else self.shift_of(tokens)
        # Unlike SD3's, FLUX's pipeline starts from an even grid down to 1 / steps and shifts once.
        even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
        times = shift * even / (1.0 + (shift - 1.0) * even)
        if self.shift_terminal:
            times = 1.0 - (1.0 - times) * (1.0 - self.shift_terminal) / (1.0 - times[-1])
        return torch.cat([times.float(), torch.tensor([self.clean])])


class PackedFlow(TransformerBackbone):
    """A flow over 2 x 2 patches of latents whose pipeline hands its scheduler an even grid of times, and whose config states no
    size: FLUX, Qwen-Image, Z-Image."""

    process: FluxFlow

    @property
    def default_resolution(self) -> int:
        return SIZE

    @property
    def pixel_multiple(self) -> int:
        return self.vae_scale_factor * PATCH

    def tokens(self, height: int, width: int) -> int:
        """Return the number of tokens that an image of this size in pixels has in the trunk."""
        return (height // self.pixel_multiple) * (width // self.pixel_multiple)

    def build_process(self, scheduler: SchedulerMixin) -> FluxFlow:
        return FluxFlow.of(scheduler, self.tokens(SIZE, SIZE))

    def schedule_arguments(self, steps: int, height: int, width: int) -> ScheduleArguments:
        return self.process.scheduler_arguments(steps, self.tokens(height, width))

    def shift_at(self, steps: int, height: int, width: int) -> float:
        return self.process.shift_of(self.tokens(height, width))


class Flux(PackedFlow):
    """FluxPipeline with guidance embedding. Conditioning: prompt_embeds [B, L_t5, D], pooled_prompt_embeds [B, P].

    The option `guidance` is what the embedding gets in `predict`. In `sample` it is `guidance_scale`, as in the pipeline, and
    there is no negative prompt: the guidance is distilled into the network. Image sides are multiples of 16.
    """

    family: ClassVar[str] = "flux"
    scheduler_seeded: ClassVar[bool] = False
    blocks: ClassVar[tuple[str, ...]] = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION

    kohya: ClassVar[KohyaLayout | None] = KohyaLayout("flux1", "networks.lora_flux", flux_place)
    single_file: ClassVar[SingleFile | None] = SingleFile(
        flux_place,
        "ComfyUI (Load Diffusion Model), beside FLUX's own VAE and text encoders; diffusers' "
        "`FluxTransformer2DModel.from_single_file`",
        trunk="",
    )

    options: FluxOptions

    @classmethod
    def pipeline_class(cls) -> type[FluxPipeline]:
        from diffusers import FluxPipeline

        return FluxPipeline

    @property
    def guided(self) -> bool:
        return True

    @property
    def guidance(self) -> float:
        return self.options.guidance

    def build_process(self, scheduler: SchedulerMixin) -> FluxFlow:
        config = scheduler.config
        name = type(scheduler).__name__
        if not self.pipeline.transformer.config.guidance_embeds:
            raise DiffalignError(
                f"{self.path}: a FLUX without guidance embedding is distilled to a few steps (FLUX.1-schnell) and cannot "
                "be trained; use FLUX.1-dev"
            )
        if "FlowMatch" not in name or not config.get("use_dynamic_shifting"):
            raise DiffalignError(
                f"scheduler: FLUX.1-dev needs a FlowMatch scheduler with use_dynamic_shifting, not this {name}; see "
                "scheduler_config.json"
            )
        return FluxFlow.of(scheduler, self.tokens(SIZE, SIZE))

    def facts(self) -> dict[str, str | int]:
        return super().facts() | {"guidance": f"{self.guidance:g}"}

    def prompt_tokens(self) -> int:
        if self.options.max_sequence_length is not None:
            return self.options.max_sequence_length
        return min(DEFAULT_T5_TOKENS, int(self.pipeline.tokenizer_2.model_max_length))

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        return [*super().prompt_readers(), (self.pipeline.tokenizer_2, self.prompt_tokens())]

    def sampling_options(self) -> dict[str, object]:
        return {"max_sequence_length": self.prompt_tokens()}

    def call_options(self) -> dict[str, object]:
        length = self.options.max_sequence_length
        return {} if length is None else {"max_sequence_length": length}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)

    def negative_prompts(self, negative: str | None, count: int) -> None:
        if negative is not None:
            raise DiffalignError(NO_NEGATIVE)

    def encode_guided_prompts(self, prompts: list[str], negatives: list[str] | None) -> dict[str, Tensor]:
        return self.encode(prompts)  # there is nothing to steer away from

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=self.device, max_sequence_length=self.prompt_tokens()
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        height, width = noisy.shape[-2:]
        embeds = conditioning["prompt_embeds"]
        places = torch.zeros(height // PATCH, width // PATCH, 3, device=noisy.device, dtype=noisy.dtype)
        places[..., 1] += torch.arange(height // PATCH, device=noisy.device)[:, None]
        places[..., 2] += torch.arange(width // PATCH, device=noisy.device)[None, :]
        tokens: Tensor = module(
            hidden_states=pack(noisy),
            timestep=time / 1000,  # the network multiplies by 1000 itself
            guidance=torch.full((len(noisy),), float(self.guidance), device=noisy.device),
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=places.flatten(0, 1),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)
