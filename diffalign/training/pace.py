"""How long steps take, and how much of that is waiting for data."""

from diffalign.training.progress import peak_memory

ALLOWED = 0.02


class Pace:
    """Seconds of steps since the last row and since the start. On a GPU a step's own seconds say little, since the host runs
    ahead; those between two rows, each of which waits for the GPU, do."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._all_seconds = self._all_waited = 0.0

    def add(self, seconds: float, waited: float) -> None:
        """A step, and how much of it was spent on reading and drawing its groups and on nothing else."""
        self._steps += 1
        self._seconds += seconds
        self._waited += waited
        self._all_seconds += seconds
        self._all_waited += waited

    def row(self) -> dict[str, float]:
        """Of the steps since the last row: seconds a step and the share of them spent waiting; peak memory in GiB."""
        row = {
            "seconds": self._seconds / self._steps,
            "waiting": self._waited / self._seconds,
            "peak_gib": peak_memory(),
        }
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return row

    def verdict(self) -> str | None:
        """A line where more than 2% of the run was waiting."""
        share = self._all_waited / self._all_seconds if self._all_seconds else 0.0
        if share <= ALLOWED:
            return None
        return (
            f"{share:.1%} of the steps' time went into reading and drawing groups (more than {ALLOWED:.0%}); data.cache=all "
            "and a fast disk for data.cache_dir shorten it"
        )
