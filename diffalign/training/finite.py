"""When the numbers of a step reach the host.

A GPU works behind the host's back: asking for a number makes the host wait until everything queued before it is done, and
the GPU then waits for the host's next order. So on a GPU numbers are read every `train.log_every` steps only, and losses
and gradients that are not finite are found there: before a row, an image or a checkpoint is written, named by the step and
the groups in which they came up first. On a CPU nothing is gained by waiting, and each step is judged at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign.errors import DiffalignError
from diffalign.training.checkpoint import checkpoints


@dataclass(frozen=True)
class _Note:
    """A number that must be finite, of a step's `groups`; `losses` tell which of them it is, where that is known."""

    what: str
    step: int
    groups: Sequence[str]
    value: Tensor
    losses: Tensor | None = None


class Reading:
    """Numbers that must be finite, judged at once or at the next reading."""

    def __init__(self, device: torch.device, run_dir: Path) -> None:
        self.eager, self.run_dir = not runs_ahead(device), run_dir
        self._notes: list[_Note] = []

    def loss(self, step: int, groups: Sequence[str], losses: Tensor, share: Tensor) -> None:
        """A micro-batch: its groups' losses [B], and its share of the step's loss."""
        self._add(_Note("loss", step, groups, share.detach(), losses.detach()))

    def norm(self, step: int, groups: Sequence[str], norm: Tensor) -> None:
        """The norm of a step's gradient."""
        self._add(_Note("gradient norm", step, groups, norm.detach()))

    def _add(self, note: _Note) -> None:
        self._notes.append(note)
        if self.eager:
            self.check()

    def check(self) -> None:
        """Raise DiffalignError for the first number that is not finite; one transfer for all since the last time."""
        notes, self._notes = self._notes, []
        if not notes:
            return
        finite = torch.stack([note.value.float() for note in notes]).isfinite().tolist()
        for note, fine in zip(notes, finite, strict=True):
            if not fine:
                raise self._not_finite(note)

    def _not_finite(self, note: _Note) -> DiffalignError:
        bad: list[str] = []
        if note.losses is not None:
            fine = torch.isfinite(note.losses).tolist()
            bad = [group for group, ok in zip(note.groups, fine, strict=True) if not ok]
        saved = checkpoints(self.run_dir)
        return DiffalignError(
            f"the {note.what} is {float(note.value)} at step {note.step + 1}, groups {', '.join(bad or note.groups)}; the last "
            f"good checkpoint is {saved[-1] if saved else 'none'}: look at these images and captions, or lower optimizer.lr or "
            "objective.beta"
        )


def runs_ahead(device: torch.device) -> bool:
    """Whether the host runs ahead of the device, so that reading a number holds both up."""
    return device.type == "cuda"
