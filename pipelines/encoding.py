"""The half of a backbone that encodes: prompts to embeddings, images to latents and back."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.family import Family
from diffalign.pipelines.prompt_length import count_longer


class Encoding(Family):
    """Text encoders and VAE of a backbone. They are frozen, and may be freed once everything is encoded."""

    def _require(self, component: str) -> None:
        if self.pipeline.components[component] is None:
            raise DiffalignError(f"{self.path}: {component} was freed by drop_encoders; load the model again")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts to all that `predict` needs of them: tensors [B, ...] on the CPU, float32, bfloat16 or masks."""
        self._require("text_encoder")
        if isinstance(prompts, str) or not prompts:
            raise DiffalignError("encode_prompts: a non-empty list of prompts is needed")
        return _widened(self.encode(list(prompts)))

    @torch.no_grad()
    def encode_guided(self, prompts: Sequence[str], negative_prompt: str | None = None) -> dict[str, Tensor]:
        """Encode prompts to what `sample_encoded` needs in place of text encoders: the pipeline's own embeddings.

        Those of the negative prompt are among them; each [B, ...] on the CPU under the pipeline's argument names.
        """
        self._require("text_encoder")
        negatives = self.negative_prompts(negative_prompt, len(prompts))
        return {name: value.cpu() for name, value in self.encode_guided_prompts(list(prompts), negatives).items()}

    def encode_unconditional(self) -> dict[str, Tensor]:
        """Return what the pipeline steers away from where no negative prompt is given, for `predict`: [1, ...] on the CPU.

        Zeros for an SDXL with `force_zeros_for_empty_prompt`, the empty prompt's embedding for most others. A network with
        the guidance built in steers away from nothing; there it is the empty prompt's, too.
        """
        prefix, guided = "negative_", self.encode_guided([""])
        negative = {name.removeprefix(prefix): v for name, v in guided.items() if name.startswith(prefix)}
        return _widened({name: negative[name] for name in self.conditioning}) if negative else self.encode_prompts([""])

    @property
    def longest(self) -> int:
        """The number of tokens of a prompt that the text encoder reads which reads most; the rest has no effect."""
        return max(longest for _, longest in self.prompt_readers())

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many distinct prompts are longer than `longest` tokens."""
        tokenizer, longest = max(self.prompt_readers(), key=lambda reader: reader[1])
        return count_longer(tokenizer, prompts, longest)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, 3, H, W] in [0, 1] to latents [B, C, H/f, W/f] float32 on the device: posterior mean, scaled."""
        return self.encode_posterior(pixels)[0]

    @torch.no_grad()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode as `encode_images`, with the posterior's standard deviation: mean + spread * normal noise is a sample.

        The spread is 0 where the VAE gives one latent and no distribution.
        """
        self._require("vae")
        side = self.pixel_multiple
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] % side or pixels.shape[3] % side:
            shape = "x".join(map(str, pixels.shape))
            raise DiffalignError(
                f"images of shape {shape} cannot be encoded: [B, 3, H, W] with multiples of {side} needed"
            )
        return self.vae.encode(self.pipeline.vae, pixels.to(self.device))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to pixels [B, 3, H, W] float32 in [0, 1]; differentiable."""
        self._require("vae")
        return self.vae.decode(self.pipeline.vae, latents.to(self.device))

    def to_images(self, pixels: Tensor) -> list[Image.Image]:
        """Turn pixels [B, 3, H, W] in [0, 1] into PIL images, rounded as the pipeline rounds them."""
        images: list[Image.Image] = self.pipeline.image_processor.postprocess(
            pixels.detach(), output_type="pil", do_denormalize=[False] * len(pixels)
        )
        return images

    # --- memory ------------------------------------------------------------------------------------------------

    def drop_encoders(self, keep_vae: bool = False, keep_text: bool = False) -> None:
        """Free VAE and text encoders: with latents and embeddings cached, training needs only the trunk.

        `keep_vae` leaves the VAE in the CPU's memory, for `borrowed_vae`; `keep_text` leaves the text encoders where they are.
        """
        for name, component in list(self.pipeline.components.items()):
            if not isinstance(component, nn.Module) or name == self.trunk_name:
                continue
            if name == "vae" and keep_vae:
                component.to("cpu")
            elif name == "vae" or not keep_text:
                self.pipeline.register_modules(**{name: None})
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def borrowed_vae(self) -> Iterator[None]:
        """Put the VAE on the device inside the block, decoding tile by tile where images are larger than a tile."""
        vae = self.pipeline.vae
        if vae is None:
            raise DiffalignError(f"{self.path}: the VAE was freed by drop_encoders; keep it with keep_vae=True")
        home = vae.device  # the CPU, unless training encodes its images itself
        vae.to(self.device)
        vae.enable_tiling()
        try:
            yield
        finally:
            vae.disable_tiling()
            vae.to(home)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def _widened(encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return embeddings on the CPU, float16 as float32: not everything that stores or mixes them knows float16."""
    return {k: (v.float() if v.dtype == torch.float16 else v).cpu() for k, v in encoded.items()}
