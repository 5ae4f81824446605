"""Typed configs: a YAML file or a shipped recipe, dotted overrides, and errors that name key, file and line.

    config = load_config("sdxl_dpo", ["data.path=my/pairs", "train.steps=200"])

Nothing here imports torch.
"""

from diffalign.config.data import DataSection, LabelSection
from diffalign.config.distill import DistillConfig, RewardTerm, StudentValidationSection
from diffalign.config.judge import JudgeConfig, JudgeTuneSection
from diffalign.config.load import (
    config_path,
    eval_config_of_run,
    load_config,
    load_distill_config,
    load_eval_config,
    load_judge_config,
    load_rank_config,
    load_reward_gradient_config,
    load_rounds_config,
    load_run_config,
    load_sample_config,
    load_synth_config,
    recipes,
    resolved_yaml,
)
from diffalign.config.objective import OBJECTIVE_SECTIONS, ObjectiveSection
from diffalign.config.reward_gradient import RewardGradientConfig
from diffalign.config.rounds import RoundsConfig
from diffalign.config.schema import (
    CheckpointSection,
    EvalConfig,
    ModelSection,
    OptimizerSection,
    PolicySection,
    RewardSection,
    SampleConfig,
    TimeSection,
    TrackingSection,
    TrainConfig,
    TrainSection,
    TuneSection,
    ValidationSection,
)
from diffalign.config.synth import GeneratorSection, PromptSection, RankConfig, RankSection, SynthConfig

__all__ = [
    "OBJECTIVE_SECTIONS",
    "CheckpointSection",
    "DataSection",
    "DistillConfig",
    "EvalConfig",
    "GeneratorSection",
    "JudgeConfig",
    "JudgeTuneSection",
    "LabelSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "PolicySection",
    "PromptSection",
    "RankConfig",
    "RankSection",
    "RewardGradientConfig",
    "RewardSection",
    "RewardTerm",
    "RoundsConfig",
    "SampleConfig",
    "StudentValidationSection",
    "SynthConfig",
    "TimeSection",
    "TrackingSection",
    "TrainConfig",
    "TrainSection",
    "TuneSection",
    "ValidationSection",
    "config_path",
    "eval_config_of_run",
    "load_config",
    "load_distill_config",
    "load_eval_config",
    "load_judge_config",
    "load_rank_config",
    "load_reward_gradient_config",
    "load_rounds_config",
    "load_run_config",
    "load_sample_config",
    "load_synth_config",
    "recipes",
    "resolved_yaml",
]
