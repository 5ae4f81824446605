"""The log of votes: what is appended, what counts, and what a kill leaves."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from diffalign.errors import DiffalignError
from diffalign.voting.log import NotKept, Undo, Vote, VoteLog, check_rater, line_of, read_entries, read_votes, votes_of
from helpers.vote_data import full_disk

LEFT = Vote("v1", "2026-01-01T00:00:00+00:00", "anna", "a fox", ("a/0", "b/0"), ("base", "tuned"), "left")


def undo(of: str, rater: str = "anna") -> Undo:
    return Undo(f"u-{of}", LEFT.time, rater, of)


def test_a_log_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    ranked = replace(
        LEFT, id="v2", images=("x", "y", "z"), models=("m",) * 3, answer="ranking", ranking=(2, 1, 2),
        scores={"alignment": (4.5, None, 1.0)}, note="line\u2028\n\"<b>\ud800", repeat_of="v1", asked_by="s", seconds=1.5,
    )  # fmt: skip
    with VoteLog(path) as log:
        log.append(LEFT)
        log.append(ranked)
    assert len(path.read_bytes().splitlines()) == 2
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["v1", "v2"]
    assert read_votes(path) == [LEFT, replace(ranked, note='line\u2028\n"<b>\\ud800')]


def test_an_entry_is_in_the_file_before_append_returns(tmp_path: Path) -> None:
    with VoteLog(tmp_path / "votes.jsonl") as log:
        log.append(LEFT)
        assert read_votes(log.path) == [LEFT]


def test_an_entry_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole line the system is asked that it survives a power cut."""
    synced: list[bytes] = []
    with VoteLog(tmp_path / "votes.jsonl") as log:
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(log.path.read_bytes()))
        log.append(LEFT)
        log.append(undo("v1"))
    lines = [line_of(entry).encode() for entry in (LEFT, undo("v1"))]
    assert synced == [lines[0], lines[0] + lines[1]]


def test_an_undo_is_an_entry_and_counts_for_its_own_rater_alone(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    second = replace(LEFT, id="v2", answer="right")
    with VoteLog(path) as log:
        for entry in (LEFT, second, undo("v2", "ben"), undo("v1"), LEFT, second):
            log.append(entry)
    assert len(read_entries(path)) == 6
    assert read_votes(path) == [second]  # v1 was sent again after it was taken back; v2 twice


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_torn_last_line_is_skipped_and_the_next_entry_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text(line_of(LEFT) + line_of(replace(LEFT, id="v2"))[:-cut])
    kept = [LEFT, replace(LEFT, id="v2")] if cut == 1 else [LEFT]  # only its newline was missing
    assert read_votes(path) == kept
    with VoteLog(path) as log:
        log.append(replace(LEFT, id="v3"))
    assert read_votes(path) == [*kept, replace(LEFT, id="v3")]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    with VoteLog(tmp_path / "votes.jsonl") as log:
        log.append(LEFT)
        before = log.path.read_bytes()
        with full_disk(len(before) + 30), pytest.raises(NotKept, match="not written .* answer again"):
            log.append(replace(LEFT, id="v2"))
        assert log.path.read_bytes() == before and len(log.entries) == 1
        log.append(replace(LEFT, id="v3"))
    assert read_votes(log.path) == [LEFT, replace(LEFT, id="v3")]


@pytest.mark.parametrize("content", ["notes of mine", "{}", '{"a": 1}\nnotes', "\ufeff"])
def test_a_file_that_is_no_log_keeps_its_bytes(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(DiffalignError, match=r"notes.txt"):
        VoteLog(path)
    assert path.read_text() == content
    with pytest.raises(DiffalignError, match="no file; name another place"):
        VoteLog(Path("/dev/full"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"answer": "best"}, "answer"),
        ({"images": ["a/0", "a/0"]}, "no image twice"),
        ({"models": ["base"]}, "for each of the 2 images"),
        ({"answer": "ranking"}, "a rank from 1 for each image"),
        ({"ranking": [1, 2]}, "a rank from 1 for each image"),
        ({"answer": "ranking", "ranking": [0, 3]}, "a rank from 1 for each image"),
        ({"images": list("abc"), "models": list("mmm")}, "one of two images, not of 3"),
        ({"scores": {"alignment": [6, 1]}}, "from 1 to 5"),
        ({"scores": {"alignment": [1]}}, "for each of the 2 images"),
        ({"note": "x" * 2001}, "more than 2000"),
        ({"seconds": float("nan")}, "seconds"),
    ],
)
def test_an_entry_that_is_none_is_named(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text(json.dumps(json.loads(line_of(LEFT)) | change) + "\n")
    with pytest.raises(DiffalignError, match=fault) as error:
        read_votes(path)
    assert "v1" in str(error.value)


def test_ranks_follow_the_answer() -> None:
    two = {answer: replace(LEFT, answer=answer).ranks for answer in ("left", "right", "tie", "both_bad", "skip")}
    assert two == {"left": (1, 2), "right": (2, 1), "tie": (1, 1), "both_bad": (1, 1), "skip": ()}
    assert replace(LEFT, answer="ranking", ranking=(2, 1)).ranks == (2, 1)


def test_human_stands_for_all_and_a_log_that_has_it_as_a_rater_is_read(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    old = [replace(LEFT, rater="human"), replace(LEFT, id="v2", rater="human"), replace(LEFT, id="v3")]
    entries = [*old, undo("v2", "human"), undo("v3", "human")]
    path.write_text("".join(map(line_of, entries)))
    votes = read_votes(path)
    assert [(vote.id, vote.rater) for vote in votes] == [("v1", "me"), ("v3", "anna")]
    assert votes_of(votes, "human") == votes and votes_of(votes, "me") == votes[:1] and votes_of(votes, "ben") == []
    assert path.read_text() == "".join(map(line_of, entries))  # as it was


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "x" * 101, "pickscore", "a\nb", "human", "Human"])
def test_a_name_that_is_no_source_is_refused(name: str) -> None:
    assert check_rater("Anna-2", {"pickscore"}) == "Anna-2"
    with pytest.raises(DiffalignError, match="rater"):
        check_rater(name, {"pickscore"})
