"""Turn the names in a config into models, prompts and validations; here, and nowhere else.

`shapes-sd3` becomes a folder, `testbed:test` becomes prompts, since pipelines know nothing of the embedded world. Devices and
rewards are in resolve_rewards.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from diffalign import testbed
from diffalign.config import (
    BackboneRunConfig,
    BenchConfig,
    DistillConfig,
    GeneratorSection,
    JudgeModelSection,
    ModelSection,
    RewardGradientConfig,
    SampleConfig,
    SizedSamplingSection,
    TrainConfig,
    ValidationSection,
    load_run_config,
)
from diffalign.data.prompts import PromptRow, hub_prompts, read_prompts, unique_prompts
from diffalign.data.suites import read_suite
from diffalign.data.suites_hub import from_hub, read_hub_suite
from diffalign.errors import DiffalignError
from diffalign.files.remote import is_address, local_copy
from diffalign.files.tensors import read_tensors
from diffalign.hub import cache_alone
from diffalign.pipelines import Backbone, load_backbone
from diffalign.pipelines.generator import Generator, load_generator
from diffalign.pipelines.hub import HUB_ID, find_index
from diffalign.pipelines.known_models import known_backbone, known_models
from diffalign.pipelines.lora_file import checkpoint_file, is_checkpoint, stated_base
from diffalign.pipelines.schedulers import replace_scheduler
from diffalign.pipelines.settings import SamplingSettings
from diffalign.pretrained import quiet_progress
from diffalign.progress import say, waiting_for
from diffalign.rewards import Reward
from diffalign.rewards.judge import Judge, load_judge
from diffalign.rewards.rubric import load_rubrics
from diffalign.stages.resolve_rewards import resolve_device, settled_rewards
from diffalign.testbed.shape_prompts import draw_prompts

if TYPE_CHECKING:
    from diffalign.training.validation import Validation

Loading = TypeVar("Loading", TrainConfig, DistillConfig, RewardGradientConfig, SampleConfig, BenchConfig)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TESTBED_PROMPTS = 256
Settled = TypeVar("Settled", bound=BackboneRunConfig)


def model_folder(path: str) -> str:
    """Return the folder of a model of the embedded world, and any other path or hub id as it is."""
    return str(testbed.model_path(path)) if path in testbed.MODELS else path


def open_backbone(model: ModelSection, device: str) -> Backbone:
    """Load the backbone that a `model` section names."""
    # A download has bars of its own.
    with waiting_for(f"loading {model.path}") if model_is_here(model) else nullcontext():
        return load_backbone(model_folder(model.path), device=device, **_loading(model, device))


def planned_backbone(model: ModelSection) -> Backbone | None:
    """Return a backbone to plan with, on the CPU: of a known hub model its shapes alone, of any other the model itself.

    None where that is not on this machine: nothing is downloaded. Raises DiffalignError as `load_backbone`.
    """
    if model.path in known_models() and not Path(model.path).exists():
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
    if stated["gradient_checkpointing"] == "auto":  # chosen once it is known what a step needs
        stated["gradient_checkpointing"] = False
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

    source: a file or folder as `read_prompts` takes it, the address of a file (s3://), `hub:OWNER/DATASET`,
    `suite:NAME:PATH`, `suite:NAME:hub` or `testbed:SPLIT`, whose prompts are drawn with `seed`. column, split: where a
    table, a folder or a hub dataset keeps the prompts. unique: skip prompts that came before.
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
        rows = read_prompts(str(local_copy(source)) if is_address(source) else source, column, split)
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
    from diffalign.training.validation import Validation  # needs accelerate, which other stages do without

    texts = [row.prompt for row in rows]
    chunks = [texts[i : i + section.batch_size] for i in range(0, len(texts), section.batch_size)]
    parts = [backbone.encode_guided(chunk, sampling.negative_prompt) for chunk in chunks]
    encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Validation(backbone, section, rows, encoded, rewards, sampling, seed)
