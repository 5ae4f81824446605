"""init, doctor and config: a config from five answers, a look at the machine, configs shown, checked and compared."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from diffalign.cli import start
from diffalign.config import load_config
from diffalign.stages import doctor
from diffalign.stages.init import BASES, Answers, write_config
from helpers.command_line import refused, run


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "hub_answers", lambda: False)


def test_init_writes_a_short_config(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", "data/mine", "--model", "sdxl", "--memory", "8", "--prompts", "held-out.txt"]
    assert run("init", "my.yaml", *given, "--run-dir", "runs/a") == 0
    said = capsys.readouterr().out
    assert "diffalign pairs" in said and "diffalign train my.yaml --dry-run" in said
    text = Path("my.yaml").read_text()
    assert len(text.splitlines()) < 25 and yaml.safe_load(text)["extends"] == "sdxl_dpo_small"
    config = load_config("my.yaml")
    assert (str(config.data.path), str(config.run_dir)) == ("data/mine", "runs/a")
    assert (config.model.quantize, config.validation.prompts) == ("int8", "held-out.txt")
    assert yaml.safe_load(text)["train"] == {"micro_batch": "auto"}
    assert "exists already" in refused(capsys, "init", "my.yaml", "--yes", "--memory", "8")
    assert Path("my.yaml").read_text() == text
    assert "one of sdxl" in refused(capsys, "init", "b.yaml", "--model", "sdxxl", "--memory", "8")
    assert not Path("b.yaml").exists()


@pytest.mark.parametrize("model", BASES)
@pytest.mark.parametrize("prompts", [None, "testbed:validation"])
def test_every_base_gives_a_config_that_loads(model: str, prompts: str | None) -> None:
    write_config(Path("c.yaml"), Answers(Path("d"), model, 24, prompts, Path("r")))
    config = load_config("c.yaml")
    assert (config.validation.every is None) == (prompts is None) and config.model.quantize == "none"


@pytest.mark.parametrize(
    ("model", "groups", "recipe", "steps"),
    [
        ("sdxl", 100, "sdxl_dpo_small", 125),
        ("sdxl", 5, "sdxl_dpo_small", 40),
        ("sdxl", 50_000, "sdxl_dpo", 2000),
        ("shapes-sd3", 64, "shapes_sd3_dpo", 80),
    ],
)
def test_the_number_of_pairs_chooses_recipe_and_steps(model: str, groups: int, recipe: str, steps: int) -> None:
    Path("d").mkdir()
    pq.write_table(pa.table({"group_id": list(map(str, range(groups)))}), "d/groups.parquet")
    write_config(Path("c.yaml"), Answers(Path("d"), model, 24, "held-out.txt", Path("r")))
    assert yaml.safe_load(Path("c.yaml").read_text())["extends"] == recipe
    config = load_config("c.yaml")
    assert config.train.steps == steps and config.optimizer.warmup_steps < steps
    assert config.validation.every is not None and config.validation.every < steps


def test_init_asks_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(question: str, default: object, value_proc: Callable[[str], str]) -> object:
        asked.append(question)
        return value_proc({"Base": "shapes-sd3", "Folder": "runs/z"}.get(question.split()[0], str(default)))

    monkeypatch.setattr(start.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(start.typer, "prompt", answer)
    assert run("init") == 0
    assert len(asked) == 5
    config = load_config("train.yaml")
    assert (config.model.path, str(config.run_dir)) == ("shapes-sd3", "runs/z")
    assert run("init", "other.yaml", "--data", "d", "--memory", "9") == 0
    assert len(asked) == 8


class Terminal(io.StringIO):
    """What somebody types; at its end comes end of file, as from Ctrl-D."""

    def isatty(self) -> bool:
        return True


def test_init_asks_again_after_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("data/mine\nsdxxl\nshapes-sd3\nmuch\nnan\n0\n24\nnone\nruns/a\n"))
    assert run("init") == 0
    said = "".join(capsys.readouterr())
    assert "sdxxl is unknown here" in said and "much is no number of GB" in said and "nan is no number" in said
    assert load_config("train.yaml").model.path == "shapes-sd3"


def test_a_question_without_an_answer_ends_init(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("data/mine\n"))
    assert run("init") == 130
    assert "stopped at a question; nothing was written" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_init_refuses_a_place_before_it_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.yaml").write_text("mine")
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    assert "exists already" in refused(capsys, "init", "there.yaml")
    assert "choose another place" in refused(capsys, "init", "/proc/x.yaml")
    assert "choose another place" in refused(capsys, "init", "there.yaml/x.yaml")
    assert Path("there.yaml").read_text() == "mine"


@pytest.fixture
def _broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import torch` fail as it does where a shared library is missing."""
    genuine = builtins.__import__

    def refuse(name: str, *rest: object, **named: object) -> object:
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return genuine(name, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("_broken_torch")
def test_init_and_doctor_work_where_torch_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("init", "--yes") == 0
    assert Path("train.yaml").exists()
    capsys.readouterr()
    assert run("doctor") == 1
    said = capsys.readouterr().out
    assert "problem: torch: libcudart.so.12: cannot open shared object file; install torch again" in said
    assert "disk\n" in said and said.count("torch cannot be imported") == 1


def test_config_show_validate_and_diff(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("config", "show", "sdxl_dpo_small", "train.steps=70") == 0
    printed = capsys.readouterr().out
    Path("shown.yaml").write_text(printed)
    assert load_config("shown.yaml") == load_config("sdxl_dpo_small", ["train.steps=70"])
    assert "  steps: 70\n" in printed  # without the recipe's note on its own number
    assert run("config", "validate", "shown.yaml") == 0
    assert capsys.readouterr().out == "shown.yaml: a valid config of `diffalign train`\n"
    assert "did you mean optimizer.lr?" in refused(capsys, "config", "validate", "sdxl_dpo", "lr=1")
    Path("nothing.yaml").write_text("seed: 1\n")
    assert "no kind: in it" in refused(capsys, "config", "validate", "nothing.yaml")
    assert run("config", "diff", "sdxl_dpo_small", "shown.yaml") == 0
    assert capsys.readouterr().out == "train.steps: 400 -> 70\n"
    assert run("config", "diff", "sdxl_dpo", "sdxl_dpo") == 0
    assert capsys.readouterr().out == "no difference\n"
    assert "compare two of one verb" in refused(capsys, "config", "diff", "sdxl_dpo", "synth_shapes")


def test_config_reads_run_directories(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("run_dir: run\nmodel: {path: m}\ndata: {path: d}\n")  # from before `kind:`
    assert run("config", "validate", "run") == 0
    assert run("config", "diff", "run", "sdxl_dpo") == 0
    assert "model.path: m -> stabilityai/stable-diffusion-xl-base-1.0\n" in capsys.readouterr().out


def test_doctor_names_what_is_there_and_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "ROOM", 0)
    assert run("doctor") == 0
    said = capsys.readouterr().out
    for line in ("versions", "  torch  ", "devices", "extras", "  8bit  ", "model cache", "no problem found"):
        assert line in said
    monkeypatch.setattr(doctor, "ROOM", 1e18)
    assert run("doctor") == 1
    said = capsys.readouterr().out
    assert "problem: here: " in said and "GB left; free some" in said


def test_recipes_by_a_part_of_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "sd35") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if line.startswith("sd")]
    assert names and all("sd35" in name for name in names)
    assert "neither a file nor a shipped recipe" in refused(capsys, "recipes", "nothing_like_it")
