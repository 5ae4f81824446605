"""The default order of questions: balanced, without repeats, the same for all, and fast in large groups."""

from __future__ import annotations

from collections import Counter

from diffalign.voting.balanced import Balanced
from diffalign.voting.questions import Group, Question, State, shown_order


def groups(count: int, models: tuple[str, ...], pairs: tuple[tuple[int, int], ...] | None = None) -> list[Group]:
    return [Group(f"prompt {g}", tuple(f"g{g}/{k}" for k in range(len(models))), models, pairs) for g in range(count)]


def ask_all(state: State, most: int = 10_000) -> list[Question]:
    found = []
    while len(found) < most and (question := Balanced().next_question(state)) is not None:
        found.append(question)
        state.waiting.append(question)
        state.count(question.key)
    return found


def test_each_pair_is_asked_once_and_prompts_take_turns() -> None:
    asked = ask_all(State(groups(5, ("m",) * 4), 2, "anna"))
    assert len(asked) == len({q.key for q in asked}) == 5 * 6
    assert [sorted(q.group for q in asked[n : n + 5]) for n in range(0, 30, 5)] == [list(range(5))] * 6


def models_of(asked: list[Question], state: State) -> Counter[frozenset[str]]:
    return Counter(frozenset(state.groups[q.group].models[p] for p in q.places) for q in asked)


def test_models_are_balanced() -> None:
    state = State(groups(12, ("a", "b", "c")), 2, "anna")
    models = models_of(ask_all(state, 12), state)
    assert models == {frozenset("ab"): 4, frozenset("ac"): 4, frozenset("bc"): 4}


def test_pairs_of_two_models_come_before_those_of_one() -> None:
    state = State(groups(12, ("a", "b", "c", "a")), 2, "anna")
    asked = ask_all(state)
    assert all(len(models) == 2 for models in models_of(asked[:60], state))
    assert models_of(asked[60:], state) == {frozenset("a"): 12}


def test_only_pairs_that_belong_together_are_asked() -> None:
    asked = ask_all(State(groups(3, ("A", "A", "B", "B"), ((0, 2), (1, 3))), 2, "anna"))
    assert {tuple(sorted(q.places)) for q in asked} == {(0, 2), (1, 3)}
    assert len(asked) == 6


def test_raters_get_the_same_questions_on_other_sides() -> None:
    states = [State(groups(30, ("m", "n")), 2, rater) for rater in ("anna", "ben")]
    anna, ben = (ask_all(state) for state in states)
    assert [q.key for q in anna] == [q.key for q in ben]
    sides = [[shown_order(q, state) for q in anna] for state in states]
    assert sides[0] != sides[1]
    assert 5 < sum(order == (0, 1) for order in sides[0]) < 25
    assert sides[0] == [shown_order(q, states[0]) for q in anna]


def test_another_seed_asks_in_another_order() -> None:
    first, second = (ask_all(State(groups(9, ("m", "m", "m")), 2, "anna", seed=seed)) for seed in (0, 1))
    assert [q.key for q in first] != [q.key for q in second]
    assert {q.key for q in first} == {q.key for q in second}


def test_a_ranking_asks_each_image_before_one_twice() -> None:
    asked = ask_all(State(groups(2, ("m",) * 8), 4, "anna"))
    assert sorted(p for q in asked if q.group == 0 for p in q.places) == list(range(8))
    few = ask_all(State(groups(1, ("m",) * 3), 4, "anna"))
    assert [q.places for q in few] == [(0, 1, 2)]


def test_a_group_of_ten_thousand_images_has_a_next_pair() -> None:
    state = State(groups(1, ("m",) * 10_000), 2, "anna")
    assert len({q.key for q in ask_all(state, 20)}) == 20
    assert max(state.per_image.values()) == 1
