"""How a run proceeds: a bar on a terminal, a plain line now and then elsewhere; seconds a step, and waiting for data."""

import resource
import sys
import time
from collections.abc import Callable
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import Progress

from diffalign.progress import progress_bar

ALLOWED_WAITING = 0.02
# Preference steps have the first, distillation the others.
SHOWN = ("loss", "student_loss", "fake_loss", "reward")


def peak_memory() -> float:
    """Return the peak memory in GiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform != "darwin" else kib / 2**30


def describe(metrics: dict[str, float], seconds: float) -> str:
    """Describe a step, as `loss 0.671  margin +0.042  accuracy 0.62  0.21 s/step  1.3 GiB`."""
    parts = [f"{name.replace('_', ' ')} {metrics[name]:.4f}" for name in SHOWN if name in metrics]
    if "margin" in metrics:
        parts.append(f"margin {metrics['margin']:+.3f}")
    if "accuracy" in metrics:
        parts.append(f"accuracy {metrics['accuracy']:.2f}")
    return "  ".join([*parts, f"{seconds:.2f} s/step", f"{peak_memory():.1f} GiB"])


class TrainProgress:
    """A progress bar or lines, as a context manager; `update` it once a step.

    Metrics are smoothed over about 20 steps: single batches only flicker.
    """

    def __init__(self, first: int, steps: int, say: Callable[[str], None], show: bool = True) -> None:
        self.first, self.steps, self.say, self.show = first, steps, say, show
        self.smooth: dict[str, float] = {}
        self.started = time.monotonic()
        self.bar: Progress | None = None
        console = Console(stderr=True)
        if show and console.is_terminal:
            self.bar = progress_bar(console, "train", first, steps)

    def __enter__(self) -> "TrainProgress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, metrics: dict[str, float]) -> None:
        """Show that `done` steps are finished; `metrics` are those of the last."""
        if not self.show:
            return
        share = 1 / min(20, done - self.first)
        for name, value in metrics.items():
            self.smooth[name] = (1 - share) * self.smooth.get(name, value) + share * value
        seconds = (time.monotonic() - self.started) / (done - self.first)
        text = describe(self.smooth, seconds)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=done, text=text)
        elif done == self.steps or done - self.first == 1 or done % max(1, self.steps // 10) == 0:
            left = seconds * (self.steps - done)
            self.say(f"step {done}/{self.steps}  {text}  ETA {int(left // 60)}:{int(left % 60):02d}")


class Pace:
    """Seconds of steps since the last row and since the start, and the share of them in which a run only waited for data.

    On a GPU a step's own seconds say little, since the host runs ahead; those between two rows, each of which waits for the
    GPU, do. remedy: what shortens the waiting; None where a method does not measure it.
    """

    def __init__(self, remedy: str | None) -> None:
        self.remedy = remedy
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._all_seconds = self._all_waited = 0.0

    def add(self, seconds: float, waited: float) -> None:
        """Count a step, and how much of it was spent on reading and drawing its data and on nothing else."""
        self._steps += 1
        self._seconds += seconds
        self._waited += waited
        self._all_seconds += seconds
        self._all_waited += waited

    def row(self) -> dict[str, float]:
        """Return seconds a step and the share of waiting since the last row, and peak memory in GiB."""
        row = {"seconds": self._seconds / self._steps}
        if self.remedy is not None:
            row["waiting"] = self._waited / self._seconds
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return row | {"peak_gib": peak_memory()}

    def waiting_warning(self) -> str | None:
        """Return a line to print where more than 2% of the run was waiting."""
        share = self._all_waited / self._all_seconds if self._all_seconds else 0.0
        if self.remedy is None or share <= ALLOWED_WAITING:
            return None
        return (
            f"{share:.1%} of the steps' time went into reading and drawing their data (more than {ALLOWED_WAITING:.0%}); "
            f"{self.remedy}"
        )
