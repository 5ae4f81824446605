"""Check labels before training: do they agree with stored scores, and does the generator explain them?"""

from dataclasses import dataclass, field
from itertools import combinations
from math import isfinite, sqrt

from diffalign.health.findings import Finding
from diffalign.health.row_checks import NEAR_CHANCE, TOO_MANY_WEIGHTLESS

# Fewer pairs are not judged.
PAIRS_NEEDED = 64
OPPOSED, SURE = 0.35, 2.5
GENERATOR_WINS = 0.8
# If two generators meet once, one of them wins every time: only those that met often are counted.
MEETINGS_NEEDED = 16


@dataclass(frozen=True)
class LabelledGroup:
    """A group's labels, the stored scores of the same images by reward, and their generators."""

    labels: list[float]
    scores: dict[str, list[float]] = field(default_factory=dict)
    generators: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Agreement:
    """Pairs that both label and score order strictly, the share ordered alike, and its standard error."""

    pairs: int
    share: float
    error: float


def _agreement(groups: list[LabelledGroup], reward: str) -> Agreement:
    """Compare labels with a reward's scores.

    The error is that between groups: the pairs of one group share its images, so they are not independent.
    """
    counts: list[tuple[int, int]] = []
    for group in groups:
        scores = group.scores.get(reward, [])
        alike = pairs = 0
        for i, j in combinations(range(len(scores)), 2):
            label, score = group.labels[i] - group.labels[j], scores[i] - scores[j]
            if isfinite(label) and isfinite(score) and label and score:
                pairs += 1
                alike += (label > 0) == (score > 0)
        counts.append((alike, pairs))
    total = sum(pairs for _, pairs in counts)
    if not total:
        return Agreement(0, 0.5, 0.5)
    share = sum(alike for alike, _ in counts) / total
    return Agreement(total, share, sqrt(sum((alike - share * pairs) ** 2 for alike, pairs in counts)) / total)


def _generators(groups: list[LabelledGroup]) -> Finding | None:
    """Measure how often the better of two generators wins."""
    wins: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        for i, j in combinations(range(len(group.generators)), 2):
            first, second = group.generators[i], group.generators[j]
            difference = group.labels[i] - group.labels[j]
            if first != second and isfinite(difference) and difference:
                pair = (min(first, second), max(first, second))
                wins.setdefault(pair, []).append(int((difference > 0) == (first == pair[0])))
    met = [w for w in wins.values() if len(w) >= MEETINGS_NEEDED]
    total = sum(map(len, met))
    if total < PAIRS_NEEDED:
        return None
    share = sum(max(sum(w), len(w) - sum(w)) for w in met) / total
    if share < GENERATOR_WINS:
        return None
    measured = f"the stronger generator wins {share:.0%} of {total} pairs of two generators"
    return Finding("generators_explain_ranking", 0, measured)


def examine_labels(groups: list[LabelledGroup], weightless: int = 0) -> list[Finding]:
    """Return findings on labels alone. The labels need not come from the rewards whose scores are stored.

    weightless: how many groups weigh nothing for whatever reason, where more is known than their labels.
    """
    found = []
    weightless = max(weightless, sum(len(set(filter(isfinite, group.labels))) < 2 for group in groups))
    if weightless > TOO_MANY_WEIGHTLESS * len(groups):
        found.append(Finding("labels_without_spread", 0, f"{weightless / len(groups):.0%} of {len(groups)} groups"))
    rewards = sorted({name for group in groups for name in group.scores})
    agreements = {reward: _agreement(groups, reward) for reward in rewards}
    agreements = {reward: a for reward, a in agreements.items() if a.pairs >= PAIRS_NEEDED}
    if agreements:
        # One score that agrees is enough: labels come from it, or from people who see it alike.
        reward, best = max(agreements.items(), key=lambda item: item[1].share)
        measured = f"{best.share:.0%} ± {best.error:.0%} of {best.pairs} pairs are ordered as {reward} orders them"
        highest = best.share + SURE * best.error
        if best.share < OPPOSED and highest < 0.5:
            found.append(Finding("labels_oppose_scores", 0, measured))
        elif highest < NEAR_CHANCE:
            found.append(Finding("labels_ignore_scores", 0, measured))
    by_generator = _generators(groups)
    return [*found, by_generator] if by_generator else found
