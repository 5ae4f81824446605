"""FLUX.2: rectified flow in a transformer over 2 x 2 patches, one language model for prompts; klein and dev.

A latent of the VAE becomes a patch of 2 x 2 cells with 128 channels, normalised by the statistics of a batch norm that the
VAE carries. Those patches are the trunk's latents here, [B, 128, h, w] with 16 pixels a cell.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffalign.errors import DiffalignError
from diffalign.pipelines.base import JOINT_ATTENTION, TransformerBackbone
from diffalign.pipelines.kohya import KohyaLayout
from diffalign.pipelines.options import Flux2KleinOptions, Flux2Options
from diffalign.pipelines.original_names import flux2_place
from diffalign.pipelines.process import Flow
from diffalign.pipelines.save_single_file import SingleFile
from diffalign.pipelines.settings import ScheduleArguments
from diffalign.pipelines.vae import NormalVAE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
    from transformers import PreTrainedTokenizerBase

PATCH = 2
TOKENS = 512
SIZE = 1024
"""Side in pixels that FLUX.2 was made for; its config does not say."""
IMAGE = 10
"""The first axis of the positions of an image to edit; that of the image drawn is 0."""
STEPS = 50
"""The pipelines' own number of steps, at which `Flux2Flow.shift` is stated."""
NO_NEGATIVE = "negative_prompt: FLUX.2 steers away from the empty prompt or from nothing; leave it out"


