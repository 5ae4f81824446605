"""Which questions are asked: at random, the least certain first, and some of them twice."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from diffalign.voting.active import Active
from diffalign.voting.balanced import Balanced
from diffalign.voting.log import Vote
from diffalign.voting.questions import Group, Question, Sampler, State
from diffalign.voting.repeats import FEWEST_BETWEEN, Repeats
from diffalign.voting.uniform import Uniform


def groups(count: int, images: int, pairs: tuple[tuple[int, int], ...] | None = None) -> list[Group]:
    names = [tuple(f"g{g}/{k}" for k in range(images)) for g in range(count)]
    return [Group(f"prompt {g}", names[g], ("m",) * images, pairs) for g in range(count)]


def ask(sampler: Sampler, state: State, most: int = 10_000) -> list[Question]:
    """Ask and answer, one question after another."""
    found: list[Question] = []
    while len(found) < most and (question := sampler.next_question(state)) is not None:
        assert sampler.next_question(state) == question  # an equal state gives an equal question
        found.append(question)
        state.count(question.key)
        group = state.groups[question.group]
        images = tuple(group.images[place] for place in question.places)
        answer = "left" if len(images) == 2 else "tie"
        models = ("m",) * len(images)
        state.votes.append(
            Vote(
                f"v{len(state.votes) + 1}",
                "t",
                state.rater,
                group.prompt,
                images,
                models,
                answer,
                repeat_of=question.repeat_of,
            )  # type: ignore[arg-type]
        )
    return found


SCORES = {f"g{g}/{k}": float(v) for g in range(6) for k, v in enumerate(np.random.default_rng(g).normal(size=5))}


@pytest.mark.parametrize("sampler", [Uniform(), Active(SCORES)])
def test_each_pair_is_asked_once(sampler: Sampler) -> None:
    asked = ask(sampler, State(groups(6, 5), 2, "anna"))
    assert {q.key for q in asked} == {(g, frozenset(p)) for g in range(6) for p in combinations(range(5), 2)}
    assert len(asked) == 60 and {q.asked_by for q in asked} == {sampler.name}
    only = ask(sampler, State(groups(6, 5, ((0, 1), (2, 3))), 2, "anna"))
    assert sorted(q.places for q in only) == [(0, 1)] * 6 + [(2, 3)] * 6


@pytest.mark.parametrize("sampler", [Uniform(), Active(SCORES), Balanced()])
def test_sets_of_images_to_rank(sampler: Sampler) -> None:
    asked = ask(sampler, State(groups(6, 5), 3, "anna"), 6)
    assert len(asked) == 6 and all(len(q.places) == 3 for q in asked) and len({q.key for q in asked}) == 6


def test_random_is_uniform_and_keyed() -> None:
    first = Counter(Uniform().next_question(State(groups(3, 3), 2, "anna", seed)).key for seed in range(900))  # type: ignore[union-attr]
    assert len(first) == 9 and all(60 < count < 140 for count in first.values())
    by = [ask(Uniform(), State(groups(9, 4), 2, rater, seed)) for rater, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert by[0] == by[1] != by[2]


def test_active_asks_what_is_least_certain() -> None:
    scores = {"g0/0": 0.0, "g0/1": 5.0, "g0/2": 0.5, "g1/0": 1.0, "g1/1": 1.2, "g1/2": 9.0}
    asked = ask(Active(scores), State(groups(2, 3), 2, "anna"))
    # Prompts take turns; among those asked least, the closest pair of all comes first.
    assert [(q.group, q.places) for q in asked] == [
        (1, (0, 1)), (0, (0, 2)), (0, (1, 2)), (1, (1, 2)), (0, (0, 1)), (1, (0, 2)),
    ]  # fmt: skip
    ranked = ask(Active({"g0/0": 0, "g0/1": 9, "g0/2": 1, "g0/3": 2}), State(groups(1, 4), 3, "anna"), 1)
    assert ranked[0].places == (0, 2, 3)


def test_active_without_a_score_and_in_large_groups() -> None:
    scores = {"g0/0": 0.0, "g0/1": 5.0, "g0/2": float("nan")}
    asked = ask(Active(scores), State(groups(1, 3), 2, "anna"))
    assert asked[0].places == (0, 1) and len(asked) == 3
    many = {f"g0/{k}": float(v) for k, v in enumerate(np.random.default_rng(0).permutation(3000))}
    found = ask(Active(many), State(groups(1, 3000), 2, "anna"), 5)
    assert {abs(many[f"g0/{a}"] - many[f"g0/{b}"]) for a, b in (q.places for q in found)} == {1.0}


def test_repeats() -> None:
    state = State(groups(200, 2), 2, "anna")
    asked = ask(Repeats(Balanced(), 0.2), state, 200)
    again = [(n, q) for n, q in enumerate(asked) if q.repeat_of is not None]
    assert 20 <= len(again) <= 50
    assert len({q.repeat_of for _, q in again}) == len(again)  # once each
    for n, question in again:
        first = int(str(question.repeat_of)[1:]) - 1
        assert asked[first].key == question.key and n - first >= FEWEST_BETWEEN
        assert asked[first].repeat_of is None and question.asked_by == "repeat"
    others = [q for q in asked if q.repeat_of is None]
    assert len({q.key for q in others}) == len(others) and {q.asked_by for q in others} == {"balanced"}
    none = ask(Repeats(Balanced(), 0.0), State(groups(30, 2), 2, "anna"))
    assert none == ask(Balanced(), State(groups(30, 2), 2, "anna"))


def test_what_is_left_counts_repeats() -> None:
    repeats, state = Repeats(Balanced(), 0.3), State(groups(40, 2), 2, "anna")
    foreseen = []
    while True:
        foreseen.append(len(state.votes) + repeats.left(state, 40 - state.done.total()))
        if not ask(repeats, state, 1):
            break
    assert set(foreseen) == {len(state.votes)} and len(state.votes) > 45
    assert repeats.left(State(groups(1, 2), 2, "anna"), 100_000) == pytest.approx(100_000 / 0.7, rel=0.01)
    assert Repeats(Balanced(), 0.0).left(State(groups(1, 2), 2, "anna"), 5) == 5


@pytest.mark.parametrize("sampler", [Balanced(), Uniform(), Active({})], ids=lambda one: one.name)
def test_with_repeats_every_pair_is_asked(sampler: Sampler) -> None:
    state = State(groups(10, 3), 2, "anna")
    asked = ask(Repeats(sampler, 0.3), state)
    assert len({question.key for question in asked}) == 30 and len(asked) > 33


def test_what_was_skipped_is_not_repeated() -> None:
    state = State(groups(60, 2), 2, "anna")
    ask(Balanced(), state, 30)
    state.votes = [Vote(**{**vars(vote), "answer": "skip"}) for vote in state.votes]
    assert Repeats(Balanced(), 0.5).next_question(state) == Balanced().next_question(state)
    assert all(q.repeat_of is None for q in ask(Repeats(Balanced(), 0.5), state, 5))
