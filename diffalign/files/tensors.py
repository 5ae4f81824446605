"""Read safetensors files, and the index of a model that is cut into several; damage is named in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffalign.errors import DiffalignError, brief
from diffalign.files.parse import parse_json

SUFFIX = ".safetensors"
LFS = b"version https://git-lfs"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU. Raise DiffalignError for a file that cannot be read as one."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, and read no tensor. Raise DiffalignError as `read_tensors` does."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a safetensors file's tensors, and read no tensor. Raise DiffalignError as `read_tensors` does."""
    with _opened(path) as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> DiffalignError:
    """Return the error for a safetensors file that cannot be read."""
    size = path.stat().st_size if path.is_file() else 0
    if size and path.open("rb").read(len(LFS)) == LFS:
        return DiffalignError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    return DiffalignError(
        f"{path} is damaged or no safetensors file ({brief(error)}; {size} bytes); download or copy it once more"
    )


def weight_files(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """Return the safetensors files that diffusers and transformers read in a folder; [] if it has none of this variant.

    stem: `model` or `diffusion_pytorch_model`. Raises DiffalignError as `check_shards` does.
    """
    middle = f".{variant}" if variant else ""
    single = folder / f"{stem}{middle}{SUFFIX}"
    if single.is_file():
        return [single]
    index = folder / f"{stem}{SUFFIX}.index{middle}.json"
    return check_shards(index) if index.is_file() else []


def variants(folder: Path, stem: str) -> list[str]:
    """Return the variants of which a folder holds weights, such as fp16."""
    names = (path.name.removeprefix(stem) for path in folder.glob(f"{stem}.*{SUFFIX}"))
    found = {re.sub(r"-\d+-of-\d+", "", name.removesuffix(SUFFIX)).strip(".") for name in names}
    return sorted(found - {""})


def check_shards(index: Path, suffix: str = SUFFIX) -> list[Path]:
    """Return the files that an index names, in order. Raise DiffalignError unless all have the suffix and lie beside it."""
    try:
        content = parse_json(index.read_bytes())
        names = sorted({str(name) for name in content["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiffalignError(
            f"{index} is no index of weights ({brief(error)}); download or copy it once more"
        ) from error
    for name in names:
        if Path(name).name != name or not name.endswith(suffix) or "\0" in name:
            raise DiffalignError(f"{index} names {name!r}; only {suffix} files beside it are read")
        if not (index.parent / name).is_file():
            raise DiffalignError(f"{index} names {name}, which is missing; download or copy it")
    if not names:
        raise DiffalignError(f"{index} names no files; download or copy it once more")
    return [index.parent / name for name in names]
