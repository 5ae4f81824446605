"""Turn the names in a config into devices, models, prompts, rewards and validations; here, and nowhere else.

`shapes-sd3` becomes a folder, `testbed:test` becomes prompts, `detector: shapes` becomes a detector that is handed to the
reward, since rewards and pipelines know nothing of the embedded world.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffalign import testbed
from diffalign.config import (
    BackboneRunConfig,
    DistillConfig,
    GeneratorSection,
    JudgeModelSection,
    ModelSection,
    RewardGradientConfig,
    RewardSection,
    SampleConfig,
    SizedSamplingSection,
    TrainConfig,
    ValidationSection,
    load_run_config,
)
from diffalign.data.prompts import PromptRow, hub_prompts, read_prompts, unique_prompts
from diffalign.data.shared_tasks import local_rank_and_world_size
from diffalign.data.suites import read_suite
from diffalign.data.suites_hub import from_hub, read_hub_suite
from diffalign.errors import DiffalignError
from diffalign.files.tensors import read_tensors
from diffalign.hub import cache_alone, hub_answers
from diffalign.pipelines import Backbone, load_backbone
from diffalign.pipelines.generator import Generator, load_generator
from diffalign.pipelines.hub import HUB_ID, find_index
from diffalign.pipelines.known_models import known_backbone, known_models
from diffalign.pipelines.lora_file import checkpoint_file, is_checkpoint, stated_base
from diffalign.pipelines.schedulers import replace_scheduler
from diffalign.pipelines.settings import SamplingSettings
from diffalign.pretrained import quiet_progress
from diffalign.progress import say
from diffalign.rewards import REWARDS, Detector, Reward, load_reward, takes
from diffalign.rewards.groupwise import GroupReward
from diffalign.rewards.judge import Judge, load_judge
from diffalign.rewards.rubric import load_rubrics
from diffalign.testbed.detector import ShapeDetector
from diffalign.testbed.shape_prompts import draw_prompts
from diffalign.training.validation import Validation

Loading = TypeVar("Loading", TrainConfig, DistillConfig, RewardGradientConfig, SampleConfig)

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DETECTORS: dict[str, type[Detector]] = {"shapes": ShapeDetector}
TESTBED_PROMPTS = 256
FIRST_JUDGES = ("hpsv2", "pickscore")
"""Rewards that judge any image with a prompt, in the order in which they are tried where none is named."""
Settled = TypeVar("Settled", bound=BackboneRunConfig)


def resolve_device(device: str) -> str:
    """Return `cpu` or `cuda` for auto, cpu or cuda. Raise DiffalignError for CUDA on a machine without it."""
    if device not in DEVICES:
        raise DiffalignError(f"device {device}: unknown; one of {', '.join(DEVICES)}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise DiffalignError("device cuda: this machine has no usable CUDA device; use cpu or auto")
    return "cuda" if device != "cpu" and available else "cpu"


def process_device(device: str) -> str:
    """Return what `resolve_device` returns; of several processes on CUDA each gets a GPU of its own, such as `cuda:1`."""
    resolved, (number, world) = resolve_device(device), local_rank_and_world_size()
    return f"cuda:{number % torch.cuda.device_count()}" if resolved == "cuda" and world > 1 else resolved


def model_folder(path: str) -> str:
    """Return the folder of a model of the embedded world, and any other path or hub id as it is."""
    return str(testbed.model_path(path)) if path in testbed.MODELS else path


def open_backbone(model: ModelSection, device: str) -> Backbone:
    """Load the backbone that a `model` section names."""
    return load_backbone(model_folder(model.path), device=device, **_loading(model, device))


def planned_backbone(model: ModelSection) -> Backbone | None:
    """Return a backbone to plan with, on the CPU: of a known hub model its shapes alone, of any other the model itself.

    None where that is not on this machine: nothing is downloaded. Raises DiffalignError as `load_backbone`.
    """
    # 4-bit weights have no shapes without the weights themselves.
    if model.path in known_models() and not Path(model.path).exists() and model.quantize != "nf4":
        wanted = ("dtype", "attention", "gradient_checkpointing", "quantize", "channels_last", *model.options)
        given = {key: value for key, value in _loading(model, "cpu").items() if key in wanted}
        return known_backbone(model.path, **given)
    if testbed_or_folder(model.path) or model_is_here(model):
        with cache_alone():
            return open_backbone(model, "cpu")
    return None


def testbed_or_folder(path: str) -> bool:
    """Return whether a model's path is no hub id: a model of the embedded world, a folder or a file, or a mistyped one."""
    return path in testbed.MODELS or Path(path).expanduser().exists() or not HUB_ID.fullmatch(path)


