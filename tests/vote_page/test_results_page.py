"""What `diffalign vote-results` prints and writes, and which pair the options of `diffalign vote` ask for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from diffalign.errors import DiffalignError
from diffalign.stages.vote_scores import sampler_of, scores_by, stored_scores
from diffalign.vote_page.gallery import open_gallery
from diffalign.voting.log import Vote, line_of
from diffalign.voting.questions import State
from helpers.command_line import refused, run
from helpers.vote_data import EVIL, colours


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pairs; anna prefers `tuned` in ten of them, ben always the left one."""
    folder = colours(tmp_path / "mine", 12)
    votes = []
    for g in range(12):
        turn = (0, 1) if g % 2 else (1, 0)
        images, models = (tuple(f"g{g:05d}/{k}" for k in turn), tuple(("base", "tuned")[k] for k in turn))
        prompt = EVIL if g == 0 else f"prompt {g}"
        wanted = "left" if (models[0] == "tuned") == (g < 10) else "right"
        for rater, answer in (("anna", wanted), ("ben", "left")):
            note = EVIL if rater == "ben" and g == 3 else ""
            votes.append(Vote(f"{rater}{g}", "t", rater, prompt, images, models, answer, note=note, seconds=1.5))  # type: ignore[arg-type]
        votes += [
            Vote(f"again{g}{n}", "t", "ben", prompt, images[::-1], models[::-1], "left", repeat_of=f"ben{g}")
            for n in range(1)
        ]
    (folder / "votes.jsonl").write_text("".join(map(line_of, votes)))
    return folder


def test_tables_and_page(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", data, "-r", "sharpness", "--into-dataset") == 0
    capsys.readouterr()
    page = tmp_path / "out.html"
    assert run("vote-results", data, "--html", page, "-r", "jpeg_compressibility", "--rater", "anna") == 0
    said = capsys.readouterr().out
    assert "tuned is preferred to base: tuned won 10, lost 2, 0 ties: 83.3%" in said
    assert re.search(r"tuned +10 +0 +2 +83.3%", said) and re.search(r"anna +12 +0 +0 +–", said)
    assert "ben" not in said and all(len(line) <= 80 for line in said.splitlines()[1:-2] if "won 10" not in line)
    assert run("vote-results", data, "--html", page, "--reward", "jpeg_compressibility") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "sides explain votes: ben chose the left image in 100% of 24 choices" in said
    assert "ben 24 0 12 0.0%" in said and "anna and ben 12 0, 0" in said
    assert re.search(r"sharpness 24 0, 24 50.0%", said) and "jpeg_compressibility 24" in said  # flat pictures: all ties
    html = page.read_text()
    assert "<script" not in html and "onerror=window" not in html.replace("&lt;img src=x onerror=window", "")
    assert "&lt;script&gt;window.hacked=1" in html and html.count("data:image/jpeg") >= 4
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    for words in ("People disagree", "With a note", "Against jpeg_compressibility", "tuned is preferred to base"):
        assert words in html
    assert str(tmp_path) not in html


def test_nothing_to_say(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "carl has not voted yet" in refused(capsys, "vote-results", data, "--rater", "carl")
    (data / "votes.jsonl").unlink()
    assert "nobody has voted yet; vote with `diffalign vote" in refused(capsys, "vote-results", data)
    assert "no such file or folder" in refused(capsys, "vote-results", tmp_path / "none")


def test_which_pair_is_asked(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = open_gallery([data])
    assert stored_scores(gallery) == {}
    name, scores = scores_by(gallery, "small=jpeg_compressibility:quality=50", "cpu")
    assert name == "small" and len(scores) == 24
    state = State(gallery.groups, 2, "anna")
    question = sampler_of("active", 0.0, scores).next_question(state)
    assert question is not None
    gaps = [abs(np.diff([scores[image] for image in group.images]))[0] for group in gallery.groups]
    assert gaps[question.group] == min(gaps) and question.asked_by == "active"
    for ask in ("balanced", "random"):
        found = sampler_of(ask, 0.3, None).next_question(state)  # type: ignore[arg-type]
        assert found is not None and found.asked_by == ask
    assert run("score", data, "-r", "sharpness", "--into-dataset") == 0
    assert scores_by(gallery, "sharpness")[1] == stored_scores(gallery)["sharpness"]
    with pytest.raises(DiffalignError, match="--ask active and --reward go together"):
        sampler_of("active", 0.1, None)
    assert "go together" in refused(capsys, "vote", data, "--reward", "sharpness", "--no-browser")
    assert "none of the images has a score" in refused(capsys, "vote", data, "--ask", "active", "-r", "ocr")
