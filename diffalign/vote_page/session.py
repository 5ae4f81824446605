"""The sessions of the people who vote: what each is asked next, and what each answered."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from diffalign.errors import DiffalignError
from diffalign.vote_page.gallery import Gallery
from diffalign.voting.log import Answer, Undo, Vote, VoteLog, check_rater, effective, new_id, now
from diffalign.voting.questions import Question, Sampler, State, shown_order
from diffalign.voting.repeats import Repeats

AHEAD = 4
"""Questions that a page holds: the one that is shown, and those whose images it loads meanwhile."""
MOST_RATERS = 100
"""Names of one server run: each has a session in memory."""


class Unknown(DiffalignError):
    """A question that was not asked, or not since the server started."""


@dataclass(frozen=True)
class Asked:
    """A question as it is shown. id: becomes that of the vote. order: places of its images, left to right."""

    id: str
    question: Question
    order: tuple[int, ...]


@dataclass(frozen=True)
class Given:
    """An answer as the page sends it; `diffalign.voting.log.Vote` explains the fields."""

    answer: Answer
    ranking: tuple[int, ...] = ()
    scores: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    note: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a rater is. done: votes without skipped questions. total: votes in all, repeats too. seconds_left: of
    `--minutes`.
    """

    done: int
    total: int
    seconds_left: float | None


@dataclass
class _Rater:
    state: State
    undone: int
    started: float
    queue: list[Asked] = field(default_factory=list)


