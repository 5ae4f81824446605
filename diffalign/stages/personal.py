"""`diffalign judge personal`: choices in a dataset to a reward of one person's taste."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.config import PersonalConfig
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.schema import HUMAN
from diffalign.errors import DiffalignError
from diffalign.files.lock import writing_folder
from diffalign.hub import cache_alone
from diffalign.judge.personal import Choices, Taste, check_enough, choices_in, choices_of, features_of, fit_taste
from diffalign.progress import ImageProgress, say
from diffalign.rewards.features import Features, PixelFeatures, load_features, probe
from diffalign.rewards.personal import FeatureNote, Head
from diffalign.scoring.spec import parse_options
from diffalign.stages.dry_run import print_config, print_facts
from diffalign.stages.resolve_rewards import FIRST_JUDGES, resolve_device
from diffalign.terminal import counted
from diffalign.voting.log import VOTES_FILE, Vote, read_votes

VOTES = "votes"
"""The source that stands for the votes of all raters."""


def fit(config: PersonalConfig, dry_run: bool = False) -> Path:
    """Fit a reward to choices and write it: `diffalign judge personal`. Return its folder."""
    dataset = PreferenceDataset(config.data)
    source, choices = find_choices(dataset, config.source, config.split)
    out = config.out or config.data / "personal" / source
    features = _features(config.features, resolve_device(config.device))
    if dry_run:
        print_config(config)
        print_facts("personal", {"choices": len(choices), "source": source, "features": features.name, "out": str(out)})
        return out
    check_enough(choices)
    with writing_folder(out, "out"):
        used, places = np.unique(np.concatenate([choices.first, choices.second]), return_inverse=True)
        show = ImageProgress().named(f"{features.name} features")
        show(0, len(used))
        seen = features_of(dataset, used, features, config.batch_size, lambda done: show(done, len(used)))
        within = replace(choices, first=places[: len(choices)], second=places[len(choices) :])
        importance = features.importance(seen.shape[1]).numpy()
        taste = fit_taste(seen, importance, within, config.folds, config.ridge, config.seed)
        note: FeatureNote = {
            "name": features.name, "options": _given(config.features), "weights": features.weights_id(),
        }  # fmt: skip
        head = Head(taste.weight, taste.mean, probe(features).double().numpy(), note, _about(taste, choices, source))
        head.save(out)
    _say_result(taste, choices, source, out)
    return out


def find_choices(dataset: PreferenceDataset, source: str | None, split: str) -> tuple[str, Choices]:
    """Return the name of a source and the comparisons in it; None for votes where there are any, else for `human`.

    source: `votes`, a rater, `human` or scores. Raises DiffalignError for one that the dataset does not have.
    """
    votes = read_votes(dataset.folder / VOTES_FILE)
    raters = sorted({vote.rater for vote in votes})
    source = source or (VOTES if votes else HUMAN)
    if source in (VOTES, *raters):
        return source, choices_in(_of(votes, source), dataset)
    if source == HUMAN and not any(dataset.human):
        raise DiffalignError(
            f"{dataset.folder}: nobody has voted yet, and no preferences of people are in it; vote with `diffalign vote "
            f"{dataset.folder}`, or name another source"
        )
    if source not in (HUMAN, *dataset.rewards()) and source.partition(".")[0] not in dataset.rewards():
        have = ", ".join(
            [*([VOTES] if votes else []), *raters, *([HUMAN] if any(dataset.human) else []), *dataset.rewards()]
        )
        raise DiffalignError(f"source {source}: {dataset.folder} has none of that name; it has {have or 'none'}")
    return source, choices_of(dataset, source, split)


def _of(votes: Sequence[Vote], source: str) -> list[Vote]:
    return [vote for vote in votes if source in (VOTES, vote.rater)]


def _given(features: str | None) -> dict[str, Any]:
    """Return the options in a text such as clipscore:model=HUB_ID."""
    return parse_options(features.partition(":")[2], f"features {features}") if features else {}


def _features(given: str | None, device: str) -> Features:
    """Return the features that a config names; None for those of the first judge whose weights are here."""
    if given is not None:
        return load_features(given.partition(":")[0], _given(given), device)
    for name in FIRST_JUDGES[::-1]:
        with cache_alone(), suppress(DiffalignError):
            found = load_features(name, {}, device)
            found.weights_id()
            return found
    say(
        "features=pixels, which knows colours and no objects: no weights of pickscore or hpsv2 are here; for photographs "
        "give features=pickscore, which fetches 3.9 GB"
    )
    return PixelFeatures(device)


def _about(taste: Taste, choices: Choices, source: str) -> dict[str, Any]:
    """Return what personal.json says of a fit."""
    return {
        "source": source,
        "choices": len(choices),
        "ties": choices.ties,
        "prompts": len(set(choices.prompts)),
        "ridge": taste.ridge,
        "held_out": {
            "accuracy": taste.accuracy,
            "low": taste.interval.low,
            "high": taste.interval.high,
            "log_loss": taste.loss,
        },
    }


def _say_result(taste: Taste, choices: Choices, source: str, out: Path) -> None:
    ties = f" ({counted(choices.ties, 'tie')})" if choices.ties else ""
    say(f"{len(choices)} choices{ties} over {counted(len(set(choices.prompts)), 'prompt')}, of {source}")
    say(f"right on held-out prompts: {taste.accuracy:.1%} ({taste.interval.words('.1%')}); ridge {taste.ridge:g}")
    if taste.interval.side(0.5) <= 0:
        say(
            "warning: this is not better than chance (50%): vote on more pairs, or name other features, before you use it"
        )
    say(f"use it as a reward: -r personal:weights={out}")
