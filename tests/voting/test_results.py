"""What votes say, against counts by hand, scipy's tests and fits of the written-out model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binom, chi2, kendalltau

from diffalign.voting.log import Vote
from diffalign.voting.results import RIDGE, Results, comparisons, duels, results
from diffalign.voting.sides import side_tests


def vote(n: int, answer: str, prompt: str = "p", **more: object) -> Vote:
    """A vote on the images a (left) and b; the image of a prompt is named by its model and the prompt."""
    models = tuple(more.pop("models", ("base", "tuned")))  # type: ignore[call-overload]
    images = tuple(more.pop("images", tuple(f"{prompt}/{model}" for model in models)))  # type: ignore[call-overload]
    rater = str(more.pop("rater", "anna"))
    return Vote(f"v{n}", "t", rater, prompt, images, models, answer, **more)  # type: ignore[arg-type]


def many(share: float, prompts: int, seed: int = 0, left: float = 0.5) -> list[Vote]:
    """A rater who prefers `tuned` in this share of votes; sides are drawn. left: share of votes that follow the left side."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(prompts):
        models = ("base", "tuned") if rng.random() < 0.5 else ("tuned", "base")
        wanted = "tuned" if rng.random() < share else "base"
        side = "left" if models[0] == wanted else "right"
        side = "left" if rng.random() < 2 * left - 1 else side
        found.append(vote(n, side, f"p{n}", models=models))
    return found


def test_two_models() -> None:
    votes = [vote(n, "right", f"p{n}") for n in range(12)] + [vote(20 + n, "left", f"p{n}") for n in range(4)]
    votes += [vote(30, "tie", "p1"), vote(31, "both_bad", "p2"), vote(32, "skip", "p3")]
    found = results(votes, {})
    assert found.votes == 19 and found.prompts == 12
    assert found.answers == {"right": 12, "left": 4, "tie": 1, "both_bad": 1, "skip": 1}
    best, other = found.models
    assert (best.model, best.wins, best.ties, best.losses) == ("tuned", 12, 2, 4)
    assert (other.model, other.wins, other.ties, other.losses) == ("base", 4, 2, 12)
    assert best.win_rate == pytest.approx(13 / 18, abs=1e-3) and best.win_rate + other.win_rate == pytest.approx(1)
    assert best.strength == pytest.approx(0.5 * math.log(13 / 5), abs=0.01)
    assert best.win_interval.low is not None and best.win_interval.low < 13 / 18 < (best.win_interval.high or 0)
    duel = found.duels[0]
    assert (duel.a, duel.b, duel.wins, duel.ties, duel.losses) == ("base", "tuned", 4, 2, 12)
    assert duel.share == pytest.approx(5 / 18)
    assert [(r.rater, r.votes, r.ties, r.skipped) for r in found.raters] == [("anna", 19, 2, 1)]


def test_the_interval_is_a_bootstrap_over_prompts() -> None:
    """Votes on one prompt move together: ten votes a prompt say little more than one."""
    rng = np.random.default_rng(0)
    votes = []
    for p in range(20):
        right = rng.random() < 0.7
        votes += [vote(100 * p + n, "right" if right else "left", f"p{p}") for n in range(10)]
    found = results(votes, {}).duels[0].interval
    wins = np.array([[v.answer == "left" for v in votes[10 * p : 10 * p + 10]] for p in range(20)]).mean(1)
    again = np.random.default_rng(5)
    means = [wins[again.integers(20, size=20)].mean() for _ in range(4000)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.03)
    assert found.high - found.low > 0.3  # type: ignore[operator]


def test_strengths_of_three_models() -> None:
    rng = np.random.default_rng(1)
    true = {"a": 1.0, "b": 0.0, "c": -1.0}
    votes = []
    for n in range(300):
        one, two = rng.permutation(list(true))[:2]
        chance = 1 / (1 + math.exp(true[two] - true[one]))
        votes.append(vote(n, "left" if rng.random() < chance else "right", f"p{n % 60}", models=(one, two)))
    found = results(votes, {})
    wins = np.zeros((3, 3))
    for v in votes:
        i, j = ("abc".index(m) for m in v.models)
        wins[(i, j) if v.answer == "left" else (j, i)] += 1

    def loss(s: np.ndarray) -> float:
        return float((wins * np.log1p(np.exp(s[None, :] - s[:, None]))).sum() + 0.5 * RIDGE * (s**2).sum())

    expected = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9}).x
    assert [row.model for row in found.models] == ["a", "b", "c"]
    assert [row.strength for row in found.models] == pytest.approx(expected.tolist(), abs=1e-3)
    for row in found.models:
        low, high = row.strength_interval.low, row.strength_interval.high
        assert low is not None and high is not None and low < true[row.model] < high
    assert len(found.duels) == 3


def test_coverage_of_the_win_rate() -> None:
    """Of 30 rounds of votes, about 95% have the true share in their interval."""
    inside = 0
    for seed in range(30):
        compared = [one for v in many(0.65, 60, seed) for one in comparisons(v)]
        interval = duels(compared, seed)[0].interval
        inside += interval.low <= 0.35 <= interval.high  # type: ignore[operator]
    assert inside >= 26


def test_verdicts() -> None:
    said = {name: results(votes, {}).duels[0].verdict for name, votes in {
        "better": many(0.8, 100), "equal": many(0.5, 100), "few": many(0.9, 5),
    }.items()}  # fmt: skip
    assert said == {
        "better": "tuned is preferred to base",
        "equal": "no difference seen between base and tuned",
        "few": "too few prompts to tell base from tuned",
    }
    better = results(many(0.8, 100), {}).duels[0]
    low, high = 1 - (better.interval.high or 0), 1 - (better.interval.low or 0)
    assert better.numbers == (
        f"tuned won {better.losses}, lost {better.wins}, 0 ties: {1 - better.share:.1%} ({low:.1%} to {high:.1%})"
    )


