"""Load a backbone from a local folder or a hub id, with errors that say what to mend.

Only safetensors weights are read and no code from a repository is run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffalign.errors import DiffalignError
from diffalign.files.parse import parse_json
from diffalign.pipelines.base import Backbone
from diffalign.pipelines.checkpointing import Checkpointing
from diffalign.pipelines.components import check_files, is_component, load_components
from diffalign.pipelines.flux import Flux
from diffalign.pipelines.flux2 import Flux2, Flux2Klein
from diffalign.pipelines.hub import INDEX, download, find_index
from diffalign.pipelines.lora_file import TextEncoders
from diffalign.pipelines.options import Value, read_options
from diffalign.pipelines.pixart import PixArt
from diffalign.pipelines.prompt_length import hide_truncation_warnings
from diffalign.pipelines.qwen_image import QwenImage
from diffalign.pipelines.qwen_image_21 import QwenImage21
from diffalign.pipelines.sana import Sana
from diffalign.pipelines.single_file import config_index, is_single_file, left_out, load_single_file
from diffalign.pipelines.source import Source
from diffalign.pipelines.stable_diffusion import StableDiffusion15, StableDiffusionXL
from diffalign.pipelines.stable_diffusion_3 import StableDiffusion3
from diffalign.pipelines.z_image import ZImage
from diffalign.pretrained import foreign

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Where bitsandbytes is installed, it warns on CPUs that an optional kernel of its own is missing; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

BACKBONES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion15,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2Klein,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
    "ZImagePipeline": ZImage,
    "QwenImagePipeline": QwenImage,
    "QwenImage21Pipeline": QwenImage21,
}
# Components that are never needed: a filter for finished images, and inputs of image prompts.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def load_backbone(
    path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    config: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
    gradient_checkpointing: Checkpointing = False,
    quantize: str = "none",
    channels_last: bool = False,
    lora_text_encoders: TextEncoders = "refuse",
    **options: Value,
) -> Backbone:
    """Load a diffusers pipeline as a `Backbone`. The family follows from the class in its model_index.json.

    path: a local folder, a checkpoint in one file, or a hub id (owner/name); a revision of the latter is resolved to a
    commit and recorded. config: where the configs of a single file come from, as `config_index` takes it. variant: file
    variant such as fp16. dtype: of trunk and text encoders; the VAE stays in float32, where all published ones are exact.
    quantize: int8 or nf4 for the trunk's repeated blocks. channels_last: memory format of a UNet.
    lora_text_encoders: "ignore" takes the trunk's part of LoRAs that adapt text encoders, which are refused otherwise.
    options: those of the family alone, such as use_t5=False for SD3; `diffalign.pipelines.options` lists them.
    Raises DiffalignError for everything a user can mend: missing folder, no pipeline, gated or unreachable repository,
    missing file, unsupported class, an option that the family does not have, absent device or attention kernel.
    """
    path = str(path)
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DiffalignError("device: CUDA was asked for and is not available here; use device: cpu")
    index, commit = model_index(path, config, revision, token, local_files_only)
    components = read_index(path, index)
    kind = _family(path, components)
    chosen = read_options(kind.family, options, path)
    single = is_single_file(path)
    left = kind.left_out(chosen) or (left_out(path, kind.optional) if single else ())
    absent = _absent(path, components, kind, left)
    folder = index.parent
    if commit is not None and not local_files_only and not single:
        folder = download(path, commit, variant, token, absent)
    source = Source(path, folder, commit, variant, absent, Path(path).expanduser() if single else None)
    if not single:
        check_files(source, components)
    pipeline = _load_pipeline(source, kind, components, dtype)
    hide_truncation_warnings()
    backbone = kind(
        pipeline,
        source,
        dtype=dtype,
        device=device,
        attention=attention,
        gradient_checkpointing=gradient_checkpointing,
        quantize=quantize,
        channels_last=channels_last,
        options=chosen,
    )
    backbone.lora_text_encoders = lora_text_encoders
    return backbone


def model_index(
    path: str, config: str | None, revision: str | None, token: str | None, local: bool
) -> tuple[Path, str | None]:
    """Return the model_index.json of a model, or that of a single file's configs, and its commit (None for local files)."""
    if is_single_file(path):
        return config_index(path, config, revision, token, local)
    if config is not None:
        raise DiffalignError(
            f"model.config: {path} is not a single file, and brings its own configs; leave model.config out"
        )
    return find_index(path, revision, token, local)


def pipeline_class(
    path: str,
    revision: str | None = None,
    token: str | None = None,
    local: bool = False,
    config: str | None = None,
) -> str:
    """Read the pipeline's class name from its model_index.json alone. Raises DiffalignError for an unsupported one."""
    index, _ = model_index(path, config, revision, token, local)
    components = read_index(path, index)
    _family(path, components)
    return str(components["_class_name"])


def _family(path: str, components: dict[str, Any]) -> type[Backbone]:
    name = components["_class_name"]
    if name not in BACKBONES:
        raise DiffalignError(f"{path}: pipeline class {name} is not supported; supported are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def read_index(path: str, index: Path) -> dict[str, Any]:
    """Read a model_index.json; `path` names the model in messages."""
    try:
        components = parse_json(index.read_bytes())
    except ValueError as error:
        raise DiffalignError(f"{path} is no diffusers pipeline: its {INDEX} is not valid JSON ({error})") from error
    if not isinstance(components, dict) or not isinstance(components.get("_class_name"), str):
        raise DiffalignError(f"{path} is no diffusers pipeline: its {INDEX} names no _class_name")
    return components


def _absent(path: str, components: dict[str, Any], kind: type[Backbone], left_out: tuple[str, ...]) -> dict[str, None]:
    """Return the components to pass as None: unused ones, and those of `kind.optional` that are missing or left out.

    Refuses a checkpoint that lacks others. diffusers writes [null, null] for a missing T5 but does not load such a folder
    unless None is passed.
    """
    absent: dict[str, None] = {}
    for name, entry in components.items():
        if not is_component(name, entry):
            continue
        if name in UNUSED or name in left_out or (name in kind.optional and entry[1] is None):
            absent[name] = None
        elif entry[1] is None:
            allowed = f"only {', '.join(kind.optional)} may be" if kind.optional else "none may be"
            raise DiffalignError(f"{path}: component {name} is absent; {allowed}")
        elif entry[0] not in ("diffusers", "transformers"):
            raise DiffalignError(f"{path}: component {name} is code of the repository ({entry[0]}), which is never run")
    missing = [name for name in kind.optional if name in absent or name not in components]
    return absent | dict.fromkeys(kind.optional) if missing else absent  # half a T5 is none


def _load_pipeline(
    source: Source, kind: type[Backbone], components: dict[str, Any], dtype: torch.dtype
) -> DiffusionPipeline:
    wanted = kind.pipeline_class()
    if source.file is not None:
        if not kind.single_files:
            raise DiffalignError(
                f"{source.path}: {kind.family} is not read from a single file; give a folder or hub id"
            )
        return load_single_file(source, components, wanted, dtype, kind.loading_options)
    networks = load_components(
        source,
        components,
        wanted,
        dtype,
        torch.float32,
        kind.component_classes(),
        kind.published_as,
        text_dtype=kind.text_dtype(dtype),
    )
    options: dict[str, Any] = {**source.absent, **networks, **kind.loading_options}
    with foreign(f"{source.path} cannot be loaded as {wanted.__name__}"):
        return wanted.from_pretrained(source.folder, local_files_only=True, **options)
