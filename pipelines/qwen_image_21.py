"""Qwen-Image-2.1: rectified flow in one block-causal stream of prompt and image. Only text is its input here, no picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.family import unpadded
from diffalign.pipelines.flux import FluxFlow
from diffalign.pipelines.qwen_image import EMPTY, QwenPrompts
from diffalign.pipelines.settings import SamplingSettings
from diffalign.pipelines.vae import FrameVAE, NormalVAE

if TYPE_CHECKING:
    from diffusers import ModelMixin, QwenImage21Pipeline, SchedulerMixin
    from transformers import PreTrainedTokenizerBase

SLOT = 4
"""Latents for which one slot of the text encoder's sequence stands."""


class OpaqueVAE(FrameVAE):
    """A video VAE with a fourth channel, opacity: images are encoded as opaque, and of decoded ones it is dropped."""

    def posterior(self, module: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return super().posterior(module, torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    def pixels(self, module: ModelMixin, latents: Tensor) -> Tensor:
        return super().pixels(module, latents)[:, :3]


class QwenImage21(QwenPrompts):
    """QwenImage21Pipeline. Latents have 16 pixels a cell and are not packed; image sides are multiples of 32.

    The image's positions follow those of its prompt, padding included. So only prompts of one length go through the network
    together, and each image depends on its own prompt alone.
    """

    family: ClassVar[str] = "qwen_image_21"
    kernels: ClassVar[tuple[str, ...]] = ("sdpa",)  # diffusers' processor ignores any other in training
    blocks: ClassVar[tuple[str, ...]] = ("QwenImage21TransformerBlock",)
    vae_kind: ClassVar[type[NormalVAE]] = OpaqueVAE
    text_width: ClassVar[str] = "context_in_dim"

    @classmethod
    def pipeline_class(cls) -> type[QwenImage21Pipeline]:
        from diffusers import QwenImage21Pipeline

        return QwenImage21Pipeline

    def build_process(self, scheduler: SchedulerMixin) -> FluxFlow:
        if self.pipeline.config.get("sample_sigmas") is not None:
            raise DiffalignError(
                f"{self.path}: a Qwen-Image-2.1 with sample_sigmas is distilled to a few steps (Turbo) and cannot be trained; "
                "use Qwen-Image-2.1"
            )
        return super().build_process(scheduler)

    def tokens(self, height: int, width: int) -> int:
        return (height // self.vae_scale_factor) * (width // self.vae_scale_factor)

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        tokenizer = self.pipeline.processor.tokenizer
        template = len(tokenizer(self.pipeline.prompt_template_t2i.format(""))["input_ids"]) - self.pipeline._drop_idx
        return [(tokenizer, self.prompt_tokens() - template)]

    # --- sampling ----------------------------------------------------------------------------------------------

    def to_pipeline(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (height, width))

    def _latents(self, inputs: Mapping[str, object], seeds: Sequence[int], settings: SamplingSettings) -> Tensor:
        rows: dict[int, list[int]] = {}
        for row, length in enumerate(self._lengths(inputs)):
            rows.setdefault(length, []).append(row)
        found: dict[int, Tensor] = {}
        for alike in rows.values():
            drawn = super()._latents(_some(inputs, alike), [seeds[row] for row in alike], settings)
            found |= dict(zip(alike, drawn, strict=True))
        return torch.stack([found[row] for row in sorted(found)])

    def _lengths(self, inputs: Mapping[str, Any]) -> list[int]:
        """Return how many tokens each prompt has."""
        if "prompt" not in inputs:
            lengths: list[int] = inputs["prompt_embeds_mask"].sum(dim=1).tolist()
            return lengths
        template, tokenizer = self.pipeline.prompt_template_t2i, self.pipeline.processor.tokenizer
        return [len(tokenizer(template.format(prompt or EMPTY))["input_ids"]) for prompt in inputs["prompt"]]

    # --- network -----------------------------------------------------------------------------------------------

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        prompts = unpadded(conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"])
        parts, start = [], 0
        for _, run in groupby(prompts, key=len):
            alike = torch.stack(list(run))
            rows = slice(start, start + len(alike))
            parts.append(self._predict_alike(module, noisy[rows], time[rows], alike))
            start += len(alike)
        return torch.cat(parts)

    def _predict_alike(self, module: nn.Module, noisy: Tensor, time: Tensor, prompts: Tensor) -> Tensor:
        """Predict for prompts of one length, [N, L, D]."""
        height, width = noisy.shape[-2:]
        if noisy.is_meta:
            tokens = _follow_shapes(module, self.to_pipeline(noisy), time, prompts)
        else:
            slots = torch.zeros(len(noisy), prompts.shape[1] + height * width // SLOT, dtype=torch.bool)
            slots[:, prompts.shape[1] :] = True
            tokens = module(
                hidden_states=self.to_pipeline(noisy),
                encoder_hidden_states=prompts,
                timestep=time / 1000,
                img_shapes=[[(1, height, width)]] * len(noisy),
                img_mask=slots.to(noisy.device),
                return_dict=False,
            )[0]
        return self.from_pipeline(tokens[:, -height * width :], height, width)

    def image_positions(self, features: Tensor, noisy: Tensor) -> Tensor:
        return features[:, -noisy[0, 0].numel() :]


def _some(inputs: Mapping[str, Any], rows: list[int]) -> dict[str, object]:
    """Return these rows of the pipeline's arguments, embeddings without the padding that all of them have."""
    part: dict[str, Any] = {
        name: value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]
        for name, value in inputs.items()
    }
    for name in [name for name in part if name.endswith("prompt_embeds_mask")]:
        longest = int(part[name].sum(dim=1).max())
        for padded in (name, name.removesuffix("_mask")):
            part[padded] = part[padded][:, :longest]
    return part


def _follow_shapes(trunk: Any, tokens: Tensor, time: Tensor, prompts: Tensor) -> Tensor:
    """Take the steps of the trunk's forward on the meta device, where it cannot read positions from a mask."""
    x = torch.cat([trunk.txt_in(prompts), trunk.img_in(tokens)], dim=1)
    seen = time if not trunk.config.causal_condition else torch.cat([time, time.new_zeros(1)])
    embedded = trunk.time_text_embed(seen.to(x.dtype), x)
    image = torch.zeros(x.shape[1], dtype=torch.bool, device="meta") if trunk.config.causal_condition else None
    places = torch.empty(x.shape[1], trunk.config.attention_head_dim // 2, dtype=torch.complex64, device="meta")
    rest = (trunk.modulation(embedded), places, None, image, None, None, None, [(0, prompts.shape[1], True)], None)
    for block in trunk.transformer_blocks:
        checkpointed = torch.is_grad_enabled() and trunk.gradient_checkpointing
        x = trunk._gradient_checkpointing_func(block, x, *rest) if checkpointed else block(x, *rest)
    output: Tensor = trunk.proj_out(trunk.norm_out(x, embedded, image))
    return output
