"""PixArt-Sigma: epsilon prediction in a transformer over 4-channel latents, T5 for prompts."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from diffalign.pipelines.masked_prompts import MaskedPrompts
from diffalign.pipelines.process import Diffusion
from diffalign.pipelines.stable_diffusion import diffusion_process

if TYPE_CHECKING:
    from diffusers import PixArtSigmaPipeline, SchedulerMixin


class PixArt(MaskedPrompts):
    """PixArtSigmaPipeline. Conditioning: prompt_embeds [B, L, D] and prompt_attention_mask [B, L].

    Prompts are read as they are and images keep their size. The network also predicts a variance, which diffusers leaves
    unused. The published sampler is a DPM-Solver, which training cannot unroll; sampler.scheduler=ddim stands in its place.
    """

    family: ClassVar[str] = "pixart"
    published_as: ClassVar[dict[str, str]] = {"transformer": "Transformer2DModel"}
    lora_loader: ClassVar[bool] = False
    blocks: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock",)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    @classmethod
    def pipeline_class(cls) -> type[PixArtSigmaPipeline]:
        from diffusers import PixArtSigmaPipeline

        return PixArtSigmaPipeline

    @classmethod
    def component_classes(cls) -> dict[str, type]:
        return {"transformer": _adaptable()}

    def build_process(self, scheduler: SchedulerMixin) -> Diffusion:
        return diffusion_process(scheduler)

    @property
    def pixel_multiple(self) -> int:
        return self.vae_scale_factor * int(self._model.config.patch_size)

    def sampling_options(self) -> dict[str, object]:
        return {**super().sampling_options(), "clean_caption": False}

    def call_options(self) -> dict[str, object]:
        return {**super().call_options(), "clean_caption": False}

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        output: Tensor = module(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : noisy.shape[1]]  # what follows are the variances


@cache
def _adaptable() -> type:
    """Return diffusers' class of the trunk with the methods for adapters that those of other families have."""
    from diffusers import PixArtTransformer2DModel
    from diffusers.loaders.peft import PeftAdapterMixin

    own = PixArtTransformer2DModel
    # By name and module the same class, so that a pipeline with it is saved and loaded as diffusers' own.
    return type(own.__name__, (own, PeftAdapterMixin), {"__module__": own.__module__})
