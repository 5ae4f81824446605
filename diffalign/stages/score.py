"""`diffalign score`: score images; print, write and compare the scores."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from PIL import Image

from diffalign.cluster import LOCAL, Engine, open_engine
from diffalign.data.cut_prompts import cut_lines
from diffalign.data.schema import GROUPS_FILE, score_schema
from diffalign.data.writer import parquet_writer
from diffalign.errors import DiffalignError
from diffalign.files import check_place
from diffalign.files.lock import writing_file, writing_folder
from diffalign.files.remote import is_address, local_copy
from diffalign.progress import ImageProgress, OnNamedImages, say, say_aside
from diffalign.rewards import Reward
from diffalign.scoring.allocator import keep_freed_memory
from diffalign.scoring.captions import PromptTable
from diffalign.scoring.compare_folders import comparison_table, outcomes, verdict_lines
from diffalign.scoring.gallery import write_gallery
from diffalign.scoring.human_agreement import Choice, agreement_table, read_choices
from diffalign.scoring.items import Item
from diffalign.scoring.mirror import Mirror, mirror
from diffalign.scoring.numbered_rows import NumberedRows, is_numbered
from diffalign.scoring.on_cluster import OnCluster
from diffalign.scoring.pairing import heading, pair_up
from diffalign.scoring.position_bias import position_bias
from diffalign.scoring.processes import Processes
from diffalign.scoring.run import Scores, score_items
from diffalign.scoring.score_summary import faults, summarise, summary_table
from diffalign.scoring.side_by_side import write_side_by_side
from diffalign.scoring.sources import Prompting, collect
from diffalign.scoring.spec import RewardSpec, parse_all
from diffalign.scoring.store import Store
from diffalign.scoring.thumbnails import folder_beside
from diffalign.stages.resolve_rewards import build_reward, build_rewards, process_device
from diffalign.terminal import counted, show_table

PAGES = (".html", ".htm")
UNSCORED = 3
"""Exit code of a run that ended, but left images without a score."""


@dataclass(frozen=True)
class ScoreRequest:
    """The options of `diffalign score` as the user gave them. prompts, output: a text is an address, such as s3://."""

    images: list[str]
    rewards: list[str]
    prompt: str | None = None
    prompts: Path | str | None = None
    prompt_from: str = "auto"
    prompt_column: str | None = None
    output: Path | str | None = None
    html: Path | None = None
    against: list[str] | None = None
    labels: Path | None = None
    into_dataset: bool = False
    batch_size: int = 32
    workers: int | None = None
    device: str = "auto"
    engine: str = LOCAL
    actors: int | None = None


