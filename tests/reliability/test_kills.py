"""Kills and signals at random moments in every kind of stage: the same command again ends with the same bytes.

`make kills` runs 100 kills and 20 signals; part of `make test` are 20 and 6.
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment(number: int, undisturbed: Undisturbed) -> None:
    trial = undisturbed.trial(list(JOBS)[number % len(JOBS)], number, signal.SIGKILL)
    assert trial.same, f"{trial.job}: {', '.join(trial.different) or 'did not end'}"
    assert trial.code in (-signal.SIGKILL, 0)
    _record(trial.job, "killed" if trial.hit else "had ended", undisturbed.folder)


@pytest.mark.parametrize("number", range(TERMS))
def test_terminated_at_any_step(number: int, undisturbed: Undisturbed) -> None:
    trial = undisturbed.trial(TRAINERS[number % len(TRAINERS)], number, signal.SIGTERM)
    assert trial.same, f"{trial.job}: {', '.join(trial.different) or 'did not end'}"
    assert trial.code in (75, 0, -signal.SIGTERM)  # the last: before the handlers are set
    _record(trial.job, f"terminated with {trial.code}", undisturbed.folder)


def _record(job: str, how: str, folder: Path) -> None:
    """Append to the file that DIFFALIGN_KILLS_LOG names, for a count at the end; clear up what is done with."""
    for place in folder.glob("SIG*"):
        shutil.rmtree(place)
    if log := os.environ.get("DIFFALIGN_KILLS_LOG"):
        with Path(log).open("a") as stream:
            stream.write(f"{job} {how}\n")
