"""What a backbone family defines. A new family is one file with a subclass of `Backbone` that overrides what differs here.

The defaults hold for pipelines like SDXL's: `encode_prompt` returns embeddings with and without guidance, the VAE gives a
normal distribution, the scale of guidance is an argument of the call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.pipelines.attention import ATTENTION
from diffalign.pipelines.kohya import KohyaLayout
from diffalign.pipelines.options import Options
from diffalign.pipelines.own_sampler import SamplerSteps, sampler_steps
from diffalign.pipelines.process import NoiseProcess
from diffalign.pipelines.save_single_file import SingleFile
from diffalign.pipelines.settings import ScheduleArguments
from diffalign.pipelines.tuning import Tunable
from diffalign.pipelines.vae import NormalVAE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin
    from transformers import PreTrainedTokenizerBase


class Family(Tunable):
    """The declarations and hooks of a family; `Backbone` builds everything else on them.

    Besides those here, a family declares `blocks` and `lora_targets` (`Tunable`) and says where its trunk lies, as
    `TransformerBackbone` does for the pipeline's `transformer`.
    """

    # --- loading -----------------------------------------------------------------------------------------------

    family: ClassVar[str]
    """Short name, as in `diffalign.pipelines.options.OPTIONS`."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Components that a checkpoint may lack, all of them or none."""
    single_files: ClassVar[bool] = False
    """Whether checkpoints in one file are read."""
    loading_options: ClassVar[dict[str, bool]] = {}
    """Further arguments of the pipeline's `from_pretrained`."""
    options: Options
    """The values of the family's own options."""
    path: str
    device: torch.device
    dtype: torch.dtype
    process: NoiseProcess
    vae: NormalVAE

    @classmethod
    @abstractmethod
    def pipeline_class(cls) -> type[DiffusionPipeline]:
        """Return the diffusers class; importing it takes seconds."""

    @classmethod
    def left_out(cls, options: Options) -> tuple[str, ...]:
        """Return the components that these options leave out."""
        return ()

    published_as: ClassVar[dict[str, str]] = {}
    """Component -> another class name under which it was published."""

    @classmethod
    def component_classes(cls) -> dict[str, type]:
        """Return the classes of components for which the pipeline's signature names a base class or several."""
        return {}

    @classmethod
    def text_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which text encoders compute where the trunk's is `dtype`."""
        return dtype

    @abstractmethod
    def build_process(self, scheduler: SchedulerMixin) -> NoiseProcess:
        """Read the noise process from the pipeline's scheduler. Refuse a scheduler that the family cannot have."""

    # --- prompts -----------------------------------------------------------------------------------------------

    conditioning: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    """Which of the encoder's outputs `forward` takes."""
    encoder_outputs: ClassVar[tuple[str, ...]] = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    """What the pipeline's `encode_prompt` returns, in its order, under the names that the pipeline's call has for it."""
    prompt_masks: ClassVar[tuple[str, ...]] = ()
    """Names in `conditioning` that are masks [B, L], True at tokens of the prompt; `forward` gets them as booleans."""

    condition: ClassVar[str | None] = None
    """The name in `forward`'s conditioning of the latents [B, C, h, w] of an image to edit; None where it takes none.

    `encode` does not give it. A trunk that gets none draws from the prompt alone.
    """

    def encoding_options(self) -> dict[str, object]:
        """Return arguments of the pipeline's `encode_prompt` that only this family takes."""
        return {}

    def encoding_marks(self) -> tuple[str, ...]:
        """Return what decides embeddings besides weights, number type and length: options that are not at their defaults."""
        return ()

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode prompts to what `forward` takes: each [B, ...] under the names of `conditioning`.

        Shapes must not depend on the prompts, which are encoded one by one and batched later: pad to `prompt_tokens()`
        tokens (`padded`) where the pipeline pads to the longest prompt.
        """
        encoded = self._encoded(prompts, do_classifier_free_guidance=False)
        return {name: encoded[name] for name in self.conditioning}

    def encode_guided_prompts(self, prompts: list[str], negatives: list[str] | None) -> dict[str, Tensor]:
        """Encode prompts and what to steer away from, under the names that the pipeline's call has; each [B, ...].

        What belongs to the negative prompts is called "negative_" and the name in `conditioning`.
        """
        return self._encoded(prompts, negative_prompt=negatives, do_classifier_free_guidance=True)

    def _encoded(self, prompts: list[str], **options: object) -> dict[str, Tensor]:
        found = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, num_images_per_prompt=1, **options, **self.encoding_options()
        )
        return dict(zip(self.encoder_outputs, found, strict=True))

    def negative_prompts(self, negative: str | None, count: int) -> list[str] | None:
        """Return a negative prompt for each of `count` images; None: the pipeline's own. Refuse one that cannot be."""
        return None if negative is None else [negative] * count

    @abstractmethod
    def prompt_tokens(self) -> int:
        """Return the number of tokens that a prompt is padded or cut to."""

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what `encode` gives for one prompt, from the trunk's config alone."""
        config: Any = self._model.config
        return {
            "prompt_embeds": (self.prompt_tokens(), config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        """Return the tokenizers of the text encoders, each with how many tokens of a prompt its encoder reads."""
        return [(self.pipeline.tokenizer, int(self.pipeline.tokenizer.model_max_length))]

    # --- latents -----------------------------------------------------------------------------------------------

    vae_kind: ClassVar[type[NormalVAE]] = NormalVAE
    """How the VAE encodes and decodes."""

    @property
    def vae_scale_factor(self) -> int:
        """Pixels along a side of an image for each cell of the trunk's latents."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def latent_channels(self) -> int:
        """C of the trunk's latents."""
        return self.vae.channels

    @property
    def pixel_multiple(self) -> int:
        """What sides of images are multiples of."""
        return self.vae_scale_factor

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images the trunk was made for."""
        size = self._model.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * self.vae_scale_factor

    @property
    def max_side(self) -> int | None:
        """The longest side in pixels that the trunk can place; None: no bound."""
        return None

    # --- the network -------------------------------------------------------------------------------------------

    kernels: ClassVar[tuple[str, ...]] = ATTENTION
    """Attention kernels that the trunk can have: flash kernels take no masks."""

    @property
    def guided(self) -> bool:
        """Whether the guidance scale is an input of the network, so that a prediction without guidance has no use."""
        return False

    @property
    def guidance(self) -> float | None:
        """The guidance scale that `predict` gives a network which takes it as an input; None for all others."""
        return None

    @abstractmethod
    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Predict with `module`, the trunk or a wrapper of it: latents [N, C, h, w], time [N] -> [N, C, h, w].

        time: as `NoiseProcess.model_time` gives it. conditioning: as `encode` gives it.
        """

    block_list: ClassVar[str] = "transformer_blocks"
    """The name of the trunk's list of repeated blocks."""

    def middle_block(self) -> nn.Module:
        """Return the block in the middle of the trunk, whose features a discriminator reads."""
        blocks = list(self.pipeline_trunk.get_submodule(self.block_list).children())
        return blocks[(len(blocks) - 1) // 2]

    def image_positions(self, features: Tensor, noisy: Tensor) -> Tensor:
        """Return those of the middle block's features [N, positions, C] that belong to the image `noisy` [N, c, h, w].

        A family whose blocks hold text and image in one sequence leaves the text's out.
        """
        return features

    # --- sampling ----------------------------------------------------------------------------------------------

    scheduler_seeded: ClassVar[bool] = True
    """Whether the pipeline hands its generator to the scheduler; else a stochastic one draws from torch's global one."""

    latents_in_float32: ClassVar[bool] = False
    """Whether the pipeline draws and keeps latents in float32 whatever the model's number type."""

    def sampling_times(self, steps: int, height: int, width: int) -> Tensor:
        """Return the times that the pipeline visits for an image of this size in pixels: [steps + 1] float32, `clean` last.

        Raises DiffalignError for a scheduler whose steps are not those of `NoiseProcess.step`.
        """
        found = self.sampler_steps(steps, height, width)
        return torch.cat([found.times, found.stops[-1:]])

    def sampler_steps(self, steps: int, height: int, width: int) -> SamplerSteps:
        """Return the steps that the pipeline takes for an image of this size in pixels; raises as `sampling_times`."""
        return sampler_steps(
            self.pipeline.scheduler, self.process, steps, **self.schedule_arguments(steps, height, width)
        )

    def schedule_arguments(self, steps: int, height: int, width: int) -> ScheduleArguments:
        """Return what the pipeline passes to its scheduler's `set_timesteps` besides the number of steps.

        Where it passes `sigmas`, these take the place of that number.
        """
        return {}

    def shift_at(self, steps: int, height: int, width: int) -> float:
        """Return the shift of the sampling times in `steps` steps, for an image of this size in pixels."""
        return self.process.shift

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """Return the arguments of the pipeline's call for u + scale (c - u), u being the negative prompt's prediction."""
        return {"guidance_scale": scale}

    def rescale_guided(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        """Return u + scale (c - u) as the pipeline changes it before its step; guided and with_prompt (c): [N, C, h, w]."""
        return guided

    def sampling_options(self) -> dict[str, object]:
        """Return arguments of the pipeline's call that only this family takes."""
        return {}

    def call_options(self) -> dict[str, object]:
        """Return arguments that a call of the plain pipeline needs to draw the same images."""
        return {}

    def pipeline_inputs(self, encoded: dict[str, Tensor]) -> dict[str, object]:
        """Return the arguments of the pipeline's call for what `encode_guided_prompts` gave, in the form that it takes."""
        return dict(encoded)

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Return latents [B, C, h, w] in the form that the pipeline takes and returns."""
        return latents

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Undo `to_pipeline`; height and width are those of the latents."""
        return latents

    # --- export ------------------------------------------------------------------------------------------------

    lora_loader: ClassVar[bool] = True
    """Whether diffusers' pipeline has `load_lora_weights`."""
    kohya: ClassVar[KohyaLayout | None] = None
    """How kohya's LoRA files name the base model and its layers; None where they are not known."""
    single_file: ClassVar[SingleFile | None] = None
    """How the pipeline lies in one file; None where that is not known."""


def padded(embeds: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Pad or cut embeddings [B, L, D] with their mask [B, L] to `length` tokens: [B, length, D] and bool [B, length].

    mask: None where every token is one of the prompt, as some pipelines have it.
    """
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
    more = max(0, length - embeds.shape[1])
    padding = torch.nn.functional.pad
    return padding(embeds, (0, 0, 0, more))[:, :length], padding(mask, (0, more))[:, :length]


def padded_rows(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Pad or cut embeddings of several lengths, each [L_i, D], to `length` tokens: [B, length, D] and bool [B, length]."""
    embeds, masks = zip(*(padded(row[None], None, length) for row in rows), strict=True)
    return torch.cat(embeds), torch.cat(masks)


def unpadded(embeds: Tensor, mask: Tensor) -> list[Tensor]:
    """Undo `padded_rows`: embeddings [B, L, D] as a list of [L_i, D], for networks that take no padding.

    The lengths are read from the mask, for which a GPU is waited once. On the meta device all are L.
    """
    lengths = [mask.shape[1]] * len(mask) if mask.is_meta else mask.sum(dim=1).tolist()
    return [row[:length] for row, length in zip(embeds, lengths, strict=True)]