class PatchVAE(NormalVAE):
    """AutoencoderKLFlux2: 2 x 2 cells of a latent become one with four times the channels, normalised by `bn`."""

    @property
    def channels(self) -> int:
        return int(self.config["latent_channels"]) * PATCH**2

    def posterior(self, module: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().posterior(module, pixels)
        return pixel_unshuffle(mean, PATCH), pixel_unshuffle(std, PATCH)

    def pixels(self, module: ModelMixin, latents: Tensor) -> Tensor:
        return super().pixels(module, pixel_shuffle(latents, PATCH))

    def scaling(self, module: ModelMixin) -> tuple[Tensor | float, Tensor | float]:
        norm: Any = module.bn
        mean, variance = (value.float().view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        return mean, (variance + float(self.config["batch_norm_eps"])).rsqrt()


class Flux2Flow(Flow):
    """Rectified flow whose sampling times are shifted towards noise by the number of tokens and of steps.

    shift = exp(mu), with mu as fitted by Black Forest Labs (`compute_empirical_mu`): linear in the tokens for 10 and for 200
    steps and linear in the steps between them; for more than 4,300 tokens that of 200 steps. `tokens`: those of an image of
    the model's own size.
    """

    def __init__(self, tokens: int, *, timesteps: int = 1000) -> None:
        self.tokens = tokens
        super().__init__(self.shift_of(tokens, STEPS), timesteps=timesteps)

    @staticmethod
    def shift_of(tokens: int, steps: int) -> float:
        """Return the shift for an image of so many tokens in so many steps."""
        many, few = 0.00016927 * tokens + 0.45666666, 8.73809524e-05 * tokens + 1.89833333
        mu = many if tokens > 4300 else many + (many - few) / 190.0 * (steps - 200.0)
        return math.exp(mu)

    def schedule(self, steps: int, tokens: int | None = None) -> Tensor:
        """Return the times as `NoiseProcess.schedule` does; `tokens`: those of the image, if not of the model's own size."""
        if steps < 1:
            raise DiffalignError(f"steps: {steps} sampling steps asked for; at least 1 is needed")
        shift = self.shift_of(tokens or self.tokens, steps)
        even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
        times = shift * even / (1.0 + (shift - 1.0) * even)
        return torch.cat([times.float(), torch.tensor([self.clean])])


class Flux2Klein(TransformerBackbone):
    """Flux2KleinPipeline. Conditioning: prompt_embeds [B, L, D], three layers of Qwen3 side by side.

    The base models are guided at sampling, away from the empty prompt. Those distilled to 4 steps ignore the scale of
    guidance; LoRAs are trained on the base and used on both. Image sides are multiples of 16.
    """

    family: ClassVar[str] = "flux2_klein"
    scheduler_seeded: ClassVar[bool] = False
    vae_kind: ClassVar[type[NormalVAE]] = PatchVAE
    conditioning: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    encoder_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds", "text_ids")
    condition: ClassVar[str | None] = "image_latents"
    blocks: ClassVar[tuple[str, ...]] = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    lora_targets: ClassVar[tuple[str, ...]] = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")

    kohya: ClassVar[KohyaLayout | None] = KohyaLayout("flux2", "networks.lora_flux_2", flux2_place)
    single_file: ClassVar[SingleFile | None] = SingleFile(
        flux2_place,
        "ComfyUI (Load Diffusion Model), beside FLUX.2's own VAE and text encoder; diffusers' "
        "`Flux2Transformer2DModel.from_single_file`",
        trunk="",
    )

    process: Flux2Flow
    options: Flux2KleinOptions | Flux2Options

    @classmethod
    def pipeline_class(cls) -> type[DiffusionPipeline]:
        from diffusers import Flux2KleinPipeline

        return Flux2KleinPipeline

    @property
    def guided(self) -> bool:
        """Whether the scale of guidance is an input of the network, or without effect on it."""
        return bool(self.pipeline.config.get("is_distilled"))

    def build_process(self, scheduler: SchedulerMixin) -> Flux2Flow:
        name = type(scheduler).__name__
        if "FlowMatch" not in name or not scheduler.config.get("use_dynamic_shifting"):
            raise DiffalignError(
                f"scheduler: FLUX.2 needs a FlowMatch scheduler with use_dynamic_shifting, not this {name}; see "
                "scheduler_config.json"
            )
        return Flux2Flow(self.image_tokens(SIZE, SIZE), timesteps=int(scheduler.config.num_train_timesteps))

    # --- prompts -----------------------------------------------------------------------------------------------

    def prompt_tokens(self) -> int:
        return self.options.max_sequence_length or TOKENS

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        return [(self.pipeline.tokenizer, self.prompt_tokens())]

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.prompt_tokens(), self._model.config.joint_attention_dim)}

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": self._encoded(prompts, max_sequence_length=self.prompt_tokens())["prompt_embeds"]}

    def negative_prompts(self, negative: str | None, count: int) -> None:
        if negative is not None:
            raise DiffalignError(NO_NEGATIVE)

    def encode_guided_prompts(self, prompts: list[str], negatives: list[str] | None) -> dict[str, Tensor]:
        if self.guided:
            return self.encode(prompts)
        empty = self.encode([""])["prompt_embeds"]
        return {**self.encode(prompts), "negative_prompt_embeds": empty.expand(len(prompts), *empty.shape[1:])}

    def sampling_options(self) -> dict[str, object]:
        return {"max_sequence_length": self.prompt_tokens()}

    def call_options(self) -> dict[str, object]:
        length = self.options.max_sequence_length
        return {} if length is None else {"max_sequence_length": length}

    # --- latents -----------------------------------------------------------------------------------------------

    @property
    def vae_scale_factor(self) -> int:
        return super().vae_scale_factor * PATCH

    @property
    def default_resolution(self) -> int:
        return SIZE

    def image_tokens(self, height: int, width: int) -> int:
        """Return the number of tokens that an image of this size in pixels has in the trunk."""
        return (height // self.vae_scale_factor) * (width // self.vae_scale_factor)

    def schedule_arguments(self, steps: int, height: int, width: int) -> ScheduleArguments:
        even = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64).tolist()
        return {"sigmas": even, "mu": math.log(self.shift_at(steps, height, width))}

    def shift_at(self, steps: int, height: int, width: int) -> float:
        return self.process.shift_of(self.image_tokens(height, width), steps)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Undo what the pipeline does to its last latents, which it returns as the VAE takes them."""
        offset, factor = (torch.as_tensor(value).to(latents) for value in self.vae.scaling(self.pipeline.vae))
        return (pixel_unshuffle(latents, PATCH) - offset) * factor

    # --- the network -------------------------------------------------------------------------------------------

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        height, width = noisy.shape[-2:]
        embeds = conditioning["prompt_embeds"]
        guidance = self.guidance
        text = torch.arange(embeds.shape[1], device=noisy.device)
        patches, places = [noisy], [positions(height, width, 0, noisy.device)]
        if "image_latents" in conditioning:
            patches.append(conditioning["image_latents"])
            rows, columns = patches[-1].shape[-2:]
            places.append(positions(rows, columns, IMAGE, noisy.device))
        tokens: Tensor = module(
            hidden_states=torch.cat([patch.flatten(2).transpose(1, 2) for patch in patches], dim=1),
            timestep=time / 1000,  # the network multiplies by 1000 itself
            guidance=None if guidance is None else torch.full((len(noisy),), float(guidance), device=noisy.device),
            encoder_hidden_states=embeds,
            txt_ids=torch.stack([torch.zeros_like(text)] * 3 + [text], dim=1),
            img_ids=torch.cat(places),
            return_dict=False,
        )[0]
        return tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


class Flux2(Flux2Klein):
    """Flux2Pipeline (FLUX.2-dev): the scale of guidance is an input of the network; Mistral Small reads the prompt.

    The option `guidance` is what the embedding gets in `predict`. In `sample` it is `guidance_scale`, as in the pipeline.
    """

    family: ClassVar[str] = "flux2"
    options: Flux2Options

    @classmethod
    def pipeline_class(cls) -> type[DiffusionPipeline]:
        from diffusers import Flux2Pipeline

        return Flux2Pipeline

    @classmethod
    def component_classes(cls) -> dict[str, type]:
        from transformers import PixtralProcessor

        return {"tokenizer": PixtralProcessor}

    @property
    def guided(self) -> bool:
        return True

    @property
    def guidance(self) -> float:
        return self.options.guidance

    def facts(self) -> dict[str, str | int]:
        return super().facts() | {"guidance": f"{self.guidance:g}"}

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return tokens [B, h w, C] as latents: unlike klein's, this pipeline returns them as the trunk has them."""
        return latents.transpose(1, 2).unflatten(2, (height, width))

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        return [(self.pipeline.tokenizer.tokenizer, self.prompt_tokens())]


def positions(height: int, width: int, image: int, device: torch.device) -> Tensor:
    """Return the positions (image, row, column, 0) of an image's tokens, [height width, 4]."""
    axes = [torch.tensor([image]), torch.arange(height), torch.arange(width), torch.zeros(1, dtype=torch.long)]
    return torch.cartesian_prod(*(axis.to(device) for axis in axes))
