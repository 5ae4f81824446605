"""`diffalign rank`: scores to preferences, with the report of it and the dataset's card."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from diffalign.config import RankConfig, RankSection
from diffalign.data.choose_members import Limit
from diffalign.data.dataset import RANKING_FILE, PreferenceDataset
from diffalign.data.dataset_card import shuffled_words, write_own_card
from diffalign.data.rank import NEAR_TIE, Rules, generator_warning, is_split, write_splits
from diffalign.data.rank import rank as rank_groups
from diffalign.data.sample import clean_up
from diffalign.data.schema import HUMAN
from diffalign.data.shared_tasks import WORK_FOLDER, Task, complete_all
from diffalign.files import write_whole
from diffalign.files.lock import writing_folder
from diffalign.progress import say
from diffalign.terminal import counted
from diffalign.voting.log import votes_digest

RULES = 2
"""Part of a ranking's settings. A ranking made under older rules, by which an unscored image was the worst, is made again."""


def rank(config: RankConfig) -> None:
    """Rank a scored dataset again: `diffalign rank`.

    Preferences that people gave are the default source. Where nothing but splits is asked for, labels stay as they are.
    """
    PreferenceDataset(config.data)  # refuses a folder that is no dataset, before a lock makes the folder
    with writing_folder(config.data, "data"):
        _rank(config)


def _rank(config: RankConfig) -> None:
    dataset = PreferenceDataset(config.data)
    voters = [HUMAN] if any(dataset.human) else dataset.rewards()
    labelled = any(dataset.column("preference"))
    if config.splits is not None and _asks_for_splits_alone(config) and (labelled or not voters):
        _split_dataset(dataset, config.splits, config.seed)
    else:
        rank_dataset(dataset, config, voters, config.shuffle)
    if (config.data / "sampling.json").is_file():  # `diffalign synth` wrote the card; other datasets keep theirs
        write_card_once(config.data)
    clean_up(config.data)


def rank_dataset(dataset: PreferenceDataset, section: RankSection, voters: list[str], shuffle: bool = False) -> None:
    """Write preferences into groups.parquet and what was done into ranking.json, in one of the processes.

    voters: those that vote where the section names none. shuffle: permute each group's preferences, as a control. With
    the same settings and scores as before nothing is done.
    """
    sources = section.sources or voters
    names = {source.partition(".")[0] for source in sources}
    scored_by = {name: dataset.scored_by(name) for name in sorted(names) if name in dataset.rewards()}
    settings = {**section.model_dump(mode="json", include=set(RankSection.model_fields)), "sources": sources}
    settings |= {"shuffle": shuffle, "scored_by": scored_by, "rules": RULES}
    if votes := [vote for source in sources for vote in dataset.votes_for(source)]:
        settings["votes"] = votes_digest(votes)  # new votes make another ranking

    def done() -> bool:
        before = dataset.ranking()
        return before is not None and before["settings"] == settings

    def make() -> None:
        _say_what_is_replaced(dataset, sources)
        report = rank_groups(dataset, sources, section.seed if shuffle else None, _rules(section))
        _forget_pages(dataset.folder)
        _write_ranking(dataset.folder, {"settings": settings, "report": report})

    complete_all([Task("rank", done, make)], dataset.folder / WORK_FOLDER / "locks")
    made = dataset.ranking()
    assert made is not None
    _print_report(made, dataset)


def _split_dataset(dataset: PreferenceDataset, splits: dict[str, float], seed: int) -> None:
    """Write the splits into groups.parquet in one of the processes, and what was done into ranking.json, if there is one."""

    def make() -> None:
        write_splits(dataset, splits, seed)
        _forget_pages(dataset.folder)
        if done := dataset.ranking():
            # `split_seed` makes these settings differ from those of every ranking, so that the next one is made.
            settings = {**done["settings"], "splits": splits, "split_seed": seed}
            _write_ranking(dataset.folder, {**done, "settings": settings})

    done = lambda: is_split(PreferenceDataset(dataset.folder), splits, seed)  # noqa: E731
    complete_all([Task("split", done, make)], dataset.folder / WORK_FOLDER / "locks")
    names = Counter(PreferenceDataset(dataset.folder).column("split"))
    counts = ", ".join(f"{name} {count}" for name, count in sorted(names.items()))
    say(f"split {len(dataset)} groups: {counts}; their labels stay as they are")


def _asks_for_splits_alone(config: RankConfig) -> bool:
    plain = RankConfig(data=config.data, splits=config.splits, seed=config.seed)
    return config.model_dump() == plain.model_dump()


def _write_ranking(folder: Path, ranking: dict[str, Any]) -> None:
    write_whole(folder / RANKING_FILE, json.dumps(ranking, indent=1) + "\n")


def _forget_pages(folder: Path) -> None:
    """Delete the pages that show the old order or splits; `synth` and `rank` write them again."""
    (folder / "contact.html").unlink(missing_ok=True)
    if (folder / "sampling.json").is_file():
        (folder / "README.md").unlink(missing_ok=True)


def _say_what_is_replaced(dataset: PreferenceDataset, sources: list[str]) -> None:
    before, people = dataset.ranking(), sum(map(bool, dataset.human))
    if before is not None and before["settings"]["sources"] != sources:
        say(f"this replaces the ranking by {', '.join(before['settings']['sources'])}")
    if people and sources != [HUMAN]:
        say(
            f"the preferences that people gave for {people} groups are kept as the source {HUMAN}: `diffalign rank "
            f"{dataset.folder} sources=[{HUMAN}]` brings them back"
        )


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


def _print_report(ranking: dict[str, Any], dataset: PreferenceDataset) -> None:
    settings, report = ranking["settings"], ranking["report"]
    names = ", ".join(_full_name(source, dataset) for source in settings["sources"])
    near, gap = report["dropped"].get(NEAR_TIE, 0), settings["min_gap"]
    dropped = "".join(f"; {n} dropped ({why})" for why, n in report["dropped"].items() if why != NEAR_TIE)
    images = "1 image counts" if report["images"] == 1 else f"{report['images']} images count"
    by_gap = f"; min_gap {gap:g} dropped {counted(near, 'group')} as near ties" if gap else ""
    say(f"ranked {counted(report['groups'], 'group')} by {names}{dropped}; {images}{by_gap}")
    if report.get("gaps"):  # rankings of earlier versions have none
        least, median, largest = (f"{value:.3g}" for value in report["gaps"])
        which = f"every group differ by {least}"
        which = which if least == largest else f"a group differ by {least} to {largest}, median {median}"
        say(f"best and worst of {which}" + ("" if gap else "; min_gap is 0: near ties are kept"))
    if settings["shuffle"]:
        say(f"{shuffled_words(settings)}: do not train on them for use")
    if report["without_score"]:
        say(f"{report['without_score']} images without a score are left out of the ranking")
    if report["without_preference"]:
        equal = (
            "1 group states" if report["without_preference"] == 1 else f"{report['without_preference']} groups state"
        )
        say(f"{equal} no preference (all equal)")
    if warning := generator_warning(report["generator_explains"]):
        say(warning)


def _full_name(source: str, dataset: PreferenceDataset) -> str:
    """Return a voter with its column: a reward alone means its first."""
    if source not in dataset.rewards() or "." in source:
        return source
    column = dataset.score_columns(source)[0]
    return source if column == source else f"{source}.{column}"
