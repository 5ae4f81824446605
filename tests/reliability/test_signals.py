"""Signals: the current step or batch is finished and kept, and the same command ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign import stopping
from diffalign.cli import errors
from diffalign.data.prompts import PromptRow
from diffalign.data.shared_tasks import Task, complete_all
from diffalign.errors import DiffalignError
from diffalign.evaluation.evaluate import EvaluationPlan, sample_images
from diffalign.training import stop
from helpers import counting_reward, toy, toy_distill, toy_reward_gradient
from helpers.command_line import run as command
from helpers.processes import command as toy_command
from helpers.processes import environment, finish, torchrun

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
TOYS: dict[str, Any] = {"train": toy, "distill": toy_distill, "reward_gradient": toy_reward_gradient}


class Signalling:
    """A source that sends this process a signal when its n-th batch is drawn, in the middle of a step."""

    def __init__(self, source: Any, number: signal.Signals, at: int, times: int = 1) -> None:
        self.source, self.number, self.left, self.times = source, number, at, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: list[int]) -> Any:
        self.left -= 1
        for _ in range(self.times if self.left == 0 else 0):
            os.kill(os.getpid(), self.number)
        return self.source.batch(indices)


def train(method: str, run_dir: Path, source: Any = None, **sections: Any) -> None:
    """Run a toy as the command line does: with signals handled, and errors as exit codes."""
    module = TOYS[method]
    plain = source or (toy.ToySource() if method == "train" else toy_distill.ToyPrompts())
    with errors.plain_errors(resumes=True):
        config, backbone = module.toy_config(run_dir, **sections), module.ToyBackbone()
        if method == "train":
            toy.train(config, backbone=backbone, source=plain, say=lambda _: None)
        else:
            module.run(config, backbone, source=plain)


def stopped(method: str, run_dir: Path, source: Any, **sections: Any) -> int:
    """Return the exit code of a run that ends early."""
    with pytest.raises(errors.typer.Exit) as left:
        train(method, run_dir, source, **sections)
    return int(left.value.exit_code)


def source_of(method: str) -> Any:
    return toy.ToySource() if method == "train" else toy_distill.ToyPrompts()


def state_of(run_dir: Path) -> dict[str, Any]:
    """Return every byte of a run that has no clock in it: metrics, weights, and which checkpoints there are, with tensors."""
    found: dict[str, Any] = {"metrics": (run_dir / "metrics.jsonl").read_bytes()}
    for file in sorted(run_dir.rglob("*.safetensors")):
        found[str(file.relative_to(run_dir))] = {k: v.numpy().tobytes() for k, v in load_file(file).items()}
    return found


@pytest.mark.parametrize("method", TOYS)
@pytest.mark.parametrize(("number", "keep"), [(signal.SIGTERM, 1), *((number, 2) for number in SIGNALS)])
def test_a_signal_finishes_the_step_and_the_run_resumes_bit_for_bit(
    method: str, number: signal.Signals, keep: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {"train": {"steps": 8}, "checkpoint": {"every": 3, "keep": keep}}
    train(method, tmp_path / "straight", **sections)
    for at in (1, 7):
        run_dir = tmp_path / f"stopped-{at}"
        before = signal.getsignal(number)
        assert stopped(method, run_dir, Signalling(source_of(method), number, at), **sections) == 75
        assert signal.getsignal(number) is before
        (done,) = [int(p.name[5:]) for p in sorted((run_dir / "checkpoints").iterdir())][-1:]
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        line = f"stopped by {name}: step {done} of 8 is kept; the same command resumes from there\n"
        assert capfd.readouterr().err.endswith(line)
        assert not (run_dir / "weights").exists()
        train(method, run_dir, **sections)
        assert state_of(run_dir) == state_of(tmp_path / "straight")


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    train("train", tmp_path / "straight", train={"steps": 4})
    train("train", tmp_path / "late", Signalling(toy.ToySource(), signal.SIGTERM, 4), train={"steps": 4})
    assert state_of(tmp_path / "late") == state_of(tmp_path / "straight")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sections: dict[str, Any] = {"train": {"steps": 8}, "checkpoint": {"every": 2}}
    assert stopped("train", tmp_path, Signalling(toy.ToySource(), signal.SIGINT, 6, times=2), **sections) == 130
    assert capfd.readouterr().err.endswith(
        "stopped by Ctrl-C: step 4 of 8 is kept; the same command resumes from there\n"
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if "part" in p.name] == []


def test_ctrl_c_before_anything_is_saved_promises_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stopped("train", tmp_path, Signalling(toy.ToySource(), signal.SIGINT, 1, times=2)) == 130
    assert capfd.readouterr().err.endswith("stopped by Ctrl-C: nothing was saved yet; the same command starts again\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_a_signal_ends_at_once(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.typer.Exit) as left, errors.plain_errors(resumes=True):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert left.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert "nothing was saved yet; the same command starts again" in capfd.readouterr().err


def test_a_validation_that_a_signal_left_out_is_made_up_for(tmp_path: Path) -> None:
    script = dict(enumerate([0.0, 0.1, 0.5, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1]))

    def validated(run_dir: Path, source: Any) -> None:
        config = toy.toy_config(
            run_dir,
            train={"steps": 8, "ema_decay": 0.5},
            validation={"every": 3, "prompts": "p.txt"},
            checkpoint={"every": 2},
        )
        backbone = toy.ToyBackbone()
        scripted = toy.Scripted(backbone, config.validation, [], {}, {}, 8, 0, script)
        with stopping.stopping_on_signals():
            toy.train(config, backbone=backbone, source=source, say=lambda _: None, validation=scripted)

    validated(tmp_path / "straight", toy.ToySource())
    with pytest.raises(stopping.Stopped):
        validated(tmp_path / "stopped", Signalling(toy.ToySource(), signal.SIGTERM, 3))
    assert (tmp_path / "stopped/validation.jsonl").read_text().count("\n") == 1
    validated(tmp_path / "stopped", toy.ToySource())
    assert (tmp_path / "stopped/validation.jsonl").read_bytes() == (tmp_path / "straight/validation.jsonl").read_bytes()
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "straight")


@pytest.mark.parametrize("name", ["USR2", "SIGUSR2", "usr2"])
def test_the_pre_emption_signal_can_be_chosen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stopping.SIGNAL_KEY, name)
    assert stopped("train", tmp_path, Signalling(toy.ToySource(), signal.SIGUSR2, 2)) == 75


@pytest.mark.parametrize("name", ["USR9", "pre-empt", "12"])
def test_an_unknown_signal_is_a_mistake_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stopping.SIGNAL_KEY, name)
    with pytest.raises(DiffalignError, match=f"DIFFALIGN_STOP_SIGNAL={name}: no signal"):
        stopping.preemption_signal()


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "75 stopped by SIGTERM, Ctrl-C or SIGUSR1" in shown and "130 stopped at once by Ctrl-C" in shown


# --- stages with a journal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_tasks_are_finished_and_counted(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []

    def make(i: int) -> None:
        if i == 2:
            os.kill(os.getpid(), number)
        (tmp_path / str(i)).write_text("done")
        made.append(i)

    tasks = [Task(str(i), (tmp_path / str(i)).is_file, lambda i=i: make(i), size=10) for i in range(5)]
    with pytest.raises(errors.typer.Exit) as left, errors.plain_errors(resumes=True):
        complete_all(tasks, tmp_path / "locks", kept="images")
    assert left.value.exit_code == 75 and made == [0, 1, 2]
    assert "30 of 50 images are kept; the same command resumes from there" in capfd.readouterr().err
    assert complete_all(tasks, tmp_path / "locks") == 20


class Interrupting(counting_reward.Counting):
    """Sends a signal while it measures its third batch."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number

    def measure(self, *given: Any) -> dict[str, torch.Tensor]:
        if len(self.batches) == 2:
            os.kill(os.getpid(), self.number)
        return super().measure(*given)


