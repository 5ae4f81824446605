"""Find and load a reward's weights: a local file or folder, or the hub at a revision. Pickles are never executed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import DiffalignError, brief
from diffalign.files.tensors import SUFFIX, read_tensors
from diffalign.hub import download_command, hub_answers
from diffalign.kernels import align_weights, avoid_cudnn_attention
from diffalign.pretrained import Loadable, load_model, quiet_libraries

EDGE = 1 << 20
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Config, tokenizer and processor of a transformers folder."""
FOLDER_FILES = (*SMALL_FILES, "*.safetensors")
"""All that a transformers folder needs; checkpoints in other formats stay on the hub, unless there is no other."""
OLDER_FILES = (*SMALL_FILES, "pytorch_model*.bin")


def fetch(
    reward: str,
    repo: str,
    file: str | None,
    revision: str,
    local: str | Path | None,
    option: str = "weights",
    patterns: tuple[str, ...] = FOLDER_FILES,
    asked: str = "reward",
) -> Path:
    """Return the path of `file` of `repo`, or of a whole folder if `file` is None.

    local: replaces the hub. option: the reward's option that sets it. patterns: the files wanted of a folder, since a
    tokenizer's repository may hold 8 GB of weights. asked: what the user named, and the command line's option. Raises
    DiffalignError naming file, repository and how to point to a local copy.
    """
    where = f"{file or 'the files'} of {repo} (revision {revision})"
    if local is not None:
        path = Path(local).expanduser()
        path = path / file if file and path.is_dir() else path
        if not path.exists():
            raise DiffalignError(f"{asked} {reward}: {path} does not exist; it should be {where}")
        if file is None and not path.is_dir():
            raise DiffalignError(f"{asked} {reward}: {path} is a file; it should be a folder with {where}")
        if file is None and not any(next(path.glob(pattern), None) for pattern in FOLDER_FILES):
            raise DiffalignError(f"{asked} {reward}: {path} holds no model; it should be a folder with {where}")
        return path
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if file is None:
            given: dict[str, Any] = {"revision": revision, "local_files_only": not hub_answers()}
            folder = Path(snapshot_download(repo, allow_patterns=list(patterns), **given))
            if patterns == FOLDER_FILES and not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(repo, allow_patterns=list(OLDER_FILES), **given))
            return folder
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=not hub_answers()))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        what = file or ("model.safetensors and its config" if "*.safetensors" in patterns else f"the {option}'s files")
        absent = isinstance(error, LocalEntryNotFoundError)
        why = "not in the local cache, and the hub gave no answer" if absent else brief(error).rstrip(".")
        raise DiffalignError(
            f"{asked} {reward}: {what} of https://huggingface.co/{repo} (revision {revision}) is not reachable: "
            f"{why}. Download it elsewhere ({download_command(repo, 'FOLDER', file=file)}) and name "
            f"the copy: {reward}:{option}=PATH"
        ) from error


def fingerprint(path: Path) -> str:
    """Return a short name of weights on disk: the hub's commit, or a hash of size, beginning and end of every file.

    It does not hash all bytes: for 16 GB that would take longer than scoring a small folder. Weights that differ only
    in the middle, at the same size, keep their name.
    """
    parts = path.parts
    if "snapshots" in parts and parts.index("snapshots") + 1 < len(parts):
        return parts[parts.index("snapshots") + 1][:12]
    digest = hashlib.blake2b(digest_size=6)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name} {size}".encode(errors="surrogateescape") + stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read(EDGE))
    return digest.hexdigest()


def pretrained(
    kind: Loadable[tuple[torch.nn.Module, dict[str, Any]]], folder: Path, reward: str, dtype: torch.dtype
) -> torch.nn.Module:
    """Return `kind.from_pretrained(folder)`, tensors only, every one of them from the folder.

    Raises DiffalignError as `load_model` does.
    """
    avoid_cudnn_attention()  # judges are trained, and gradients flow through rewards
    model = load_model(kind, folder, f"reward {reward}", dtype=dtype, weights_only=True, trust_remote_code=False)
    align_weights(model)  # a checkpoint scores the same in either of its formats
    return model


def load_state(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors file, or in a .pt/.pth that holds tensors only. `key`: where it is
    inside.
    """
    loaded: Any
    if path.suffix == SUFFIX:
        loaded = read_tensors(path)
    else:
        try:
            with quiet_libraries():
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's unpickler answers junk with whatever its reading of it leads to
            reason = (str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__).splitlines()[0]
            if "Unsupported" in reason:
                raise DiffalignError(
                    f"{path}: cannot be loaded without running code from it ({reason}); if you trust it, convert it once "
                    "where it came from: safetensors.torch.save_file(torch.load(FILE, weights_only=False)['state_dict'], "
                    "'weights.safetensors'), and pass that file as weights="
                ) from error
            raise DiffalignError(
                f"{path} is damaged or no checkpoint of torch ({reason}; {path.stat().st_size} bytes); download or copy it "
                "once more"
            ) from error
    if key is not None and isinstance(loaded, dict) and key in loaded:
        loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        raise DiffalignError(f"{path}: holds no state dict of tensors; is it another kind of file?")
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def fill(
    module: torch.nn.Module,
    state: dict[str, Tensor],
    path: Path,
    reward: str,
    *,
    assign: bool = False,
    asked: str = "reward",
) -> None:
    """Load `state` into `module`. Raises DiffalignError unless exactly its parameters are there.

    asked: what the user named. assign: make the tensors the module's parameters, in their own dtype, and copy nothing.
    The module may be without memory (on the meta device) until then.
    """
    try:
        missing, extra = module.load_state_dict(state, strict=False, assign=assign)
    except RuntimeError as error:
        raise DiffalignError(f"{asked} {reward}: {path} does not fit the model: {_one_line(error)}") from error
    missing = [name for name in missing if not name.endswith("position_ids")]
    extra = [name for name in extra if not name.endswith("position_ids")]
    if missing or extra:
        faults = ", ".join([*(f"{m} is missing" for m in missing[:2]), *(f"{e} is not part of it" for e in extra[:2])])
        raise DiffalignError(
            f"{asked} {reward}: {path} does not fit the model: {faults} ({len(missing)} missing, {len(extra)} left over)"
        )


@contextmanager
def without_memory() -> Iterator[None]:
    """Give no memory to the parameters of modules that are built inside (the meta device); buffers get their values.

    As accelerate's `init_empty_weights(include_buffers=False)`. Not for several threads at once: it replaces a method of
    torch's Module.
    """
    register = torch.nn.Module.register_parameter

    def register_empty(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        empty = None if parameter is None else torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, empty)

    torch.nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill_empty(
    module: torch.nn.Module,
    state: dict[str, Tensor],
    path: Path,
    reward: str,
    dtype: torch.dtype,
    device: str = "cpu",
    exact: str | tuple[str, ...] = (),
) -> None:
    """Give a module without memory (on the meta device) the parameters in `state`, in `dtype`; errors as of `fill`.

    `state` is emptied of the file's own tensors one by one, so that no second copy of the network is in memory. exact: the
    beginnings of names that stay in float32.
    """
    for key, value in state.items():
        wanted = torch.float32 if key.startswith(exact) else dtype
        # A copy even where nothing changes: in a file, numbers may not be aligned.
        state[key] = value.to(device, wanted if value.is_floating_point() else value.dtype, copy=True)
    fill(module, state, path, reward, assign=True)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)]
