"""Z-Image: rectified flow in a single-stream transformer over image and prompt, with a language model as text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from diffalign.pipelines.family import padded_rows, unpadded
from diffalign.pipelines.flux import PackedFlow
from diffalign.pipelines.options import PromptOptions

if TYPE_CHECKING:
    from diffusers import ZImagePipeline
    from transformers import PreTrainedTokenizerBase


class ZImage(PackedFlow):
    """ZImagePipeline: Z-Image and Z-Image-Turbo. Conditioning: prompt_embeds [B, L, D] and prompt_mask [B, L].

    The network takes 1 - t and gives x0 - noise; `predict` gives noise - x0 at t, as for every flow. It takes prompts without
    padding, and places the image behind its prompt, so `forward` cuts each prompt to its own length. The pipeline's
    guidance_scale g means c + g (c - u): one less than the scale here.
    """

    family: ClassVar[str] = "z_image"
    scheduler_seeded: ClassVar[bool] = False
    latents_in_float32: ClassVar[bool] = True
    kernels: ClassVar[tuple[str, ...]] = ("sdpa", "xformers")  # prompts of several lengths are masked
    blocks: ClassVar[tuple[str, ...]] = ("ZImageTransformerBlock",)
    block_list: ClassVar[str] = "layers"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
    )  # fmt: skip
    conditioning: ClassVar[tuple[str, ...]] = ("prompt_embeds", "prompt_mask")
    prompt_masks: ClassVar[tuple[str, ...]] = ("prompt_mask",)

    options: PromptOptions

    @classmethod
    def pipeline_class(cls) -> type[ZImagePipeline]:
        from diffusers import ZImagePipeline

        return ZImagePipeline

    @classmethod
    def component_classes(cls) -> dict[str, type]:
        from transformers import Qwen2Tokenizer, Qwen3Model

        return {"text_encoder": Qwen3Model, "tokenizer": Qwen2Tokenizer}

    @property
    def max_side(self) -> int:
        """Its tables of positions end somewhere."""
        return int(min(self.pipeline.transformer.config.axes_lens[1:])) * self.pixel_multiple

    # --- prompts -----------------------------------------------------------------------------------------------

    def prompt_tokens(self) -> int:
        return self.options.max_sequence_length

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.prompt_tokens()
        return {"prompt_embeds": (tokens, self.pipeline.transformer.config.cap_feat_dim), "prompt_mask": (tokens,)}

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        tokenizer = self.pipeline.tokenizer
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return [(tokenizer, self.prompt_tokens() - len(tokenizer(template)["input_ids"]))]

    def sampling_options(self) -> dict[str, object]:
        return {"max_sequence_length": self.prompt_tokens()}

    def call_options(self) -> dict[str, object]:
        return {} if self.options == PromptOptions() else self.sampling_options()

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        rows, _ = self.pipeline.encode_prompt(
            list(prompts),  # it writes its template into the list
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.prompt_tokens(),
        )
        return dict(zip(self.conditioning, padded_rows(rows, self.prompt_tokens()), strict=True))

    def encode_guided_prompts(self, prompts: list[str], negatives: list[str] | None) -> dict[str, Tensor]:
        negative = self.encode(negatives or [""] * len(prompts))
        return self.encode(prompts) | {f"negative_{name}": value for name, value in negative.items()}

    def pipeline_inputs(self, encoded: dict[str, Tensor]) -> dict[str, object]:
        return {
            f"{kind}prompt_embeds": unpadded(encoded[f"{kind}prompt_embeds"], encoded[f"{kind}prompt_mask"])
            for kind in ("", "negative_")
        }

    # --- network and sampling ----------------------------------------------------------------------------------

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": max(0.0, scale - 1.0)}

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        found: list[Tensor] = module(
            list(noisy[:, :, None].unbind()),
            (1000 - time) / 1000,
            unpadded(conditioning["prompt_embeds"], conditioning["prompt_mask"]),
            return_dict=False,
        )[0]
        return -torch.stack(found)[:, :, 0]

    def image_positions(self, features: Tensor, noisy: Tensor) -> Tensor:
        return features[:, : noisy[0, 0, ::2, ::2].numel()]  # patches of 2 x 2, before the prompt