def test_raters_and_rewards() -> None:
    """Agreement by hand, and Kendall's tau-b of a full ranking as scipy computes it."""
    names = [f"g/{k}" for k in range(6)]
    ranks = (1, 2, 2, 4, 5, 6)
    ranking = vote(0, "ranking", images=names, models=["m"] * 6, ranking=ranks)
    scores = dict(zip(names, (5.0, 4.0, 4.5, 4.5, 1.0, 2.0), strict=True))
    found = results([ranking], {"r": scores}).rewards["r"]
    assert found.kendall == pytest.approx(kendalltau([-r for r in ranks], list(scores.values())).statistic)
    assert (found.pairs, found.human_ties, found.predicted_ties) == (14, 1, 1)
    votes = [vote(n, "left", f"p{n}") for n in range(10)]
    for n in range(10):  # ben sees the sides swapped, and agrees 7 times, has one tie, and differs twice
        answer = "right" if n < 7 else "tie" if n == 7 else "left"
        votes.append(vote(20 + n, answer, f"p{n}", rater="ben", models=("tuned", "base")))
    votes.append(vote(50, "left", "alone", rater="ben"))
    both = results(votes, {}).between["anna", "ben"]
    assert (both.pairs, both.human_ties, both.predicted_ties, both.accuracy) == (10, 0, 1, pytest.approx(0.75))
    assert both.kendall == pytest.approx((7 - 2) / math.sqrt(10 * 9))
    partly = results(
        votes, {"r": {"p0/base": 2.0, "p0/tuned": 1.0, "p1/base": 1.0, "p2/base": 3.0, "p2/tuned": math.nan}}
    )
    assert partly.rewards["r"].pairs == 2 and partly.rewards["r"].accuracy == 1.0  # of both raters, on p0 alone


def test_consistency_on_repeats() -> None:
    votes = [vote(n, "left", f"p{n}") for n in range(12)]
    votes += [
        vote(100 + n, "right", f"p{n}", models=("tuned", "base"), repeat_of=f"v{n}") for n in range(9)
    ]  # the same
    votes += [vote(200 + n, "left", f"p{n}", models=("tuned", "base"), repeat_of=f"v{n}") for n in (9, 10)]  # the other
    votes += [vote(300, "skip", "p11", repeat_of="v11")]
    rater = results(votes, {}).raters[0]
    assert rater.repeats == 11 and rater.same == pytest.approx(9 / 11)
    low, high = rater.same_interval.low, rater.same_interval.high
    assert low is not None and high is not None
    assert binom.sf(8, 11, low) == pytest.approx(0.025) and binom.cdf(9, 11, high) == pytest.approx(0.025)
    ranked = [vote(0, "ranking", images="xyz", models="mmm", ranking=(1, 2, 3))]
    ranked.append(vote(1, "ranking", images="zyx", models="mmm", ranking=(3, 2, 1), repeat_of="v0"))
    ranked.append(vote(2, "ranking", images="zyx", models="mmm", ranking=(1, 2, 3), repeat_of="v0"))
    assert results(ranked, {}).raters[0].same == 0.5


def test_sides_are_tested() -> None:
    def sides(found: Results) -> list[bool]:
        return [one.explains for one in found.sides]

    fair, lefty = results(many(0.7, 200), {}), results(many(0.7, 200, left=0.8), {})
    assert sides(fair) == [False] and sides(lefty) == [True]
    one = lefty.sides[0]
    left = one.chosen[0]
    assert one.p == pytest.approx(min(1.0, 2 * binom.sf(left - 1, 200, 0.5)))
    assert binom.sf(left - 1, 200, one.low) == pytest.approx(0.025) and binom.cdf(left, 200, one.high) == pytest.approx(
        0.025
    )
    assert f"anna chose the left image in {left / 200:.0%} of 200 choices" in one.words
    righty = results([vote(n, "right", f"p{n}") for n in range(40)], {}).sides[0]
    assert righty.explains and "chose the right image in 100% of 40 choices (91% to 100%)" in righty.words
    assert side_tests(many(0.7, 19)) == []
    ranks = [(1, 2, 3)] * 20 + [(2, 1, 3)] * 5 + [(2, 3, 1)] * 5 + [(1, 1, 2)] * 9
    ranked = [vote(n, "ranking", images="xyz", models="mmm", ranking=r) for n, r in enumerate(ranks)]
    three = results(ranked, {}).sides[0]
    assert three.chosen == (20, 5, 5) and three.p == pytest.approx(chi2.sf(15, 2)) and three.explains
    assert "place 1 of 3 in 67% of 30 choices" in three.words
    alarms = sum(one.explains for seed in range(100) for one in side_tests(many(0.6, 60, seed)))
    assert alarms <= 4  # 1% of fair raters


def test_rubrics_and_no_votes() -> None:
    votes = [vote(n, "left", f"p{n}", scores={"realism": (4.0, 2.0 if n else None)}) for n in range(9)]
    found = {(r.question, r.model): r for r in results(votes, {}).rubrics}
    assert found["realism", "base"].mean == 4.0 and found["realism", "base"].count == 9
    assert found["realism", "tuned"].mean == 2.0 and found["realism", "tuned"].count == 8
    nothing = results([], {"r": {}})
    assert nothing.votes == 0 and not nothing.models and math.isnan(nothing.rewards["r"].accuracy)
