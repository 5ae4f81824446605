"""The health of a run while it goes: what is found is said at once, kept in `health.json`, and may end the run."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.files import read_json_lines
from diffalign.health import Finding, Watch, describe


class Oversight:
    """Every process has one and feeds it the same rows, so all stop together; only the main one speaks and writes."""

    def __init__(
        self,
        run_dir: Path,
        on_alarm: str,
        known: Iterable[Finding],
        first: int,
        say: Callable[[str], None],
        main: bool,
    ) -> None:
        self.run_dir, self.stop_on_alarm, self.say, self.main = run_dir, on_alarm == "stop", say, main
        self.watch = Watch(known)
        self._announce(list(self.watch.findings.values()))
        if first:  # a resumed run sees its past as the first one did
            rows = (read_json_lines(run_dir / name, first) for name in ("metrics.jsonl", "validation.jsonl"))
            self.watch.replay(*rows)
        if self.stops:
            self._write()
            raise DiffalignError(self.reason())

    @property
    def stops(self) -> bool:
        return self.stop_on_alarm and bool(self.watch.alarms)

    def reason(self) -> str:
        """Why a run with on_alarm=stop ends."""
        return (
            f"{self.run_dir} stops, as on_alarm=stop says. {describe(self.watch.alarms[0])} Set on_alarm=warn to go on; "
            "nothing that was trained is lost"
        )

    def row(self, row: dict[str, float]) -> None:
        self._announce(self.watch.row(row))

    def validation(self, row: dict[str, Any]) -> None:
        self._announce(self.watch.validation(row))

    def _announce(self, new: list[Finding]) -> None:
        if self.main and new:
            for finding in new:
                self.say(describe(finding))
            self._write()

    def close(self) -> None:
        """Say once more what was found, since a long run scrolls it away."""
        if self.main:
            self._write()
            found = self.watch.in_order()
            self.say("health: " + ("; ".join(f"{f.words.title} (step {f.step})" for f in found) or "nothing found"))

    def _write(self) -> None:
        if self.main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps([f.as_dict() for f in self.watch.in_order()], indent=1) + "\n"
            (self.run_dir / "health.json").write_text(text)
