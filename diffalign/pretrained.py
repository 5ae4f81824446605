"""Load what others published, with diffusers and transformers: whole or not at all, quietly, and without running its code.

Everything that comes from a stranger's folder goes through here: models, tokenizers, processors and configs.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from diffalign.errors import DiffalignError, brief
from diffalign.files.parse import parse_json
from diffalign.files.tensors import check_shards, read_metadata, weight_files
from diffalign.packages import install_command, not_installed

if TYPE_CHECKING:
    import torch

T = TypeVar("T", covariant=True)

LIBRARIES = ("diffusers", "transformers", "peft", "accelerate", "torchao")
BUFFERS = ("position_ids",)
"""Tables that older checkpoints lack, and that the model computes itself."""
PARAMETER = re.compile(r"(.+\.)?(weight|bias)")


class Loadable(Protocol[T]):
    """A class of diffusers or transformers, such as CLIPModel or an Auto class."""

    __name__: str

    def from_pretrained(self, folder: Path, **options: object) -> T:
        """Return the object that the folder holds."""
        ...


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep diffusers' and transformers' progress bars off the terminal; they have a switch each."""
    with _quiet_transformers(), _quiet_diffusers() if sys.modules.get("diffusers") else nullcontext():
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as switch

    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    # Scoring never imports diffusers, and need not have it.
    from diffusers.utils import logging as switch

    shown = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            switch.enable_progress_bar()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep progress bars, log lines and warnings of the libraries off the terminal: what matters in them is checked here."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [logger.level for logger in loggers]
    with quiet_progress(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn whatever a library raises about a stranger's files into one line, `what` and the reason, with no output before it.

    Libraries answer damaged files with nearly every exception there is. Only a lack of memory is passed on.
    """
    import torch

    try:
        with quiet_libraries():
            yield
    except (DiffalignError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and install_command(error.name):
            raise not_installed(error.name, what) from error
        raise DiffalignError(f"{what}: {brief(error)}") from error


def refuse_code(folder: Path, what: str) -> None:
    """Raise DiffalignError if a JSON file of the folder names code to load: an `auto_map`, or an attention kernel of the hub.

    transformers would ask whether to run it, or fetch it.
    """
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size > 1 << 24:  # a vocabulary
            continue
        try:
            values = _all_values(parse_json(path.read_bytes()))
        except ValueError as error:
            raise DiffalignError(f"{what}: {path} is not valid JSON ({brief(error)})") from error
        for key, value in values:
            kernel = key in ("attn_implementation", "_attn_implementation") and "/" in str(value)
            if (key == "auto_map" and value) or kernel:
                raise DiffalignError(
                    f"{what}: {path.name} names code of its own ({key}), and no code from a model's folder is run; use a model "
                    f"that transformers knows by itself, or delete {key} from {path} if it is one"
                )


def _all_values(content: object) -> list[tuple[str, Any]]:
    """Return every key with its value, at any depth of parsed JSON."""
    found: list[tuple[str, Any]] = []
    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            found += part.items()
            left += part.values()
        elif isinstance(part, list):
            left += part
    return found


def load_part(kind: Loadable[T], folder: Path, what: str, **options: object) -> T:
    """Return `kind.from_pretrained(folder)` of transformers: a config, tokenizer or processor, or a model unchecked.

    The network is not asked. what: the beginning of an error's line. Raises DiffalignError for whatever cannot be loaded.
    """
    refuse_code(folder, what)
    with foreign(f"{what}: {folder} cannot be loaded as {kind.__name__}"):
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


def load_model(
    kind: Loadable[tuple[torch.nn.Module, Mapping[str, Any]]],
    folder: Path,
    what: str,
    *,
    stem: str = "model",
    variant: str | None = None,
    **options: object,
) -> torch.nn.Module:
    """Return a model of diffusers or transformers whose every tensor comes from the folder.

    stem, variant: of the weights' names, as `weight_files` takes them. Raises DiffalignError that names count and first
    key of tensors that are missing, have another shape, or belong to parts of the model that its config leaves out. The
    libraries fill such tensors with random numbers, or drop them.
    """
    refuse_code(folder, what)
    for file in weight_files(folder, stem, variant):
        read_metadata(file)
    older = folder / "pytorch_model.bin.index.json"
    if older.is_file():
        check_shards(older, ".bin")
    with foreign(f"{what}: {folder} cannot be loaded as {kind.__name__}"):
        model, info = kind.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            variant=variant,
            **options,
        )
    check_whole(model, info, f"{what}: {folder} does not fit {type(model).__name__}")
    return model


def check_whole(model: torch.nn.Module, info: Mapping[str, Any], what: str) -> None:
    """Refuse a model by the libraries' loading info, as `load_model` says."""
    parts = {name for name, _ in model.named_children()}
    names = sorted(str(key) for key in info["unexpected_keys"])
    faults = {
        "missing": sorted(str(key) for key in info["missing_keys"] if not str(key).endswith(BUFFERS)),
        "of another shape": sorted(f"{key[0]} {list(key[1])}" for key in info["mismatched_keys"]),
        # Other networks of the same file, such as the vision half beside a text encoder, are left out on purpose.
        "left over, so the config describes another model": [
            key for key in names if key.split(".")[0] in parts and PARAMETER.fullmatch(key)
        ],
    }
    for fault, keys in faults.items():
        if keys:
            number = "1 tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"
            raise DiffalignError(f"{what}: {number} {fault}; first {keys[0]}")
