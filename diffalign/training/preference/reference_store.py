"""The frozen reference's predictions or errors, stored by the first run and read by later ones.

Draws are seeded, so the reference's predictions in a step are the same in every run that draws alike: another learning rate,
another beta, another objective on the same images. The first run computes and stores them; the next one reads them and skips
the forward pass. What is not stored yet is computed, and stored in turn.

    FOLDER/key.json                              all that decides the numbers; a run of another key is refused
    FOLDER/step-00000001-00000100-0.safetensors  "step/slot/name": of the micro-batch that begins at a slot of a step:
        members     [B, k] which images of its groups
        error       [B, k] float32: the reference's squared error, before `error_space` rescales it (keep: errors)
        prediction  [B, k, C, h, w]: what it was taken of, float32 or a narrower type that loses nothing (keep: predictions)
        noise       [B k, C, h, w]: likewise, where noise is found by inverting the reference

Each tensor has a CRC-32 in its file's metadata, which is compared when it is read; files of earlier versions have none.
Files are written under another name, renamed, and never touched again, so a kill loses only what was not yet written.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.config.model import current_keys
from diffalign.errors import DiffalignError
from diffalign.files import make_folder, reading
from diffalign.files.checksums import check_crc, crc_metadata, stored_crcs, tensor_crc
from diffalign.files.parse import parse_json

Make = Callable[[], Tensor]
Recall = Callable[[str, Tensor, Make], Tensor]
"""(name, members [B, k], function that computes it) -> the tensor, on the CPU or the device."""

FILE_BYTES = 64 * 2**20
"""How much gathers at most before a file is written; checkpoints write one in any case."""
DAY = 24 * 3600
NARROW = (torch.bfloat16, torch.float16)


def live(name: str, members: Tensor, make: Make) -> Tensor:
    """Compute a tensor: a `Recall` that stores nothing."""
    return make()


class ReferenceStore:
    """A folder of stored tensors. Every process stores what it computes; all read what was there at the start."""

    def __init__(self, folder: Path, key: dict[str, object], process: int = 0) -> None:
        """Open a folder. Raises DiffalignError where it holds another key's numbers, or cannot be made or read."""
        self.folder, self.process = folder, process
        self.waited = 0.0
        """Seconds spent reading so far."""
        _claim(folder, key)
        self._at: dict[str, Path] = {}
        for path in sorted(folder.glob("step-*.safetensors")):
            with _reading(path), safe_open(path, "pt") as file:
                self._at |= dict.fromkeys(file.keys(), path)
        self._new: dict[str, Tensor] = {}
        self._file: tuple[Path, Any, dict[str, int]] | None = None  # path, open file, checksums
        for part in folder.glob("step-*.part"):  # of runs that were killed, and not of those that write now
            if time.time() - part.stat().st_mtime > DAY:
                part.unlink(missing_ok=True)

    def count(self) -> int:
        """Return how many micro-batches are stored."""
        return sum(name.endswith("/members") for name in self._at)

    def holds(self, step: int, slot: int) -> bool:
        """Return whether the micro-batch that begins at `slot` of `step` was stored by an earlier run."""
        return f"{step}/{slot}/members" in self._at

    def recall(self, step: int, slot: int) -> Recall:
        """Return a `Recall` for this micro-batch: it reads what is stored, and stores what it must compute."""

        def recalled(name: str, members: Tensor, make: Make) -> Tensor:
            place = f"{step}/{slot}"
            if f"{place}/{name}" not in self._at:
                made = make()
                self._new |= {f"{place}/members": members, f"{place}/{name}": made}
                return made
            started = time.monotonic()
            if not torch.equal(self._read(f"{place}/members"), members):
                raise DiffalignError(
                    f"reference.store {self.folder}: at step {step + 1} it holds other images of the groups than this run "
                    "looks at; choose another folder"
                )
            found = self._read(f"{place}/{name}").float()
            self.waited += time.monotonic() - started
            return found

        return recalled

    def tidy(self) -> None:
        """Write a file where enough has gathered. To be called between steps."""
        if sum(values.numel() * 4 for values in self._new.values()) >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered since the last time."""
        if not self._new:
            return
        steps = [int(name.split("/")[0]) + 1 for name in self._new]
        path = self.folder / f"step-{min(steps):08d}-{max(steps):08d}-{self.process}.safetensors"
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            kept = {name: _narrow(values.detach().cpu()) for name, values in self._new.items()}
            save_file(kept, part, crc_metadata({name: tensor_crc([values]) for name, values in kept.items()}))
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise DiffalignError(
                f"reference.store {path} cannot be written ({error}); free some space and run the same command again, or set "
                "reference.store=null to continue without"
            ) from error
        # From now on they count as kept: a step that is repeated after a resume reads them.
        self._at |= dict.fromkeys(self._new, path)
        self._new = {}

    def _read(self, name: str) -> Tensor:
        path = self._at[name]
        with _reading(path):
            if self._file is None or self._file[0] != path:
                opened = safe_open(path, "pt")
                self._file = path, opened, stored_crcs(opened.metadata())
            values: Tensor = self._file[1].get_tensor(name)
            check_crc(name, tensor_crc([values]), self._file[2])
        return values


def _reading(path: Path) -> AbstractContextManager[None]:
    return reading(path, "reference.store ", "delete it, and its steps are computed again")


def _narrow(values: Tensor) -> Tensor:
    """Return the values in 16 bits where that loses nothing, as with predictions of a model that computes in 16 bits."""
    if values.dtype == torch.float32 and values.dim() > 2:
        for dtype in NARROW:
            if torch.equal(values.to(dtype).float(), values):
                return values.to(dtype).contiguous()
    return values.contiguous()


def _current(key: dict[str, object]) -> dict[str, object]:
    """Return a stored key with today's names of the model's options, so that stores of earlier versions still serve."""
    model = {name.removeprefix("model."): value for name, value in key.items() if name.startswith("model.")}
    renamed = {f"model.{name}": value for name, value in current_keys({"model": model})["model"].items()}
    return renamed | {name: value for name, value in key.items() if not name.startswith("model.")}


def _claim(folder: Path, key: dict[str, object]) -> None:
    """Write the key where there is none, or compare it, so that of two runs that begin at once one gives way."""
    path = folder / "key.json"
    part = folder / f"key.{os.getpid()}.part"
    try:
        make_folder(folder)
        part.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
        try:
            os.link(part, path)  # unlike a rename, it fails where the name is taken
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                path.write_bytes(part.read_bytes())
        part.unlink()
    except OSError as error:
        raise DiffalignError(f"reference.store {folder} cannot be used ({error}); choose another folder") from error
    with reading(path, "reference.store ", "choose another folder"):
        kept = _current(parse_json(path.read_text(encoding="utf-8")))
    now = json.loads(json.dumps(key))
    for field in {**now, **kept}:
        if kept.get(field) != now.get(field):
            raise DiffalignError(
                f"reference.store {folder} belongs to other draws: {field} was {kept.get(field)!r}, is now {now.get(field)!r}; "
                "choose another folder, or restore the old value"
            )
