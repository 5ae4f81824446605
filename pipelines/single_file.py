"""Load a checkpoint in one file, as most community models of SD1.x, SDXL and SD3 are published.

The file holds weights alone. Configs, tokenizers and the scheduler come from a folder in diffusers' format: ours for SD1.x and
SDXL, with CLIP's vocabulary from open_clip, or what `model.config` names. diffusers translates the names of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import nn

from diffalign.errors import DiffalignError
from diffalign.files.parse import parse_json
from diffalign.files.tensors import SUFFIX, read_shapes
from diffalign.kernels import align_weights
from diffalign.pipelines.components import check_classes, is_component
from diffalign.pipelines.hub import download_configs, find_index
from diffalign.pipelines.source import Source
from diffalign.pretrained import foreign, load_part, refuse_code

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from transformers import CLIPTokenizer

CONFIGS = Path(__file__).parent / "single_file_configs"
SHIPPED = {"v1": "sd15", "xl_base": "sdxl"}
"""Our folders of configs, by diffusers' names of the kinds of checkpoints."""
TRUNKS = "model.diffusion_model."
"""How the keys of a UNet or transformer begin in a file of a whole model."""
SD1 = "model.diffusion_model.output_blocks.11.0.skip_connection.weight"
"""The last block of SD1's UNet; SDXL and SD3 have none of this name."""
VAE = "first_stage_model."
T5 = "text_encoders.t5xxl."
PREDICTIONS = {"v_pred": "prediction_type: v_prediction", "ztsnr": "rescale_betas_zero_snr: true"}
"""Empty tensors by which a file says how it was trained, and what scheduler_config.json must then say."""


def is_single_file(path: str) -> bool:
    """Return whether a model is one file. Raise DiffalignError for one of another format than safetensors."""
    file = Path(path).expanduser()
    if not file.is_file():
        return False
    if file.suffix != SUFFIX:
        raise DiffalignError(
            f"{path} is a file, and only {SUFFIX} files are read, as other formats can carry code; save it as one, or give a "
            "folder in diffusers format"
        )
    return True


def config_index(
    path: str, config: str | None, revision: str | None, token: str | None, local: bool
) -> tuple[Path, str | None]:
    """Return the model_index.json that describes a single file, and its commit (None for a folder); configs are downloaded.

    config: a folder or a hub id; None: ours, or the repository that diffusers names. Raises DiffalignError for a file that
    is no checkpoint of a whole model, and where the configs are not to be had.
    """
    if revision is not None:
        raise DiffalignError(f"model.revision: {path} is a file, which has none; leave it out")
    shapes = read_shapes(Path(path).expanduser())
    if not any(key.startswith(TRUNKS) for key in shapes):
        raise DiffalignError(
            f"{path}: holds no UNet or transformer of a whole checkpoint ({len(shapes)} tensors, none is called {TRUNKS}...); "
            "give a file of a whole model, or a folder in diffusers format"
        )
    if config is None:
        kind, repository = _kind(path, shapes)
        if kind in SHIPPED:
            return CONFIGS / SHIPPED[kind] / "model_index.json", None
        config = repository
    index, commit = find_index(config, None, token, local, key="model.config")
    if commit is not None:
        index = download_configs(config, commit, token, local) / index.name
    return index, commit


