"""What came out of votes: who was preferred, how far people, rewards and repeats agree, and whether sides explain answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from diffalign.agreement import Agreement, agreement
from diffalign.bradley_terry import strengths, win_rates
from diffalign.intervals import Interval, bootstrap, exact_interval, share_interval
from diffalign.terminal import counted
from diffalign.voting.log import Vote
from diffalign.voting.sides import SideTest, side_tests

RIDGE = 0.01
"""Of the strengths: a prior with a standard deviation of 10 log-odds, which keeps a model finite that never lost."""


@dataclass(frozen=True)
class Comparison:
    """Two images of one vote. sign: 1 where the first was preferred, -1 where the second was, 0 for neither."""

    images: tuple[str, str]
    models: tuple[str, str]
    sign: int
    prompt: str
    rater: str
    vote: str


@dataclass(frozen=True)
class ModelResult:
    """How often a model's images were preferred to those of other models; a tie is half a win.

    win_rate: chance to be preferred to an image of another model, on average over them, by the Bradley-Terry model.
    strength: log-odds, 0 for the average model. With their 95% intervals over prompts.
    """

    model: str
    wins: int
    ties: int
    losses: int
    win_rate: float
    win_interval: Interval
    strength: float
    strength_interval: Interval


@dataclass(frozen=True)
class Duel:
    """Two models. share: of comparisons in which `a` was preferred, a tie counts half; interval: over prompts."""

    a: str
    b: str
    wins: int
    ties: int
    losses: int
    share: float
    interval: Interval

    @property
    def verdict(self) -> str:
        """What may be said: a winner is named only where the interval excludes a half."""
        if self.interval.low is None:
            return f"too few {self.interval.unit} to tell {self.a} from {self.b}"
        side = self.interval.side(0.5)
        if not side:
            return f"no difference seen between {self.a} and {self.b}"
        return f"{self.a if side > 0 else self.b} is preferred to {self.b if side > 0 else self.a}"

    @property
    def numbers(self) -> str:
        """The counts, the share and its interval, from the side that won more."""
        turned = self.share < 0.5
        name, won, lost = (self.b, self.losses, self.wins) if turned else (self.a, self.wins, self.losses)
        share = 1 - self.share if turned else self.share
        low, high = self.interval.low, self.interval.high
        ends = (
            Interval(self.interval.count, 1 - high, 1 - low)
            if turned and low is not None and high is not None
            else self.interval
        )
        return f"{name} won {won}, lost {lost}, {counted(self.ties, 'tie')}: {share:.1%} ({ends.words('.1%')})"


@dataclass(frozen=True)
class RaterResult:
    """One person.

    ties: answers that prefer neither. repeats: questions answered twice; same: share of equal answers, with its exact 95%
    interval. seconds: median of a vote.
    """

    rater: str
    votes: int
    ties: int
    skipped: int
    repeats: int
    same: float
    same_interval: Interval
    seconds: float | None


@dataclass(frozen=True)
class Rubric:
    """Scores from 1 to 5 of one model's images by one question: mean, and its interval over prompts."""

    question: str
    model: str
    count: int
    mean: float
    interval: Interval


@dataclass(frozen=True)
class Results:
    """All that votes say. answers: how often each was given. between: (rater, rater) -> agreement; rewards: name -> it."""

    votes: int
    prompts: int
    answers: dict[str, int]
    models: list[ModelResult]
    duels: list[Duel]
    raters: list[RaterResult]
    between: dict[tuple[str, str], Agreement]
    rewards: dict[str, Agreement]
    rubrics: list[Rubric]
    sides: list[SideTest]


def results(votes: Sequence[Vote], scores: Mapping[str, Mapping[str, float]], seed: int = 0) -> Results:
    """Return what votes say.

    scores: reward -> image's name -> score, higher is better. A repeated question counts in the models' results and in those
    of sides; people and rewards are compared on first answers. seed: of the bootstrap.
    """
    compared = [one for vote in votes for one in comparisons(vote)]
    first = [one for vote in votes if vote.repeat_of is None for one in comparisons(vote)]
    raters = sorted({vote.rater for vote in votes})
    return Results(
        votes=len(votes),
        prompts=len({vote.prompt for vote in votes}),
        answers=dict(Counter(vote.answer for vote in votes)),
        models=_models(compared, seed),
        duels=duels(compared, seed),
        raters=[_rater(rater, [vote for vote in votes if vote.rater == rater]) for rater in raters],
        between={(a, b): _between(first, a, b, seed) for a, b in combinations(raters, 2)},
        rewards={name: _reward(first, known, seed) for name, known in scores.items()},
        rubrics=_rubrics(votes, seed),
        sides=side_tests(votes),
    )


def comparisons(vote: Vote) -> list[Comparison]:
    """Return what a vote says of every two of its images; nothing for a skipped question."""
    ranks = vote.ranks
    found = []
    for a, b in combinations(range(len(ranks)), 2):
        sign = int(ranks[a] < ranks[b]) - int(ranks[a] > ranks[b])
        images, models = (vote.images[a], vote.images[b]), (vote.models[a], vote.models[b])
        found.append(Comparison(images, models, sign, vote.prompt, vote.rater, vote.id))
    return found


