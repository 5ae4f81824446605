"""Kills and signals at random moments in every kind of stage: the same command again ends with the same bytes.

`make kills` runs 100 kills and 20 signals; part of `make test` are 20 and 6. The file that DIFFALIGN_KILLS_LOG names gets a
line for each trial; with it, the same command leaves out what has been done.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from helpers.killable import JOBS, TRAINERS, Undisturbed

LONG = os.environ.get("DIFFALIGN_KILLS") == "long"
KILLS, TERMS = (100, 20) if LONG else (20, 6)
LOG = os.environ.get("DIFFALIGN_KILLS_LOG")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment(number: int, undisturbed: Undisturbed) -> None:
    check(undisturbed, list(JOBS)[number % len(JOBS)], number, signal.SIGKILL, (-signal.SIGKILL, 0))


@pytest.mark.parametrize("number", range(TERMS))
def test_terminated_at_any_step(number: int, undisturbed: Undisturbed) -> None:
    # Killed by it: before the command has set its handlers.
    codes = (75, 0, -signal.SIGTERM)
    check(undisturbed, TRAINERS[number % len(TRAINERS)], number, signal.SIGTERM, codes)


def check(undisturbed: Undisturbed, job: str, number: int, how: signal.Signals, codes: tuple[int, ...]) -> None:
    """Make one trial, if the log has none of this number, and write its outcome there."""
    trial_name = f"{how.name} {number} {job}"
    done = Path(LOG).read_text().splitlines() if LOG and Path(LOG).is_file() else []
    if any(line.startswith(f"{trial_name}: ") for line in done):
        pytest.skip("done already")
    trial = undisturbed.trial(job, number, how)
    shutil.rmtree(undisturbed.folder / f"{how.name}-{number}-{job}")
    different = ", ".join(trial.different) or "it did not end"
    outcome = f"exit code {trial.code}, {'same bytes' if trial.same else f'DIFFERENT: {different}'}"
    if LOG:
        with Path(LOG).open("a") as stream:
            stream.write(f"{trial_name}: {outcome}\n")
    assert trial.same and trial.code in codes, f"{job}: {outcome}"
