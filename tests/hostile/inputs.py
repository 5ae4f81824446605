"""Classes of hostile input for functions: pictures, JSON, YAML, overrides, tables, prompt files, labels, secrets, names."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin

from diffalign.config import load
from diffalign.config.load import resolved_yaml
from diffalign.config.recipes import recipes
from diffalign.data.convert import open_rows
from diffalign.data.dataset import PreferenceDataset
from diffalign.data.imported import write_imported
from diffalign.data.prompts import read_prompts
from diffalign.errors import DiffalignError
from diffalign.files.images import Unreadable, decode, displayed_size
from diffalign.files.parse import MAX_DEPTH, parse_json
from diffalign.files.paths import inside, is_plain_name, member_name
from diffalign.progress import say
from diffalign.scoring.spec import parse as parse_reward
from helpers import pictures
from hostile.trial import FRAGMENTS, SECRET, call_fault, mutate, printed_fault, text

FORMS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MODES = ("RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I;16", "I", "F")


def picture_bytes(rng: random.Random) -> bytes:
    """Return an encoded picture of a random form, size and mode, often with frames, EXIF or text."""
    size = (rng.choice([1, 2, 7, 64, 300]), rng.choice([1, 3, 64, 500]))
    image = Image.new("RGB", size, (rng.randrange(256), 5, 9))
    form, mode = rng.choice(FORMS), rng.choice(MODES)
    options: dict[str, Any] = {}
    if form in ("GIF", "WEBP", "PNG", "TIFF") and rng.random() < 0.3:
        options = {"save_all": True, "append_images": [image.copy() for _ in range(rng.randint(1, 5))]}
    if form == "PNG" and rng.random() < 0.3:
        info = PngImagePlugin.PngInfo()
        info.add_text(
            rng.choice(["parameters", "prompt", "x"]),
            text(rng).replace("\0", "")[:2000].encode("utf-8", "replace").decode(),
        )
        options = {"pnginfo": info}
    buffer = io.BytesIO()
    try:
        (Image.fromarray(np.zeros(size[::-1], np.uint16)) if mode == "I;16" else image.convert(mode)).save(
            buffer, form, **options
        )
    except (OSError, ValueError, KeyError, TypeError):
        image.save(buffer, "PNG")
    return buffer.getvalue()


def pictures_(rng: random.Random, folder: Path) -> str:
    """A mutated picture is decoded to RGB of its displayed size, or is unreadable with a reason of one line."""
    data = picture_bytes(rng)
    data = mutate(rng, data) if rng.random() < 0.8 else data
    try:
        size = displayed_size(data)
        image = decode(data)
    except Unreadable as error:
        return "more than one line" if "\n" in str(error) or not str(error) else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if image.mode == "RGB" and image.size == size else f"{image.mode} {image.size}, not {size}"


def json_text(rng: random.Random, depth: int = 0) -> str:
    """Return JSON, or nearly so."""
    kind = rng.randrange(7 if depth < 4 else 4)
    if kind < 2:
        return json.dumps(text(rng), ensure_ascii=rng.random() < 0.5)
    if kind < 4:
        return rng.choice(
            ["1", "-2.5", "null", "true", "NaN", "1e999", "9" * rng.choice([5, 400, 5000]), '"\\ud800"', '"\\u0000"']
        )
    if kind == 4:
        deep = rng.choice([3, MAX_DEPTH - 10, MAX_DEPTH + 10, 3000])
        return "[" * deep + "1" + "]" * deep
    inner = [json_text(rng, depth + 1) for _ in range(rng.randrange(4))]
    return (
        f"[{','.join(inner)}]"
        if kind == 5
        else "{" + ",".join(f"{json.dumps(text(rng, 1))}:{one}" for one in inner) + "}"
    )


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def json_(rng: random.Random, folder: Path) -> str:
    """JSON is parsed to a value that can be written again as UTF-8, or refused with ValueError."""
    given = json_text(rng)
    if rng.random() < 0.3:
        given = mutate(rng, given.encode("utf-8", "replace")).decode("utf-8", "replace")
    try:
        value = parse_json(given)
    except ValueError:
        return ""
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return "" if depth_of(value) <= MAX_DEPTH else f"{depth_of(value)} levels"


@cache
def recipe_texts() -> list[tuple[str, str, Path]]:
    """Return (kind, text, path) of every recipe."""
    found = []
    for path in recipes().values():
        content = path.read_text()
        kind = next(
            line.split(":")[1].split("#")[0].strip() for line in content.splitlines() if line.startswith("kind:")
        )
        found.append((kind, content, path))
    return found


def yaml_(rng: random.Random, folder: Path) -> str:
    """A recipe with mutated text is a config, or one line."""
    kind, content, path = rng.choice(recipe_texts())
    lines = content.split("\n")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines) + 1)
        key = rng.choice(lines).partition(":")[0] or "x"
        lines[at:at] = [
            rng.choice(
                [f"{key}: {text(rng)}", text(rng), f"  {text(rng, 1)}: {text(rng, 1)}", "&a {b: *a}", rng.choice(lines)]
            )
        ]
    data = "\n".join(lines).encode("utf-8", "replace")
    file = folder / path.name
    file.write_bytes(mutate(rng, data) if rng.random() < 0.5 else data)
    return call_fault(lambda: load(kind, file))


def dotted(values: Any, prefix: str = "") -> list[str]:
    if isinstance(values, dict):
        return [key for name, one in values.items() for key in (f"{prefix}{name}", *dotted(one, f"{prefix}{name}."))]
    return []


@cache
def keys_of(name: str) -> tuple[str, list[str]]:
    """Return the kind of a recipe and all its dotted keys."""
    kind, _, _ = next(one for one in recipe_texts() if one[2].stem == name)
    given = ["data.path=x"] if kind == "train" else []
    return kind, dotted(load(kind, name, given).model_dump(mode="json"))


OVERRIDDEN = ("sd3_rankdpo", "sdxl_dpo", "synth_shapes", "rounds_shapes_gdro", "shapes_sd3_gndm", "shapes_judge_gdso")


def overrides(rng: random.Random, folder: Path) -> str:
    """Any value for any key is taken, or refused in one line; what is taken can be printed."""
    name = rng.choice(OVERRIDDEN)
    kind, keys = keys_of(name)
    given = ["data.path=x"] if kind == "train" else []
    for _ in range(rng.randint(1, 2)):
        given.append(
            f"{rng.choice([*keys, text(rng, 1), 'generators.0.model.path'])}="
            f"{rng.choice([text(rng), str(rng.randint(-9, 10**12)), '1.5'])}"
        )
    return call_fault(lambda: resolved_yaml(load(kind, name, given)))


def cell(rng: random.Random) -> Any:
    """Return a hostile cell of a table."""
    return rng.choice(
        [text(rng), "a.png", "b.png", None, 5, -1.5, float("nan"), float("inf"), True, [], ["a.png"], {"path": "a.png"},
         {"bytes": None},
         ["a.png", "b.png"], [1, 0], "a", "tie", "../a.png", "/etc/passwd"]
    )  # fmt: skip


COLUMNS = (
    "prompt", "winner", "loser", "image_a", "image_b", "choice", "images", "preference", "ranking", "split", "file_name",
    "score", "rank",
    "group_id", "file_path", "human_preference", "path1", "path2", "caption", "metadata", "include", "model",
)  # fmt: skip


def tables(rng: random.Random, folder: Path) -> str:
    """A hostile row costs itself: the good row before it and the one after it are kept."""
    for n, name in enumerate("ab"):
        pictures.smooth(n).save(folder / f"{name}.png")
    good = [{"prompt": f"good {n}", "winner": "a.png", "loser": "b.png"} for n in range(2)]
    bad = {name: cell(rng) for name in rng.sample(COLUMNS, rng.randint(1, 6))}
    form = rng.choice([".jsonl", ".json", ".csv", ".parquet"])
    path = folder / f"t{form}"
    rows: list[dict[str, Any]] = [good[0], bad, good[1]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if form == ".csv":
        with path.open("w", newline="", encoding="utf-8", errors="replace") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows({k: v for k, v in row.items() if v is not None} for row in rows)
    elif form == ".parquet":
        plain = [{k: None if row.get(k) is None else str(row[k]) for k in names} for row in rows]
        pq.write_table(pa.Table.from_pylist(plain), path)
    else:
        lines = [json.dumps(row) for row in rows]
        if rng.random() < 0.5:
            lines[1] = "{" + f'"prompt": {json_text(rng)}, "winner": {json_text(rng)}, "loser": "b.png"' + "}"
        try:
            json.loads(lines[1], parse_int=str)
        except (ValueError, RecursionError):
            form = ".jsonl"  # no JSON as a whole
            path = folder / "t.jsonl"
        path.write_text(
            "\n".join(lines) if form == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8", errors="replace"
        )
    try:
        write_imported(open_rows([path], "table")[1], folder / "out")
    except Exception as error:
        return f"{form}: {type(error).__name__}: {str(error)[:200]}"
    prompts = PreferenceDataset(folder / "out").column("prompt")
    return "" if {"good 0", "good 1"} <= set(prompts) else f"{form}: a good row is lost: {bad}"


def damaged_tables(rng: random.Random, folder: Path) -> str:
    """A damaged file is read as far as it goes, or refused in one line, whatever its form."""
    for n, name in enumerate("ab"):
        pictures.smooth(n).save(folder / f"{name}.png")
    form = rng.choice(
        [
            "t.jsonl",
            "t.json",
            "t.csv",
            "t.parquet",
            "metadata.jsonl",
            "metadata.csv",
            "train.json",
            "metadata.parquet",
            "t.tsv",
        ]
    )
    rows = [
        {"prompt": f"p{n}", "winner": "a.png", "loser": "b.png", "file_name": "ab"[n % 2] + ".png", "score": n,
         "path1": "a.png", "path2": "b.png"}
        for n in range(6)
    ]  # fmt: skip
    path = folder / form
    if form.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form.endswith((".csv", ".tsv")):
        separator = "\t" if form.endswith("tsv") else ","
        path.write_text("\n".join([separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if form.endswith("l") else json.dumps(rows))
    path.write_bytes(mutate(rng, path.read_bytes()))
    return call_fault(lambda: write_imported(open_rows([path], None)[1], folder / "out"))


def prompt_files(rng: random.Random, folder: Path) -> str:
    """Prompts of any file are texts that UTF-8 can hold, or one line says what is wrong."""
    form = rng.choice([".txt", ".jsonl", ".csv", ".parquet"])
    path = folder / f"p{form}"
    prompts = [text(rng) for _ in range(3)]
    if form == ".parquet":
        pq.write_table(pa.table({"prompt": [p.encode("utf-8", "replace").decode() for p in prompts]}), path)
    elif form == ".jsonl":
        path.write_text(
            "\n".join(json.dumps({"prompt": p, text(rng, 1): 1}) for p in prompts), encoding="utf-8", errors="replace"
        )
    else:
        path.write_text("\n".join(["prompt", *prompts]), encoding="utf-8", errors="replace")
    if rng.random() < 0.6:
        path.write_bytes(mutate(rng, path.read_bytes()))

    def read() -> None:
        for row in read_prompts(path):
            row.prompt.encode("utf-8")
            assert row.prompt_id and row.prompt.strip()

    return call_fault(read)


def labels(rng: random.Random, folder: Path) -> str:
    """A label of a reward is a plain name that replaces no column."""
    given = f"{rng.choice([text(rng, 1), 'image', 'human', 'a'])}={rng.choice(['sharpness', text(rng, 1)])}"
    given += rng.choice(["", ":a=1", ":" + text(rng, 1)])
    try:
        label = parse_reward(given).label
    except DiffalignError as error:
        return "more than one line" if "\n" in str(error) else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return (
        ""
        if is_plain_name(label) and label not in ("image", "prompt", "sha256", "reason", "human")
        else f"label {label!r}"
    )


def secrets(rng: random.Random, folder: Path) -> str:
    """A token that is given to any key of secrets, beside any mistake, is in no message and in no dump."""
    name = rng.choice(["sd3_rankdpo", "synth_shapes", "rounds_shapes_gdro"])
    kind, keys = keys_of(name)
    model = {"synth": "generators.0.model", "rounds": "x"}.get(kind, "model")
    value = rng.choice(
        [SECRET, f"[{SECRET}]", f"{{a: {SECRET}}}", f"!x {SECRET}", f"*{SECRET}", f'"{SECRET}', f"'{SECRET}'"]
    )
    given = [f"overrides=[model.token={SECRET}]"] if kind == "rounds" else [f"{model}.token={value}"]
    given += [f"{rng.choice(keys)}={rng.choice(FRAGMENTS)}" for _ in range(rng.randrange(3))]
    rng.shuffle(given)
    try:
        shown = resolved_yaml(load(kind, name, given))
    except DiffalignError as error:
        shown = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return f"{given}: the token is in {shown[:300]!r}" if SECRET in shown else ""


def lines(rng: random.Random, folder: Path) -> str:
    """Text of any kind is printed without a control character, and without a token."""
    given = f"{text(rng, 5)} token={SECRET} {text(rng, 5)}"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        say(given)
    shown = out.getvalue()
    return (
        printed_fault(shown)
        or ("more than one line" if shown.count("\n") != 1 else "")
        or ("the token is printed" if f"token={SECRET}" in shown else "")
    )


def names(rng: random.Random, folder: Path) -> str:
    """A name from data leads nowhere outside, and a member's name is one plain part."""
    given = text(rng)
    key = member_name(given)
    if not key or set(key) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-%"):
        return f"member {key!r}"
    if is_plain_name(given) and (folder / given).resolve().parent != folder.resolve():
        return f"plain name {given!r}"
    try:
        found = inside(folder, given)
    except DiffalignError:
        return ""
    return "" if found.resolve().is_relative_to(folder.resolve()) else f"{given!r} leads to {found}"


CLASSES = {
    "pictures, their bytes changed": pictures_,
    "JSON": json_,
    "YAML configs": yaml_,
    "overrides": overrides,
    "tables with a hostile row": tables,
    "damaged tables": damaged_tables,
    "prompt files": prompt_files,
    "labels of rewards": labels,
    "tokens beside mistakes": secrets,
    "lines on the terminal": lines,
    "names from data": names,
}
