"""What can be said of labels before a single step: do they agree with stored scores, does the generator explain them?"""

from dataclasses import dataclass, field
from itertools import combinations
from math import isfinite, sqrt

from diffalign.health.findings import Finding

# A coin orders n pairs right with a standard deviation of 0.5 / sqrt(n): fewer pairs decide nothing.
PAIRS_NEEDED = 64
OPPOSED, COIN_SIGMA = 0.35, 2.5
GENERATOR_WINS = 0.8


@dataclass(frozen=True)
class LabelledGroup:
    """A group's labels, the stored scores of the same images by reward, and who made them."""

    labels: list[float]
    scores: dict[str, list[float]] = field(default_factory=dict)
    generators: list[str] = field(default_factory=list)


def _agreement(groups: list[LabelledGroup], reward: str) -> tuple[int, float]:
    """Number of pairs that both order strictly, and the share that they order alike."""
    alike = pairs = 0
    for group in groups:
        scores = group.scores.get(reward, [])
        for i, j in combinations(range(len(scores)), 2):
            label, score = group.labels[i] - group.labels[j], scores[i] - scores[j]
            if isfinite(label) and isfinite(score) and label and score:
                pairs += 1
                alike += (label > 0) == (score > 0)
    return pairs, alike / pairs if pairs else 0.5


def _generators(groups: list[LabelledGroup]) -> Finding | None:
    """Pairs of two generators: how often does the one that wins more win?"""
    wins: dict[tuple[str, str], list[int]] = {}
    for group in groups:
        for i, j in combinations(range(len(group.generators)), 2):
            first, second = group.generators[i], group.generators[j]
            difference = group.labels[i] - group.labels[j]
            if first != second and isfinite(difference) and difference:
                pair = (min(first, second), max(first, second))
                wins.setdefault(pair, []).append(int((difference > 0) == (first == pair[0])))
    total = sum(map(len, wins.values()))
    if total < PAIRS_NEEDED:
        return None
    share = sum(max(sum(w), len(w) - sum(w)) for w in wins.values()) / total
    if share < GENERATOR_WINS:
        return None
    measured = f"the stronger generator wins {share:.0%} of {total} pairs of two generators"
    return Finding("generators_explain_ranking", 0, measured)


def examine_labels(groups: list[LabelledGroup]) -> list[Finding]:
    """Findings on labels alone; the scores are those of rewards that the labels may or may not come from."""
    found = []
    agreements = {
        reward: (pairs, share)
        for reward in sorted({name for group in groups for name in group.scores})
        for pairs, share in [_agreement(groups, reward)]
        if pairs >= PAIRS_NEEDED
    }
    if agreements:
        # One score that agrees is enough: labels come from it, or from people who see it alike.
        reward, (pairs, share) = max(agreements.items(), key=lambda item: item[1][1])
        measured = f"{share:.0%} of {pairs} pairs are ordered as {reward} orders them"
        if share < OPPOSED:
            found.append(Finding("labels_oppose_scores", 0, measured))
        elif share < 0.5 + COIN_SIGMA * 0.5 / sqrt(pairs):
            found.append(Finding("labels_ignore_scores", 0, measured))
    by_generator = _generators(groups)
    return [*found, by_generator] if by_generator else found
