"""The command line: what each verb calls, exit codes, and that help costs nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import typer

import diffalign.stages
from diffalign.cli import app
from diffalign.errors import DiffalignError
from helpers.command_line import run

CONFIG = "run_dir: runs/x\nmodel: {path: m}\ndata: {path: d}\n"
IMAGES = "model: {path: m}\nprompts: p.txt\nout: o\nweights: w\n"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    return str(path)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Put a module `diffalign.stages.<name>` of stand-ins where the verbs import it from."""
    module = types.ModuleType(f"diffalign.stages.{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(diffalign.stages, name, module, raising=False)


def fail_with(error: BaseException) -> Any:
    def stage(*_: Any, **__: Any) -> None:
        raise error

    return stage


# --- what the verbs call ---------------------------------------------------------------------------------------


def test_train(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    install(monkeypatch, "train", train=lambda c, dry_run: calls.append((c.train.steps, dry_run)))
    assert run("train", config, "train.steps=7") == 0
    assert run("train", config, "--dry-run", "train.steps=9", "seed=1") == 0
    assert calls == [(7, False), (9, True)]


def test_the_rewards_of_an_evaluation_by_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    install(monkeypatch, "evaluate", evaluate=lambda c, dry_run: calls.append(c))
    (tmp_path / "e.yaml").write_text(IMAGES)
    assert run("eval", tmp_path / "e.yaml", "-r", "pickscore") == 0
    assert run("eval", tmp_path / "e.yaml", "-r", "hpsv2", "-r", "pickscore:dtype=bfloat16", "seeds=2") == 0
    assert run("eval", tmp_path / "e.yaml", "reward=sharpness") == 0
    assert [(c.reward.name, [r.name for r in c.more_rewards]) for c in calls] == [
        ("pickscore", []),
        ("hpsv2", ["pickscore"]),
        ("sharpness", []),
    ]
    assert calls[1].more_rewards[0].options == {"dtype": "bfloat16"} and calls[1].seeds == 2
    for wrong in ("mine=pickscore", "pickscore:fast", "no_module:Class"):
        capsys.readouterr()
        assert run("eval", tmp_path / "e.yaml", "-r", wrong) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("verb", "recipe", "found"),
    [
        ("synth", "synth_one_gpu", lambda config: config.rewards),
        ("rounds", "rounds_shapes_gdro", lambda config: config.data.rewards),
        ("reward-gradient", "sdxl_refl", lambda config: config.rewards),
        ("distill", "shapes_sd3_gndm", lambda config: config.reward.terms),
    ],
)
def test_rewards_by_option(verb: str, recipe: str, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    name = verb.replace("-", "_")
    install(monkeypatch, name, **{name: lambda c, dry_run: calls.append(c)})
    assert run(verb, recipe, "-r", "hpsv2", "-r", "pickscore:dtype=bfloat16") == 0
    assert [one.name for one in found(calls[0])] == ["hpsv2", "pickscore"]
    assert found(calls[0])[1].options == {"dtype": "bfloat16"}


def test_rank_by_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    install(monkeypatch, "rank", rank=calls.append)
    assert run("rank", tmp_path, "-r", "hpsv2", "-r", "pickscore") == 0
    assert run("rank", tmp_path, "reward=human") == 0
    assert [c.sources for c in calls] == [["hpsv2", "pickscore"], ["human"]]


def test_sample_and_eval(tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    install(monkeypatch, "sample", sample=lambda c, images, dry_run: calls.append(("sample", c.n, images, dry_run)))
    install(monkeypatch, "evaluate", evaluate=lambda c, dry_run: calls.append(("eval", str(c.weights), c.n)))
    path = tmp_path / "i.yaml"
    path.write_text(IMAGES)
    assert run("sample", str(path), "n=3") == 0
    assert run("eval", str(path)) == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(CONFIG)
    assert run("eval", str(tmp_path / "run"), "prompts=testbed:test", "n=5") == 0
    assert calls == [("sample", 3, None, False), ("eval", "w", None), ("eval", str(tmp_path / "run" / "weights"), 5)]


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    install(monkeypatch, "quickstart", quickstart=lambda **given: calls.append(given))
    assert run("testbed", "quickstart", "--out", str(tmp_path)) == 0
    assert run("testbed", "quickstart", "--base", "shapes-sdxl", "--seed", "2", "--steps", "5", "--shuffle") == 0
    assert calls[0] == {"base": "shapes-sd3", "out": tmp_path, "seed": 0, "steps": None, "shuffle": False}
    assert calls[1] == {
        "base": "shapes-sdxl",
        "out": Path("runs/quickstart-shapes-sdxl"),
        "seed": 2,
        "shuffle": True,
        "steps": 5,
    }


def test_pretrain_refuses_other_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("testbed", "pretrain", "shapes-sd5") == 2
    assert (
        capsys.readouterr().err
        == "error: shapes-sd5: no model of the embedded world; use shapes-sd3 or shapes-sdxl [DA101]\n"
    )


def test_testbed_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("testbed", "prompts", "test", "--n", "6") == 0
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in shown.splitlines()]
    assert len(rows) == 6 and all({"tag", "include", "prompt"} <= set(row) for row in rows)
    assert run("testbed", "prompts", "test", "--n", "6", "--out", str(tmp_path / "a" / "p.jsonl")) == 0
    assert (tmp_path / "a" / "p.jsonl").read_text() == shown
    assert run("testbed", "prompts", "tests") == 2
    assert capsys.readouterr().err == "error: split tests: unknown; one of train, validation, test [DA101]\n"


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert listed["sdxl_dpo"].split() == ["DPO,", "LoRA", "SDXL", "24", "GB"]


def test_a_recipe_is_printed_with_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "sdxl_dpo") == 0
    printed = capsys.readouterr().out
    assert "  # Decay of Adam's two averages. Default: [0.9, 0.999]\n  betas: [0.9, 0.999]\n" in printed
    assert "  beta: 5000.0 # the paper's value for SDXL\n" in printed
    assert run("recipes", "sdxl_dop") == 2
    assert "did you mean sdxl_dpo?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "recipe"),
    [
        ("train", "sdxl_dpo"),
        ("distill", "sdxl_dmd2_4step"),
        ("reward-gradient", "shapes_sd3_reward_gradient"),
        ("rounds", "rounds_shapes_gdro"),
        ("synth", "synth_shapes"),
        ("cache", "sdxl_dpo"),
        ("judge", "shapes_judge_risd"),
    ],
)
def test_verbs_check_their_own_kind_of_config(verb: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, recipe, "nonsense=1") == 2
    assert "argument 'nonsense=1': unknown key nonsense" in capsys.readouterr().err
    other = "sdxl_dpo" if verb not in ("train", "cache") else "synth_shapes"
    assert run(verb, other) == 2 and "this file is for" in capsys.readouterr().err


