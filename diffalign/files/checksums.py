"""CRC-32 checksums, with which a file of tensors tells whether its bytes are as they were written."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

CRC = "crc32"
"""The one entry of a safetensors file's metadata: with several, their order would differ from process to process."""
CHUNK = 2**22


def tensor_crc(tensors: Iterable[Tensor]) -> int:
    """Return the CRC-32 of the bytes of tensors on the CPU, one after another."""
    crc = 0
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


def crc_metadata(crcs: Mapping[str, int]) -> dict[str, str]:
    """Return the metadata of a safetensors file with these checksums by name."""
    return {CRC: json.dumps(crcs)}


def stored_crcs(metadata: Mapping[str, str] | None) -> dict[str, int]:
    """Return the checksums of a safetensors file by name; none of files of earlier versions."""
    found: dict[str, int] = json.loads((metadata or {}).get(CRC, "{}"))
    return found


def check_crc(name: str, found: int, stored: Mapping[str, int]) -> None:
    """Raise ValueError where a checksum is stored under the name and differs."""
    if name in stored and stored[name] != found:
        raise ValueError(f"the checksum of {name} differs")