def model_is_here(model: ModelSection) -> bool:
    """Return whether a model needs no download; of a hub model, whether its index is in the local cache."""
    if testbed_or_folder(model.path):
        return True
    try:
        find_index(model.path, model.revision, None, local_files_only=True)
    except DiffalignError:
        return False
    return True


def open_plain_backbone(model: ModelSection) -> Backbone:
    """Load the backbone in float32 on the CPU without quantisation or special kernels, as a pipeline is saved from it."""
    plain = {"dtype": "float32", "attention": "sdpa", "quantize": "none", "channels_last": False}
    return open_backbone(model.model_copy(update=plain), "cpu")


def open_generator(section: GeneratorSection, device: str) -> Generator:
    """Load the model that a section of `generators` names, with its weights and sampler."""
    model = section.model
    generator = load_generator(model_folder(model.path), device=device, prior=section.prior, **_loading(model, device))
    if section.weights is not None:
        note_other_base(section.weights, model)
        generator.load_weights(section.weights)
    if section.scheduler is not None:
        replace_scheduler(generator.pipeline, section.scheduler.name, section.scheduler.options)
    return generator


def note_other_base(weights: Path | None, model: ModelSection) -> None:
    """Say so where trained weights state that they belong to another model: equal shapes do not make them fit."""
    if weights is None:
        return
    checkpoint = is_checkpoint(weights)
    run = weights.absolute().parent.parent.parent if checkpoint else weights.absolute().parent
    if (checkpoint or weights.name in ("weights", "best")) and (run / "config.yaml").is_file():
        trained = load_run_config(run / "config.yaml")
        base = trained.model.path if isinstance(trained, BackboneRunConfig) else model.path
        if model_folder(base) != model_folder(model.path):
            say(f"note: {weights} was trained on {base}, and is loaded into {model.path}")
    elif not checkpoint and (made_for := stated_base(weights)):
        say(f"note: {weights} says that it was made for {made_for}; it is loaded into {model.path}")


def open_judge(model: JudgeModelSection, device: str) -> Judge:
    """Load the judge that a `model` section names; what the section leaves open is as the judge's folder states it."""
    rubrics = None if model.rubrics is None else load_rubrics(model.rubrics)
    with quiet_progress():
        return load_judge(model.path, labels=model.labels, rubrics=rubrics, dtype=DTYPES[model.dtype], device=device)


def _loading(model: ModelSection, device: str) -> dict[str, Any]:
    """Return the keyword arguments of `load_backbone` that a `model` section states."""
    stated = model.model_dump(exclude={"path", "dtype", "compile", "options"})
    return {"dtype": DTYPES[resolve_dtype(model, device).dtype], **stated, **model.options}


def resolve_dtype(model: ModelSection, device: str, full: bool = False) -> ModelSection:
    """Return the section with `dtype: auto` replaced by what this device takes; full: whether all weights train."""
    if model.dtype != "auto":
        return model
    half = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) and not full
    return model.model_copy(update={"dtype": "bfloat16" if half else "float32"})


def settled(config: Loading) -> Loading:
    """Return the config with its model's number type resolved, so that what a run writes says which it was."""
    full = isinstance(config, BackboneRunConfig) and config.tune.kind == "full"
    return config.model_copy(update={"model": resolve_dtype(config.model, resolve_device(config.device), full)})


