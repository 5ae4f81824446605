"""Write a dataset's card (README.md as the hub reads it): content, generators, rewards and licences."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.dataset import PreferenceDataset
from diffalign.data.schema import HUMAN
from diffalign.files import read_json, write_whole
from diffalign.files.paths import own_files
from diffalign.redaction import without_folders
from diffalign.rewards import takes

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
GENERATOR_MEND = "delete it, and `diffalign synth` with the same config writes it again"
FORM_WORDS = {
    "rows": "One row a prompt: `images`, `preference` (share of won comparisons, higher is better), `scores`, `generators` and "
    "`seeds` are lists of equal length.",
    "pickapic": "Pick-a-Pic's columns, one row a pair: `caption`, `jpg_0`, `jpg_1` (encoded images), `label_0`, `label_1` "
    "(1 for the preferred).",
    "folder": "`images/` holds one row an image, `scores/` the scores of each reward, `groups.parquet` one row a prompt with "
    "its `preference` (share of won comparisons, higher is better). `diffalign data export` writes it as one row a prompt.",
    "webdataset": "Tar files for webdataset: `<group>.json` and `<group>.<index>.png` for each prompt.",
}


def write_card(
    dataset: PreferenceDataset,
    out: Path,
    form: str,
    counts: dict[str, int],
    features: Sequence[Mapping[str, object]] = (),
) -> None:
    """Write README.md of an export, or (form `folder`) of a dataset folder itself.

    features: the columns in the form of a card's `dataset_info`, where `datasets` cannot find them in the files. A
    licence that is not known is stated as unknown. Equal data give equal bytes: the card holds neither time nor host.
    """
    generators = _generators(dataset)
    lines = [
        *_front_matter(generators, form, counts, features),
        "",
        f"# {dataset.folder.name}",
        "",
        FORM_WORDS[form],
        "",
        *_table(("split", "groups" if form == "folder" else "rows"), list(counts.items())),
        *_generator_section(generators),
        *_reward_section({name: dataset.scored_by(name) for name in dataset.rewards()}),
        *_ranking_section(dataset.ranking()),
    ]
    write_whole(out / "README.md", "\n".join(lines))


def write_own_card(dataset: PreferenceDataset) -> None:
    """Write README.md of a dataset folder."""
    splits, dropped = dataset.column("split"), dataset.column("dropped")
    used = [split for split, reason in zip(splits, dropped, strict=True) if not reason]
    write_card(dataset, dataset.folder, "folder", {split: used.count(split) for split in sorted(set(used))})


def _generators(dataset: PreferenceDataset) -> dict[str, dict[str, Any]]:
    """Return name -> settings of the generators that drew the images; {} for imported data."""
    files = own_files(dataset.folder, "generators/*.json")
    return {path.stem: read_json(path, GENERATOR_MEND, "licence") for path in files}


def _front_matter(
    generators: dict[str, dict[str, Any]], form: str, counts: dict[str, int], features: Sequence[Mapping[str, object]]
) -> list[str]:
    """Return the YAML that the hub reads: licence, tags, size, and where the data files are."""
    licences = sorted({str(g.get("licence") or "unknown") for g in generators.values()})
    size = next((name for limit, name in SIZES if sum(counts.values()) < limit), "n>1M")
    lines = ["---", "license: other", f"license_name: {_yaml(', '.join(licences) or 'unknown')}"]
    lines += ["task_categories:", "- text-to-image", "tags:", "- preference", "- diffalign"]
    lines += ["size_categories:", f"- {size}"]
    if form == "folder":
        lines += ["configs:", "- config_name: images", '  data_files: "images/*.parquet"']
        lines += ["- config_name: groups", '  data_files: "groups.parquet"']
    else:
        ending = "tar" if form == "webdataset" else "parquet"
        lines += ["configs:", "- config_name: default", "  data_files:"]
        for split in (split for split, count in counts.items() if count):
            lines += [f"  - split: {_yaml(split)}", f'    path: "data/{split}-*.{ending}"']
    if features:
        lines.append(f"dataset_info: {json.dumps({'features': features})}")
    return [*lines, "---"]


def _generator_section(generators: dict[str, dict[str, Any]]) -> list[str]:
    if not generators:
        return []
    rows = []
    for name, g in generators.items():
        sampler = f"{g.get('scheduler', '?')}, {g.get('steps', '?')} steps, guidance {g.get('guidance_scale', '?')}"
        rows.append((name, g.get("model", "?"), g.get("revision") or "local", sampler, g.get("licence") or "unknown"))
    table = _table(("generator", "model", "revision", "sampler", "licence"), rows)
    return ["## Generators", "", *table, "The images may be used as far as these models' licences allow.", ""]


def _reward_section(rewards: dict[str, dict[str, Any]]) -> list[str]:
    if not rewards:
        return []
    rows = [
        (name, r.get("version", "?"), _weights(name, r), r.get("licence", "unknown"), _settings(r))
        for name, r in rewards.items()
    ]
    table = _table(("reward", "version", "weights", "licence", "settings"), rows)
    return ["## Rewards", "", *table, "Scores are those of models, not of people.", ""]


def _ranking_section(done: dict[str, Any] | None) -> list[str]:
    if done is None:
        return []
    settings, report = done["settings"], done["report"]
    how = "vote shares" if settings["aggregate"] == "votes" else "the mean of z-scores"
    text = f"Preferences are {how} of {', '.join(settings['sources'])}. "
    if settings["sources"] == [HUMAN]:
        text = "Preferences are those that people gave. "
    if settings["shuffle"]:
        text += f"{shuffled_words(settings)}: they say nothing about the images. "
    text += f"{report['groups']} groups, of which {sum(report['dropped'].values())} were dropped."
    if absent := report.get("without_score"):  # older files lack it
        text += f" {absent} images without a score are left out: they are neither better nor worse than others."
    if report["generator_explains"] is not None:
        text += f" The generators' means alone explain {report['generator_explains']:.0%} of the preferences."
    return ["## Ranking", "", text, ""]


def shuffled_words(settings: dict[str, Any]) -> str:
    """Return what a ranking with `shuffle: true` did, in words."""
    return f"Preferences were shuffled within each group (seed {settings['seed']}), as a control"


def _weights(name: str, reward: dict[str, Any]) -> str:
    """Return the weights behind a reward. Files of older versions name the class's; `shapes` is their detector's name."""
    shapes = reward.get("settings", {}).get("detector") == "shapes" and takes(name, "detector")
    return "the detector shapes" if shapes else str(reward.get("weights", "?"))


def _settings(reward: dict[str, Any]) -> str:
    settings = without_folders(reward.get("settings", {}))
    return ", ".join(f"{key}={value}" for key, value in sorted(settings.items())) or "-"


def _table(names: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> list[str]:
    """Return the lines of a Markdown table and an empty one."""
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""]


def _cell(value: object) -> str:
    return without_folders(str(value)).replace("|", "\\|").replace("\n", " ")


def _yaml(text: str) -> str:
    return json.dumps(text)
