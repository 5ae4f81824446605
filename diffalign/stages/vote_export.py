"""`diffalign vote-export`: write votes for `pairs`, `score --labels` and `judge`."""

from collections.abc import Sequence
from pathlib import Path

from diffalign.errors import DiffalignError
from diffalign.files.lock import writing_file, writing_folder
from diffalign.progress import say
from diffalign.terminal import counted
from diffalign.vote_page.export import write_judge_records, write_table
from diffalign.vote_page.gallery import open_gallery
from diffalign.voting.log import EVERYBODY, read_votes


def export_votes(sources: Sequence[Path], out: Path, raters: Sequence[str] = (), log: Path | None = None) -> None:
    """Write the votes on sources as a table (`out` ends in .csv or .jsonl) or as the records of a judge (a folder).

    raters: whose votes; none, or `human`: all. log: as `open_gallery` takes it. Raises DiffalignError where there is no such
    vote.
    """
    gallery = open_gallery(sources, log)
    every = read_votes(gallery.log)
    if EVERYBODY in raters:
        raters = ()
    missing = set(raters) - {vote.rater for vote in every}
    if not every or missing:
        who = f" of {min(missing)!r}" if missing else ""
        raise DiffalignError(f"{gallery.log}: holds no vote{who}; vote first")
    votes = [vote for vote in every if not raters or vote.rater in raters]
    if out.suffix:
        with writing_file(out, "--out"):
            rows = write_table(votes, gallery, out)
        say(f"{out}: {counted(rows, 'row')}")
        return
    with writing_folder(out, "--out"):
        pairs, ratings = write_judge_records(votes, gallery, out)
    say(f"{out}: {counted(pairs, 'pair')} in pairs.jsonl, {counted(ratings, 'rated image')} in ratings.jsonl")
