"""Numbers of a step that must be finite, and when the host reads them.

A GPU works behind the host's back: asking for a number makes the host wait until everything queued before it is done, and
the GPU then waits for the host's next order. So on a GPU numbers are read every `train.log_every` steps only, and losses
and gradients that are not finite are found there: before a row, an image or a checkpoint is written, named by the step in
which they came up first. On a CPU nothing is gained by waiting, and each number is checked at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.training.checkpoint_files import checkpoints


@dataclass(frozen=True)
class _Note:
    """A number that must be finite, and what it was computed from: `names`, whose own `losses` are given where known."""

    what: str
    step: int
    names: Sequence[str]
    value: Tensor
    losses: Tensor | None = None


class FiniteGuard:
    """Numbers that must be finite: checked at once on a CPU, all together at the next `check` on a GPU.

    unit: what a step's names are names of, such as "groups"; remedy: how a user mends a number that is not finite.
    """

    def __init__(self, device: torch.device, run_dir: Path, unit: str, remedy: str) -> None:
        self.eager = not runs_ahead(device)
        self.run_dir, self.unit, self.remedy = run_dir, unit, remedy
        self._notes: list[_Note] = []

    def loss(self, step: int, names: Sequence[str], losses: Tensor, share: Tensor, what: str = "loss") -> None:
        """Note a micro-batch: its losses [N], as many of each name, and its share of the step's loss."""
        self._add(_Note(what, step, names, share.detach(), losses.detach()))

    def norm(self, step: int, names: Sequence[str], norm: Tensor, what: str = "gradient norm") -> None:
        """Note the norm of a gradient."""
        self._add(_Note(what, step, names, norm.detach()))

    def _add(self, note: _Note) -> None:
        self._notes.append(note)
        if self.eager:
            self.check()

    def check(self) -> None:
        """Raise DiffalignError for the first number that is not finite; one transfer for all since the last check."""
        notes, self._notes = self._notes, []
        if not notes:
            return
        finite = torch.stack([note.value.float() for note in notes]).isfinite().tolist()
        for note, fine in zip(notes, finite, strict=True):
            if not fine:
                raise self._not_finite(note)

    def _not_finite(self, note: _Note) -> DiffalignError:
        bad: list[str] = []
        if note.losses is not None and note.names:
            fine = torch.isfinite(note.losses).view(len(note.names), -1).all(dim=1).tolist()
            bad = [name for name, ok in zip(note.names, fine, strict=True) if not ok]
        where = f", {self.unit} {', '.join(bad or note.names)}" if note.names else ""
        saved = checkpoints(self.run_dir)
        return DiffalignError(
            f"the {note.what} is {float(note.value)} at step {note.step + 1}{where}; the last good checkpoint is "
            f"{saved[-1] if saved else 'none'}: {self.remedy}"
        )


def runs_ahead(device: torch.device) -> bool:
    """Return whether the host runs ahead of the device, so that reading a number holds both up."""
    return device.type == "cuda"
