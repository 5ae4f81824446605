"""Count what a server does, in the text format of Prometheus."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of seconds."""
Labels = tuple[tuple[str, str], ...]

HELP = {
    "diffalign_requests_total": ("counter", "requests, by path and HTTP status"),
    "diffalign_request_seconds": ("histogram", "seconds from a request to its answer, of requests that score"),
    "diffalign_images_total": ("counter", "images by reward and outcome: scored, refused (its own answer) or failed"),
    "diffalign_batches_total": ("counter", "batches by reward"),
    "diffalign_batch_images_total": ("counter", "images in these batches"),
    "diffalign_batch_seconds_total": ("counter", "seconds in these batches"),
    "diffalign_model_loads_total": ("counter", "how often a reward's model became the one in memory"),
    "diffalign_queue_images": ("gauge", "images of accepted requests that have no answer yet"),
}


class Metrics:
    """Counters that several threads raise."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, Labels]] = Counter()
        self._seconds: Counter[int] = Counter()
        self._sum = 0.0
        self._lock = threading.Lock()

    def request(self, path: str, status: int) -> None:
        self._add("diffalign_requests_total", 1, path=path, status=str(status))

    def image(self, reward: str, outcome: str) -> None:
        self._add("diffalign_images_total", 1, reward=reward, outcome=outcome)

    def batch(self, reward: str, images: int, seconds: float) -> None:
        self._add("diffalign_batches_total", 1, reward=reward)
        self._add("diffalign_batch_images_total", images, reward=reward)
        self._add("diffalign_batch_seconds_total", seconds, reward=reward)

    def load(self, reward: str) -> None:
        self._add("diffalign_model_loads_total", 1, reward=reward)

    def answered(self, seconds: float) -> None:
        with self._lock:
            self._seconds[bisect_left(BUCKETS, seconds)] += 1
            self._sum += seconds

    @property
    def requests(self) -> int:
        """Requests that were scored."""
        with self._lock:
            return self._seconds.total()

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a counter over all labels that hold these."""
        with self._lock:
            wanted = set(labels.items())
            return sum(value for (known, of), value in self._counts.items() if known == name and wanted <= set(of))

    def _add(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._counts[name, tuple(labels.items())] += value  # type: ignore[assignment]  # seconds are no integers

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return all counters and these gauges, by name."""
        with self._lock:
            lines: list[str] = []
            for name, (kind, what) in HELP.items():
                lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
                if name in gauges:
                    lines.append(f"{name} {gauges[name]:g}")
                lines += [
                    f"{name}{_shown(labels)} {value:.10g}"
                    for (known, labels), value in sorted(self._counts.items())
                    if known == name
                ]
                if kind == "histogram":
                    below = 0
                    for n, bound in enumerate([*map(str, BUCKETS), "+Inf"]):
                        below += self._seconds[n]
                        lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
                    lines += [f"{name}_sum {self._sum:.10g}", f"{name}_count {below}"]
            return "\n".join(lines) + "\n"


def _shown(labels: Labels) -> str:
    """Return labels as the format writes them."""
    escaped = ((key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels)
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}" if labels else ""
