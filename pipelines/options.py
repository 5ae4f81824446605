"""The options that only some backbone families have: names, types, defaults, bounds and meanings, without torch.

A family's options are the fields of a frozen dataclass. A field's metadata holds its `description` and its bounds (`gt`,
`ge`, `le`, as pydantic names them). `load_backbone` takes the options by name.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import get_args, get_type_hints

from diffalign.errors import DiffalignError

Value = bool | int | float | str | None
BOUNDS = {
    "gt": (operator.gt, "greater than"),
    "ge": (operator.ge, "at least"),
    "le": (operator.le, "at most"),
}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


@dataclass(frozen=True)
class Options:
    """The options of a family that has none."""


@dataclass(frozen=True)
class SD3Options(Options):
    """The options of Stable Diffusion 3 and 3.5."""

    use_t5: bool = field(default=True, metadata={"description": "false: without the T5 encoder (zeros in its place)"})
    max_sequence_length: int | None = field(
        default=None,
        metadata={
            "gt": 0,
            "le": 512,
            "description": "tokens of a prompt that T5 encodes; null: its tokenizer's limit, at most 256",
        },
    )


GUIDANCE = {
    "ge": 0,
    "description": "guidance scale, an input of the network: the one to train under, which must be that of the data",
}


@dataclass(frozen=True)
class FluxOptions(Options):
    """The options of FLUX.1-dev."""

    guidance: float = field(default=3.5, metadata=GUIDANCE)
    max_sequence_length: int | None = field(
        default=None,
        metadata={
            "gt": 0,
            "le": 512,
            "description": "tokens of a prompt that T5 encodes; null: its tokenizer's limit, at most 512",
        },
    )


@dataclass(frozen=True)
class Flux2KleinOptions(Options):
    """The options of FLUX.2 klein."""

    max_sequence_length: int | None = field(
        default=None, metadata={"gt": 0, "le": 512, "description": "tokens of a prompt that are encoded; null: 512"}
    )


@dataclass(frozen=True)
class Flux2Options(Flux2KleinOptions):
    """The options of FLUX.2-dev."""

    guidance: float = field(default=4.0, metadata=GUIDANCE)


@dataclass(frozen=True)
class MaskedPromptOptions(Options):
    """The options of PixArt-Sigma."""

    max_sequence_length: int | None = field(
        default=None, metadata={"gt": 0, "le": 300, "description": "tokens of a prompt that are encoded; null: 300"}
    )


@dataclass(frozen=True)
class SanaOptions(MaskedPromptOptions):
    """The options of Sana."""

    instruction: bool = field(
        default=True,
        metadata={"description": "false: the prompt alone, without the instruction that the pipeline puts before it"},
    )


@dataclass(frozen=True)
class PromptOptions(Options):
    """The options of families whose text encoder is a language model."""

    max_sequence_length: int = field(
        default=512,
        metadata={"gt": 0, "le": 1024, "description": "tokens of a prompt, with its template, that the network reads"},
    )


OPTIONS: dict[str, type[Options]] = {
    "sd15": Options,
    "sdxl": Options,
    "sd3": SD3Options,
    "flux": FluxOptions,
    "flux2": Flux2Options,
    "flux2_klein": Flux2KleinOptions,
    "pixart": MaskedPromptOptions,
    "sana": SanaOptions,
    "z_image": PromptOptions,
    "qwen_image": PromptOptions,
    "qwen_image_21": PromptOptions,
}
"""The options of each family, by the family's name."""


def read_options(family: str, given: Mapping[str, Value], path: str) -> Options:
    """Return the options of a family with the values `given` by name, the others at their defaults.

    path: the model, for messages. Raises DiffalignError for a name that the family does not have, and for a value of
    another type or out of bounds.
    """
    kind = OPTIONS[family]
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    for name, value in given.items():
        if name not in known:
            there = f"its options are {', '.join(known)}" if known else "it has none"
            raise DiffalignError(
                f"model.options.{name}: {path} is of family {family}, which has no such option; {there}"
            )
        _check(f"model.options.{name}", value, get_args(hints[name]) or (hints[name],), known[name].metadata)
    return kind(**given)


def _check(key: str, value: Value, kinds: tuple[type, ...], metadata: Mapping[str, float]) -> None:
    """Refuse a value that is of none of the types `kinds`, or out of the bounds in `metadata`."""
    # A truth value is an integer to Python, and an integer is good for a number.
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    bounds = {name: metadata[name] for name in BOUNDS if name in metadata}
    inside = value is None or isinstance(value, str) or all(BOUNDS[name][0](value, b) for name, b in bounds.items())
    if not fits or not inside:
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        limits = ", ".join(f"{BOUNDS[name][1]} {bound:g}" for name, bound in bounds.items())
        raise DiffalignError(f"{key}: {value!r} is not possible; it must be {wanted}{limits and f' ({limits})'}")
