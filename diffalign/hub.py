"""The Hugging Face hub: one quick try whether it answers, and the command that fetches a repository."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

SECONDS = 2.0
_CACHE_ALONE: ContextVar[bool] = ContextVar("_CACHE_ALONE", default=False)


@contextmanager
def cache_alone() -> Iterator[None]:
    """Look into the local cache alone inside the block: nothing is downloaded, and the hub is not asked."""
    token = _CACHE_ALONE.set(True)
    try:
        yield
    finally:
        _CACHE_ALONE.reset(token)


def hub_answers() -> bool:
    """Return whether the hub answers within SECONDS; asked once in a process. False where HF_HUB_OFFLINE is set.

    Without this, every file that is not in the cache costs the hub's client half a minute of retries.
    """
    from huggingface_hub import constants

    return not _CACHE_ALONE.get() and not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@cache
def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=SECONDS, follow_redirects=False)
    except Exception:  # its classes belong to the HTTP library that the hub's client was built on
        return False
    return True


def download_command(
    repository: str, folder: str, variant: str | None = None, file: str | None = None, configs: bool = False
) -> str:
    """Return the command that fetches a repository into `folder`: safetensors of one variant, a single file, or no weights."""
    if configs:
        return f'hf download {repository} --include "*.json" "*.txt" "*.model" --local-dir {folder}'
    if file is not None:
        return f"hf download {repository} {file} --local-dir {folder}"
    weights = "*.safetensors" if variant is None else f"*.{variant}.safetensors"
    return f'hf download {repository} --include "*.json" "*.txt" "*.model" "{weights}" --local-dir {folder}'


def dataset_command(repository: str, folder: str) -> str:
    """Return the command that fetches a dataset's repository into `folder`."""
    return f"hf download {repository} --repo-type dataset --local-dir {folder}"
