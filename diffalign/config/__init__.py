"""Typed configs: a YAML file or a shipped recipe, dotted overrides, and errors that name key, file and line.

    config = load_config("sdxl_dpo", ["data.path=my/pairs", "train.steps=200"])

Nothing here imports torch.
"""

from diffalign.config.data import DataSection, LabelSection
from diffalign.config.distill import DistillConfig, RewardTerm
from diffalign.config.images import (
    BenchConfig,
    EvalConfig,
    SampleConfig,
    SamplingSection,
    SizedSamplingSection,
)
from diffalign.config.judge import JudgeConfig, JudgeModelSection, JudgeTuneSection
from diffalign.config.load import (
    KINDS,
    bench_config,
    eval_config_of_run,
    kind_of_run,
    load,
    load_config,
    load_distill_config,
    load_eval_config,
    load_for,
    load_judge_config,
    load_personal_config,
    load_rank_config,
    load_reward_gradient_config,
    load_rounds_config,
    load_run_config,
    load_sample_config,
    load_synth_config,
    resolved_yaml,
)
from diffalign.config.model import ModelSection, PolicySection, TuneSection
from diffalign.config.noise import TimeSection
from diffalign.config.objective import OBJECTIVE_SECTIONS, ObjectiveSection
from diffalign.config.online import OnlineSection
from diffalign.config.personal import PersonalConfig
from diffalign.config.recipes import Recipe, config_path, list_recipes, recipes
from diffalign.config.reward_gradient import RewardGradientConfig
from diffalign.config.rounds import RoundsConfig
from diffalign.config.run import (
    BackboneRunConfig,
    CheckpointSection,
    OptimizerSection,
    RewardSection,
    RunConfig,
    StepSection,
    TrackingSection,
    ValidationSection,
)
from diffalign.config.synth import GeneratorSection, PromptSection, RankConfig, RankSection, SynthConfig
from diffalign.config.train import SampledValidationSection, TrainConfig
from diffalign.config.train_section import TrainSection

__all__ = [
    "KINDS",
    "OBJECTIVE_SECTIONS",
    "BackboneRunConfig",
    "BenchConfig",
    "CheckpointSection",
    "DataSection",
    "DistillConfig",
    "EvalConfig",
    "GeneratorSection",
    "JudgeConfig",
    "JudgeModelSection",
    "JudgeTuneSection",
    "LabelSection",
    "ModelSection",
    "ObjectiveSection",
    "OnlineSection",
    "OptimizerSection",
    "PersonalConfig",
    "PolicySection",
    "PromptSection",
    "RankConfig",
    "RankSection",
    "Recipe",
    "RewardGradientConfig",
    "RewardSection",
    "RewardTerm",
    "RoundsConfig",
    "RunConfig",
    "SampleConfig",
    "SampledValidationSection",
    "SamplingSection",
    "SizedSamplingSection",
    "StepSection",
    "SynthConfig",
    "TimeSection",
    "TrackingSection",
    "TrainConfig",
    "TrainSection",
    "TuneSection",
    "ValidationSection",
    "bench_config",
    "config_path",
    "eval_config_of_run",
    "kind_of_run",
    "list_recipes",
    "load",
    "load_config",
    "load_distill_config",
    "load_eval_config",
    "load_for",
    "load_judge_config",
    "load_personal_config",
    "load_rank_config",
    "load_reward_gradient_config",
    "load_rounds_config",
    "load_run_config",
    "load_sample_config",
    "load_synth_config",
    "recipes",
    "resolved_yaml",
]
