"""The backbone: one interface over the diffusers pipelines. Families subclass it in their own files.

The trunk (UNet or transformer) is what trains (`tuning.py`); text encoders and VAE are always frozen. A backbone is built in
layers, one file each: `tuning`, `family` (what differs between families), `encoding`, `sampling`, and the rest here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.attention import ATTENTION, set_attention
from diffalign.pipelines.checkpointing import Checkpointing
from diffalign.pipelines.low_adapters import installed, lowered
from diffalign.pipelines.options import OPTIONS, Options
from diffalign.pipelines.quantize import number_of_weights, quantize_blocks
from diffalign.pipelines.sampling import Sampling
from diffalign.pipelines.schedulers import replace_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffalign.pipelines.source import Source


JOINT_ATTENTION = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""The projections of attention over image and text together, as diffusers names them: what a LoRA of these families adapts."""


class Backbone(Sampling):
    """A text-to-image model: encode, predict, sample, adapt, save. Build it with `load_backbone`.

    Latents are [B, C, h, w] float32, scaled as the trunk expects them; times are those of `process`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        source: Source,
        *,
        dtype: torch.dtype,
        device: str | torch.device,
        attention: str = "sdpa",
        gradient_checkpointing: Checkpointing = False,
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
        self.process = self.build_process(pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        # Before the trunk goes to the device, which may not hold it whole.
        quantize_blocks(self.pipeline_trunk, quantize, self.blocks, self.device)
        pipeline.to(self.device)
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
        self.trunk = self.pipeline_trunk
        self._model = self.pipeline_trunk
        if attention in ATTENTION and attention not in self.kernels:
            raise DiffalignError(
                f"model.attention: {attention} is not possible with {self.family}; use {' or '.join(self.kernels)}"
            )
        self.cudnn = set_attention(self.trunk, attention)
        if gradient_checkpointing:
            self.checkpoint(gradient_checkpointing)
        if channels_last:
            if self.trunk_name != "unet":
                raise DiffalignError(
                    f"model.channels_last: {self.path} has no UNet, whose convolutions it serves; set it to false"
                )
            self._model.to(memory_format=torch.channels_last)
        self.vae = self.vae_kind(pipeline.vae.config)

    def use_scheduler(self, name: str, options: Mapping[str, object]) -> None:
        """Draw with another sampler from here on; see `replace_scheduler`."""
        replace_scheduler(self.pipeline, name, options)
        self.process = self.build_process(self.pipeline.scheduler)

    # --- facts -------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hash what decides latents and embeddings: folder, commit, configs, weights, dtype, prompt length; 16 digits."""
        marks = self.encoding_marks()
        return self.source.fingerprint(str(self.dtype), str(self.prompt_tokens()), self.family, *marks)

    def vae_fingerprint(self) -> str:
        """Hash the VAE: two models with the same hash have the same latents."""
        return self.source.component_fingerprint("vae")

    def facts(self) -> dict[str, str | int]:
        """Return what a dry run prints about the model."""
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

    # --- predict ---------------------------------------------------------------------------------------------

    def predict(
        self, noisy: Tensor, t: Tensor, conditioning: dict[str, Tensor], module: nn.Module | None = None
    ) -> Tensor:
        """Return the network's native prediction (epsilon, v or velocity), [N, C, h, w] float32, differentiable.

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
        # as they are, so they are cast in either case. Masks may come back from a store as numbers.
        dtype = self.base_dtype(active)
        inputs = {
            name: value.to(self.device, torch.bool if name in self.prompt_masks else dtype)
            for name, value in conditioning.items()
        }
        time = self.process.model_time(t).to(self.device)
        low = lowered(active, dtype) if self.lowers_adapters else []
        with installed(active, low):
            return self.forward(module, noisy.to(self.device, dtype), time, inputs).float()


class TransformerBackbone(Backbone):
    """A backbone whose trunk is the pipeline's `transformer`."""

    trunk_name: ClassVar[str] = "transformer"

    @property
    def pipeline_trunk(self) -> nn.Module:
        trunk: nn.Module = self.pipeline.transformer
        return trunk

    @pipeline_trunk.setter
    def pipeline_trunk(self, module: nn.Module) -> None:
        self.pipeline.transformer = module