class Sessions:
    """All raters of one server. Not for several threads: the app calls it from its event loop.

    most, minutes: how many votes each rater is asked for, earlier ones included, and how long from the first question on;
    None: no limit. rubric: questions that are scored from 1 to 5 for each image. clock: seconds.
    """

    def __init__(
        self,
        gallery: Gallery,
        log: VoteLog,
        sampler: Sampler,
        *,
        size: int = 2,
        seed: int = 0,
        most: int | None = None,
        minutes: float | None = None,
        rubric: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gallery, self.log, self.sampler = gallery, log, sampler
        self.size, self.seed, self.most, self.minutes, self.rubric, self.clock = (
            size,
            seed,
            most,
            minutes,
            rubric,
            clock,
        )
        self.votes = effective(log.entries)
        self._known = {entry.id for entry in log.entries}
        self._raters: dict[str, _Rater] = {}
        self._available = sum(group.count(size) for group in gallery.groups)

    def queue(self, rater: str) -> list[Asked]:
        """Return what a rater is asked now and next, at most `AHEAD` questions; none where the rater is done.

        Raises DiffalignError for a name that no rater may have.
        """
        one, progress = self._rater(rater), self.progress(rater)
        wanted = AHEAD if self.most is None else min(AHEAD, self.most - progress.done)
        if wanted <= 0 or progress.seconds_left == 0:
            return []
        while len(one.queue) < wanted:
            question = self.sampler.next_question(one.state)
            if question is None:
                break
            order = shown_order(question, one.state)
            one.queue.append(self._asked(question, order, one.state.turn, one))
            one.state.count(question.key)
            one.state.waiting.append(question)
        return one.queue[:wanted]

    def vote(self, rater: str, question: str, given: Given) -> None:
        """Keep an answer; it is on the disk when this returns. An answer that is known already changes nothing.

        Raises Unknown for a question that was not asked, and DiffalignError for an answer that does not fit it.
        """
        if question in self._known:
            return
        one = self._rater(rater)
        if one.state.turn == len(one.state.votes):
            self.queue(rater)  # after a start of the server, the page may hold the questions of the one before
        asked = next((asked for asked in one.queue if asked.id == question), None)
        if asked is None:
            raise Unknown("this question is not open; the page asks again")
        unknown = set(given.scores) - set(self.rubric)
        if unknown:
            raise DiffalignError(f"scores: {min(unknown)!r} is not asked here")
        group = self.gallery.groups[asked.question.group]
        vote = Vote(
            id=asked.id,
            time=now(),
            rater=rater,
            prompt=group.prompt,
            images=tuple(group.images[place] for place in asked.order),
            models=tuple(group.models[place] for place in asked.order),
            answer=given.answer,
            ranking=given.ranking,
            scores={name: scores for name, scores in given.scores.items() if any(s is not None for s in scores)},
            note=given.note.strip(),
            repeat_of=asked.question.repeat_of,
            asked_by=asked.question.asked_by,
            seconds=given.seconds,
        )
        self.log.append(vote)
        self._known.add(vote.id)
        self.votes.append(vote)
        one.queue.remove(asked)
        one.state.waiting.remove(asked.question)
        one.state.votes.append(vote)

    def undo(self, rater: str) -> bool:
        """Take back a rater's last vote, which is asked again first; return whether there was one."""
        one = self._rater(rater)
        if not one.state.votes:
            return False
        vote = one.state.votes[-1]
        self.log.append(Undo(new_id(), now(), rater, vote.id))
        one.state.votes.pop()
        self.votes.remove(vote)
        one.undone += 1
        key = one.state.key_of(vote)
        if key is not None:  # else its images are no longer there
            group, places = key
            order = tuple(one.state.places[name][1] for name in vote.images)
            question = Question(group, tuple(sorted(places)), vote.asked_by, vote.repeat_of)
            one.queue.insert(0, self._asked(question, order, len(one.state.votes), one))
            one.state.waiting.insert(0, question)
        return True

    def progress(self, rater: str) -> Progress:
        """Return how far a rater is."""
        one = self._rater(rater)
        skipped = sum(vote.answer == "skip" for vote in one.state.votes)
        done = len(one.state.votes) - skipped
        new = max(0, self._available - one.state.done.total())
        after = self.sampler.left(one.state, new) if isinstance(self.sampler, Repeats) else new
        total = done + len(one.state.waiting) + after
        total = total if self.most is None else max(done, min(self.most, total))
        left = None if self.minutes is None else max(0.0, 60 * self.minutes - (self.clock() - one.started))
        return Progress(done, total, left)

    def _rater(self, name: str) -> _Rater:
        if name not in self._raters:
            check_rater(name, self.gallery.taken)
            if len(self._raters) == MOST_RATERS:
                raise DiffalignError(f"more than {MOST_RATERS} raters; start the server again")
            state = State(self.gallery.groups, self.size, name, self.seed, everybody=self.votes)
            state.votes = [vote for vote in self.votes if vote.rater == name]
            for vote in state.votes:
                if (key := state.key_of(vote)) is not None:
                    state.count(key)
            undone = sum(isinstance(entry, Undo) and entry.rater == name for entry in self.log.entries)
            self._raters[name] = _Rater(state, undone, self.clock())
        return self._raters[name]

    def _asked(self, question: Question, order: tuple[int, ...], turn: int, one: _Rater) -> Asked:
        """Return a question with an id that a server that starts again gives it too, so that a page can send its answer."""
        images = [self.gallery.groups[question.group].images[place] for place in order]
        name = repr((self.seed, one.state.rater, turn, one.undone, question.repeat_of, images))
        return Asked(hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), question, order)


@dataclass(frozen=True)
class Tally:
    """How often model `a` was preferred to model `b`, and the other way round; ties hold `both_bad` too."""

    a: str
    b: str
    a_wins: int
    ties: int
    b_wins: int


def tallies(votes: list[Vote]) -> list[Tally]:
    """Return the counts of every two models that were compared."""
    found: dict[tuple[str, str], Counter[int]] = {}
    for vote in votes:
        sides = list(zip(vote.models, vote.ranks, strict=False))
        for n, (model, rank) in enumerate(sides):
            for other, other_rank in sides[n + 1 :]:
                if model != other:
                    a, b = sorted((model, other))
                    sign = (rank > other_rank) - (rank < other_rank)
                    found.setdefault((a, b), Counter())[sign if model == a else -sign] += 1
    return [Tally(a, b, signs[-1], signs[0], signs[1]) for (a, b), signs in sorted(found.items())]