def _models(compared: Sequence[Comparison], seed: int) -> list[ModelResult]:
    """Return the models by falling strength; none where no two models were compared."""
    between = [one for one in compared if one.models[0] != one.models[1]]
    names = sorted({model for one in between for model in one.models})
    if not names:
        return []
    place = {name: n for n, name in enumerate(names)}
    prompts = {prompt: n for n, prompt in enumerate(dict.fromkeys(one.prompt for one in between))}
    size = len(names)
    wins = np.zeros((len(prompts), size, size))
    for one in between:
        a, b = (place[model] for model in one.models)
        wins[prompts[one.prompt], a, b] += (1 + one.sign) / 2
        wins[prompts[one.prompt], b, a] += (1 - one.sign) / 2
    per_prompt = wins.reshape(len(prompts), -1)

    def values(means: np.ndarray) -> np.ndarray:
        total = means.reshape(-1, size, size) * len(prompts)
        return np.concatenate([win_rates(total, RIDGE), strengths(total, RIDGE)], axis=-1)

    found = values(per_prompt.mean(0)[None])[0]
    ends = bootstrap(per_prompt, values, seed=seed)
    rows = []
    for n, name in enumerate(names):
        signs = Counter(one.sign if one.models[0] == name else -one.sign for one in between if name in one.models)
        rate, strength = float(found[n]), float(found[size + n])
        rows.append(ModelResult(name, signs[1], signs[0], signs[-1], rate, ends[n], strength, ends[size + n]))
    return sorted(rows, key=lambda row: -row.strength)


def duels(compared: Sequence[Comparison], seed: int = 0) -> list[Duel]:
    """Return every two models that were compared, by name. seed: of the bootstrap."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for one in compared:
        if one.models[0] != one.models[1]:
            a, b = sorted(one.models)
            found.setdefault((a, b), []).append((one.sign if one.models[0] == a else -one.sign, one.prompt))
    rows = []
    for (a, b), answers in sorted(found.items()):
        signs = np.array([sign for sign, _ in answers])
        won = (1 + signs) / 2
        interval = share_interval(won, [prompt for _, prompt in answers], seed=seed)
        wins, ties, losses = (int((signs == sign).sum()) for sign in (1, 0, -1))
        rows.append(Duel(a, b, wins, ties, losses, float(won.mean()), interval))
    return rows


def _rater(rater: str, votes: Sequence[Vote]) -> RaterResult:
    known = {vote.id: vote for vote in votes}
    same: list[bool] = []
    for vote in votes:
        before = known.get(vote.repeat_of or "")
        if before is not None and vote.ranks and before.ranks and set(before.images) == set(vote.images):
            same.append(_order(before) == _order(vote))
    seconds = [vote.seconds for vote in votes if vote.seconds is not None]
    return RaterResult(
        rater,
        len(votes),
        sum(vote.answer in ("tie", "both_bad") for vote in votes),
        sum(vote.answer == "skip" for vote in votes),
        len(same),
        float(np.mean(same)) if same else float("nan"),
        exact_interval(int(sum(same)), len(same), "repeats"),
        float(np.median(seconds)) if seconds else None,
    )


def _order(vote: Vote) -> dict[str, int]:
    """Return the rank of each image among those of the vote, 1, 2, ... without gaps: equal orders are equal answers."""
    levels = sorted(set(vote.ranks))
    return {image: levels.index(rank) for image, rank in zip(vote.images, vote.ranks, strict=True)}


def _between(first: Sequence[Comparison], a: str, b: str, seed: int) -> Agreement:
    """Return how far rater `b` agrees with rater `a` on the pairs that both judged."""
    said: dict[str, dict[tuple[str, str], tuple[int, str]]] = {a: {}, b: {}}
    for one in first:
        if one.rater in said:
            turned = one.images[0] > one.images[1]
            key = (one.images[1], one.images[0]) if turned else one.images
            said[one.rater].setdefault(key, (-one.sign if turned else one.sign, one.prompt))
    both = [key for key in said[a] if key in said[b]]
    by_a, by_b = (np.array([said[rater][key][0] for key in both], dtype=np.int64) for rater in (a, b))
    return agreement(by_a, by_b, [said[a][key][1] for key in both], seed=seed)


def _reward(first: Sequence[Comparison], scores: Mapping[str, float], seed: int) -> Agreement:
    """Return how far a reward agrees with people, on pairs with both scores."""
    human, predicted, prompts = [], [], []
    for one in first:
        gap = scores.get(one.images[0], np.nan) - scores.get(one.images[1], np.nan)
        if np.isfinite(gap):
            human.append(one.sign)
            predicted.append(int(np.sign(gap)))
            prompts.append(one.prompt)
    return agreement(np.array(human, dtype=np.int64), np.array(predicted, dtype=np.int64), prompts, seed=seed)


def _rubrics(votes: Sequence[Vote], seed: int) -> list[Rubric]:
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for vote in votes:
        for question, given in vote.scores.items():
            for model, score in zip(vote.models, given, strict=True):
                if score is not None:
                    found.setdefault((question, model), []).append((score, vote.prompt))
    rows = []
    for (question, model), answers in sorted(found.items()):
        values, prompts = np.array([score for score, _ in answers]), [prompt for _, prompt in answers]
        interval = share_interval(values, prompts, seed=seed)
        rows.append(Rubric(question, model, len(values), float(values.mean()), interval))
    return rows
