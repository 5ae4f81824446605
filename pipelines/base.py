"""The backbone: one interface over the diffusers pipelines. Families subclass it in their own files.

The trunk (UNet or transformer) is what trains (`tuning.py`); text encoders and VAE are always frozen.
"""

from __future__ import annotations

import gc
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.attention import set_attention
from diffalign.pipelines.options import OPTIONS, Options
from diffalign.pipelines.process import NoiseProcess
from diffalign.pipelines.quantize import number_of_weights, quantize_blocks
from diffalign.pipelines.tuning import Tunable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffalign.pipelines.loading import Source


class Backbone(Tunable):
    """A text-to-image model: encode, predict, sample, adapt, save. Build it with `load_backbone`.

    Latents are [B, C, h, w] float32, scaled as the trunk expects them; times are those of `process`.
    """

    family: ClassVar[str]
    guided: ClassVar[bool] = False
    """Whether the guidance scale is an input of the network."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Components that a checkpoint may lack, all of them or none."""
    loading_options: ClassVar[dict[str, bool]] = {}
    """Further arguments of the pipeline's `from_pretrained`."""
    options: Options
    """The values of the family's own options (`diffalign.pipelines.options`)."""

    def __init__(
        self,
        pipeline: Any,
        source: Source,
        *,
        dtype: torch.dtype,
        device: str | torch.device,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        quantize: str = "none",
        channels_last: bool = False,
        options: Options | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.source = source
        self.path, self.revision = source.path, source.revision
        self.dtype, self.device = dtype, torch.device(device)
        self.attention = attention
        self.options = options or OPTIONS[self.family]()
        self.process: NoiseProcess = self.build_process(pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        # Before the trunk goes to the device, which may not hold it whole.
        quantize_blocks(self.pipeline_trunk, quantize, self.blocks, self.device)
        pipeline.to(self.device)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.trunk: nn.Module = self.pipeline_trunk
        model: Any = self.pipeline_trunk  # diffusers' models carry methods that nn.Module does not declare
        self._model = model
        set_attention(self.trunk, attention)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if channels_last:
            if self.trunk_name != "unet":
                raise DiffalignError(
                    f"model.channels_last: {self.path} has no UNet, whose convolutions it serves; set it to false"
                )
            model.to(memory_format=torch.channels_last)
        self.vae_scale_factor: int = pipeline.vae_scale_factor
        self._vae_config: Any = pipeline.vae.config
        self._config: Any = self._model.config

    # --- what a family defines ---------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def pipeline_class(cls) -> type[DiffusionPipeline]:
        """Return the diffusers class; importing it takes seconds."""

    @classmethod
    def left_out(cls, options: Options) -> tuple[str, ...]:
        """Return the components that these options leave out."""
        return ()

    @abstractmethod
    def build_process(self, scheduler: Any) -> NoiseProcess: ...

    @abstractmethod
    def encode(self, prompts: list[str]) -> dict[str, Tensor]: ...

    @abstractmethod
    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor: ...

    def sampling_options(self) -> dict[str, Any]:
        """Arguments of the pipeline that only this family takes."""
        return {}

    def encoding_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's `encode_prompt` that only this family takes."""
        return {}

    def to_pipeline(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] in the form that the pipeline takes and returns."""
        return latents

    def from_pipeline(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `to_pipeline`; height and width are those of the latents."""
        return latents

    @abstractmethod
    def prompt_tokens(self) -> int: ...

    # --- facts -------------------------------------------------------------------------------------------------

    @property
    def guidance(self) -> float | None:
        """The guidance scale that `predict` gives a network which takes it as an input; None for all others."""
        return None

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images the trunk was made for."""
        size = self._config.sample_size
        return int(size if isinstance(size, int) else size[0]) * self.vae_scale_factor

    def sampling_times(self, steps: int, height: int, width: int) -> Tensor:
        """[steps + 1] float32: the times that the pipeline visits for an image of this size in pixels, `clean` last."""
        return self.process.schedule(steps)

    @property
    def pixel_multiple(self) -> int:
        """What sides of images are multiples of."""
        return self.vae_scale_factor

    @property
    def max_side(self) -> int | None:
        """The longest side in pixels that the trunk can place; None: no bound."""
        return None

    @property
    def latent_channels(self) -> int:
        return int(self._vae_config.latent_channels)

    def fingerprint(self) -> str:
        """Short hash of what decides latents and embeddings: folder, commit, configs, weights, dtype, prompt length."""
        return self.source.fingerprint(str(self.dtype), str(self.prompt_tokens()), self.family)

    def vae_fingerprint(self) -> str:
        """Short hash of the VAE: two models with the same one have the same latents."""
        return self.source.component_fingerprint("vae")

    def facts(self) -> dict[str, str | int]:
        """What a dry run prints."""
        facts: dict[str, str | int] = {
            "family": self.family,
            "pipeline": type(self.pipeline).__name__,
            "path": self.path,
            "revision": self.revision or "local folder",
            "prediction": self.process.prediction_type,
            "parameters": number_of_weights(self.trunk),
            "trainable": sum(p.numel() for p in self.trunk.parameters() if p.requires_grad),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.attention,
            "resolution": self.default_resolution,
            "latent_channels": self.latent_channels,
            "prompt_tokens": self.prompt_tokens(),
        }
        return facts

    # --- encode ------------------------------------------------------------------------------------------------

    def _require(self, component: str) -> None:
        if self.pipeline.components[component] is None:
            raise DiffalignError(f"{self.path}: {component} was freed by drop_encoders; load the model again")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Everything `predict` needs that depends on the prompt: tensors [B, ...] on the CPU, float32 or bfloat16."""
        self._require("text_encoder")
        if isinstance(prompts, str) or not prompts:
            raise DiffalignError("encode_prompts: a non-empty list of prompts is needed")
        encoded = self.encode(list(prompts))
        # float16 is widened: not everything that stores or mixes these knows it.
        return {k: (v.float() if v.dtype == torch.float16 else v).cpu() for k, v in encoded.items()}

    @torch.no_grad()
    def encode_guided(self, prompts: Sequence[str], negative_prompt: str | None = None) -> dict[str, Tensor]:
        """What `sample_encoded` needs in place of text encoders: the pipeline's own embeddings, also of what to steer
        away from, each [B, ...] on the CPU under the pipeline's argument names."""
        self._require("text_encoder")
        encoded = self.pipeline.encode_prompt(
            prompt=list(prompts),
            negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            **self.encoding_options(),
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return {name: value.cpu() for name, value in zip(names, encoded, strict=False)}  # SD1.5 pools nothing

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> latents [B, C, H/f, W/f] float32 on the device: posterior mean, scaled."""
        return self.encode_posterior(pixels)[0]

    @torch.no_grad()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode_images`, with the posterior's standard deviation: mean + spread * normal noise is a sample."""
        self._require("vae")
        side = self.pixel_multiple
        if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] % side or pixels.shape[3] % side:
            shape = "x".join(map(str, pixels.shape))
            raise DiffalignError(
                f"images of shape {shape} cannot be encoded: [B, 3, H, W] with multiples of {side} needed"
            )
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(self.device, vae.dtype) * 2.0 - 1.0).latent_dist
        mean = posterior.mean.float()
        offset, scale = self._latent_scale(mean)
        return (mean - offset) * scale, posterior.std.float() * scale

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W] float32 in [0, 1]; differentiable."""
        self._require("vae")
        vae = self.pipeline.vae
        offset, scale = self._latent_scale(latents)
        image = vae.decode((latents.to(self.device, torch.float32) / scale + offset).to(vae.dtype), return_dict=False)[
            0
        ]
        return (image.float() / 2.0 + 0.5).clamp(0.0, 1.0)

    def _latent_scale(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Offset and factor between the VAE's latents and the trunk's: trunk = (vae - offset) * factor."""
        config = self._vae_config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1).to(self.device)
            std = torch.tensor(config.latents_std).view(1, -1, 1, 1).to(self.device)
            return mean, config.scaling_factor / std
        return config.get("shift_factor") or 0.0, config.scaling_factor

    # --- predict and sample ------------------------------------------------------------------------------------

    def predict(
        self, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor], module: nn.Module | None = None
    ) -> Tensor:
        """The network's native prediction (epsilon, v or velocity), [N, C, h, w] float32, differentiable.

        noisy [N, C, h, w]; t [N] in the process's units; conditioning from `encode_prompts`, each [N, ...]. Runs under
        the current role, inside torch.autocast or without. `module` stands in for the policy's trunk (a DDP wrapper of
        it).
        """
        active = self.pipeline_trunk
        if module is None:
            module = active
        elif active is not self.trunk:
            raise RuntimeError("predict: the reference is a copy of its own; pass no module inside role('reference')")
        # The base's dtype, not that of the float32 LoRA weights within it. Autocast leaves inputs of non-matmul layers
        # as they are, so they are cast in either case.
        dtype = self._base_dtype(active)
        inputs = {name: value.to(self.device, dtype) for name, value in conditioning.items()}
        time = self.process.model_time(t).to(self.device)
        return self.forward(module, noisy.to(self.device, dtype), time, inputs).float()

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Sample one image per prompt and seed through the diffusers pipeline, under the current role.

        Image i depends on prompt i and seed i: its noise is what `torch.Generator().manual_seed(seed)` on the CPU gives
        a plain diffusers pipeline. Seeds lie in [0, 2**32): torch's CPU generator reads no more bits. Returns PIL
        images, or a float32 tensor for output_type "pt" ([B, 3, H, W] in [0, 1]) and "latent" ([B, C, h, w]).
        """
        self._require("vae")
        self._require("text_encoder")
        if len(prompts) != len(seeds) or not prompts:
            raise DiffalignError(
                f"sample: {len(prompts)} prompts and {len(seeds)} seeds; one seed per prompt is needed"
            )
        inputs = {
            "prompt": list(prompts),
            "negative_prompt": None if negative_prompt is None else [negative_prompt] * len(prompts),
        }
        return self._sample(inputs, seeds, steps, guidance_scale, height, width, output_type)

    @torch.no_grad()
    def sample_encoded(
        self,
        encoded: dict[str, Tensor],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance_scale: float,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
    ) -> Any:
        """`sample` from what `encode_guided` gave, with the text encoders freed; the same images."""
        inputs = {name: value.to(self.device, self.dtype) for name, value in encoded.items()}
        return self._sample(inputs, seeds, steps, guidance_scale, height, width, output_type)

    def _sample(
        self,
        inputs: dict[str, Any],
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        height: int | None,
        width: int | None,
        output_type: str,
    ) -> Any:
        if output_type not in ("pil", "pt", "latent"):
            raise DiffalignError(f"sample: unknown output_type '{output_type}'; choose pil, pt or latent")
        outside = [s for s in seeds if not 0 <= s < 2**32]
        if outside:
            raise DiffalignError(f"sample: seed {outside[0]} is outside 0..2**32-1; larger ones would repeat silently")
        if steps < 1:
            raise DiffalignError(f"sample: {steps} sampling steps asked for; at least 1 is needed")
        height, width = height or self.default_resolution, width or self.default_resolution
        multiple, side = self.pixel_multiple, self.vae_scale_factor
        if height % multiple or width % multiple:
            raise DiffalignError(
                f"sample: {height}x{width} pixels are not multiples of {multiple}, which this model needs"
            )
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        shape = (1, self.latent_channels, height // side, width // side)
        noise = torch.cat([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators])
        trunk_dtype = self._base_dtype(self.pipeline_trunk)
        # After full fine-tuning of a bf16 checkpoint the trunk is float32 while the encoders are not.
        mixed = trunk_dtype != self.dtype
        with torch.autocast(self.device.type, dtype=self.dtype) if mixed else nullcontext():
            latents = self.pipeline(
                **inputs,
                latents=self.to_pipeline(noise.to(self.device, self.dtype)),
                generator=generators,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                output_type="latent",
                **self.sampling_options(),
            ).images
        latents = self.from_pipeline(latents, height // side, width // side)
        if output_type == "latent":
            return latents.float()
        pixels = self.decode_latents(latents)
        if output_type == "pt":
            return pixels
        return self.pipeline.image_processor.postprocess(
            pixels, output_type="pil", do_denormalize=[False] * len(pixels)
        )

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
        """The VAE on the device for the time of the block, decoding tile by tile where images are larger than a tile."""
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
