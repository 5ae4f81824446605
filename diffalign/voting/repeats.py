"""Questions that are asked again, to see how far a person agrees with themselves."""

from diffalign.draws import draw
from diffalign.voting.questions import Question, Sampler, State

FEWEST_BETWEEN = 10
"""Votes between a question and its repeat, so that the answer is not remembered."""


class Repeats:
    """Asks a share of the rater's own questions a second time, and otherwise what `sampler` asks.

    share: of the turns, at most a half. A question is repeated once, at least 10 votes later, on sides that are drawn again;
    one that was skipped is not repeated. The draws do not depend on the rater, as those of `Balanced`.
    """

    def __init__(self, sampler: Sampler, share: float) -> None:
        self.sampler, self.share, self.name = sampler, share, sampler.name

    def next_question(self, state: State) -> Question | None:
        """Return the next question, or None where the sampler has none left."""
        generator = draw(state.seed, "vote repeat", step=state.turn)
        new = self.sampler.next_question(state)
        if new is None or generator.random() >= self.share:
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
        chosen = list(keys)[int(generator.integers(len(keys)))]
        group, places = keys[chosen]
        return Question(group, tuple(sorted(places)), "repeat", chosen)
