"""Diffusion-DPO on SDXL as scripts commonly write it, for comparison: every step encodes its images and its captions.

What diffusers' research_projects/diffusion_dpo does in a step, written anew: VAE and both text encoders on the batch, one noise
and one time for both images of a pair, one policy forward on the concatenated pairs, one reference forward with the adapters
off, -log sigmoid(-0.5 beta (d_w - d_l)), backward, clipped gradient, optimiser. No cache, no seeded draws, nothing logged.
The encoders are reduced with the UNet: their shares of one UNet forward's FLOPs are those of the real SDXL at 1024 px.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.pipelines.adapters import use_adapter
from diffalign.pipelines.lean_lora import use_peft_forward
from shared.random_models import BETAS, VAE

VAE_SHARE, TEXT_SHARE = 0.722, 0.0164
"""FLOPs of SDXL's VAE encoder an image, and of both text encoders a caption, in UNet forwards of one image at 1024 px."""
SMALL_VAE: dict[str, Any] = VAE | {"block_out_channels": (18, 38, 76, 76), "norm_num_groups": 2}
WORDS, TOKENS = 1000, 77


def autoencoder(device: str = "cpu") -> AutoencoderKL:
    with torch.device(device):
        return AutoencoderKL(**SMALL_VAE).requires_grad_(False)


def text_encoders(device: str = "cpu") -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Of widths 96 and 160, which together are the small UNet's cross-attention width."""

    def config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=WORDS, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
            num_attention_heads=width // 32, projection_dim=width, bos_token_id=0, eos_token_id=WORDS - 1,
        )  # fmt: skip

    with torch.device(device):
        first, second = CLIPTextModel(config(96)), CLIPTextModelWithProjection(config(160))
    return first.requires_grad_(False), second.requires_grad_(False)


class CommonScript:
    """One step a call, on a UNet with a LoRA. pixels [B, 2, 3, H, W], winners first; captions [B, TOKENS] token numbers."""

    def __init__(
        self, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, beta: float, side: int, pairs: int
    ) -> None:
        use_peft_forward(unet)  # as peft and diffusers have them, without our leaner ones
        unet.set_attn_processor(AttnProcessor2_0())
        self.unet, self.optimizer, self.beta, self.side = unet, optimizer, beta, side
        self.vae, (self.text_1, self.text_2) = autoencoder(), text_encoders()
        self.scheduler = DDPMScheduler(**{k: BETAS[k] for k in ("beta_start", "beta_end", "beta_schedule")})
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        generator = torch.Generator().manual_seed(2)
        self.pixels = torch.rand(pairs, 2, 3, side, side, generator=generator)
        self.captions = torch.randint(WORDS, (pairs, TOKENS), generator=generator)

    def encode(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of winners then losers, embeddings, pooled embeddings."""
        pixels = self.pixels.transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            latents = self.vae.encode(pixels * 2 - 1).latent_dist.sample() * self.vae.config.scaling_factor
            first = self.text_1(self.captions, output_hidden_states=True)
            second = self.text_2(self.captions, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return latents, embeds.repeat(2, 1, 1), second.text_embeds.repeat(2, 1)

    def __call__(self) -> float:
        latents, embeds, pooled = self.encode()
        pairs = len(latents) // 2
        noise = torch.randn(pairs, *latents.shape[1:]).repeat(2, 1, 1, 1)
        times = torch.randint(0, 1000, (pairs,)).repeat(2)
        noisy = self.scheduler.add_noise(latents, noise, times)
        sizes = torch.tensor([self.side, self.side, 0, 0, self.side, self.side]).expand(2 * pairs, 6)
        inputs = (noisy, times, embeds)
        added = {"text_embeds": pooled, "time_ids": sizes}

        def errors() -> Tensor:
            predicted = self.unet(*inputs, added_cond_kwargs=added).sample
            return F.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))

        policy_w, policy_l = errors().chunk(2)
        with torch.no_grad(), use_adapter(self.unet, None):
            reference_w, reference_l = errors().chunk(2)
        inside = -0.5 * self.beta * ((policy_w - policy_l) - (reference_w - reference_l))
        loss = -F.logsigmoid(inside).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())
