"""Work that the main process does alone, while the others wait for a file and not inside a collective.

A collective has a time limit (NCCL's is ten minutes), and a validation or a checkpoint of a large model may take longer.
`main_alone` ends when the main process says in `run_dir/.alone-<launch>` that it has finished.
"""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from diffalign.errors import DiffalignError
from diffalign.files import write_whole

WAIT = 0.1  # seconds between looks at the file
FAILED = "failed"


class Alone:
    """The turns of the main process in one run. Every process makes one, and takes part in every turn."""

    def __init__(self, accelerator: Accelerator, run_dir: Path) -> None:
        """Agree on a file. The run directory exists when the main process comes here."""
        self.accelerator, self.turns = accelerator, 0
        self.file: Path | None = None
        if accelerator.num_processes == 1:
            return
        launch = [uuid.uuid4().hex]
        if accelerator.is_main_process:
            for old in run_dir.glob(".alone-*"):  # of launches that were killed
                old.unlink(missing_ok=True)
            write_whole(run_dir / f".alone-{launch[0]}", "0")
        path = run_dir / f".alone-{broadcast_object_list(launch)[0]}"
        # On machines that share no disk only a collective is left to wait in.
        if all(gather_object([path.is_file()])):
            self.file = path

    @contextmanager
    def main_alone(self) -> Iterator[None]:
        """Run the block in all processes; those that are not the main one then wait until the main one has left it.

        Raises DiffalignError in the others where the block failed in the main process.
        """
        self.turns += 1
        main = self.accelerator.is_main_process
        try:
            yield
        except BaseException:
            if main and self.file is not None:
                write_whole(self.file, FAILED)
            raise
        if self.file is None:
            self.accelerator.wait_for_everyone()
        elif main:
            write_whole(self.file, str(self.turns))
        else:
            while (said := self.file.read_text()) != FAILED and int(said) < self.turns:
                time.sleep(WAIT)
            if said == FAILED:
                raise DiffalignError("the main process failed while this one waited for it; its message says why")

    def close(self) -> None:
        """Delete the file, after all processes have seen its last turn."""
        self.accelerator.wait_for_everyone()
        if self.file is not None and self.accelerator.is_main_process:
            self.file.unlink(missing_ok=True)
