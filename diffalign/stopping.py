"""Stop on a signal without losing work: finish the current unit of work, keep it, and end with an exit code of its own.

SIGTERM, SIGINT (Ctrl-C) and a pre-emption signal (SIGUSR1, or the one that DIFFALIGN_STOP_SIGNAL names) ask a command to
stop. A unit of work, such as a training step or a batch of images, runs inside `deferred()` and is finished first; the loop
around it calls `check()`, or looks at `asked()` where it has something to save. Outside of units the command ends at once.
A second SIGINT ends it at once anywhere.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from diffalign.errors import DiffalignError

RESUME_CODE = 75
"""Exit code of a command that a signal stopped and that the same command resumes: EX_TEMPFAIL of sysexits.h."""
SIGNAL_KEY = "DIFFALIGN_STOP_SIGNAL"
"""Environment variable with the name of the pre-emption signal."""
ONE_PRESS = 1.0
"""Seconds within which a process of several takes two SIGINTs for one: the terminal sends one, the launcher another."""


class Stopped(KeyboardInterrupt):
    """The end of a command that a signal asked to stop. Its text: which signal, what is kept, what the same command does."""

    def __init__(self) -> None:
        super().__init__(f"stopped by {_name()}: {what_is_kept()}")


@dataclass
class _State:
    """The state of this process. signal: the first that asked; units: how many units are open; kept: what is kept."""

    signal: str | None = None
    since: float = 0.0
    units: int = 0
    kept: str | None = None


_state = _State()


def preemption_signal() -> signal.Signals:
    """Return the signal that announces a pre-emption. Raise DiffalignError for a name that is no signal."""
    name = os.environ.get(SIGNAL_KEY) or "USR1"
    try:
        return signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
    except KeyError:
        raise DiffalignError(f"{SIGNAL_KEY}={name}: no signal of this system; use USR1, USR2 or TERM") from None


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Handle the three signals inside the block, in the main thread; elsewhere Python allows no handlers."""
    global _state
    _state = _State()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watched = {signal.SIGINT, signal.SIGTERM, preemption_signal()}
    before = {number: signal.signal(number, _on_signal) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python, and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _state.signal = None


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Note the first signal; outside of units end the command. A SIGINT that follows another signal ends it anywhere."""
    several, now = int(os.environ.get("WORLD_SIZE", "1")) > 1, time.monotonic()
    if _state.signal is not None:
        if number == signal.SIGINT and now - _state.since > (ONE_PRESS if several else 0.0):
            raise KeyboardInterrupt
        return
    _state.signal, _state.since = signal.Signals(number).name, now
    if _state.units:
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come while a line was being printed.
            os.write(2, f"{_state.signal}: finishing what is running, then stopping; Ctrl-C ends at once\n".encode())
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise Stopped


@contextmanager
def deferred() -> Iterator[None]:
    """Run a unit of work, or a loop over units, that a signal does not interrupt."""
    _state.units += 1
    try:
        yield
    finally:
        _state.units -= 1


def asked() -> bool:
    """Return whether a signal has asked this process to stop."""
    return _state.signal is not None


def _name() -> str:
    """Return the name of the signal that asked to stop, for messages."""
    return {None: "a signal to another process", "SIGINT": "Ctrl-C"}.get(_state.signal, str(_state.signal))


def keep(what: str) -> None:
    """Note what is kept by now, such as `128 of 400 images`, for the message of a command that is stopped."""
    _state.kept = what


def what_is_kept() -> str:
    """Return what is kept and what the same command does, in words."""
    if _state.kept is None:
        return "nothing was saved yet; the same command starts again"
    return f"{_state.kept} kept; the same command resumes from there"


def check() -> None:
    """Raise Stopped if a signal has asked to stop. To be called after a unit of work."""
    if asked():
        raise Stopped
