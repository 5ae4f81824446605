"""Sana: rectified flow in a transformer with linear attention, 32 pixels a cell (DC-AE), Gemma 2 for prompts."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.masked_prompts import MaskedPrompts
from diffalign.pipelines.options import SanaOptions
from diffalign.pipelines.process import Flow
from diffalign.pipelines.schedulers import is_flow
from diffalign.pipelines.vae import NormalVAE, PlainVAE

if TYPE_CHECKING:
    from diffusers import SanaPipeline, SchedulerMixin


class SolverFlow(Flow):
    """Rectified flow with the times of DPM-Solver's scheduler, Sana's own: an even grid from 1 - 1/T, shifted once."""

    def schedule(self, steps: int) -> Tensor:
        if steps < 1:
            raise DiffalignError(f"steps: {steps} sampling steps asked for; at least 1 is needed")
        even = torch.linspace(1.0 - 1.0 / self.timesteps, 0.0, steps + 1, dtype=torch.float64)
        return self._shifted(even).float()


class Sana(MaskedPrompts):
    """SanaPipeline. Conditioning: prompt_embeds [B, L, D] and prompt_attention_mask [B, L]; image sides are multiples of 32.

    The prompt is read behind an instruction to the language model, the pipeline's own ("complex human instruction"), unless
    the option `instruction` is false. Gemma overflows in float16, and runs in bfloat16 there. The published sampler is a
    DPM-Solver, which training cannot unroll; sampler.scheduler=flow_euler stands in its place.
    """

    family: ClassVar[str] = "sana"
    vae_kind: ClassVar[type[NormalVAE]] = PlainVAE
    latents_in_float32: ClassVar[bool] = True
    blocks: ClassVar[tuple[str, ...]] = ("SanaTransformerBlock",)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    options: SanaOptions

    @classmethod
    def pipeline_class(cls) -> type[SanaPipeline]:
        from diffusers import SanaPipeline

        return SanaPipeline

    @classmethod
    def component_classes(cls) -> dict[str, type]:
        from transformers import Gemma2Model, GemmaTokenizerFast

        return {"tokenizer": GemmaTokenizerFast, "text_encoder": Gemma2Model}

    @classmethod
    def text_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype == torch.float16 else dtype

    def build_process(self, scheduler: SchedulerMixin) -> Flow:
        config, name = scheduler.config, type(scheduler).__name__
        if not is_flow(scheduler) or config.get("use_dynamic_shifting"):
            raise DiffalignError(
                f"scheduler: Sana needs a scheduler of a flow with a fixed shift, not this {name}; see scheduler_config.json"
            )
        timesteps = int(config.num_train_timesteps)
        if "flow_shift" in config:
            return SolverFlow(float(config.flow_shift), timesteps=timesteps)
        return Flow(float(config.shift), timesteps=timesteps, shift_terminal=config.get("shift_terminal"))

    def encoding_options(self) -> dict[str, object]:
        return {**super().encoding_options(), "complex_human_instruction": self.instruction()}

    def encoding_marks(self) -> tuple[str, ...]:
        return () if self.options.instruction else ("instruction=false",)

    def instruction(self) -> list[str] | None:
        """Return the lines that stand before a prompt: the pipeline's own, or None."""
        if not self.options.instruction:
            return None
        own = inspect.signature(self.pipeline_class().__call__).parameters["complex_human_instruction"].default
        return list(own)

    def call_options(self) -> dict[str, object]:
        plain = {} if self.options.instruction else {"complex_human_instruction": None}
        return {**super().call_options(), **plain}

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        output: Tensor = module(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=time * self._model.config.timestep_scale,
            return_dict=False,
        )[0]
        return output