def _kind(path: str, shapes: Mapping[str, list[int]]) -> tuple[str, str]:
    """Return diffusers' name of the kind of checkpoint, and the repository whose configs it takes for it."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type

    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    unknown = f"{path}: its kind of model is not known; name a folder or hub id with its configs in model.config"
    with foreign(unknown):
        kind = infer_diffusers_model_type(empty)
        repository = fetch_diffusers_config(empty)["pretrained_model_name_or_path"]
    if kind == "v1" and SD1 not in shapes:  # diffusers takes everything that it does not know for SD1
        raise DiffalignError(unknown)
    return str(kind), str(repository)


def left_out(path: str, optional: tuple[str, ...]) -> tuple[str, ...]:
    """Return the optional components, T5 and its tokenizer, if the file holds no T5."""
    return () if any(key.startswith(T5) for key in read_shapes(Path(path).expanduser())) else optional


def load_single_file(
    source: Source,
    components: Mapping[str, Any],
    pipeline: type[DiffusionPipeline],
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> DiffusionPipeline:
    """Load a whole pipeline from `source.file` with the configs in `source.folder`; the VAE in float32.

    options: further arguments of the pipeline. Raises DiffalignError unless every tensor of every network is in the file, and
    every tensor of the file's UNet or transformer and VAE in the model.
    """
    from diffusers import AutoencoderKL

    file = source.file
    assert file is not None
    check_classes(source, components, pipeline)
    parts = {
        name: entry for name, entry in components.items() if is_component(name, entry) and name not in source.absent
    }
    for name in parts:
        refuse_code(source.folder / name, source.path)
    _check_scheduler(source)
    where: dict[str, Any] = {"config": str(source.folder), "local_files_only": True}

    wanted = get_type_hints(pipeline.__init__)
    trunk = "unet" if "unet" in parts else "transformer"
    with foreign(f"{source.path} cannot be loaded as {pipeline.__name__}"):
        _check_count(source, TRUNKS, trunk, wanted[trunk])
        _check_count(source, VAE, "vae", AutoencoderKL)
        # The VAE apart: it stays in float32, and diffusers takes one number type for all parts.
        vae = AutoencoderKL.from_single_file(str(file), subfolder="vae", torch_dtype=torch.float32, **where)
        tokenizers = {name: _tokenizer(source.folder / name) for name in parts if name.startswith("tokenizer")}
        given: dict[str, Any] = {**source.absent, **options, **tokenizers, "vae": vae}
        loaded: DiffusionPipeline = pipeline.from_single_file(str(file), torch_dtype=dtype, **where, **given)
    networks = {name: part for name, part in loaded.components.items() if isinstance(part, nn.Module)}
    _check_whole(source, networks)
    for network in networks.values():
        align_weights(network)  # views into the file round otherwise than a folder's weights
    return loaded


def _tokenizer(folder: Path) -> Any:
    """Load a tokenizer; ours have CLIP's vocabulary, which open_clip brings."""
    from transformers import CLIPTokenizer, T5Tokenizer

    settings = parse_json((folder / "tokenizer_config.json").read_bytes())
    if CONFIGS not in folder.parents:
        kind = T5Tokenizer if "T5" in str(settings.get("tokenizer_class")) else CLIPTokenizer
        return load_part(kind, folder, str(folder))
    return clip_tokenizer(settings["pad_token"], settings["model_max_length"])


def clip_tokenizer(pad_token: str, length: int) -> CLIPTokenizer:
    """Return CLIP's tokenizer with the vocabulary that open_clip brings."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    words = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in words.encoder.items()}
    merges: Any = list(words.bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, pad_token=pad_token)


def _check_scheduler(source: Source) -> None:
    """Refuse a scheduler that contradicts what the file says about its training."""
    assert source.file is not None
    keys = read_shapes(source.file)
    config = parse_json((source.folder / "scheduler" / "scheduler_config.json").read_bytes())
    for mark, setting in PREDICTIONS.items():
        name, value = setting.split(": ")
        if mark in keys and str(config.get(name)).lower() != value:
            raise DiffalignError(
                f"{source.path}: was trained with {setting} (it holds {mark}), and the scheduler of {source.folder} says "
                f"otherwise; copy that folder, set it in its scheduler/scheduler_config.json, and name the copy in model.config"
            )


def _check_count(source: Source, prefix: str, name: str, kind: type[ModelMixin]) -> None:
    """Refuse a UNet, transformer or VAE that has more or fewer weights in the file than by its config."""
    from accelerate import init_empty_weights

    assert source.file is not None
    with init_empty_weights(include_buffers=True):
        model = kind.from_config(kind.load_config(source.folder / name))
    described = sum(value.numel() for value in model.state_dict().values())
    shapes = read_shapes(source.file)
    held = sum(torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith(prefix))
    if held != described:
        raise DiffalignError(
            f"{source.path}: its {name} has {held} weights, and the config in {source.folder} describes {described}; give the "
            "whole file, or name a folder with the model's own configs in model.config"
        )


def _check_whole(source: Source, networks: Mapping[str, nn.Module]) -> None:
    """Refuse networks with tensors that the file lacks."""
    for name, network in networks.items():
        missing = sorted(key for key, value in network.state_dict().items() if value.is_meta)
        if missing:
            raise DiffalignError(
                f"{source.path}: {len(missing)} tensors of {name} are missing, by the configs in {source.folder}; first "
                f"{missing[0]}"
            )
