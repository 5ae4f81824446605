"""Where metrics go: `metrics.jsonl` and `timing.jsonl` always, trackers by name."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from diffalign.files import read_json_lines, write_whole
from diffalign.files.metric_rows import metrics_line, numbers, plain_row, read_metrics
from diffalign.packages import require
from diffalign.training.protocols import PlainConfig, PlainRow


class Tracker(Protocol):
    """Another place for metrics."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """Finish, so that nothing is lost."""


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, run_dir: Path, project: str, config: PlainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; offline unless the user is logged in, so no run waits for a login."""

    def __init__(self, run_dir: Path, project: str, config: PlainConfig) -> None:
        import wandb

        known = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
        mode = os.environ.get("WANDB_MODE") or ("online" if known else "offline")
        self.run = wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), config=config, mode=mode, resume="allow"
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Hugging Face's local-first tracker."""

    def __init__(self, run_dir: Path, project: str, config: PlainConfig) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project=project, name=run_dir.name, config=config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.trackio.log(metrics, step=step)

    def close(self) -> None:
        self.trackio.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise DiffalignError where a tracker's package is absent, before anything is loaded."""
    for name in names:
        require(name, "tracking.trackers")


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def cut_rows(path: Path, step: int) -> None:
    """Drop rows written after `step` steps were done, and a last line that a kill left unfinished."""
    if path.exists():
        write_whole(path, "".join(json.dumps(row) + "\n" for row in read_json_lines(path, step)))


class Metrics:
    """The files and trackers that rows go to. Rows of `metrics.jsonl` hold no clock, so equal runs have equal files."""

    def __init__(
        self,
        run_dir: Path,
        trackers: Sequence[str],
        project: str,
        config: PlainConfig,
        step: int,
        rows: Sequence[PlainRow] = (),
        interim: bool = False,
    ) -> None:
        """Open the files after `step` steps.

        rows: the checkpoint's, of which a crash may have torn the last ones. interim: the next checkpoint takes its place, and
        so takes its rows as well.
        """
        cut_rows(run_dir / "timing.jsonl", step)
        kept = {row["step"]: row for row in [*map(numbers, rows), *read_metrics(run_dir / "metrics.jsonl", step)]}
        write_whole(run_dir / "metrics.jsonl", "".join(metrics_line(kept[done]) for done in sorted(kept)))
        self._recent = [numbers(row) for row in rows] if interim else []
        # Line by line: a checkpoint must never be ahead of its metrics.
        self.metrics = (run_dir / "metrics.jsonl").open("a", buffering=1)
        self.timing = (run_dir / "timing.jsonl").open("a", buffering=1)
        check_trackers(trackers)
        self.trackers: list[Tracker] = [TRACKERS[name](run_dir, project, config) for name in trackers]

    def log(self, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """Write a row of each file, and hand the metrics to the trackers."""
        self._recent.append({"step": step, **metrics})
        self.metrics.write(metrics_line(self._recent[-1]))
        self.timing.write(json.dumps({"step": step, **timing}) + "\n")
        self.track(step, metrics)

    def recent(self) -> list[PlainRow]:
        """Return the rows of metrics.jsonl since the last call, as JSON has them, for a checkpoint."""
        rows, self._recent = self._recent, []
        return [plain_row(row) for row in rows]

    def track(self, step: int, metrics: dict[str, float]) -> None:
        """Hand metrics to the trackers alone."""
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        """Close files and trackers."""
        self.metrics.close()
        self.timing.close()
        for tracker in self.trackers:
            tracker.close()
