"""The requeue script of docs/resume.md, on a stand-in for Slurm that sends SIGUSR1 and starts the job again."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import command, environment, finish

PAGE = Path(__file__).resolve().parents[2] / "docs" / "resume.md"
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)

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


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_the_script_goes_through_the_queue_until_the_run_is_done(tmp_path: Path) -> None:
    (script,) = [script for script in SCRIPTS if "scontrol requeue" in script]
    assert "#SBATCH --signal=USR1@" in script and "#SBATCH --requeue" in script
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
    (tmp_path / "job.sh").write_text(script)
    given = {**environment(), "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    requeued, jobs = tmp_path / "requeued", 0
    while jobs == 0 or (requeued.is_file() and requeued.read_text().count("\n") == jobs):
        jobs += 1
        with (tmp_path / "jobs").open("a") as stream:
            stream.write(f"{jobs}\n")
        done = subprocess.run(
            ["bash", str(tmp_path / "job.sh")], env=given, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert jobs < 6
    assert requeued.read_text() == "requeue 17\n" * 2 and jobs == 3
    finish([sys.executable, *command(tmp_path / "straight", steps, 4, 2)])
    for name in ("metrics.jsonl", "weights/weights.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_another_error_is_not_requeued(tmp_path: Path) -> None:
    (script,) = [script for script in SCRIPTS if "scontrol requeue" in script]
    for name, text in {"srun": "exit 2", "scontrol": f"touch {tmp_path}/requeued"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    assert subprocess.run(["bash", "-c", script], env=given).returncode == 2
    assert not (tmp_path / "requeued").exists()
