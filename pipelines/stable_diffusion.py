"""Stable Diffusion 1.x and SDXL: UNets over 4-channel latents, epsilon or v prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.base import Backbone
from diffalign.pipelines.kohya import KohyaLayout, diffusers_place
from diffalign.pipelines.original_names import unet_place
from diffalign.pipelines.process import Diffusion
from diffalign.pipelines.save_single_file import VAE, SingleFile, clip_state, open_clip_state, vae_state

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusionPipeline, StableDiffusionXLPipeline


def diffusion_process(scheduler: SchedulerMixin) -> Diffusion:
    """Read prediction type, zero terminal SNR and timestep layout from a diffusers scheduler.

    Raises DiffalignError for schedulers without a table of alphas (EDM) and for what `Diffusion` refuses.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if "alphas_cumprod" not in vars(scheduler):
        raise DiffalignError(
            f"scheduler: {name} has no alphas_cumprod; only discrete epsilon and v schedulers are supported"
        )
    euler = "Euler" in name
    # Euler ends at sigma 0; DDIM and PNDM decide by `set_alpha_to_one`.
    clean = euler or config.get("set_alpha_to_one", True)
    final = 1.0 if clean else float(scheduler.alphas_cumprod[0])
    spacing = config.get("timestep_spacing", "leading")
    return Diffusion(
        scheduler.alphas_cumprod,
        config.get("prediction_type", "epsilon"),
        spacing=spacing,
        offset=int(config.get("steps_offset", 0)),
        final_alpha_cumprod=final,
        scaled_start=euler and spacing != "leading",
        zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
        log_sigmas=euler and any(config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta")),
    )


class _UNetBackbone(Backbone):
    trunk_name: ClassVar[str] = "unet"
    single_files: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    blocks: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock",)
    # Their norms, activations and sums move as much memory as the transformer blocks' do.
    compiled: ClassVar[tuple[str, ...]] = ("ResnetBlock2D",)

    def build_process(self, scheduler: SchedulerMixin) -> Diffusion:
        if self.pipeline.unet.config.get("time_cond_proj_dim") is not None:
            raise DiffalignError(f"{self.path}: guidance-distilled models (LCM) cannot be trained; use the base model")
        return diffusion_process(scheduler)

    @property
    def pipeline_trunk(self) -> nn.Module:
        trunk: nn.Module = self.pipeline.unet
        return trunk

    @pipeline_trunk.setter
    def pipeline_trunk(self, module: nn.Module) -> None:
        self.pipeline.unet = module

    def prompt_tokens(self) -> int:
        return int(self.pipeline.tokenizer.model_max_length)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.prompt_tokens(), self._model.config.cross_attention_dim)}

    def middle_block(self) -> nn.Module:
        return self.pipeline_trunk.get_submodule("mid_block")


class StableDiffusion15(_UNetBackbone):
    """StableDiffusionPipeline: one CLIP text encoder. Conditioning: prompt_embeds [B, L, D]."""

    family: ClassVar[str] = "sd15"
    loading_options: ClassVar[dict[str, bool]] = {"requires_safety_checker": False}
    conditioning: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    encoder_outputs: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")
    kohya: ClassVar[KohyaLayout | None] = KohyaLayout("sd_v1", "networks.lora", diffusers_place)
    single_file: ClassVar[SingleFile | None] = SingleFile(
        unet_place,
        "ComfyUI, A1111 and Forge; diffusers' `from_single_file`",
        components={"vae": (VAE, vae_state), "text_encoder": ("cond_stage_model.transformer.", clip_state)},
    )

    @classmethod
    def pipeline_class(cls) -> type[StableDiffusionPipeline]:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        output: Tensor = module(noisy, time, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False)[0]
        return output


class StableDiffusionXL(_UNetBackbone):
    """StableDiffusionXLPipeline. Conditioning: prompt_embeds [B, L, D1 + D2] and pooled_prompt_embeds [B, D2].

    Micro-conditioning (Podell et al. 2023, section 2.2): original and target size are the image's own, the crop is 0,
    0.
    """

    family: ClassVar[str] = "sdxl"
    loading_options: ClassVar[dict[str, bool]] = {"add_watermarker": False}
    kohya: ClassVar[KohyaLayout | None] = KohyaLayout("sdxl_base_v1-0", "networks.lora", unet_place)
    single_file: ClassVar[SingleFile | None] = SingleFile(
        unet_place,
        "ComfyUI, A1111 and Forge; diffusers' `from_single_file`",
        components={
            "vae": (VAE, vae_state),
            "text_encoder": ("conditioner.embedders.0.transformer.", clip_state),
            "text_encoder_2": ("conditioner.embedders.1.model.", open_clip_state),
        },
    )

    @classmethod
    def pipeline_class(cls) -> type[StableDiffusionXLPipeline]:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self._model.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().conditioning_shapes(), "pooled_prompt_embeds": (pooled,)}

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        height, width = (side * self.vae_scale_factor for side in noisy.shape[-2:])
        # In the trunk's dtype, as the pipeline has it. Filled there: a transfer would make the host wait.
        size = torch.stack([noisy.new_full((), side) for side in (height, width, 0, 0, height, width)])
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": size.expand(len(noisy), 6)}
        output: Tensor = module(
            noisy,
            time,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output