# --- exit codes ------------------------------------------------------------------------------------------------


def test_config_mistakes_come_before_anything_heavy(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", config, "train.stepz=7") == 2
    said = capsys.readouterr()
    assert said.err == "error: argument 'train.stepz=7': unknown key train.stepz; did you mean steps? [DA102]\n"
    assert said.out == ""


def test_users_mistakes_are_one_line(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "train", train=fail_with(DiffalignError("model folder m\ndoes not exist")))
    assert run("train", config) == 2
    assert capsys.readouterr().err == "error: model folder m does not exist [DA100]\n"


def test_ctrl_c(config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, "train", train=fail_with(KeyboardInterrupt()))
    assert run("train", config) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C: nothing was saved yet; the same command starts again\n"


def wrapped(text: str) -> RuntimeError:
    error = RuntimeError("writing failed")
    error.__cause__ = ValueError(text)
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/a"),
            "no disk space left while writing runs/x/a; free",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no disk space left; free some"),
        (wrapped("I/O error: No space left on device (os error 28)"), "no disk space left; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "no permission while opening runs/x; change"),
    ],
)
def test_what_the_system_refuses(
    error: Exception, expected: str, config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, "train", train=fail_with(error))
    assert run("train", config) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {expected}") and said.count("\n") == 1


def test_bugs_keep_their_traceback(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "train", train=fail_with(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        app(["train", config], prog_name="diffalign")


def test_unknown_verbs_and_missing_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trian") == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert run("train") == 2
    assert "Missing argument 'CONFIG'" in capsys.readouterr().err


# --- help ------------------------------------------------------------------------------------------------------

HELP = """
import sys
from diffalign.cli import app
for arguments in (["--help"], ["train", "--help"], ["testbed", "quickstart", "--help"]):
    try:
        app(arguments, prog_name="diffalign")
    except SystemExit as left:
        assert left.code == 0, left.code
from diffalign.config import load_config
load_config("sdxl_dpo")
heavy = {"torch", "numpy", "diffusers", "transformers", "accelerate", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_and_config_import_nothing_heavy(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", HELP], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "sample", "eval", "testbed", "--dry-run", "--shuffle"):
        assert verb in done.stdout


def command_paths(command: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The group itself, its verbs, and those of the groups in it."""
    below = getattr(command, "commands", {})
    return [path, *(found for name, one in below.items() for found in command_paths(one, (*path, name)))]


@pytest.mark.parametrize("path", command_paths(typer.main.get_command(app)), ids=" ".join)
def test_help_fits_80_columns(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a list of verbs shows the first sentence of each whole."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*path, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith(" ".join(("Usage: diffalign", *path)))
    verbs = lines[lines.index("Commands:") + 1 :] if "Commands:" in lines else []
    assert all(line.startswith("  ") and line.endswith(".") and "..." not in line for line in verbs)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("judge", "personal", "mine"), "judge personal [OPTIONS] {DATASET|CONFIG}"),
        (("judge", "config.yaml"), "judge train [OPTIONS] {CONFIG}"),
        (("bench", "model"), "bench run [OPTIONS] {MODEL}"),
    ],
)
def test_a_nested_verb_has_its_own_help(
    arguments: tuple[str, ...], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--help") == 0
    assert capsys.readouterr().out.startswith(f"Usage: diffalign {shown}")


def test_objectives_are_imported_without_torch(tmp_path: Path) -> None:
    """The config is built from them, and its errors come before torch is loaded."""
    code = "import sys, diffalign.objectives as o; assert o.DiffusionDPO().beta and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_module_and_script(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    shown = subprocess.run(
        [sys.executable, "-m", "diffalign", "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert shown.stdout == f"diffalign {diffalign.__version__}\n"
    wrong = subprocess.run(
        [sys.executable, "-m", "diffalign", "train", "sdxl_dqo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "did you mean sdxl_dpo?" in wrong.stderr
