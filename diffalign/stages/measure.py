"""`diffalign measure`: FID, KID, CLIP-I, DINO and LPIPS of sets of images, each with its features and sample sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.bench.results import versions
from diffalign.errors import DiffalignError
from diffalign.evaluation import set_measures
from diffalign.evaluation.set_measures import SetMeasure
from diffalign.evaluation.set_networks import Clip, Dino, Embedding, Inception, Lpips
from diffalign.files import check_place, write_whole
from diffalign.files.images import Unreadable, decode
from diffalign.progress import ImageProgress, say, say_aside
from diffalign.scoring.items import Item
from diffalign.scoring.sources import collect
from diffalign.scoring.spec import parse_options
from diffalign.stages.resolve_rewards import resolve_device
from diffalign.terminal import WordsCell, counted, name_cell, number, plain_table, show_table

NETWORKS: dict[str, Callable[..., Embedding]] = {"fid": Inception, "kid": Inception, "clip-i": Clip, "dino": Dino}
OPTIONS: dict[str, dict[str, type]] = {
    "fid": {"weights": str},
    "kid": {"weights": str, "subsets": int, "subset_size": int, "seed": int},
    "clip-i": {"weights": str, "model": str},
    "dino": {"weights": str, "model": str},
    "lpips": {"weights": str},
}
MEASURES = tuple(OPTIONS)
FORMS = {"fid": ".3f", "kid": ".6f"}


@dataclass(frozen=True)
class MeasureRequest:
    """The options of `diffalign measure` as the user gave them."""

    images: list[str]
    measures: list[str]
    reference: list[str] | None = None
    output: Path | None = None
    batch_size: int = 32
    device: str = "auto"


def measure(request: MeasureRequest) -> None:
    """Measure sets of images: `diffalign measure`. Raises DiffalignError before a network is loaded for what is known then."""
    asked = _parse(request.measures)
    if request.output is not None:
        if request.output.suffix != ".json":
            raise DiffalignError(f"--output {request.output}: name a file that ends in .json")
        check_place(request.output)
    wants = [name for name in asked if name != "lpips"]
    if wants and not request.reference:
        raise DiffalignError(f"-m {wants[0]}: compares with other images; give them as --reference")
    device = resolve_device(request.device)
    sides = {"generated": collect(request.images)}
    if request.reference:
        sides["reference"] = collect(request.reference)
    if "fid" in asked:
        set_measures.check_fid(len(sides["generated"]), len(sides["reference"]), Inception.size)
    pairs = set_measures.pairs_of([item.prompt for item in sides["generated"]]) if "lpips" in asked else []

    found: dict[str, dict[str, Any]] = {}
    embedded: dict[str, dict[str, Tensor]] = {}
    for name, options in asked.items():
        given = {key: options[key] for key in ("weights", "model") if key in options}
        if "weights" in given:
            given["weights"] = Path(given["weights"])
        if name == "lpips":
            network = Lpips(name, device=device, **given)
            result, identity = _lpips(network, sides["generated"], pairs, request.batch_size), network.identity
            counts = {"generated": len(sides["generated"])}
        else:
            embedding = NETWORKS[name](name, device=device, **given)
            identity = embedding.identity
            if identity not in embedded:  # FID and KID share their features
                embedded[identity] = {
                    s: _features(embedding, items, s, request.batch_size) for s, items in sides.items()
                }
            features, counts = embedded[identity], {s: len(f) for s, f in embedded[identity].items()}
            result = _compare(name, features, {k: v for k, v in options.items() if k not in given})
        features_of = Lpips.name if name == "lpips" else embedding.name
        found[name] = {
            "value": result.value, "spread": result.spread, "note": result.note, "features": features_of,
            "weights": identity, **counts,
        }  # fmt: skip
    _show(request, found)


def _parse(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return measure -> its options, from `-m fid,kid` and `-m kid:subset_size=500`."""
    asked: dict[str, dict[str, Any]] = {}
    for text in texts:
        head, colon, tail = text.partition(":")
        for name in (part.strip() for part in head.split(",") if part.strip()):
            if name not in OPTIONS:
                raise DiffalignError(f"-m {name}: unknown measure; one of {', '.join(MEASURES)}")
            if name in asked:
                raise DiffalignError(
                    f"-m {name}: named twice; name it once, with all its options: -m {name}:key=value,..."
                )
            options = parse_options(tail, f"-m {text!r}") if colon else {}
            for key, value in options.items():
                kind = OPTIONS[name].get(key)
                if kind is None:
                    raise DiffalignError(f"-m {name}: unknown option {key!r}; it has {', '.join(OPTIONS[name])}")
                if kind is int and (not isinstance(value, int) or isinstance(value, bool) or value < (key != "seed")):
                    raise DiffalignError(f"-m {name}:{key}={value}: a whole number is needed")
            asked[name] = {key: str(v) if OPTIONS[name][key] is str else v for key, v in options.items()}
    if not asked:
        raise DiffalignError(f"-m: name a measure, one of {', '.join(MEASURES)}")
    return asked


