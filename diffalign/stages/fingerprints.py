"""What keys of a run's config stand for: fingerprints of content, so a moved folder resumes and a changed one does not.

Each function returns dotted keys and a fingerprint each, as `training/same_run.py` compares them.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffalign.config import JudgeConfig, TuneSection
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.prompts import PromptRow
from diffalign.data.training_source import TrainingSource
from diffalign.files.fingerprint import fingerprint, folder_fingerprint
from diffalign.judge.records import RatedPair, Taught
from diffalign.pipelines import Backbone
from diffalign.stages.resolve import weights_digest


def of_model(backbone: Backbone, tune: TuneSection) -> dict[str, str]:
    """Return the fingerprints of the model and of the LoRA that training starts from."""
    found = dict.fromkeys(
        ("model.path", "model.revision", "model.variant", "model.config"), backbone.source.content_fingerprint()
    )
    return found if tune.init is None else {**found, "tune.init": weights_digest(tune.init)}


def of_data(dataset: PreferenceDataset, source: TrainingSource) -> dict[str, str]:
    """Return the fingerprint of the groups that are trained on, their prompts and labels, and of the dataset's images."""
    groups = [
        source.rewards.numpy().tobytes(),
        source.mask.numpy().tobytes(),
        *map(str.encode, [*source.group_ids, *source.prompts]),
    ]
    return {"data.path": fingerprint(groups, ((path.name, path) for path in dataset.shards))}


def of_prompts(rows: Iterable[PromptRow]) -> dict[str, str]:
    """Return the fingerprint of prompts and their metadata."""
    return {"prompts": fingerprint(json.dumps([row.prompt, row.metadata], sort_keys=True).encode() for row in rows)}


def of_real_images(source: str | None) -> dict[str, str]:
    """Return the fingerprint of a dataset whose images a critic takes for real ones; nothing where it is no folder."""
    if source is None or not Path(source).is_dir():
        return {}
    shards = PreferenceDataset(Path(source)).shards
    return {"gan.real": fingerprint(files=((path.name, path) for path in shards))}


def of_judge(config: JudgeConfig, records: Sequence[RatedPair | Taught]) -> dict[str, str]:
    """Return the fingerprints of a judge's model, of its teacher, and of its records with their images."""
    found = {"model.path": folder_fingerprint(config.model.path)}
    if config.teacher is not None:
        found["teacher"] = folder_fingerprint(config.teacher)
    images = [image for one in records for image in (one.images if isinstance(one, RatedPair) else [one.image])]
    sizes = [str(image.stat().st_size).encode() for image in images]
    for key, path in (("data.pairs", config.data.pairs), ("data.distributions", config.data.distributions)):
        if path is not None:
            found[key] = fingerprint([path.read_bytes(), *sizes])
    return found