def resolve_prompts(
    source: str,
    n: int | None,
    seed: int = 0,
    *,
    column: str = "prompt",
    split: str = "train",
    unique: bool = False,
) -> list[PromptRow]:
    """Return the first `n` prompts of a source, all where `n` is None (256 of the embedded world).

    source: a file or folder as `read_prompts` takes it, `hub:OWNER/DATASET`, `suite:NAME:PATH`, `suite:NAME:hub` or
    `testbed:SPLIT`, whose prompts are drawn with `seed`. column, split: where a table, a folder or a hub dataset keeps
    the prompts. unique: skip prompts that came before.
    """
    kind, _, rest = source.partition(":")
    if kind == "suite":
        name, _, path = rest.partition(":")
        rows = read_hub_suite(name, path) if from_hub(path) else read_suite(name, Path(path))
    elif kind == "testbed":
        drawn = draw_prompts(rest, n or TESTBED_PROMPTS, seed)
        rows = [PromptRow(row["prompt"], {k: v for k, v in row.items() if k != "prompt"}) for row in drawn]
    elif kind == "hub":
        rows = hub_prompts(rest, column, split)
    else:
        rows = read_prompts(source, column, split)
    return (unique_prompts(rows) if unique else rows)[:n]


def with_judges(config: Settled, trained_on: Sequence[str] = ()) -> Settled:
    """Return the config of a trainer with the rewards of its validation settled (`settled_rewards`).

    A run that is resumed keeps those in its config.yaml. trained_on: rewards that the run learns from.
    """
    section = config.validation
    if section.every is None or section.prompts is None:
        return config
    resolve_prompts(section.prompts, section.n)  # what cannot be read comes before what is not named
    given = section.rewards
    written = Path(config.run_dir) / "config.yaml"
    if "rewards" not in section.model_fields_set and written.is_file():
        before = load_run_config(written)
        if isinstance(before, BackboneRunConfig) and before.validation.every is not None:
            given = before.validation.rewards
    rewards = settled_rewards(given, config.model.path, section.prompts, "validation.rewards", trained_on)
    return config.model_copy(update={"validation": section.model_copy(update={"rewards": rewards})})


def settled_rewards(
    sections: Sequence[RewardSection], model: str, prompts: str, key: str, trained_on: Sequence[str] = ()
) -> list[RewardSection]:
    """Return rewards with what is left open settled: nothing of the embedded world judges other models.

    Without a name: GenEval there, elsewhere the first of FIRST_JUDGES that is here or can be fetched. Without a detector:
    the world's own there, elsewhere GenEval's own. Raises DiffalignError where no such reward is to be had.
    """
    if model in testbed.MODELS or prompts.startswith("testbed:"):
        return list(sections)
    settled = []
    for section in sections:
        changed: dict[str, Any] = {}
        if "name" not in section.model_fields_set:
            changed["name"] = _first_judge(key, trained_on)
        name = changed.get("name", section.name)
        if "detector" not in section.model_fields_set and takes(name, "detector"):
            changed["detector"] = None
        settled.append(section.model_copy(update=changed) if changed else section)
    return settled


def _first_judge(key: str, trained_on: Sequence[str]) -> str:
    """Return the reward that judges where none is named: one whose weights are here, else one that can be fetched."""
    names = [name for name in FIRST_JUDGES if name not in trained_on]
    for name in names:
        with cache_alone(), suppress(DiffalignError):
            load_reward(name).weights_id()
            return name
    if hub_answers():
        return names[0]
    raise DiffalignError(
        f"{key}: none is named, the weights of {' and '.join(names)} are not here, and the hub gave no answer; name a reward "
        "that is here, such as clipscore, or fetch one (`diffalign rewards` lists them)"
    )


