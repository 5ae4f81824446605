"""`diffalign vote-results`: what came out of votes, as tables and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from diffalign.agreement import Agreement
from diffalign.errors import DiffalignError
from diffalign.files import check_place
from diffalign.progress import say
from diffalign.stages.vote_scores import scores_by, stored_scores
from diffalign.terminal import counted, name_cell, number, plain_table, show_table
from diffalign.vote_page.gallery import open_gallery
from diffalign.vote_page.results_page import write_results
from diffalign.voting.log import EVERYBODY, read_votes, votes_of
from diffalign.voting.results import Results, results


def vote_results(
    sources: Sequence[Path],
    votes: Path | None,
    rewards: Sequence[str],
    rater: str,
    html: Path | None,
    device: str,
    seed: int,
) -> Results:
    """Print what votes say, and write the page if `html` names one: `diffalign vote-results`.

    rewards: to compare with beside those that a dataset stores. rater: whose votes; `human`: of all.
    """
    gallery = open_gallery(sources, votes)
    if html is not None:
        check_place(html)
    given = votes_of(read_votes(gallery.log), rater)
    if not given:
        whose = "nobody has voted" if rater == EVERYBODY else f"{rater} has not voted"
        command = " ".join(map(str, sources))
        raise DiffalignError(f"{gallery.log}: {whose} yet; vote with `diffalign vote {command}`")
    scores = stored_scores(gallery) | dict(scores_by(gallery, reward, device) for reward in rewards)
    found = results(given, scores, seed)
    _show(found, str(gallery.log))
    if html is not None:
        write_results(html, found, given, gallery, scores)
        say(f"page: {html}")
    return found


def _show(found: Results, log: str) -> None:
    answers = ", ".join(f"{answer.replace('_', ' ')} {count}" for answer, count in sorted(found.answers.items()))
    say(f"{log}: {counted(found.votes, 'vote')} on {counted(found.prompts, 'prompt')} ({answers})")
    if found.models:
        show_table(_models(found))
    for duel in found.duels:
        say(f"{duel.verdict}: {duel.numbers}")
    show_table(_raters(found))
    if found.between:
        pairs = {f"{a} and {b}": one for (a, b), one in found.between.items()}
        show_table(_agreements("people", pairs))
    if found.rewards:
        show_table(_agreements("reward", found.rewards))
    if found.rubrics:
        show_table(_rubrics(found))
    for side in found.sides:
        if side.explains:
            say(f"warning: sides explain votes: {side.words}")


def _models(found: Results) -> Table:
    shown = plain_table("model", "won", "ties", "lost", "win rate", "95% interval", "strength")
    for row in found.models:
        counts = map(str, (row.wins, row.ties, row.losses))
        rate, ends = f"{row.win_rate:.1%}", row.win_interval.words(".1%")
        shown.add_row(name_cell(row.model), *counts, rate, ends, f"{row.strength:+.2f}")
    return shown


def _raters(found: Results) -> Table:
    shown = plain_table("rater", "votes", "ties", "asked\ntwice", "same\nanswer", "95% interval", "seconds\na vote")
    for row in found.raters:
        counts = map(str, (row.votes, row.ties, row.repeats))
        ends = row.same_interval.words(".1%") if row.repeats else "–"
        seconds = "–" if row.seconds is None else f"{row.seconds:.1f}"
        shown.add_row(name_cell(row.rater), *counts, number(row.same, ".1%"), ends, seconds)
    return shown


def _agreements(first: str, rows: Mapping[str, Agreement]) -> Table:
    shown = plain_table(first, "pairs", "ties", "accuracy", "95% interval", "Kendall\ntau-b")
    for name, row in rows.items():
        ties = f"{row.human_ties}, {row.predicted_ties}"
        ends = row.interval.words(".1%")
        shown.add_row(
            name_cell(name), str(row.pairs), ties, number(row.accuracy, ".1%"), ends, number(row.kendall, "+.3f")
        )
    return shown


def _rubrics(found: Results) -> Table:
    shown = plain_table("question", "answers", "mean", "95% interval")
    for row in found.rubrics:
        shown.add_row(
            name_cell(f"{row.question} {row.model}"), str(row.count), f"{row.mean:.2f}", row.interval.words(".2f")
        )
    return shown
