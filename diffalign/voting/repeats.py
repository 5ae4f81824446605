"""Questions that are asked again, to see how far a person agrees with themselves."""

from diffalign.draws import draw
from diffalign.voting.questions import Question, Sampler, State

FEWEST_BETWEEN = 10
"""Votes between a question and its repeat, so that the answer is not remembered."""
FORESEEN = 1_000
"""New questions ahead between which each repeat is counted; behind them the share is."""


class Repeats:
    """Asks a share of the rater's own questions a second time, and otherwise what `sampler` asks.

    share: of the turns, at most a half. A question is repeated once, at least 10 votes later, on sides that are drawn again;
    one that was skipped is not repeated. The draws do not depend on the rater, as those of `Balanced`.
    """

    def __init__(self, sampler: Sampler, share: float) -> None:
        self.sampler, self.share, self.name = sampler, share, sampler.name
        self._drawn: dict[tuple[int, int], float] = {}

    def next_question(self, state: State) -> Question | None:
        """Return the next question, or None where the sampler has none left."""
        new = self.sampler.next_question(state)
        if new is None or not self._repeats(state.seed, state.turn):
            return new
        repeated = {vote.repeat_of for vote in state.votes} | {question.repeat_of for question in state.waiting}
        old = [
            vote
            for vote in state.votes[: max(0, state.turn - FEWEST_BETWEEN)]
            if vote.repeat_of is None and vote.id not in repeated and vote.answer != "skip"
        ]
        keys = {vote.id: key for vote in old if (key := state.key_of(vote)) is not None and len(key[1]) == state.size}
        if not keys:
            return new
        generator = draw(state.seed, "vote repeat", step=state.turn)
        generator.random()  # which said that this turn repeats
        chosen = list(keys)[int(generator.integers(len(keys)))]
        group, places = keys[chosen]
        return Question(group, tuple(sorted(places)), "repeat", chosen)

    def left(self, state: State, new: int) -> int:
        """Return how many questions follow where `new` were not asked yet: these, and the repeats between them.

        Exact for up to 1,000 new ones, if none is skipped or taken back.
        """
        firsts = [vote.repeat_of is None and vote.answer != "skip" for vote in state.votes]
        firsts += [question.repeat_of is None for question in state.waiting]
        turn = len(firsts)
        repeated = sum(vote.repeat_of is not None for vote in state.votes)
        repeated += sum(question.repeat_of is not None for question in state.waiting)
        old = sum(firsts[: max(0, turn - FEWEST_BETWEEN)])
        near = min(new, FORESEEN)
        while near:
            again = old > repeated and self._repeats(state.seed, turn)
            repeated, near = repeated + again, near - (not again)
            firsts.append(not again)
            turn += 1
            old += turn > FEWEST_BETWEEN and firsts[turn - FEWEST_BETWEEN - 1]
        return turn - state.turn + round(max(0, new - FORESEEN) / (1 - self.share))

    def _repeats(self, seed: int, turn: int) -> bool:
        """Return whether a turn repeats a question, if there is one to repeat."""
        if (seed, turn) not in self._drawn:
            self._drawn[seed, turn] = float(draw(seed, "vote repeat", step=turn).random())
        return self._drawn[seed, turn] < self.share
