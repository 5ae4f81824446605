"""Every command of README and docs: the parser takes it, its config is valid, and what it names exists.

Each runs in a copy of a small world of images, datasets and runs. Fast verbs run for real. Trainers, and verbs that load
published weights or listen, are replaced by what checks their arguments; in the long form (`make soak`) trainers do their
`--dry-run`, and the tutorials run from start to end.
"""

from __future__ import annotations

import importlib
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from diffalign.cli import app
from diffalign.data.schema import score_schema
from diffalign.data.writer import parquet_writer
from diffalign.files.remote import is_address
from diffalign.rewards import accepted
from diffalign.scoring.sources import collect
from diffalign.scoring.spec import parse_all
from diffalign.stages.resolve_rewards import build_reward
from diffalign.voting.log import Vote, VoteLog
from helpers import command_line, pictures, small_datasets
from helpers.documented import PAGES, ROOT, Command, commands, files
from helpers.processes import environment
from helpers.tuned_run import tuned_run

ELSEWHERE = {
    "diffalign train shapes_sd3_dpo 'objective={name: hinge, target: 0.5}'",
    "diffalign score FOLDER -r colourfulness",
    "diffalign export RUN/checkpoints/step-00000400 --format merged",
    "diffalign sample weights=...",
}
"""Commands on what the reader of CONTRIBUTING.md has just written (tests/plugins runs such code), on a checkpoint
(tests/stages/test_export.py), and one that is cut short."""
COMMANDS = [command for page in PAGES for command in commands(page)]
OURS = [c for c in COMMANDS if c.words[0] == "diffalign" and not c.synopsis and c.text not in ELSEWHERE]
OTHERS = [c for c in COMMANDS if c.words[0] != "diffalign"]
WORDS = {
    "...": "data.path=data/mine",
    "RECIPE": "sdxl_dpo",
    "SOURCE": "pairs.csv",
    "FOLDER": "samples/",
    "IMAGES": "samples/",
    "REFERENCE": "real/",
    "NAME": "pickscore",
    "DATA": "data/mine",
    "FILE": "mine.yaml",
    "VERB": "train",
    "REAL": "winners",
    "GENERATED": "losers",
    "RUN": "runs/a",
    "RUN1": "runs/a",
    "RUN2": "runs/b",
}
"""What stands for a word that a reader replaces."""
FIRST = {
    "train": "sdxl_dpo",
    "cache": "sdxl_dpo",
    "synth": "synth_shapes",
    "rounds": "rounds_shapes_gdro",
    "score": "samples/ -r sharpness",
}
"""What stands for `...` or CONFIG right after a verb."""
SCORED = ("pickscore", "imagereward", "hpsv2", "aesthetic", "clipscore", "personal")


