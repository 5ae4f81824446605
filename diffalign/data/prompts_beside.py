"""Find an image's prompt in files beside it (.txt, .caption, .json), or in the image file itself.

Generators write what made an image into it: A1111 and its forks, ComfyUI, Fooocus and InvokeAI.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data.tables import column_for, decoded_text
from diffalign.errors import DiffalignError
from diffalign.files.images import TEXT_CHUNKS
from diffalign.files.parse import parse_json
from diffalign.files.paths import own_file

TEXTS = (".txt", ".caption")
USER_COMMENT = 0x9286  # EXIF
EXIF_PART = 0x8769
LARGEST = 16_000_000
"""Bytes of a text chunk; larger ones are not read."""
PATH_OF_POSITIVE = ("positive", "guider", "conditioning", "conditioning_1", "cond1")
TEXT_INPUTS = (
    "text",
    "text_g",
    "t5xxl",
    "clip_l",
    "text_l",
    "prompt",
    "positive_prompt",
    "string",
    "value",
    "wildcard_text",
)


def prompt_beside(path: Path, root: Path | None = None) -> tuple[str | None, str]:
    """Return the prompt in `a.txt`, `a.caption` or `a.json` beside `a.png`, and a fault if such a file is unreadable.

    root: the folder that links may not leave, by default the image's own.
    """
    fault = ""
    for suffix in (*TEXTS, ".json"):
        file = path.with_suffix(suffix)
        try:
            if not file.is_file():
                continue
            prompt = prompt_in_text(own_file(root or file.parent, file).read_bytes(), suffix)
        except UnicodeDecodeError as error:
            fault = fault or f"{file.name}: not UTF-8 at byte {error.start}; save it as UTF-8"
        except (OSError, ValueError, DiffalignError) as error:
            fault = fault or f"{file.name}: {error}"
        else:
            if prompt:
                return prompt, ""
    return None, fault


def prompt_in_text(data: bytes, suffix: str) -> str | None:
    """Return the prompt in the bytes of a .txt, .caption or .json file. Raises ValueError."""
    text = decoded_text(data)
    return text.strip() or None if suffix in TEXTS else _of_json(text)


def prompt_within(path: Path) -> str | None:
    """Return the prompt that a generator wrote into an image file; None if there is none."""
    try:
        if not path.is_file():  # a named pipe would block for ever
            return None
        with path.open("rb") as stream:
            start = stream.read(12)
        if start.startswith(b"\x89PNG"):
            return prompt_of_texts(dict(png_texts(path)))
        if start.startswith(b"\xff\xd8") or start[8:] == b"WEBP":
            return prompt_of_texts({"parameters": _user_comment(path)})
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, RecursionError, zlib.error, AttributeError):
        pass
    return None


def png_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (keyword, text) of a PNG's text chunks. Pixels are skipped, not read."""
    with path.open("rb") as stream:
        stream.seek(8)
        while len(head := stream.read(8)) == 8 and head[4:] != b"IEND":
            length = int.from_bytes(head[:4])
            if head[4:] in TEXT_CHUNKS and length <= LARGEST:
                yield _text_chunk(head[4:], stream.read(length))
                stream.seek(4, 1)
            else:
                stream.seek(length + 4, 1)


def _text_chunk(kind: bytes, data: bytes) -> tuple[str, str]:
    """Return (keyword, text) of a tEXt, zTXt or iTXt chunk (PNG specification, third edition, 11.3.3)."""
    keyword, _, text = data.partition(b"\0")
    packed = kind == b"zTXt"
    if packed:
        text = text[1:]
    elif kind == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]  # after language and translated keyword
    if packed:
        text = zlib.decompressobj().decompress(text, LARGEST)
    try:
        return keyword.decode("latin-1"), text.decode("utf-8")  # many writers put UTF-8 where Latin-1 belongs
    except UnicodeDecodeError:
        return keyword.decode("latin-1"), text.decode("latin-1")


def _user_comment(path: Path) -> str:
    """Return EXIF's UserComment, where A1111 keeps its parameters in a JPEG or WebP file."""
    with Image.open(path, formats=("JPEG", "WEBP")) as image:
        data = image.getexif().get_ifd(EXIF_PART).get(USER_COMMENT, b"")
    if isinstance(data, str):
        return data
    kind, text = bytes(data[:8]), bytes(data[8:])
    if kind.startswith(b"UNICODE"):
        # EXIF leaves the byte order open; A1111 writes big-endian.
        return text.decode("utf-16-le" if text[1::2].count(0) > text[::2].count(0) else "utf-16-be", "replace")
    return text.decode("utf-8", "replace").strip("\0")


def prompt_of_texts(texts: dict[str, str]) -> str | None:
    """Return the prompt in what a generator wrote: keyword -> text."""
    found = None
    if parameters := texts.get("parameters", "").strip():
        found = _of_json(parameters) if parameters[0] == "{" else _of_parameters(parameters)
    if not found and texts.get("prompt", "").lstrip()[:1] == "{":
        found = _of_graph(parse_json(texts["prompt"]))
    if not found and (packed := texts.get("invokeai_metadata")):
        found = _of_json(packed)
    return found or None


def _of_parameters(text: str) -> str:
    """Return the prompt of A1111's parameters: all before the negative prompt or the line of settings."""
    lines = re.split(r"\n(?=Negative prompt:|Steps: \d)", text)
    return "" if lines[0].startswith(("Negative prompt:", "Steps: ")) else lines[0].strip()


def _of_json(text: str) -> str | None:
    """Return the prompt of a JSON object: a side-car of a downloader, Fooocus' or InvokeAI's metadata."""
    row = parse_json(text)
    if not isinstance(row, dict):
        return None
    name = column_for("prompt", row) or next((n for n in ("positive_prompt", "full_prompt") if n in row), None)
    value = row.get(name) if name else None
    if isinstance(value, list):
        value = next((v for v in value if isinstance(v, str)), None)
    return value.strip() or None if isinstance(value, str) else None


def _of_graph(graph: dict[str, Any]) -> str | None:
    """Return the text that reaches the positive input of a sampler in ComfyUI's graph (node id -> node)."""
    samplers = [node for _, node in sorted(graph.items()) if "ampler" in str(node.get("class_type"))]
    for node in samplers:
        for name in PATH_OF_POSITIVE:
            found = _text_behind(graph, node.get("inputs", {}).get(name), set())
            if found:
                return found
    return None


def _text_behind(graph: dict[str, Any], value: object, seen: set[str]) -> str | None:
    """Return the text of an input: itself, or what the node has that it is linked to ([node id, output])."""
    if isinstance(value, str):
        return value.strip() or None
    if not isinstance(value, list) or len(value) != 2 or str(value[0]) in seen or str(value[0]) not in graph:
        return None
    seen.add(str(value[0]))
    inputs = graph[str(value[0])].get("inputs", {})
    names = [name for name in (*PATH_OF_POSITIVE, *TEXT_INPUTS) if name in inputs]
    linked = [name for name in inputs if name not in names and name != "negative" and isinstance(inputs[name], list)]
    return next((found for name in (*names, *linked) if (found := _text_behind(graph, inputs[name], seen))), None)
