"""Numbers out of range and places where no file can be: one line each, from the configs' own bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.config import KINDS, load
from diffalign.config.section import LARGEST_SEED
from diffalign.errors import DiffalignError
from diffalign.files import make_folder, replacing
from helpers import pictures
from helpers.command_line import run

HUGE = ["9" * 400, str(2**64), str(10**11), "-" + "9" * 400]
KEYS = [
    ("train", "sd3_rankdpo", key)
    for key in (
        "seed", "train.steps", "tune.rank", "data.resolution", "data.limit", "data.group_size", "train.threads",
        "train.groups_per_step", "train.micro_batch", "train.log_every", "checkpoint.every", "checkpoint.keep",
        "optimizer.warmup_steps", "validation.steps", "validation.n", "validation.seeds", "validation.batch_size",
    )
]  # fmt: skip
KEYS += [
    ("synth", "synth_shapes", key)
    for key in ("seed", "prompts.n", "generators.0.steps", "generators.0.batch_size", "threads")
]
KEYS += [
    ("synth", "synth_shapes", key)
    for key in ("generators.0.images_per_prompt", "reward_batch", "contact_sheet", "rank.k")
]
KEYS += [
    ("rounds", "rounds_shapes_gdro", key)
    for key in ("rounds", "images.steps", "data.n", "data.images_per_prompt", "seed")
]
KEYS += [
    ("distill", "shapes_sd3_gndm", key)
    for key in ("student.steps", "group.size", "fake.updates", "train.steps", "resolution")
]
KEYS += [
    ("reward-gradient", "shapes_sd3_reward_gradient", key) for key in ("sampler.steps", "train.images_per_step", "n")
]
KEYS += [
    ("judge", "shapes_judge_gdso", key) for key in ("train.records_per_step", "tune.rank", "data.limit", "train.steps")
]


@pytest.mark.parametrize(("kind", "recipe", "key"), KEYS)
def test_a_number_out_of_range_is_one_line(kind: str, recipe: str, key: str) -> None:
    for value in HUGE:
        if key == "seed" and 0 <= int(value) <= LARGEST_SEED:
            continue
        with pytest.raises(DiffalignError) as caught:
            load(kind, recipe, [*(["data.path=x"] if kind == "train" else []), f"{key}={value}"])
        assert key in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.parametrize(
    "override", ["data.resolution=1000000", "validation.height=1000000", "data.buckets=[[1000000, 8]]"]
)
def test_sizes(override: str) -> None:
    with pytest.raises(DiffalignError) as caught:
        load("train", "sd3_rankdpo", ["data.path=x", override])
    assert override.partition("=")[0].rpartition(".")[2] in str(caught.value)


def test_options_of_a_family(sd3_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("99999", "9" * 400, "-1", "x", "[1]", "1.5", "true"):
        given = (f"model.path={sd3_dir}", f"model.options.max_sequence_length={value}", "prompts=testbed:test", "n=1")
        assert run("sample", "-", *given) == 2 or run("synth", "synth_shapes", "--dry-run", *given) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) <= 2


def test_the_largest_seed_is_taken() -> None:
    config = load("train", "sd3_rankdpo", ["data.path=x", f"seed={LARGEST_SEED}", "train.steps=1000000"])
    assert config.seed == LARGEST_SEED  # type: ignore[attr-defined]  # load returns the base of all configs


def test_every_whole_number_of_every_config_is_bounded() -> None:
    """A key that somebody adds is bounded, too: by its own limits, or by the section's."""
    from diffalign.config.section import Section

    assert all(issubclass(kind, Section) for kind in KINDS.values())
    assert "_check_whole_numbers" in Section.__pydantic_decorators__.model_validators


@pytest.mark.parametrize(
    "place", ["/proc/x", "/dev/null/x", "/sys/x/y", "FILE/x", "FILE/x/y", "x" * 300, "a\udcff" * 200]
)
def test_places_where_no_folder_can_be(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / place.replace("FILE", "file") if not place.startswith("/") else Path(place)
    pictures.smooth(1).save(tmp_path / "a.png")
    pictures.smooth(2).save(tmp_path / "b.png")
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "p", "winner": "a.png", "loser": "b.png"}))
    commands: list[tuple[object, ...]] = [
        ("score", tmp_path / "a.png", "-r", "sharpness", "-o", out / "s.jsonl"),
        ("score", tmp_path / "a.png", "-r", "sharpness", "--html", out / "s.html"),
        ("data", "convert", tmp_path / "t.jsonl", "--out", out),
        ("pairs", tmp_path / "t.jsonl", "--out", out),
        ("testbed", "prompts", "test", "--n", "1", "--out", out / "p.jsonl"),
        ("synth", "synth_shapes", f"out={out}", "prompts.n=1"),
    ]
    for command in commands:
        assert run(*command) == 2, command
        assert len(capsys.readouterr().err.strip().splitlines()) == 1, command


def test_a_folder_that_is_there(tmp_path: Path) -> None:
    assert make_folder(tmp_path) == tmp_path and make_folder(tmp_path / "a" / "b").is_dir()
    with pytest.raises(DiffalignError, match="choose another place"), replacing(Path("/proc/x/y.json")):
        pass


@pytest.mark.parametrize(
    "words",
    [
        ("score", "a.png", "-r", "sharpness", "--workers", "9" * 400),
        ("score", "a.png", "-r", "sharpness", "--batch-size", "0"),
        ("score", "a.png", "-r", "sharpness", "--workers", "1000000"), ("testbed", "prompts", "test", "--n", "9" * 400),
        ("testbed", "prompts", "test", "--seed", str(2**64)), ("score", "a.png", "-r", "sharpness", "--batch-size", "1e9"),
    ],
)  # fmt: skip
def test_numbers_of_the_command_line(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_before_scoring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.smooth(1).save(tmp_path / "a.png")
    for page in ("/proc/x.html", "/proc/self/x/y.html", f"/sys/{'x' * 9}.html"):
        assert run("score", tmp_path, "-r", "sharpness", "--html", page, "-o", tmp_path / "s.csv") == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
        assert not shown.out and not (tmp_path / "s.csv").exists()
