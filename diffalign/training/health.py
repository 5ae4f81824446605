"""Watch a running job: print each finding once, write `health.json`, stop on an alarm if asked."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from diffalign.errors import DiffalignError
from diffalign.files import make_folder, read_json_lines
from diffalign.files.metric_rows import read_metrics
from diffalign.health import ENDINGS, WITHOUT_SPREAD, Finding, Watch, describe
from diffalign.training.protocols import Say, ValidationRow

OnAlarm = Literal["warn", "stop"]
Row = dict[str, float]


class HealthMonitor:
    """The health checks of a running job.

    Every process has one and feeds it the same rows, so all stop together; only the main one prints and writes.
    """

    def __init__(
        self,
        run_dir: Path,
        on_alarm: OnAlarm,
        findings: Iterable[Finding],
        first: int,
        say: Say,
        main: bool,
    ) -> None:
        """Begin with the `findings` about the data, and with the rows up to step `first` of a resumed run.

        Raises DiffalignError where these hold an alarm and on_alarm is "stop".
        """
        self.run_dir, self.stop_on_alarm, self.say, self.main = run_dir, on_alarm == "stop", say, main
        self.watch = Watch(findings)
        self._announce(list(self.watch.findings.values()))
        if first:  # a resumed run sees its past as the first one did
            rows = read_metrics(run_dir / "metrics.jsonl", first)
            self.watch.replay(rows, read_json_lines(run_dir / "validation.jsonl", first))
        if self.stops:
            self._write()
            raise DiffalignError(self.reason())

    @property
    def stops(self) -> bool:
        """Whether an alarm ends the run."""
        return self.stop_on_alarm and bool(self.watch.alarms)

    def reason(self) -> str:
        """Return the message of a run that an alarm ends."""
        return (
            f"{self.run_dir} stops, as on_alarm=stop says. {describe(self.watch.alarms[0])} Set on_alarm=warn to continue; "
            "nothing that was trained is lost"
        )

    def row(self, row: Row) -> None:
        """Examine a row of metrics.jsonl."""
        self._announce(self.watch.row(row))

    def validation(self, row: ValidationRow) -> None:
        """Examine a row of validation.jsonl."""
        self._announce(self.watch.validation(row))

    def _announce(self, new: list[Finding]) -> None:
        if self.main and new:
            for finding in new:
                self.say(describe(finding))
            self._write()

    def close(self, steps: int) -> None:
        """Print once more what was found, since a long run scrolls it away; raise DiffalignError where an alarm ended it.

        steps: those that the run should have had.
        """
        self.watch.end(steps)
        if self.main:
            self._write()
            said = [
                f"{f.words.title} ({f.measured if f.name in (*ENDINGS, WITHOUT_SPREAD) else f'step {f.step}'})"
                for f in self.watch.in_order()
            ]
            said = said or ["nothing found"]
            weightless = self.watch.ending.share_weightless
            if weightless and WITHOUT_SPREAD not in self.watch.findings:
                said.append(f"{weightless:.0%} of the groups drawn state no preference and weighed nothing")
            self.say("health: " + "; ".join(said))
        if self.stops:
            raise DiffalignError(self.reason())

    def _write(self) -> None:
        if self.main:
            make_folder(self.run_dir)
            text = json.dumps([f.as_dict() for f in self.watch.in_order()], indent=1) + "\n"
            (self.run_dir / "health.json").write_text(text)
