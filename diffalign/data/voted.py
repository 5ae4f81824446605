"""Find what the votes on a dataset say of its groups."""

from collections.abc import Callable, Iterable

from diffalign.voting.log import Vote
from diffalign.voting.shares import won_shares


def voted_shares(votes: Iterable[Vote], members: Callable[[str], list[int]]) -> dict[str, list[float]]:
    """Return group id -> the share of won comparisons of each image, NaN for one without; groups without votes are left out.

    members: returns the indices of a group's images, ascending, none for an unknown group. Skipped questions say nothing,
    and votes on images that are not there are left out.
    """
    found: dict[str, list[tuple[list[int], tuple[int, ...]]]] = {}
    for vote in votes:
        group = vote.images[0].rpartition("/")[0]
        known = {f"{group}/{index}": place for place, index in enumerate(members(group))}
        if vote.ranks and known.keys() >= set(vote.images):
            found.setdefault(group, []).append(([known[name] for name in vote.images], vote.ranks))
    return {group: won_shares(given, len(members(group))).tolist() for group, given in found.items()}