def score(request: ScoreRequest) -> int:
    """Score images: `diffalign score`. Return the exit code: 0, or 3 if some image has no score."""
    processes = Processes.start()
    dataset = Path(request.images[0]) if request.into_dataset else None
    try:
        with (
            place_of_output(request.output) as (output, mirrored),
            writing_file(None if mirrored else output, "--output"),
            writing_folder(dataset if dataset and (dataset / GROUPS_FILE).is_file() else None, "dataset"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # images.py has its own limit
            with open_engine(request.engine, request.device, request.actors) as engine:
                return _score(request, processes, engine, output, mirrored)
    finally:
        processes.stop()


@contextmanager
def place_of_output(
    output: Path | str | None, said_as: str = "--output"
) -> Iterator[tuple[Path | None, Mirror | None]]:
    """Yield where the output is written here, and what sends it on if it belongs to an address.

    said_as: how the user named it, for messages.
    """
    if not isinstance(output, str):
        yield output, None
    elif not is_address(output):
        yield Path(output), None
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DiffalignError(f"{said_as} {output}: several processes write to a disk; name a file there")
    else:
        with mirror(output) as made:
            yield made.path, made


def _score(
    request: ScoreRequest, processes: Processes, engine: Engine | None, output: Path | None, mirrored: Mirror | None
) -> int:
    keep_freed_memory()
    if processes.main and request.html:
        _check_page(request.html)
    # Resolve what the options name.
    device = process_device("cpu" if engine else request.device)
    specs = parse_all(request.rewards)
    built = build_rewards(specs, device, served=False)
    given = _prompt_table(request.prompts, request.prompt_column) if request.prompts else None
    prompting = Prompting(request.prompt, given, request.prompt_from, request.prompt_column)
    sources = {"A": request.images, "B": request.against or []}
    skipped: Counter[str] = Counter()
    items = {side: collect(paths, prompting, skipped) for side, paths in sources.items() if paths}
    if processes.main and skipped:
        say_aside(
            f"skipped: {', '.join(f'{n} {suffix}' for suffix, n in sorted(skipped.items(), key=lambda s: (-s[1], s[0])))}"
        )
    if given and (unused := given.unused()) and processes.main:
        say_aside(f"prompts: {unused}")
    if "B" in items:
        both_sides = {item.name for item in items["A"]} & {item.name for item in items["B"]}
        if both_sides:
            raise DiffalignError(f"--against: {min(both_sides)!r} is on both sides")
    # Only now a server is asked: it may not answer for minutes.
    built |= build_rewards(specs, device, served=True)
    rewards = {spec.label: built[spec.label] for spec in specs}
    # Before any weights are asked for.
    every = [item for side in items.values() for item in side]
    refuse_without_prompts(every, rewards, "give --prompt or --prompts, or write a.txt beside a.png")
    # Labels and pairs are checked before hours are spent on scores.
    choices = read_choices(request.labels, Scores([], {}, items=every)) if request.labels else []
    if "B" in items:
        pair_up(*items.values())
    # Score the items of both sides in one run, so that each reward loads once.
    both, kept = score_and_store(
        every,
        rewards,
        output,
        [path for paths in sources.values() for path in paths],
        batch_size=request.batch_size,
        workers=request.workers,
        processes=processes,
        mirrored=mirrored,
        cluster=_on_cluster(engine, specs) if engine else None,
        on_progress=ImageProgress(say_aside) if processes.main else None,
    )
    if not processes.main:
        return 0
    parts = _split(both, len(items["A"]))
    _show(request, both, parts, choices, kept, rewards)
    return UNSCORED if both.failed else 0


def refuse_without_prompts(items: Sequence[Item], rewards: Mapping[str, Reward], advice: str) -> None:
    """Raise DiffalignError if no image has the prompt that every reward reads. advice: where prompts may come from."""
    without = not any((item.prompt or "").strip() or item.fault for item in items)
    if without and all("prompt" in reward.reads for reward in rewards.values()):
        raise DiffalignError(f"{', '.join(rewards)}: no image has a prompt; {advice}")


def score_and_store(
    items: list[Item],
    rewards: dict[str, Reward],
    output: Path | None,
    sources: list[str],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    processes: Processes | None = None,
    mirrored: Mirror | None = None,
    cluster: OnCluster | None = None,
    said_as: str = "--output",
    keep: bool = False,
    on_progress: OnNamedImages | None = None,
) -> tuple[Scores, int]:
    """Score items, and write the output if one is wanted. Return the scores, and how many rows of other images it keeps.

    What the output holds already is not scored again. sources: what the user named; rows of other images stay. Of several
    processes the first one writes. mirrored: what sends the output on to an address. cluster: where the rewards run.
    said_as: how the user named the output, for messages. keep: the rewards stay in memory.
    """
    processes = processes or Processes()
    with Store(output, processes.rank, mirrored, said_as) as store:
        scores = score_items(
            items,
            rewards,
            store,
            batch_size=batch_size,
            workers=workers or min(8, os.cpu_count() or 1),
            processes=processes,
            cluster=cluster,
            keep=keep,
            on_progress=on_progress,
        )
        kept = store.finish(scores.rows, [_as_written(source) for source in sources]) if processes.main else 0
    return scores, kept


def score_for_python(
    items: list[Item],
    rewards: dict[str, Reward],
    output: str | Path | None,
    *,
    batch_size: int,
    workers: int | None,
    keep: bool,
    progress: bool,
) -> Scores:
    """Score items for `diffalign.score`, and write its `output` if one is given. keep: the rewards stay in memory."""
    with place_of_output(output, "output") as (path, mirrored), writing_file(None if mirrored else path, "output"):
        scores, _ = score_and_store(
            items,
            rewards,
            path,
            [],
            batch_size=batch_size,
            workers=workers,
            mirrored=mirrored,
            said_as="output",
            keep=keep,
            on_progress=ImageProgress(say_aside) if progress else None,
        )
    return scores


def _on_cluster(engine: Engine, specs: list[RewardSpec]) -> OnCluster:
    return OnCluster(engine, {s.label: partial(build_reward, s.name, s.options, engine.device) for s in specs})


def _as_written(source: str) -> str:
    """Return a source as the names of its images begin."""
    return source if is_address(source) else Path(source).as_posix()


def _prompt_table(place: Path | str, column: str | None) -> PromptTable | NumberedRows:
    path = local_copy(place) if isinstance(place, str) and is_address(place) else Path(place)
    return NumberedRows(path, column) if is_numbered(path) else PromptTable(path, column)


def _check_page(path: Path) -> None:
    """Make the folder of the page. Raise DiffalignError where no page can be written, before anything is scored."""
    if path.is_dir() or path.suffix.lower() not in PAGES:
        raise DiffalignError(f"--html {path}: name a file that ends in {' or '.join(PAGES)}")
    check_place(path)


def _show(
    request: ScoreRequest,
    both: Scores,
    parts: list[Scores],
    choices: list[Choice],
    kept: int,
    rewards: Mapping[str, Reward],
) -> None:
    for side, part, sources in zip("AB", parts, (request.images, request.against or []), strict=False):
        found = summarise(part)
        title = f"{side} {' '.join(sources)}: " if len(parts) == 2 else ""
        title += counted(len(part.rows), "image")
        if any(s.scored for s in found):
            show_table(summary_table(found, title))
        else:
            say(f"{title}, none has a score")
    compared = _show_comparison(request, *parts) if len(parts) == 2 else None
    if request.labels:
        show_table(agreement_table(choices, both))
    for line in faults(both):
        say_aside(f"not scored: {line}")
    scored = {label: r for label, r in rewards.items() if any(math.isfinite(row[label]) for row in both.rows)}
    for line in cut_lines(scored, [item.prompt for item in both.items]):
        say(line)
    for line in position_bias(both, rewards):
        say(line)
    if request.into_dataset:
        for path in write_into_dataset(parts[0], request.images, rewards):
            say(f"scores: {path}")
    if compared:
        say(compared)
    elif request.html:
        shown, beside = write_gallery(request.html, both), folder_beside(request.html)
        say(
            f"gallery: {request.html} ({counted(shown, 'image')}{f', thumbnails in {beside}' if beside.is_dir() else ''})"
        )
    if request.output:
        others = f", {kept} rows of other images kept" if kept else ""
        say(f"output: {request.output} ({counted(both.computed, 'score')} new, {both.known} known{others})")


def _show_comparison(request: ScoreRequest, a: Scores, b: Scores) -> str | None:
    """Print how B compares with A; return a line about the page, if one was asked for and written."""
    pairing = pair_up(a.items, b.items)
    names = (" ".join(request.images), " ".join(request.against or []))
    say(f"A against B: {heading(pairing)}")
    found = outcomes(a, b, pairing)
    if any(outcome.comparison for outcome in found.values()):
        show_table(comparison_table(found))
    for line in verdict_lines(found):
        say(line)
    if request.html is None:
        return None
    pairs = write_side_by_side(request.html, a, b, pairing, names)
    return f"side by side: {request.html} ({counted(pairs, 'pair')})"


def _split(both: Scores, first: int) -> list[Scores]:
    """Return the scores of A's and B's images, from those of one run; `first` images are A's."""
    cuts = [slice(0, first), slice(first, None)] if len(both.rows) > first else [slice(None)]
    return [Scores(both.rows[c], both.columns, items=both.items[c]) for c in cuts]


def write_into_dataset(scores: Scores, sources: list[str], rewards: Mapping[str, Reward]) -> list[Path]:
    """Write `scores/<label>.parquet` into the dataset that was scored, where `rank` and `train` find them.

    One file per label, replaced whole, with a note of the reward that judged. Return the files; raise DiffalignError if
    `sources` is no dataset folder.
    """
    if len(sources) != 1 or any(item.group is None for item in scores.items):
        raise DiffalignError("--into-dataset: IMAGES must be one dataset folder (a folder with groups.parquet)")
    written = []
    for label, columns in scores.columns.items():
        path = Path(sources[0]) / "scores" / f"{label}.parquet"
        schema = score_schema(columns, rewards[label].provenance())
        rows = [
            {
                "group_id": item.group[0] if item.group else "",
                "index": item.group[1] if item.group else 0,
                **{c: row[label if k == 0 else f"{label}.{c}"] for k, c in enumerate(columns)},
                "reason": row["reason"] or row[f"{label}.reason"],
            }
            for item, row in zip(scores.items, scores.rows, strict=True)
        ]
        with parquet_writer(path, schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        written.append(path)
    return written