def _read(items: Sequence[Item]) -> list[Image.Image | None]:
    """Return images, None for those that cannot be read, which are reported."""
    found: list[Image.Image | None] = []
    for item in items:
        try:
            found.append(decode(item.origin.read()))
        except Unreadable as error:
            say_aside(f"not measured: {item.name}: {error}")
            found.append(None)
    return found


def _features(network: Embedding, items: list[Item], side: str, batch_size: int) -> Tensor:
    """Return the features [n, d] of the images that can be read."""
    progress, parts = ImageProgress(say_aside).named(f"{side}, {network.name}"), []
    progress(0, len(items))
    for rows in set_measures.batches(len(items), batch_size):
        images = [image for image in _read([items[i] for i in rows]) if image is not None]
        if images:
            parts.append(network.embed(images))
        progress(rows[-1] + 1, len(items))
    if not parts:
        raise DiffalignError(f"{side} images: none of {len(items)} can be read; the lines above say why")
    return torch.cat(parts)


def _compare(name: str, features: dict[str, Tensor], options: dict[str, Any]) -> SetMeasure:
    generated, reference = features["generated"], features["reference"]
    if name == "fid":
        return set_measures.fid(generated, reference)
    if name == "kid":
        return set_measures.kid(generated, reference, **options)
    return set_measures.similarity(name, generated, reference)


def _lpips(network: Lpips, items: list[Item], pairs: list[tuple[str, int, int]], batch_size: int) -> SetMeasure:
    progress, distances, kept = ImageProgress(say_aside).named("pairs, LPIPS"), [], []
    progress(0, len(pairs))
    for rows in set_measures.batches(len(pairs), batch_size):
        some = [pairs[i] for i in rows]
        places = sorted({i for _, *both in some for i in both})
        images = dict(zip(places, _read([items[i] for i in places]), strict=True))
        both = [(pair, images[pair[1]], images[pair[2]]) for pair in some]
        whole = [(pair, first, second) for pair, first, second in both if first is not None and second is not None]
        for pair, first, second in whole:
            if first.size != second.size:
                raise DiffalignError(
                    f"lpips: {items[pair[1]].name} and {items[pair[2]].name} have different sizes; draw or resize them alike"
                )
        distances += network.distances([first for _, first, _ in whole], [second for _, _, second in whole])
        kept += [pair for pair, _, _ in whole]
        progress(rows[-1] + 1, len(pairs))
    if not kept:
        raise DiffalignError("lpips: no pair of images can be read; the lines above say why")
    return set_measures.diversity(kept, distances)


def _show(request: MeasureRequest, found: dict[str, dict[str, Any]]) -> None:
    shown = plain_table("measure", "value", "generated", "reference", title="Measures of sets")
    shown.add_column("spread, features")
    for name, row in found.items():
        words = ", ".join(filter(None, (row["spread"], row["features"])))
        reference = str(row["reference"]) if "reference" in row else "–"
        shown.add_row(
            name_cell(name),
            number(row["value"], FORMS.get(name, ".4f")),
            str(row["generated"]),
            reference,
            WordsCell(words),
        )
    show_table(shown)
    for name, row in found.items():
        if row["note"]:
            say(f"{name}: {row['note']}")
    if request.output is not None:
        sources = {"images": request.images, "reference": request.reference}
        result = {"format": 1, **sources, "versions": versions(), "measures": found}
        write_whole(request.output, json.dumps(result, indent=1) + "\n")
        say(f"output: {request.output} ({counted(len(found), 'measure')})")
