"""Read and check the files of a checkpoint: state.json holds a CRC-32 of every file, and one of itself.

Checkpoints of earlier versions have no checksums. All of them must agree with the step in their folder's name.
"""

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from diffalign.files import reading
from diffalign.files.checksums import check_crc, check_seal, file_crc, sealed
from diffalign.files.parse import parse_json

NAME = re.compile(r"step-(\d{8})")
FILES = "files"
STATE = "state.json"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write state.json, with checksums of itself and of the files of tensors that lie in the folder."""
    files = {path.name: file_crc(path) for path in sorted(folder.glob("*.safetensors"))}
    (folder / STATE).write_text(json.dumps(sealed({**record, FILES: files}), indent=1))


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return what state.json holds. Raises DiffalignError where it is damaged or speaks of another step."""
    with damage(checkpoint):
        text = (checkpoint / STATE).read_text(encoding="utf-8")
        record: dict[str, Any] = parse_json(text)
        # Of what was written: `parse_json` changes text that UTF-8 cannot hold.
        check_seal(json.loads(text))
        named = int(checkpoint.name.rpartition("-")[2]) if NAME.fullmatch(checkpoint.name) else record["step"]
        if record["step"] != named:
            raise ValueError(f"{STATE} is of step {record['step']}")
        record["config"].keys(), record["optimizer"]["scalars"].keys(), record["optimizer"]["groups"][0].keys()
    return record


def read_tensors(
    checkpoint: Path, record: dict[str, Any], name: str, like: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's file `name`, by name.

    like: tensors of the names and shapes that it must hold. Raises DiffalignError where the file is damaged or does not.
    """
    path = checkpoint / name
    with damage(checkpoint):
        check_crc(name, file_crc(path), record.get(FILES, {}))
        found: dict[str, Tensor] = load_file(path)
        for key, value in (like or {}).items():
            if key not in found or found[key].shape != value.shape:
                raise ValueError(f"{name} lacks {key}" if key not in found else f"{name} has {key} in another shape")
    return found


def verify(checkpoint: Path) -> None:
    """Raise DiffalignError where a file of a checkpoint is damaged."""
    record = read_record(checkpoint)
    with damage(checkpoint):
        for name, crc in record.get(FILES, {}).items():
            check_crc(name, file_crc(checkpoint / name), {name: crc})


def damage(checkpoint: Path) -> AbstractContextManager[None]:
    """Turn errors of reading a checkpoint into a DiffalignError that says what is left to resume from."""
    earlier = [path for path in checkpoints(checkpoint.parent.parent) if path < checkpoint]
    then = f"resumes from {earlier[-1].name}" if earlier else "begins with the first step"
    return reading(checkpoint, "checkpoint ", f"it is damaged; delete it, and the same command {then}")
