"""Stable Diffusion 3 and 3.5: rectified flow in an MMDiT, two CLIP encoders and optionally T5."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from diffalign.errors import DiffalignError
from diffalign.pipelines.base import JOINT_ATTENTION, TransformerBackbone
from diffalign.pipelines.kohya import KohyaLayout
from diffalign.pipelines.options import Options, SD3Options
from diffalign.pipelines.original_names import sd3_place
from diffalign.pipelines.process import Flow
from diffalign.pipelines.save_single_file import VAE, SingleFile, clip_state, t5_state, vae_state

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, StableDiffusion3Pipeline
    from transformers import PreTrainedTokenizerBase

DEFAULT_T5_TOKENS = 256


class StableDiffusion3(TransformerBackbone):
    """StableDiffusion3Pipeline. Conditioning: prompt_embeds [B, L_clip + L_t5, D] and pooled_prompt_embeds [B, P].

    Without T5 its L_t5 positions are zeros, as diffusers has it. The option `max_sequence_length` is L_t5; unset, it is
    the tokenizer's own limit if that is shorter than diffusers' default of 256.
    """

    family: ClassVar[str] = "sd3"
    single_files: ClassVar[bool] = True
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")
    scheduler_seeded: ClassVar[bool] = False
    blocks: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION

    kohya: ClassVar[KohyaLayout | None] = KohyaLayout("sd3", "networks.lora_sd3", sd3_place)
    single_file: ClassVar[SingleFile | None] = SingleFile(
        sd3_place,
        "ComfyUI; diffusers' `from_single_file`",
        components={
            "vae": (VAE, vae_state),
            "text_encoder": ("text_encoders.clip_l.transformer.", clip_state),
            "text_encoder_2": ("text_encoders.clip_g.transformer.", clip_state),
            "text_encoder_3": ("text_encoders.t5xxl.transformer.", t5_state),
        },
    )

    options: SD3Options

    @classmethod
    def pipeline_class(cls) -> type[StableDiffusion3Pipeline]:
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    @classmethod
    def left_out(cls, options: Options) -> tuple[str, ...]:
        return () if isinstance(options, SD3Options) and options.use_t5 else cls.optional

    def build_process(self, scheduler: SchedulerMixin) -> Flow:
        config = scheduler.config
        name = type(scheduler).__name__
        if "FlowMatch" not in name:
            raise DiffalignError(f"scheduler: SD3 needs a FlowMatch scheduler, not {name}; see scheduler_config.json")
        if config.get("use_dynamic_shifting"):
            raise DiffalignError(
                "scheduler: use_dynamic_shifting is not supported; set it to false and give a fixed shift"
            )
        return Flow(
            float(config.shift),
            timesteps=int(config.num_train_timesteps),
            shift_terminal=config.get("shift_terminal"),
        )

    @property
    def max_side(self) -> int:
        """Its table of positions ends somewhere."""
        config = self.pipeline.transformer.config
        return int(config.pos_embed_max_size) * int(config.patch_size) * self.vae_scale_factor

    def t5_tokens(self) -> int:
        if self.options.max_sequence_length is not None:
            return self.options.max_sequence_length
        tokenizer = self.pipeline.tokenizer_3
        return DEFAULT_T5_TOKENS if tokenizer is None else min(DEFAULT_T5_TOKENS, int(tokenizer.model_max_length))

    def prompt_tokens(self) -> int:
        return int(self.pipeline.tokenizer.model_max_length) + self.t5_tokens()

    def prompt_readers(self) -> list[tuple[PreTrainedTokenizerBase, int]]:
        t5 = self.pipeline.tokenizer_3
        return [*super().prompt_readers(), *([] if t5 is None else [(t5, self.t5_tokens())])]

    def sampling_options(self) -> dict[str, object]:
        return {"max_sequence_length": self.t5_tokens()}

    def call_options(self) -> dict[str, object]:
        length = self.options.max_sequence_length
        return {} if length is None else {"max_sequence_length": length}

    def encoding_options(self) -> dict[str, object]:
        return {"prompt_2": None, "prompt_3": None, "max_sequence_length": self.t5_tokens()}

    def forward(self, module: nn.Module, noisy: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        output: Tensor = module(
            hidden_states=noisy,
            timestep=time,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return output