def open_reward(section: RewardSection, device: str) -> Reward:
    """Build the reward that a section names; `detector` counts for rewards that take one."""
    named = {"detector": section.detector} if section.detector is not None and takes(section.name, "detector") else {}
    reward = build_reward(section.name, {**section.options, **named}, device)
    if isinstance(reward, GroupReward):
        raise DiffalignError(
            f"reward {section.name}: it compares images of one prompt; score a folder or dataset with `diffalign score`"
        )
    return reward


def build_reward(name: str, options: Mapping[str, Any], device: str) -> Reward:
    """Build a reward on `device`, unless its options name another; `detector: shapes` becomes the detector itself.

    Raises DiffalignError for a name, an option or a detector that does not exist.
    """
    given = dict(options)
    if takes(name, "device"):
        given.setdefault("device", device)
    detector = given.get("detector")
    if isinstance(detector, str) and detector in DETECTORS:
        given["detector"] = DETECTORS[detector]()
    elif detector is not None and name in REWARDS:  # a reward of another package may have detectors of its own
        raise DiffalignError(f"reward {name}: unknown detector {detector!r}; there are {', '.join(DETECTORS)}")
    return load_reward(name, **given)


def open_rewards(
    sections: Sequence[RewardSection], rows: list[PromptRow], device: str, key: str, prompts: str
) -> dict[str, Reward]:
    """Build rewards by name. Raise DiffalignError before any image is drawn where one cannot score a prompt."""
    opened = [open_reward(section, device) for section in sections]
    rewards = {section.label: reward for section, reward in zip(sections, opened, strict=True)}
    for name, reward in rewards.items():
        for row in rows:
            if reason := reward.reason_not_scorable(row.prompt, row.metadata):
                raise DiffalignError(
                    f"{key}: {name} cannot judge {row.prompt!r} of {prompts}: {reason}; name another reward, such as "
                    "{name: pickscore}, or give prompts with what it needs"
                )
    return rewards


def sampling_settings(section: SizedSamplingSection) -> SamplingSettings:
    """Return how a section wants its images drawn."""
    return SamplingSettings(
        section.steps, section.guidance_scale, section.negative_prompt, section.height, section.width
    )


def check_guidance_scale(scale: float, backbone: Backbone, key: str = "guidance_scale") -> None:
    """Refuse to draw at another guidance scale than the network is trained under, where the scale is its input."""
    if backbone.guidance is not None and backbone.guidance != scale:
        raise DiffalignError(
            f"{key}={scale:g}: {backbone.path} takes the scale as an input and is trained under "
            f"model.options.guidance={backbone.guidance:g}; set both to the same value"
        )


def weights_digest(weights: Path) -> str:
    """Return a hash of the tensors in a folder or file; not of its bytes, since safetensors writes metadata in any order."""
    digest = hashlib.blake2b(digest_size=12)
    files = [weights] if weights.is_file() else sorted(weights.rglob("*.safetensors"))
    if is_checkpoint(weights):
        files = [checkpoint_file(weights)]
    if not files:
        raise DiffalignError(f"weights {weights}: no .safetensors file in it")
    for path in files:
        tensors = read_tensors(path)
        for name in sorted(tensors):
            digest.update(f"{path.relative_to(weights) if path != weights else path.name} {name}".encode())
            digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_validation(
    section: ValidationSection,
    backbone: Backbone,
    rows: list[PromptRow],
    rewards: dict[str, Reward],
    seed: int,
    sampling: SamplingSettings,
) -> Validation:
    """Encode the prompts of a validation, while the text encoders are in memory.

    rows, rewards: as `checks.check_validation` found them. sampling: how the images are drawn, of which the negative prompt
    is encoded here.
    """
    texts = [row.prompt for row in rows]
    chunks = [texts[i : i + section.batch_size] for i in range(0, len(texts), section.batch_size)]
    parts = [backbone.encode_guided(chunk, sampling.negative_prompt) for chunk in chunks]
    encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Validation(backbone, section, rows, encoded, rewards, sampling, seed)