def ids(found: list[Command]) -> list[str]:
    return [f"{c.page.stem}-{n}-{'-'.join(c.words[:3])}"[:60] for n, c in enumerate(found)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, sdxl_dir: Path) -> Path:
    """What documented commands name: images with captions, prompts, datasets with scores and votes, runs."""
    root = tmp_path_factory.mktemp("world")
    prompts = [f"a red circle {i}" for i in range(4)]
    for name in ("winners", "samples"):
        (root / name).mkdir()
        for i, prompt in enumerate(prompts):
            pictures.smooth(i + (10 if name == "samples" else 0)).save(root / name / f"{i}.png")
            (root / name / f"{i}.txt").write_text(prompt)
    shutil.copytree(root / "winners", root / "losers")
    for name in ("base", "tuned", "guided", "plain", "images", "real", "more", "A", "B", "rated"):
        shutil.copytree(root / "samples", root / name)
    (root / "my_losses.py").write_text(files(ROOT / "docs" / "tutorials" / "new-objective.md")["my_losses.py"])
    lines = "".join(f"{prompt}\n" for prompt in prompts)
    for name in ("prompts.txt", "test.txt", "validation.txt", "held_out.txt", "data/validation.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(lines)
    table = "prompt,winner,loser\n" + "".join(f"{p},winners/{i}.png,losers/{i}.png\n" for i, p in enumerate(prompts))
    (root / "pairs.csv").write_text(table)
    for name in ("winners", "losers"):
        shutil.copytree(root / name, root / "votes" / name)
    (root / "votes" / "votes.csv").write_text(table)
    rng = np.random.default_rng(0)
    scores = {name: rng.random((6, 8)).tolist() for name in SCORED}
    dataset = small_datasets.scored(root / "data" / "mine", scores)
    columns = ("dense", "exact")
    schema = score_schema(columns, {"version": "1", "weights": "none", "licence": "MIT", "settings": {}})
    rows = [
        {"group_id": f"g{g}", "index": k, "reason": "", **{column: float(rng.random()) for column in columns}}
        for g in range(len(dataset))
        for k in range(8)
    ]
    with parquet_writer(dataset.folder / "scores" / "geneval.parquet", schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    with VoteLog(root / "data" / "mine" / "votes.jsonl") as log:
        for rater in ("human", "anna"):
            for g in range(len(dataset)):
                shown = (f"g{g}/0", f"g{g}/1")
                log.append(Vote(f"{rater}{g}", "2026-01-01T00:00:00+00:00", rater, f"p{g}", shown, ("m", "m"), "left"))
    for name in ("synth", "synth-sdxl", "ranked", "scored", "groups", "more", "photos", "look"):
        shutil.copytree(root / "data" / "mine", root / "data" / name)
    tuned_run(root / "runs" / "a", sdxl_dir)
    shutil.copytree(root / "runs" / "a" / "weights", root / "runs" / "a" / "best")
    for name in ("b", "c", "sdxl", "mine", "dpo", "hinge", "own-taste"):
        shutil.copytree(root / "runs" / "a", root / "runs" / name)
    shutil.copytree(root / "runs" / "a", root / "out" / "round-02" / "run")
    shutil.copytree(root / "samples", root / "runs" / "a" / "samples")
    return root


def reads(*sources: str | Path | None) -> None:
    """Refuse local sources without an image."""
    for source in map(str, filter(None, sources)):
        assert is_address(source) or collect([source]), source


def check_rewards(texts: list[str]) -> None:
    for spec in parse_all(texts):
        if {"weights", "url"} & set(spec.options):  # building may read a folder, or ask an address
            assert set(spec.options) <= accepted(spec.name)
        else:
            build_reward(spec.name, spec.options, "cpu")


def check_score(request: Any) -> int:
    check_rewards(request.rewards)
    reads(*request.images, *(request.against or ()))
    return 0


def check_measure(request: Any) -> None:
    from diffalign.stages.measure import _parse

    assert _parse(request.measures)
    reads(*request.images, *(request.reference or ()))


def check_vote(request: Any) -> None:
    from diffalign.vote_page.gallery import open_gallery

    assert open_gallery(request.sources, request.votes).groups


def nothing(*arguments: Any, **options: Any) -> dict[str, Any]:
    return {}


STAND_INS: dict[str, Callable[..., Any]] = {
    "score.score": check_score,
    "measure.measure": check_measure,
    "serve.serve": lambda request: check_rewards(request.rewards),
    "bench.bench": lambda config, request: check_rewards([judge.partition(":")[0] for judge in request.judges]),
    "judge.judge_data": nothing,
    "judge.judge_base": nothing,
    "judge.distributions": nothing,
    "judge.evaluate_judge": nothing,
    "personal.fit": nothing,
    "quickstart.quickstart": nothing,
    "export._push": nothing,
    "vote.vote": check_vote,
    "vote_results.vote_results": nothing,
    "vote_export.export_votes": nothing,
}
"""Function of `diffalign.stages` -> what checks its arguments in its place."""
DRY = (
    "train.train", "distill.distill", "reward_gradient.reward_gradient", "rounds.rounds", "sample.sample",
    "evaluate.evaluate", "judge.train_from_config", "synth.synth", "data.cache",
)  # fmt: skip
"""Those that have a dry run, for the long form."""


def replaced(words: tuple[str, ...]) -> list[str]:
    """Return words as somebody would type them: `--out ...` gets a name, and placeholders theirs."""
    found = []
    for before, word in zip(("", *words), words, strict=False):
        if word in ("...", "DATA") and before.startswith("--"):
            found.append("written")
        elif word in ("...", "CONFIG") and before in FIRST:
            found += FIRST[before].split()
        else:
            found.append("=".join(WORDS.get(part, part) for part in word.split("=", 1)))
    return found


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch, long: bool) -> int:
    """Run a command of ours in this process and return its exit code."""
    for name in (*STAND_INS, *DRY):
        module = importlib.import_module(f"diffalign.stages.{name.partition('.')[0]}")
        function, stage = name.partition(".")[2], STAND_INS.get(name, nothing)
        if name in DRY and long:
            original = getattr(module, function)
            stage = lambda *a, original=original, **k: original(*a, **{**k, "dry_run": True})  # noqa: E731
        monkeypatch.setattr(module, function, stage)
    monkeypatch.setattr("diffalign.bench.show.compare_results", nothing)
    if words[1] == "pairs" or words[1:3] == ["data", "convert"]:  # these write a new dataset
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    return command_line.run(*words[1:])


@pytest.mark.parametrize("command", OURS, ids=ids(OURS))
def test_a_command_of_ours(
    command: Command,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    soak: bool,
) -> None:
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    for name, text in files(command.page).items():
        (here / name).write_text(text)
    verb = command.words[1]
    if verb != "init":  # which writes it
        own = "kind: rounds\nextends: rounds_shapes_gdro\n" if verb == "rounds" else "kind: train\nextends: sdxl_dpo\n"
        (here / "my.yaml").write_text(own)
    code = run_command(replaced(command.words), monkeypatch, soak)
    assert code == 0, f"{command}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.synopsis], ids=str)
def test_a_synopsis_names_options_that_exist(command: Command) -> None:
    import typer

    found: Any = typer.main.get_command(app)
    for word in command.words[1:]:
        if word in getattr(found, "commands", {}):
            found = found.commands[word]
    known = {option for parameter in found.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", command.text)) <= known


def test_there_are_commands() -> None:
    """A page whose form the extraction does not know would be tested by nothing."""
    assert len(OURS) > 150 and len(OTHERS) > 20
    assert sum(c.page == ROOT / "README.md" for c in OURS) > 25


def check_parsed(words: list[str]) -> None:
    """Check the words of a command by its parser and its config alone."""
    import typer

    group: Any = typer.main.get_command(app)
    assert words[0] == "diffalign"
    group.commands[words[1]].make_context(words[1], words[2:])


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("command", OTHERS, ids=ids(OTHERS))
def test_another_command_names_what_exists(command: Command) -> None:
    program, *words = replaced(command.words)
    if "-m" in words and words[words.index("-m") + 1] == "diffalign":
        check_parsed(words[words.index("-m") + 1 :])
        if program == "accelerate":
            assert words[0] == "launch"
            given = launch_command_parser().parse_args(words[1:])
            assert given.config_file is None or (ROOT / given.config_file).is_file()
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words if "=" not in word} <= targets
    elif program in ("sbatch", "kubectl"):
        (file,) = [word for word in words if word.endswith((".sh", ".yaml"))]
        assert (ROOT / file).is_file() or (ROOT / "docs" / "cluster" / file).is_file()
        if program == "sbatch" and "train" in words:
            check_parsed(["diffalign", *words[words.index(file) + 1 :]])
    elif program == "pip":
        for extras in re.findall(r"(?:diffalign|\.)\[([^\]]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    elif program == "python":
        assert (ROOT / words[0]).is_file() or words[0] == "-m"
    elif program == "docker" and words[0] == "run":
        image = next(i for i, word in enumerate(words) if word.split(":")[0] == "diffalign")
        verb = words[image + 1 :]
        if verb[0] != "testbed":
            check_parsed(["diffalign", *verb])
    elif program == "docker":
        arguments = {word.partition("=")[0] for before, word in itertools.pairwise(words) if before == "--build-arg"}
        assert arguments <= set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    elif program in ("srun", "apptainer") and "diffalign" in words:
        check_parsed(words[words.index("diffalign") :])


CONFIGS = [(page, name) for page in PAGES for name in files(page) if name.endswith(".yaml")]


@pytest.mark.parametrize(("page", "name"), CONFIGS, ids=[f"{page.stem}-{name}" for page, name in CONFIGS])
def test_a_config_that_a_page_shows_is_read(page: Path, name: str) -> None:
    assert isinstance(yaml.safe_load(files(page)[name]), dict)


TUTORIALS = ("pairs-to-lora", "rank-a-folder", "make-a-dataset")


@pytest.mark.soak
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_from_start_to_end(name: str, tmp_path: Path, soak: bool) -> None:
    if not soak:
        pytest.skip("takes minutes; make soak runs it")
    page = ROOT / "docs" / "tutorials" / f"{name}.md"
    for file, text in files(page).items():
        (tmp_path / file).write_text(text)
    for command in commands(page):
        if command.block and command.words[0] == "diffalign":
            line = [sys.executable, "-m", *command.words]
            done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, f"{command.text}\n{done.stderr[-2000:]}"
