"""What a small install does: scoring and datasets without the packages of extras, and one line for what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from diffalign.errors import DiffalignError
from diffalign.packages import EXTRAS, extras_named
from helpers import pictures, tiny_rewards
from helpers.processes import environment

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"pillow-jxl-plugin": "pillow_jxl"}
"""Modules that are not called as their distribution is."""
SMALL = """
import contextlib, io, json, sys

for name in {absent}:
    sys.modules[name] = None  # imports fail, and find_spec finds nothing: as if it were not installed
import open_clip

from diffalign.cli import app

open_clip.add_model_config({config!r})
for arguments in {commands}:
    code, said = 0, io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            app(arguments, prog_name="diffalign")
        except SystemExit as left:
            code = left.code or 0
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, pairs of pictures and the weights of tiny rewards."""
    folder = tmp_path_factory.mktemp("small")
    pictures.folder(folder / "in", 3, ["a red circle", "a blue square", 'a sign that says "OPEN"'])
    tiny_rewards.hps_checkpoint(folder / "hps")
    tiny_rewards.clip_folder(folder / "clip")
    tiny_rewards.imagereward_checkpoint(folder / "blip")
    for side, seed in (("winners", 0), ("losers", 10)):
        (folder / side).mkdir()
        for i in range(2):
            pictures.smooth(seed + i).save(folder / side / f"{i}.png")
            (folder / side / f"{i}.txt").write_text(f"picture {i}")
    (folder / "sample.yaml").write_text("model: {path: shapes-sd3}\nprompts: testbed:test\nn: 1\nout: sampled\n")
    return folder


@pytest.fixture(scope="module")
def small(place: Path) -> dict[str, tuple[int, str]]:
    """Run commands in one process in which no package of any extra can be imported; exit code and stderr of each.

    The rewards are on transformers, on open_clip and on a network of ours.
    """
    commands = {
        "score": "score in -o out.jsonl --html page.html -r clipscore:convention=cosine,weights=clip -r sharpness "
        "-r hpsv2:architecture=tiny-hps,weights=hps -r imagereward:weights=blip,tokenizer=blip",
        "pairs": "pairs winners losers --out data",
        "rank": "rank data",
        "rewards": "rewards",
        "train": "train shapes_sd3_dpo data.path=data run_dir=run",
        "sample": "sample sample.yaml",
        "ocr": "score in -r ocr",
    }
    program = SMALL.format(
        absent=sorted(module for modules in EXTRAS.values() for module in modules),
        config=str(place / "hps" / "tiny-hps.json"),
        commands=[line.split() for line in commands.values()],
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(), cwd=place)
    assert done.returncode == 0, done.stderr
    return {name: tuple(json.loads(line)) for name, line in zip(commands, done.stdout.splitlines(), strict=True)}


def test_the_table_holds_what_the_extras_install() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installed = {}
    for extra, requirements in listed.items():
        names = [re.split(r"[<>=\[ ]", one)[0] for one in requirements]
        own = {MODULES.get(name, name.replace("-", "_")) for name in names if name != "diffalign"}
        if own and extra not in ("test", "dev", "docs"):
            installed[extra] = own
    assert installed == {extra: set(modules) for extra, modules in EXTRAS.items()}


def test_scoring_needs_no_extra(place: Path, small: dict[str, tuple[int, str]]) -> None:
    assert small["score"][0] == 0, small["score"]
    rows = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and "a blue square" in (place / "page.html").read_text()
    for row in rows:
        assert all(isinstance(row[name], float) for name in ("clipscore", "hpsv2", "imagereward", "sharpness"))


@pytest.mark.parametrize("command", ["pairs", "rank", "rewards"])
def test_datasets_need_no_extra(small: dict[str, tuple[int, str]], command: str) -> None:
    """`pairs` is the first command of the README."""
    assert small[command][0] == 0, small[command]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train", "error: accelerate is not installed; pip install 'diffalign[train]' [DA201]\n"),
        ("sample", "error: diffusers is not installed; pip install 'diffalign[train]' [DA201]\n"),
        ("ocr", "error: reward ocr: rapidocr is not installed; pip install 'diffalign[ocr]' [DA201]\n"),
    ],
)
def test_a_missing_extra_is_one_line(small: dict[str, tuple[int, str]], command: str, said: str) -> None:
    code, shown = small[command]
    assert code == 2 and shown.splitlines(keepends=True)[-1] == said and "Traceback" not in shown


def test_only_what_an_extra_holds_is_named() -> None:
    with (
        pytest.raises(DiffalignError, match=r"^peft is not installed; pip install 'diffalign\[train\]'$"),
        extras_named(),
    ):
        raise ModuleNotFoundError("No module named 'peft'", name="peft.utils")
    with pytest.raises(ModuleNotFoundError, match="of_a_user"), extras_named():
        import of_a_user  # noqa: F401