@pytest.mark.parametrize("number", SIGNALS)
def test_score_keeps_the_batch(number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(20):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(tmp_path / "in" / f"{i:02d}.png")
        (tmp_path / "in" / f"{i:02d}.txt").write_text(f"prompt {i}")
    counting_reward.run([tmp_path / "in"], tmp_path / "straight.jsonl")
    first, out = Interrupting(number), tmp_path / "out.jsonl"
    with pytest.raises(errors.typer.Exit) as left, errors.plain_errors(resumes=True):
        counting_reward.run([tmp_path / "in"], out, first)
    assert left.value.exit_code == 75 and first.batches == [4, 4, 4]
    assert "12 scores are kept; the same command resumes from there" in capfd.readouterr().err
    _, second = counting_reward.run([tmp_path / "in"], out)
    assert sum(second.batches) == 8
    assert out.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


@pytest.mark.parametrize("number", SIGNALS)
def test_eval_keeps_the_batch(number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = EvaluationPlan([PromptRow(f"prompt {i}") for i in range(5)], seeds=2, batch_size=3)
    drawn: list[int] = []

    def sampler(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        drawn.append(len(prompts))
        if len(drawn) == 2:
            os.kill(os.getpid(), number)
        return [Image.new("RGB", (4, 4), (seed % 256, 0, 0)) for seed in seeds]

    with pytest.raises(errors.typer.Exit) as left, errors.plain_errors(resumes=True):
        sample_images(sampler, plan, tmp_path / "tuned", "x")
    assert left.value.exit_code == 75 and drawn == [3, 3] and len(list((tmp_path / "tuned").glob("*.png"))) == 6
    assert "6 of 10 images of tuned are kept" in capfd.readouterr().err
    sample_images(sampler, plan, tmp_path / "tuned", "x")
    assert drawn == [3, 3, 3, 1]


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_agree_on_the_step() -> None:
    """One process was asked, the other hears of it at the same step."""
    program = (
        "import os, torch.distributed as dist\n"
        "from diffalign import stopping\n"
        "from diffalign.training.stop import StopSignal\n"
        "dist.init_process_group('gloo')\n"
        "signal = StopSignal()\n"
        "with stopping.stopping_on_signals(), stopping.deferred():\n"
        "    for step in range(6):\n"
        "        if step == 3 and dist.get_rank() == 1:\n"
        "            os.kill(os.getpid(), 15)\n"
        "        if signal.asked():\n"
        "            break\n"
        "assert step == 3, step\n"
    )
    finish([*torchrun(), "--no-python", sys.executable, "-c", program])


def test_two_processes_stop_and_resume_as_if_they_had_not(tmp_path: Path) -> None:
    finish([*torchrun(), *toy_command(tmp_path / "straight", 30, 4, 2)])
    line = [*torchrun(), *toy_command(tmp_path / "stopped", 30, 4, 2, seconds=0.1)]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "stopped/metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    done = [int(p.name[5:]) for p in sorted((tmp_path / "stopped/checkpoints").iterdir())][-1]
    assert process.returncode != 0 and done < 30 and f"step {done} of 30 is kept" in said, said[-2000:]
    finish([*torchrun(), *toy_command(tmp_path / "stopped", 30, 4, 2)])
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()
    a, b = (load_file(tmp_path / name / "weights/weights.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop.dist, "all_reduce", lambda *_, **__: pytest.fail("a collective in a single process"))
    assert not stop.StopSignal().asked()
