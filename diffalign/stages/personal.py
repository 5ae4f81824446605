"""`diffalign judge personal`: choices in a dataset to a reward of one person's taste."""

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


def fit(config: PersonalConfig, dry_run: bool = False) -> Path:
    """Fit a reward to choices and write it: `diffalign judge personal`. Return its folder."""
    dataset = PreferenceDataset(config.data)
    choices = find_choices(dataset, config.source, config.split)
    out = config.out or config.data / "personal" / config.source
    features = _features(config.features, resolve_device(config.device))
    if dry_run:
        print_config(config)
        print_facts(
            "personal", {"choices": len(choices), "source": config.source, "features": features.name, "out": str(out)}
        )
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
        head = Head(
            taste.weight, taste.mean, probe(features).double().numpy(), note, _about(taste, choices, config.source)
        )
        head.save(out)
    _say_result(taste, choices, config.source, out)
    return out


def find_choices(dataset: PreferenceDataset, source: str, split: str) -> Choices:
    """Return the comparisons of a source: `human`, a rater, or scores; the votes themselves where there are any.

    Raises DiffalignError for a source that the dataset does not have.
    """
    votes = dataset.votes_for(source)
    if source == HUMAN and not any(dataset.human):
        raise DiffalignError(
            f"{dataset.folder}: nobody has voted yet, and no preferences of people are in it; vote with `diffalign vote "
            f"{dataset.folder}`, or name another source"
        )
    reward = source.partition(".")[0]
    if not votes and source != HUMAN and reward not in dataset.rewards():
        people = [HUMAN] if any(dataset.human) else []
        have = ", ".join([*people, *dataset.raters(), *dataset.rewards()])
        raise DiffalignError(f"source {source}: {dataset.folder} has none of that name; it has {have or 'none'}")
    given = choices_in(votes, dataset)
    if votes and source != HUMAN:
        return given
    # A group that was imported with a preference and voted on: the votes count.
    voted = {name.rpartition("/")[0] for vote in votes for name in vote.images}
    return given.and_also(choices_of(dataset, source, split, without=voted))


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
