"""Qwen-Image: rectified flow in an MMDiT over 2 x 2 patches, an image-text model as text encoder, a video VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.base import JOINT_ATTENTION
from diffalign.pipelines.family import padded
from diffalign.pipelines.flux import FluxFlow, PackedFlow, pack, unpack
from diffalign.pipelines.options import PromptOptions
from diffalign.pipelines.vae import FrameVAE, NormalVAE

if TYPE_CHECKING:
    from diffusers import QwenImagePipeline, SchedulerMixin
    from transformers import PreTrainedTokenizerBase

EMPTY = " "
"""What the authors steer away from where nothing else is given. Without a negative prompt their pipeline has no guidance."""


class QwenPrompts(PackedFlow):
    """What Qwen-Image and Qwen-Image-2.1 share: prompts with masks, guidance under another name, packed latents.

    Conditioning: prompt_embeds [B, L, D] and prompt_embeds_mask [B, L].
    """

    scheduler_seeded: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]] = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    vae_kind: ClassVar[type[NormalVAE]] = FrameVAE
    conditioning: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_embeds_mask")
    prompt_masks: ClassVar[tuple[str, ...]] = ("prompt_embeds_mask",)
    text_width: ClassVar[str] = "joint_attention_dim"
    """The key of the trunk's config that says how wide a token of the prompt is."""

    options: PromptOptions

    def prompt_tokens(self) -> int:
        return self.options.max_sequence_length

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.prompt_tokens()
        width = self.pipeline.transformer.config[self.text_width]
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    def negative_prompts(self, negative: str | None, count: int) -> list[str]:
        return [negative or EMPTY] * count

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask, *_ = self.pipeline.encode_prompt(list(prompts), device=self.device)
        return dict(zip(self.conditioning, padded(embeds, mask, self.prompt_tokens()), strict=True))

    def encode_guided_prompts(self, prompts: list[str], negatives: list[str] | None) -> dict[str, Tensor]:
        negative = self.encode(negatives or [EMPTY] * len(prompts))
        return self.encode(prompts) | {f"negative_{name}": value for name, value in negative.items()}

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        return {"true_cfg_scale": scale}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height, width)


class QwenImage(QwenPrompts):
    """QwenImagePipeline: Qwen-Image and Qwen-Image-2512.

    Under guidance its pipeline gives each patch of u + scale (c - u) the length that c has there.
    """

    family: ClassVar[str] = "qwen_image"
    kernels: ClassVar[tuple[str, ...]] = ("sdpa", "xformers")
    blocks: ClassVar[tuple[str, ...]] = ("QwenImageTransformerBlock",)
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION

    @classmethod
    def pipeline_class(cls) -> type[QwenImagePipeline]:
        from diffusers import QwenImagePipeline

        return QwenImagePipeline

    def build_process(self, scheduler: SchedulerMixin) -> FluxFlow:
        if self.pipeline.transformer.config.guidance_embeds:
            raise DiffalignError(f"{self.path}: a Qwen-Image with guidance embedding is not supported")
        return super().build_process(scheduler)

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        return [(self.pipeline.tokenizer, self.prompt_tokens() - self._template_tokens())]

    def _template_tokens(self) -> int:
        """Return how many tokens of its template follow a prompt; those before it are dropped."""
        pipeline = self.pipeline
        whole = pipeline.tokenizer(pipeline.prompt_template_encode.format(""))["input_ids"]
        return len(whole) - int(pipeline.prompt_template_encode_start_idx)

    def sampling_options(self) -> dict[str, object]:
        return {"max_sequence_length": self.prompt_tokens()}

    def call_options(self) -> dict[str, object]:
        return {} if self.options == PromptOptions() else self.sampling_options()

    def rescale_guided(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        patches, wanted = pack(guided), pack(with_prompt).norm(dim=-1, keepdim=True)
        return unpack(patches * (wanted / patches.norm(dim=-1, keepdim=True)), *guided.shape[-2:])

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        height, width = noisy.shape[-2:]
        patches: Tensor = module(
            hidden_states=pack(noisy),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning["prompt_embeds_mask"],
            timestep=time / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(patches, height, width)
