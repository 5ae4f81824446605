"""Time calls by the clock."""

import time
from collections.abc import Callable


def seconds(what: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    what()
    return time.perf_counter() - started
