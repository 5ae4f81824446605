"""What others get to see: names without the folders of this machine, and code that works on theirs."""

import json
from pathlib import Path

from diffalign.files import write_whole
from diffalign.redaction import without_folders

NAMES = ("_name_or_path", "name_or_path")
"""Keys in which diffusers and transformers note where a model was read from."""


def is_local(model: str) -> bool:
    """Return whether a model's name is a path of this machine and not a hub id or a name of the embedded world."""
    path = Path(model).expanduser()
    return path.exists() or path.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1


def public_name(model: str) -> str:
    """Return a name as it may be published: a path without its folders, all else as it is."""
    return str(without_folders(str(Path(model).expanduser().resolve()))) if is_local(model) else model


def drop_local_paths(folder: Path) -> None:
    """Remove paths of this machine from the JSON configs of a saved model: a user's name is in many."""
    for file in sorted(folder.rglob("*.json")):
        text = file.read_text(encoding="utf-8")
        if not any(name in text for name in NAMES):
            continue
        values = json.loads(text)
        cleaned = _without_names(values)
        if cleaned != values:
            write_whole(file, json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")


def _without_names(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_names(inner) for key, inner in value.items() if key not in NAMES}
    return [_without_names(inner) for inner in value] if isinstance(value, list) else value


def load_base(base: str, *, published: bool) -> str:
    """Return the lines of Python that load a base model as `pipeline`.

    base: a folder, a checkpoint in one file, a hub id or a model of the embedded world. published: a folder's path is left out.
    """
    lines = ["from diffusers import DiffusionPipeline", ""]
    given = public_name(base) if published else base
    if base.endswith(".safetensors"):
        note = "  # of the model's own class, such as StableDiffusionXLPipeline"
        return "\n".join([*lines, f'pipeline = DiffusionPipeline.from_single_file("{given}"){note}'])
    if is_local(base):
        note = "  # the folder of the base model" if published else ""
        return "\n".join([*lines, f'pipeline = DiffusionPipeline.from_pretrained("{given}"){note}'])
    if "/" not in base:
        lines.insert(0, "from diffalign.testbed import model_path")
        return "\n".join([*lines, f'pipeline = DiffusionPipeline.from_pretrained(model_path("{base}"))'])
    return "\n".join([*lines, f'pipeline = DiffusionPipeline.from_pretrained("{base}")'])
