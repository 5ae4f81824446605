"""CRC-32 checksums, with which files of tensors and JSON tell whether their bytes are as they were written."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.files.parse import parse_json

CRC = "crc32"
"""The checksum's key in JSON, and the one entry of a safetensors file's metadata: several would come in any order."""
CHUNK = 2**22


def tensor_crc(tensors: Iterable[Tensor], crc: int = 0) -> int:
    """Return the CRC-32 of the bytes of tensors on the CPU, one after another; `crc`: of what came before."""
    for tensor in tensors:
        crc = zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return crc


def file_crc(path: Path) -> int:
    """Return the CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object for JSON with the CRC-32 of its other entries."""
    return {**record, CRC: _json_crc(record)}


def check_seal(record: Mapping[str, Any]) -> None:
    """Raise ValueError where an object from JSON has a checksum that differs; those of earlier versions have none."""
    if CRC in record and record[CRC] != _json_crc(record):
        raise ValueError("its checksum differs")


def _json_crc(record: Mapping[str, Any]) -> int:
    plain = {key: value for key, value in record.items() if key != CRC}
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def crc_metadata(crcs: Mapping[str, int]) -> dict[str, str]:
    """Return the metadata of a safetensors file with these checksums by name."""
    return {CRC: json.dumps(crcs)}


def stored_crcs(metadata: Mapping[str, str] | None) -> dict[str, int]:
    """Return the checksums of a safetensors file by name; none of files of earlier versions."""
    found: dict[str, int] = parse_json((metadata or {}).get(CRC, "{}"))
    return found


def check_crc(name: str, found: int, stored: Mapping[str, int]) -> None:
    """Raise ValueError where a checksum is stored under the name and differs."""
    if name in stored and stored[name] != found:
        raise ValueError(f"the checksum of {name} differs")
