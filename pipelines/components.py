"""Check and load the parts of a diffusers folder: each of the class that the pipeline takes, and whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import nn

from diffalign.errors import DiffalignError
from diffalign.files.tensors import variants, weight_files
from diffalign.pipelines.hub import INDEX
from diffalign.pipelines.source import Source
from diffalign.pretrained import load_model, refuse_code

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DIFFUSERS = "diffusion_pytorch_model"
STEMS = {"diffusers": DIFFUSERS, "transformers": "model"}
"""How weight files of either library begin; modules of a single pipeline's are diffusers'."""


def is_component(name: str, entry: Any) -> bool:
    """Return whether an entry of a model_index.json names a component, [library, class]."""
    pair = not name.startswith("_") and isinstance(entry, list) and len(entry) == 2
    return pair and not all(isinstance(part, float) for part in entry)  # numbers are an argument of the pipeline


def check_files(source: Source, components: Mapping[str, Any]) -> None:
    """Name what is missing before a library fails in the middle of loading; only files that will be read count."""
    varied = False
    for name, entry in components.items():
        if not is_component(name, entry) or name in source.absent:
            continue
        folder = source.folder / name
        where = f"{source.path}: {name}/"
        if not folder.is_dir():
            raise DiffalignError(f"{where} is missing; {INDEX} asks for it ({entry[1]})")
        if name.startswith("tokenizer") or name == "processor":
            needed = "tokenizer_config.json"
        elif name == "scheduler":
            needed = "scheduler_config.json"
        else:
            needed = "config.json"
            varied |= _has_weights(source, name, STEMS.get(entry[0], DIFFUSERS)) is not None
        if not (folder / needed).is_file():
            raise DiffalignError(f"{where}{needed} is missing")
    if source.variant is not None and not varied:
        raise DiffalignError(f"{source.path}: no weights of variant '{source.variant}'; leave model.variant out")


def _has_weights(source: Source, name: str, stem: str) -> str | None:
    """Return the variant in which a component is read. Raise DiffalignError, with the remedy, where it has no weights."""
    folder = source.folder / name
    if source.variant is not None and weight_files(folder, stem, source.variant):
        return source.variant
    if weight_files(folder, stem):
        return None
    pickled = sorted(f.name for f in folder.glob("*.bin"))
    others = variants(folder, stem)
    if others:
        advice = f" but those of variant {', '.join(others)}; set model.variant={others[0]}"
    elif pickled:
        advice = f"; {pickled[0]} is a pickle, which is not read: convert it"
    elif source.revision is not None and source.variant is None:
        advice = "; if the repository has them as a variant only, name it: model.variant=fp16"
    else:
        advice = ""
    raise DiffalignError(f"{source.path}: {name}/ holds no .safetensors weights{advice}")


def load_components(
    source: Source,
    components: Mapping[str, Any],
    pipeline: type[DiffusionPipeline],
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    classes: Mapping[str, type] | None = None,
    published_as: Mapping[str, str] | None = None,
    *,
    text_dtype: torch.dtype | None = None,
) -> dict[str, nn.Module]:
    """Load the networks of a folder by name, on the CPU, each as the class that the pipeline's signature names.

    dtype: of all but the VAE; text_dtype: of text encoders, if it differs. classes, published_as: what a family declares
    beside the signature. Raises DiffalignError for a class that the pipeline does not take, and for a component that is not
    whole, as `load_model` does.
    """
    check_classes(source, components, pipeline, classes, published_as)
    wanted = component_types(pipeline, classes)
    found: dict[str, nn.Module] = {}
    for name, entry in components.items():
        if not is_component(name, entry) or name in source.absent or name not in wanted:
            continue
        folder = source.folder / name
        kind: Any = wanted[name]
        if not _is_network(kind):
            refuse_code(folder, source.path)
            continue
        stem = STEMS.get(entry[0], DIFFUSERS)
        model = load_model(
            kind,
            folder,
            source.path,
            stem=stem,
            variant=_has_weights(source, name, stem),
            dtype=vae_dtype if name == "vae" else (text_dtype or dtype) if name.startswith("text_encoder") else dtype,
            use_safetensors=True,
        )
        found[name] = model
    return found


def _is_network(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def component_types(pipeline: type[DiffusionPipeline], classes: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Return the class of each component as the pipeline's signature names it; `classes` stand in for some of them."""
    return {**get_type_hints(pipeline.__init__), **(classes or {})}


def check_classes(
    source: Source,
    components: Mapping[str, Any],
    pipeline: type[DiffusionPipeline],
    classes: Mapping[str, type] | None = None,
    published_as: Mapping[str, str] | None = None,
) -> None:
    """Refuse a class by which a folder would make a library load something else than the pipeline is made of."""
    wanted = component_types(pipeline, classes)
    for name, entry in components.items():
        if is_component(name, entry) and name not in source.absent and name in wanted:
            other = (published_as or {}).get(name)
            _check_class(f"{source.path}: component {name}", name, entry, wanted, other)


def _check_class(what: str, name: str, entry: list[Any], wanted: Mapping[str, Any], other: str | None) -> None:
    library, named = str(entry[0]), str(entry[1])
    expected = wanted[name].__name__ if isinstance(wanted[name], type) else ""
    if name == "scheduler":
        fits, expected = library == "diffusers" and named.endswith("Scheduler"), "a scheduler of diffusers"
    else:
        fits = named.removesuffix("Fast") == expected.removesuffix("Fast") or named == other
    if not fits:
        raise DiffalignError(f"{what} is of class {named} ({library}); the pipeline takes {expected}")
