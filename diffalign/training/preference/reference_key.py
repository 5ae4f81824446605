"""The key of a `ReferenceStore`: everything that decides the reference's predictions in a step; and the store with that key.

What is not in the key may differ between runs that share a store: the objective among those that look at the same images,
beta, the optimiser, LoRA or full fine-tuning, `error_space`, the number of steps, group weights, and labels as far as they
choose no images.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from diffalign.config import TrainConfig
from diffalign.errors import DiffalignError
from diffalign.objectives import Objective
from diffalign.pipelines import Backbone
from diffalign.training.device import precision_of
from diffalign.training.preference.reference_store import ReferenceStore
from diffalign.training.protocols import GroupSource, Say

ROWS = 65536
ELSEWHERE = {
    "path", "revision", "variant", "token", "local_files_only", "gradient_checkpointing", "lora_text_encoders", "config",
}  # fmt: skip
"""Keys of the model section that its fingerprint covers, or that change no prediction."""


def open_store(
    config: TrainConfig,
    source: GroupSource,
    backbone: Backbone,
    objective: Objective,
    accelerator: Accelerator,
    micro: int,
    say: Say,
) -> ReferenceStore | None:
    """Open the store that `config.reference` names, if any; raise DiffalignError where it belongs to other draws."""
    folder = config.reference.store
    if folder is None:
        return None
    if not objective.needs_reference and config.noise != "inverted":
        raise DiffalignError(
            f"reference.store={folder}: {config.objective.name} has no reference, and nothing would be kept; leave it out"
        )
    key = reference_key(
        config,
        source,
        backbone,
        objective,
        micro=micro,
        precision=precision_of(config, cuda=accelerator.device.type == "cuda"),
    )
    store = ReferenceStore(Path(folder), key, accelerator.process_index)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        lacks = "; the drift metric needs reference.keep=predictions" if config.reference.errors_only else ""
        say(
            f"reference.store {store.folder}: {store.count()} micro-batches are there, others are computed and kept{lacks}"
        )
    return store


def reference_key(
    config: TrainConfig, source: GroupSource, backbone: Backbone, objective: Objective, *, micro: int, precision: str
) -> dict[str, object]:
    """Return dotted fields of the config, and hashes of what they stand for; in the order in which a difference is named.

    `micro`: groups in one forward pass; `precision`: accelerate's, since `auto` is another on another machine.
    """
    tune, data, train, selection = config.tune, config.data, config.train, config.selection
    own = tune.init if tune.reference == "init" else None
    chosen = selection.groups != "all" or selection.images != "all"
    return {
        **{f"model.{name}": value for name, value in config.model.model_dump(exclude=ELSEWHERE).items()},
        "model": backbone.fingerprint(),
        "tune.init": _files(own) if own is not None else None,
        "train.mixed_precision": precision,
        "device": backbone.device.type,
        "seed": config.seed,
        "data.resolution": data.resolution,
        "data.buckets": data.buckets,
        "data.latent_sampling": data.latent_sampling,
        "data.cache_dtype": data.cache_dtype,
        "groups": _hash(group.encode() for group in source.group_ids),
        "data": source.content(),
        "data.group_size": data.group_size,
        "objective.members": objective.members,
        "selection.groups": selection.groups,
        "selection.images": selection.images,
        "selection.phases": selection.phases if chosen else None,
        "selection.sizes": selection.sizes,
        "train.steps": train.steps if chosen else None,  # phases are parts of the run
        "labels": _labels(config, source.rewards, objective.members),
        "train.groups_per_step": train.groups_per_step,
        "train.micro_batch": micro,
        "train.images_per_pass": train.images_per_pass,
        "train.prompt_dropout": train.prompt_dropout,
        **{f"times.{name}": value for name, value in config.times.model_dump().items()},
        "noise": config.noise,
        **{f"inversion.{name}": value for name, value in config.inversion.model_dump().items()},
        "reference": objective.needs_reference,
        "reference.keep": config.reference.keep if objective.needs_reference else None,
    }


def _labels(config: TrainConfig, rewards: Tensor, members: str) -> str | None:
    """Hash of the labels as far as they choose images: their values, their order within each group, or nothing."""
    selection, values = config.selection, rewards.nan_to_num(float("-inf")).numpy()
    if selection.groups != "all" or selection.images in ("variance", "score_gap"):
        return _hash([np.ascontiguousarray(values).tobytes()])
    if members == "all" and selection.images == "all":
        return None
    parts = (values[start : start + ROWS] for start in range(0, len(values), ROWS))
    return _hash((part[:, :, None] > part[:, None, :]).sum(2).astype(np.int16).tobytes() for part in parts)


def _files(folder: Path) -> str:
    """Hash of a LoRA's weights, wherever it lies."""
    if Path(folder).is_file():
        return _hash([Path(folder).read_bytes()])
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".safetensors", ".json"))
    return _hash(part for path in files for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()))


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
