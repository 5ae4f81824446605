"""What can be voted on: datasets, folders, pairs of folders, runs; and where the votes go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.errors import DiffalignError
from diffalign.vote_page.gallery import Gallery, open_gallery
from helpers.processes import environment
from helpers.vote_data import colours, folder_of


def names(gallery: Gallery) -> list[tuple[str, ...]]:
    return [group.images for group in gallery.groups]


def test_a_dataset(tmp_path: Path) -> None:
    folder = colours(tmp_path / "mine", 2, 3)
    gallery = open_gallery([folder])
    assert names(gallery) == [("g00000/0", "g00000/1", "g00000/2"), ("g00001/0", "g00001/1", "g00001/2")]
    assert gallery.groups[1].models == ("base", "tuned", "base") and gallery.groups[1].prompt == "prompt 1"
    assert (gallery.log, gallery.dataset) == (folder / "votes.jsonl", folder)
    assert gallery.about == f"{folder}: 6 images of 2 prompts"
    assert open_gallery([folder], tmp_path / "other.jsonl").log == tmp_path / "other.jsonl"


def test_a_folder_of_images_that_share_prompts(tmp_path: Path) -> None:
    files = {"a.png": "fox", "x/a.png": "fox", "x/b.png": "fox", "c.png": "alone", "d.png": ""}
    gallery = open_gallery([folder_of(tmp_path / "mine", files)])
    assert names(gallery) == [("a.png", "x/a.png", "x/b.png")]
    assert gallery.groups[0].models == ("mine", "x", "x")
    assert gallery.log == tmp_path / "mine" / "votes.jsonl"
    assert gallery.about.endswith("3 images of 1 prompt; left out: 1 without a prompt, 1 alone with theirs")


def test_two_folders_are_paired_as_score_does(tmp_path: Path) -> None:
    a = folder_of(tmp_path / "base", {"1.png": "fox", "2.png": "fox", "3.png": "owl", "9.png": "only here"})
    b = folder_of(tmp_path / "tuned", {"1.png": "fox", "2.png": "fox", "z.png": "owl"})
    gallery = open_gallery([a, b])
    assert names(gallery) == [("base/1.png", "tuned/1.png", "base/2.png", "tuned/2.png"), ("base/3.png", "tuned/z.png")]
    assert gallery.groups[0].pairs == ((0, 1), (2, 3)) and gallery.groups[0].models == ("base", "tuned") * 2
    assert gallery.log == open_gallery([b, a]).log == tmp_path / "votes-base-tuned.jsonl"
    assert gallery.about == "3 pairs by name or prompt, 2 prompts, 1 image without a partner"


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = (folder_of(tmp_path / side / "images", {"1.png": "fox"}) for side in "ab")
    assert open_gallery([a, b]).groups[0].models == ("a/images", "b/images")


def run_of(folder: Path, models: tuple[str, ...] = ("base", "tuned")) -> Path:
    for model in models:
        folder_of(folder / "eval" / "images" / model, {"00000-0.png": "", "00000-1.png": "", "00001-0.png": ""})
    images = {model: str(folder / "eval" / "images" / model) for model in models}
    (folder / "eval.json").write_text(json.dumps({"prompts": ["fox", "owl"], "images": images}))
    return folder


def test_one_run_is_its_tuned_model_against_its_base_and_two_runs_their_tuned_ones(tmp_path: Path) -> None:
    one = open_gallery([run_of(tmp_path / "one")])
    assert [group.prompt for group in one.groups] == ["fox", "owl"]
    assert one.groups[1].images == ("eval/images/base/00001-0.png", "eval/images/tuned/00001-0.png")
    assert one.log == tmp_path / "one" / "votes.jsonl"
    two = open_gallery([tmp_path / "one", run_of(tmp_path / "two")])
    assert two.groups[1].images == tuple(f"{run}/eval/images/tuned/00001-0.png" for run in ("one", "two"))
    assert two.groups[1].models == ("one", "two")


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda path: [path / "none"], "no such file or folder"),
        (lambda path: [folder_of(path / "a", {"1.png": "fox", "2.png": "owl"})], "no two images share a prompt"),
        (lambda path: [folder_of(path / "a", {"1.png": ""})], "1 image without one"),
        (lambda path: [colours(path / "a", 2, 1)], "no group of the dataset has two images"),
        (lambda path: [folder_of(path / "a", {"1.png": "fox"})] * 2, "the same folder"),
        (lambda path: [folder_of(path / n, {"1.png": "fox"}) for n in "abc"], "3 sources"),
        (
            lambda path: [folder_of(path / "a", {"1.png": "x"}), folder_of(path / "b", {"2.png": "y"})],
            "same prompt on both sides",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, make: object, fault: str) -> None:
    assert callable(make)
    with pytest.raises(DiffalignError, match=fault):
        open_gallery(make(tmp_path))


def test_the_page_starts_without_torch() -> None:
    """Torch takes longer to load than 10,000 images take to list."""
    code = "import sys, diffalign.stages.vote; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


@pytest.mark.parametrize("kind", ["dataset", "folder", "two"])
def test_a_log_that_leads_out_is_refused(tmp_path: Path, kind: str) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("last line")
    place = tmp_path / "theirs"
    if kind == "dataset":
        colours(place, 1)
    else:
        folder_of(place, {f"{a}/{n}.png": "fox" for a in "ab" for n in (1, 2)})
    sources = [place / "a", place / "b"] if kind == "two" else [place]
    (place / ("votes-a-b.jsonl" if kind == "two" else "votes.jsonl")).symlink_to("../mine.txt")
    with pytest.raises(DiffalignError, match="a link that leads out of its folder"):
        open_gallery(sources)
    assert open_gallery(sources, mine).log == mine  # the user's own choice
    assert mine.read_text() == "last line"


def test_a_link_that_leads_out_is_not_shown(tmp_path: Path) -> None:
    outside = folder_of(tmp_path / "secret", {"s.png": "fox"})
    folder = folder_of(tmp_path / "mine", {"a.png": "fox", "c.png": "fox"})
    for suffix in ("png", "txt"):
        (folder / f"b.{suffix}").symlink_to(outside / f"s.{suffix}")
    assert names(open_gallery([folder])) == [("a.png", "c.png")]
