"""Define the architectures of the two shipped base models: real diffusers and transformers classes, but small.

Their latents differ as those of SDXL and SD3 do: the UNet has few channels on a fine grid (16 x 16); the transformer,
whose cost and difficulty grow with the number of positions, has many channels on a coarse one (8 x 8). Text encoders
are trained with the trunk, since there are none to start from.
"""

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffalign.testbed.tokenizers import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

CLIP_WIDTH = 64
SIZE = 64


@dataclass(frozen=True)
class Latents:
    """The shape of latents. The VAE has a level for each of `widths`; all but the first halve the image."""

    channels: int
    widths: tuple[int, ...]

    @property
    def side(self) -> int:
        """Height and width of the latents."""
        return SIZE // 2 ** (len(self.widths) - 1)


LATENTS = {"shapes-sd3": Latents(16, (16, 32, 48, 64)), "shapes-sdxl": Latents(8, (8, 24, 48))}


def autoencoder(name: str) -> AutoencoderKL:
    """Return the untrained VAE of a model. It is purely convolutional, since shapes are local."""
    latents = LATENTS[name]
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(latents.widths),
        up_block_types=("UpDecoderBlock2D",) * len(latents.widths),
        block_out_channels=latents.widths,
        layers_per_block=1,
        latent_channels=latents.channels,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def clip_text_model(projected: bool, pad_token: str) -> tuple[CLIPTextModel | CLIPTextModelWithProjection, object]:
    """Return an untrained CLIP text model and its tokenizer. It has three layers; diffusers reads the last but one."""
    tokenizer = clip_tokenizer(pad_token)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=CLIP_WIDTH,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), tokenizer


def shapes_sd3(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Return a rectified-flow MMDiT with two CLIPs and a tiny T5, so that `from_pretrained` needs no special arguments."""
    tokenizer_3 = t5_tokenizer()
    width = 2 * CLIP_WIDTH
    text_encoder_3 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_3),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer_3.pad_token_id,
            eos_token_id=tokenizer_3.eos_token_id,
        )
    )
    latents = LATENTS["shapes-sd3"]
    transformer = SD3Transformer2DModel(
        sample_size=latents.side,
        patch_size=1,
        in_channels=latents.channels,
        out_channels=latents.channels,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=width,
        caption_projection_dim=160,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=latents.side,
    )
    clip_1, clip_2 = clip_text_model(True, "<|endoftext|>"), clip_text_model(True, "!")
    return StableDiffusion3Pipeline(
        transformer=transformer,
        # The grid is as coarse as the image is small: shifting it towards noise, as at 1024 px, would only waste steps.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=clip_1[0],
        tokenizer=clip_1[1],
        text_encoder_2=clip_2[0],
        tokenizer_2=clip_2[1],
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def shapes_sdxl(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """Return an epsilon-prediction UNet with SDXL's micro-conditioning and two CLIPs."""
    latents = LATENTS["shapes-sdxl"]
    unet = UNet2DConditionModel(
        sample_size=latents.side,
        in_channels=latents.channels,
        out_channels=latents.channels,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(1, 2, 4),  # the number of heads, whatever its name says
        use_linear_projection=True,
        cross_attention_dim=2 * CLIP_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
        norm_num_groups=16,
    )
    clip_1, clip_2 = clip_text_model(False, "<|endoftext|>"), clip_text_model(True, "!")
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=vae,
        text_encoder=clip_1[0],
        tokenizer=clip_1[1],
        text_encoder_2=clip_2[0],
        tokenizer_2=clip_2[1],
        add_watermarker=False,
    )


BUILDERS = {"shapes-sd3": shapes_sd3, "shapes-sdxl": shapes_sdxl}


def parameters(pipeline: StableDiffusion3Pipeline | StableDiffusionXLPipeline) -> dict[str, int]:
    """Return the number of parameters by component."""
    modules = {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
