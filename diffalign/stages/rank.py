"""`diffalign rank`: scores to preferences, with the report of it and the dataset's card."""

import json
from pathlib import Path
from typing import Any

from diffalign.config import RankConfig, RankSection
from diffalign.data.choose_members import Limit
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.dataset_card import write_own_card
from diffalign.data.rank import Rules, generator_warning
from diffalign.data.rank import rank as rank_groups
from diffalign.data.sample import clean_up
from diffalign.data.shared_tasks import WORK_FOLDER, Task, complete_all
from diffalign.files import write_whole
from diffalign.progress import say


def rank(config: RankConfig) -> None:
    """Rank a scored dataset again: `diffalign rank`."""
    dataset = PreferenceDataset(config.data)
    rank_dataset(dataset, config, dataset.rewards(), config.shuffle)
    if (config.data / "sampling.json").is_file():  # `diffalign synth` wrote the card; other datasets keep theirs
        write_card_once(config.data)
    clean_up(config.data)


def rank_dataset(dataset: PreferenceDataset, section: RankSection, rewards: list[str], shuffle: bool = False) -> None:
    """Write preferences into groups.parquet and what was done into ranking.json, in one of the processes.

    rewards: those that vote where the section names none. shuffle: permute each group's preferences, as a control. With
    the same settings and scores as before nothing is done.
    """
    sources = section.sources or rewards
    scored_by = {name: dataset.scored_by(name) for name in sorted({source.partition(".")[0] for source in sources})}
    settings = {**section.model_dump(mode="json", include=set(RankSection.model_fields)), "sources": sources}
    settings |= {"shuffle": shuffle, "scored_by": scored_by}
    path = dataset.folder / "ranking.json"

    def done() -> bool:
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["settings"] == settings

    def make() -> None:
        report = rank_groups(dataset, sources, section.seed if shuffle else None, _rules(section))
        # Both show the old order; `synth` writes them again.
        (dataset.folder / "contact.html").unlink(missing_ok=True)
        if (dataset.folder / "sampling.json").is_file():
            (dataset.folder / "README.md").unlink(missing_ok=True)
        write_whole(path, json.dumps({"settings": settings, "report": report}, indent=1) + "\n")

    complete_all([Task("rank", done, make)], dataset.folder / WORK_FOLDER / "locks")
    _print_report(json.loads(path.read_text(encoding="utf-8"))["report"], sources)


def write_card_once(folder: Path) -> None:
    """Write a dataset's README.md, with the licences of its generators, unless it is there; in one of the processes."""
    make = lambda: write_own_card(PreferenceDataset(folder))  # noqa: E731
    complete_all([Task("card", (folder / "README.md").is_file, make)], folder / WORK_FOLDER / "locks")


def _rules(section: RankSection) -> Rules:
    return Rules(
        aggregate=section.aggregate,
        weights=section.weights,
        min_gap=section.min_gap,
        choose=section.choose,
        k=section.k,
        limits=tuple(Limit(limit.source, limit.min, limit.max) for limit in section.limits),
        duplicates=section.duplicates,
        splits=section.splits,
        seed=section.seed,
    )


def _print_report(report: dict[str, Any], sources: list[str]) -> None:
    dropped = "".join(f"; {n} dropped ({why})" for why, n in report["dropped"].items())
    say(f"ranked {report['groups']} groups by {', '.join(sources)}{dropped}; {report['images']} images count")
    if report["without_preference"]:
        say(f"{report['without_preference']} groups state no preference (all equal)")
    if warning := generator_warning(report["generator_explains"]):
        say(warning)
