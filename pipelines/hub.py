"""Find a model: a local folder, or a repository on the Hugging Face hub resolved to one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError, brief
from diffalign.files.parse import parse_json
from diffalign.hub import download_command, hub_answers

INDEX = "model_index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_index(
    path: str, revision: str | None, token: str | None, local_files_only: bool, key: str = "model.path"
) -> tuple[Path, str | None]:
    """Find the model's model_index.json: its path, and the commit (None for a local folder). key: of the config, for messages.

    The local path is tried first: diffusers would ask the hub for a misspelt folder and answer with a network error.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise DiffalignError(f"{path} is no diffusers pipeline: it holds no {INDEX}")
        if revision is not None:
            raise DiffalignError(
                f"model.revision: {path} is a local folder, which has none; leave it out or give a hub id"
            )
        return folder / INDEX, None
    if folder.exists():
        raise DiffalignError(f"{key}: {path} is a file; a folder in diffusers format (with {INDEX}) is needed")
    if not HUB_ID.fullmatch(path):
        raise DiffalignError(f"model folder {path} does not exist (and it is no hub id of the form owner/name)")
    found = _fetch(path, INDEX, revision, token, local_files_only, key)
    # The cache names a snapshot's folder after its commit.
    return found, found.parent.name


def _fetch(
    path: str, wanted: str, revision: str | None, token: str | None, local_files_only: bool, key: str = "model.path"
) -> Path:
    """Return one file of a repository, from the cache or the hub."""
    import huggingface_hub

    with hub_errors(path, revision, wanted, asked=not local_files_only, key=key):
        return Path(
            huggingface_hub.hf_hub_download(
                path, wanted, revision=revision, token=token, local_files_only=local_files_only or not hub_answers()
            )
        )


def component_config(
    path: str, index: Path, commit: str | None, component: str, token: str | None, local_files_only: bool
) -> dict[str, Any]:
    """Read a component's config.json, without its weights. index, commit: what `find_index` found for the model `path`."""
    file = index.parent / component / "config.json"
    if commit is not None and not file.is_file():
        file = _fetch(path, f"{component}/config.json", commit, token, local_files_only)
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffalignError(f"{path}: {component}/config.json cannot be read ({brief(error)})") from error
    if not isinstance(config, dict):
        raise DiffalignError(f"{path}: {component}/config.json is not a component's config")
    return config


def download(path: str, commit: str, variant: str | None, token: str | None, absent: Mapping[str, None]) -> Path:
    """Fetch what the pipeline needs of this commit, safetensors only; `absent` names components to leave out."""
    from diffusers import DiffusionPipeline

    with hub_errors(path, commit, "its weights"):
        return Path(
            DiffusionPipeline.download(
                path, revision=commit, variant=variant, token=token, use_safetensors=True, **absent
            )
        )


def hub_size(path: str, revision: str | None, token: str | None, variant: str | None) -> int | None:
    """Return the bytes of a repository's files that `download_command` fetches; None where the hub does not say.

    Raises DiffalignError for a repository that does not exist or is not open to the token.
    """
    import huggingface_hub

    ending = ".safetensors" if variant is None else f".{variant}.safetensors"
    with hub_errors(path, revision, "its facts"):
        info = huggingface_hub.HfApi(token=token).model_info(path, revision=revision, timeout=5, files_metadata=True)
        if info.gated:
            huggingface_hub.HfApi(token=token).auth_check(path)
    sizes = [one.size for one in info.siblings or () if one.rfilename.endswith((ending, ".json", ".txt", ".model"))]
    return sum(size for size in sizes if size) or None


def download_configs(path: str, commit: str, token: str | None, local: bool) -> Path:
    """Fetch the configs and tokenizers of a commit, without weights; local: only look into the cache."""
    import huggingface_hub

    with hub_errors(path, commit, "its configs", asked=not local, key="model.config"):
        return Path(
            huggingface_hub.snapshot_download(
                path,
                revision=commit,
                token=token,
                local_files_only=local,
                allow_patterns=["*.json", "*.txt", "*.model"],
            )
        )


@contextmanager
def hub_errors(
    path: str, revision: str | None, wanted: str, asked: bool = True, key: str = "model.path"
) -> Iterator[None]:
    """Turn the hub's exceptions into one line that says what to do. asked: False where only the cache was looked into."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{path}"
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise DiffalignError(
            f"{path} is gated: accept its conditions at {page}, then pass a token (model.token or `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DiffalignError(f"{path} has no revision '{revision}'; see {page}/commits/main") from error
    except errors.RepositoryNotFoundError as error:
        raise DiffalignError(
            f"no folder {path} here, and {page} does not exist or is private; check the name, or pass model.token"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__
        answer = "the hub gave no answer" + (f" ({brief(cause)})" if cause is not None else "")
        why = answer if asked else "the hub was not asked (local_files_only)"
        folder = path.rpartition("/")[2]
        raise DiffalignError(
            f"{path}: {wanted}{at} is not in the local cache and {why}; where there is a network: "
            f"{download_command(path, folder, configs=key == 'model.config')}; then set {key}={folder}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise DiffalignError(f"{path} is no diffusers pipeline: {page} holds no {wanted}{at}") from error
    # HTTPError is that of the HTTP library the hub's client was built on, whose name has changed before.
    except (errors.HfHubHTTPError, errors.HTTPError, errors.RevisionResolutionError, ConnectionError) as error:
        raise DiffalignError(
            f"{path}: the hub did not answer for {wanted}{at} ({brief(error)}); try again later"
        ) from error
    except (OSError, ValueError) as error:
        raise DiffalignError(
            f"{path}: {wanted}{at} cannot be fetched ({brief(error)}); see {page}/tree/main"
        ) from error
