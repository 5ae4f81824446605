"""The Slurm scripts for training in docs/cluster/, on a stand-in for Slurm that sends SIGUSR1 and starts the job again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import command, environment, finish

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "cluster"
SCRIPT, NODES = FOLDER / "slurm-train.sh", FOLDER / "slurm-train-nodes.sh"

# srun runs its command; in the first JOBS jobs it sends SIGUSR1 to it once the run has logged another row, as Slurm would
# before the time limit. That reaches the command and not the script.
SRUN = """#!/bin/bash
count() { cat {folder}/run/metrics.jsonl 2>/dev/null | wc -l; }
before=$(count)
"$@" &
child=$!
if [ "$(wc -l < {folder}/jobs)" -le {jobs} ]; then
  while kill -0 $child 2>/dev/null && [ "$(count)" -le "$before" ]; do sleep 0.05; done
  kill -USR1 $child
fi
wait $child
"""


@pytest.mark.parametrize("script", [SCRIPT, NODES])
def test_scripts_ask_for_the_signal_and_may_be_requeued(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert "#SBATCH --signal=USR1@" in text and "#SBATCH --requeue" in text
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


def test_the_script_goes_through_the_queue_until_the_run_is_done(tmp_path: Path) -> None:
    bin_folder, steps = tmp_path / "bin", 30
    bin_folder.mkdir()
    run = shlex.join([sys.executable, *command(tmp_path / "run", steps, 4, 2, seconds=0.05)])
    programs = {
        "diffalign": f"#!/bin/bash\nexec {run}\n",
        "srun": SRUN.replace("{folder}", str(tmp_path)).replace("{jobs}", "2"),
        "scontrol": f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n',
    }
    for name, text in programs.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    given = {**environment(), "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    requeued, jobs = tmp_path / "requeued", 0
    while jobs == 0 or (requeued.is_file() and requeued.read_text().count("\n") == jobs):
        jobs += 1
        with (tmp_path / "jobs").open("a") as stream:
            stream.write(f"{jobs}\n")
        done = subprocess.run(["bash", str(SCRIPT)], env=given, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert jobs < 6
    assert requeued.read_text() == "requeue 17\n" * 2 and jobs == 3
    finish([sys.executable, *command(tmp_path / "straight", steps, 4, 2)])
    for name in ("metrics.jsonl", "weights/weights.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


@pytest.mark.parametrize(("script", "ended", "code"), [(SCRIPT, 2, 2), (NODES, 2, 2), (NODES, 75, 0), (NODES, 0, 0)])
def test_only_a_stopped_command_is_requeued(tmp_path: Path, script: Path, ended: int, code: int) -> None:
    programs = {"srun": f'"$@"; exit {ended}', "scontrol": f'echo "$@" >> {tmp_path}/scontrol', "diffalign": "exit 0"}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n"}
    assert subprocess.run(["bash", str(script), "train", "x"], env=given).returncode == code
    asked = (tmp_path / "scontrol").read_text() if (tmp_path / "scontrol").is_file() else ""
    assert ("requeue 17" in asked) == (ended == 75)


def test_every_process_of_several_nodes_gets_its_rank_and_the_words_of_the_command(tmp_path: Path) -> None:
    programs = {
        "srun": 'SLURM_PROCID=3 SLURM_NTASKS=16 exec "$@"',
        "scontrol": "echo node1; echo node2",
        "diffalign": f'printf "%s\n" "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" "$@" > {tmp_path}/said',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n"}
    words = ["train", "sdxl_dpo", "objective={name: ipo, beta: 2}"]
    assert subprocess.run(["bash", str(NODES), *words], env=given).returncode == 0
    assert (tmp_path / "said").read_text().splitlines() == ["3 0 16 node1 29500", *words]
